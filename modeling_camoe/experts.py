# SPDX-License-Identifier: Apache-2.0
"""Experts over frame embeddings, and the single gate that weights them.

B videos, T frames, E experts, D dims. An expert turns the frame embeddings f (B,T,D) of one video into one vector:

    v = normalize(P mean_t(f + residual(f)))                               (B,D)

The mean is over real frames, and the excitation weights it in place of a residual. Both end in a layer of zeros and
`P` starts as the identity, so an expert that was never trained gives the mean-pooled frame embedding, to the bit.
Which residual each expert has, and their forms, are our choice: we had not
read the paper's text (arXiv 2109.04290) when we chose. Layers take explicit sizes, so that each can be built and
tested alone; `CAMoEPreTrainedModel._init_weights` sets their values.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Layers whose initial values are part of the design; `_init_weights` recognises them by class.


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the residual branch that it ends starts as no change."""


class IdentityLinear(nn.Linear):
    """A square linear layer without bias that starts as the identity."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, bias=False)


class PriorLinear(nn.Linear):
    """A linear layer that starts as a constant: weight zero, bias `start` (out,)."""

    def __init__(self, dim: int, start: list[float]):
        super().__init__(dim, len(start))
        self.start = start


class PositionEmbedding(nn.Embedding):
    """Learned positions whose initial standard deviation `std` matches the scale of what they are added to."""

    def __init__(self, num_positions: int, dim: int, std: float):
        super().__init__(num_positions, dim)
        self.std = std


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over frames that counts real frames only.

    Args:
        x: (B,T,D).
        mask: (B,T), 1 for a real frame, 0 for padding, at least one real frame a row; or weights from 0 on.

    Returns:
        (B,D), in the dtype of `x`.
    """
    mask = mask.to(x.dtype)
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def frame_changes(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each frame minus the one before it; zero for the first, and for padding and the frame after it.

    Args:
        x: (B,T,D).
        mask: (B,T), 1 for a real frame, 0 for padding.

    Returns:
        (B,T,D), in the dtype of `x`.
    """
    mask = mask.to(x.dtype)[..., None]
    before, mask_before = (F.pad(values, (0, 0, 1, 0))[:, :-1] for values in (x, mask))  # nothing before the first
    return (x - before) * mask * mask_before


class FrameExcitation(nn.Module):
    """Squeeze-and-excitation over frames (after Hu et al., arXiv 1709.01507): one weight per frame, order-free.

    A frame sees itself and the mean of its clip. Its weight is 1 + tanh(.), up to a factor: only ratios count, so the
    largest weight of a clip is 1. At the start all of them are.
    """

    def __init__(self, dim: int, reduction: int):
        super().__init__()
        hidden = max(1, dim // reduction)
        self.squeeze = nn.Linear(2 * dim, hidden)
        self.output = ZeroLinear(hidden, 1)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B,T,D), (B,T) -> frame weights (B,T)."""
        context = masked_mean(frames, mask)[:, None].expand_as(frames)  # (B,T,D)
        excitation = self.output(F.relu(self.squeeze(torch.cat([frames, context], dim=-1))))  # (B,T,1)
        # In logarithms: training may drive all of 1 + tanh towards 0, where half precision has no digits left.
        log_weights = F.logsigmoid(2 * excitation[..., 0].to(frames.dtype))
        log_weights = log_weights.masked_fill(~mask.bool(), torch.finfo(frames.dtype).min)
        return (log_weights - log_weights.amax(dim=1, keepdim=True).detach()).exp()


class TemporalTransformerLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer over frames.

    `attn_implementation` applies to CLIP's towers, not here: at a dozen frames all implementations cost the same.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_input = nn.Linear(dim, 4 * dim)
        self.mlp_output = nn.Linear(4 * dim, dim)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B,T,D), boolean (B,1,1,T) where True may be attended to -> (B,T,D)."""
        batch, frames, dim = hidden_states.shape
        qkv = self.qkv(self.attention_norm(hidden_states))  # (B,T,3D)
        qkv = qkv.view(batch, frames, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3,B,heads,T,D/heads)
        query, key, value = qkv
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = attended.transpose(1, 2).reshape(batch, frames, dim)
        hidden_states = hidden_states + self.attention_output(attended)
        return hidden_states + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(hidden_states))))


class TemporalTransformer(nn.Module):
    """A small transformer over frames with learned positions: it sees their order, so it can tell left from right.

    With `changes_only` it sees each frame minus the one before. Most of an embedding is static and would drown out
    motion; the expert's mean over frames carries the static part anyway. A difference also has a direction of its own,
    so left and right differ in content alone, not only in content combined with position.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, max_frames: int, changes_only: bool = False):
        super().__init__()
        self.max_frames = max_frames
        self.changes_only = changes_only
        self.input_norm = nn.LayerNorm(dim)
        # Normalised frames have entries of about 1: positions at the usual 0.02 would be invisible next to them.
        self.position_embedding = PositionEmbedding(max_frames, dim, std=0.5)
        self.layers = nn.ModuleList([TemporalTransformerLayer(dim, num_heads) for _ in range(num_layers)])
        self.output_norm = nn.LayerNorm(dim)
        self.output = ZeroLinear(dim, dim)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B,T,D), (B,T) -> residual (B,T,D)."""
        if frames.shape[1] > self.max_frames:
            raise ValueError(
                f"The clip has {frames.shape[1]} frames, this model takes at most {self.max_frames}: "
                "sample fewer (`num_frames` of the processor) or train with a larger `max_frames`."
            )
        # Called as a module, not sliced: weights that are offloaded to disk are loaded when their module is called.
        positions = self.position_embedding(torch.arange(frames.shape[1], device=frames.device))  # (T,D)
        if self.changes_only:
            frames = frame_changes(frames, mask)
        hidden_states = self.input_norm(frames) + positions  # (B,T,D)
        attention_mask = mask.bool()[:, None, None, :]  # (B,1,1,T)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.output(self.output_norm(hidden_states))


class VideoExpert(nn.Module):
    """One view of a video: an aggregation of its frame embeddings, then a projection.

    Args:
        dim: D.
        aggregation: "mean", "excitation", "transformer" or "motion".
        num_layers, num_heads, max_frames: for the last two.
        reduction: for the excitation.
    """

    def __init__(self, dim: int, aggregation: str, num_layers: int, num_heads: int, max_frames: int, reduction: int):
        super().__init__()
        if aggregation == "mean":
            self.residual = None
        elif aggregation == "excitation":
            self.residual = FrameExcitation(dim, reduction)
        elif aggregation in ("transformer", "motion"):
            changes_only = aggregation == "motion"
            self.residual = TemporalTransformer(dim, num_layers, num_heads, max_frames, changes_only)
        else:
            raise ValueError(f"Unknown frame aggregation {aggregation!r}: mean, excitation, transformer or motion.")
        self.projection = IdentityLinear(dim)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,T,D), (B,T) -> unit vectors (B,D), and each real frame's share (B,T), summing to 1."""
        weights = mask.to(frames.dtype)
        if isinstance(self.residual, FrameExcitation):
            weights = weights * self.residual(frames, mask)
        elif self.residual is not None:
            frames = frames + self.residual(frames, mask)
        pooled = self.projection(masked_mean(frames, weights))
        shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return F.normalize(pooled, dim=-1), shares


class SingleGate(nn.Module):
    """One softmax over all experts, from the video alone, so that an index needs no query to weight them.

    The weight starts at zero and the bias at the log of a chosen prior: a fresh gate is exactly the prior.

    Args:
        dim: D.
        log_prior: (E,) logits at which it starts.
    """

    def __init__(self, dim: int, log_prior: list[float]):
        super().__init__()
        self.projection = PriorLinear(dim, log_prior)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B,T,D), (B,T) -> (B,E), rows sum to 1."""
        return self.projection(masked_mean(frames, mask)).softmax(dim=-1)


__all__ = ["FrameExcitation", "SingleGate", "TemporalTransformer", "VideoExpert", "frame_changes", "masked_mean"]
