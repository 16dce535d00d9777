# SPDX-License-Identifier: Apache-2.0
"""Where texts and videos meet: the score, its folding into one inner product, and the head that makes both sides.

N texts, B videos, E experts, D dims, K = E*D. The score of CAMoE (arXiv 2109.04290), with one gate, the video's:

    s[n,b] = sum_e g[b,e] <t[n,e], v[b,e]>     in [-1, 1]

Folding writes s as the inner product of two vectors of K entries, so any vector database serves the whole mixture
exactly. The losses are in losses.py, the corrections for hubs in hubs.py.
"""

import math

import torch
from torch import nn

from .experts import SingleGate, VideoExpert


def fold_video(video_embeds: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
    """(B,E,D) unit vectors and (B,E) gates -> (B,K) vectors, `concat_e(g[b,e] v[b,e])`."""
    return (gate_weights[..., None] * video_embeds).flatten(1)


def fold_text(text_embeds: torch.Tensor) -> torch.Tensor:
    """(N,E,D) unit vectors -> (N,K) vectors, `concat_e(t[n,e])`."""
    return text_embeds.flatten(1)


def fold_for_cosine(text_vectors: torch.Tensor, video_vectors: torch.Tensor, num_experts: int):
    """Folded vectors for a store that knows cosine only: their cosine is exactly s / sqrt(E).

    A folded text has length sqrt(E) and a folded video at most 1. One more dimension completes the video to a unit
    vector; every text is 0 there.

    Args:
        text_vectors: (N,K). video_vectors: (B,K). num_experts: E.

    Returns:
        (N,K+1) and (B,K+1), all of length 1.
    """
    missing = (1 - video_vectors.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
    texts = torch.cat([text_vectors / math.sqrt(num_experts), torch.zeros_like(text_vectors[:, :1])], dim=1)
    return texts, torch.cat([video_vectors, missing], dim=1)


def similarity(text_vectors: torch.Tensor, video_vectors: torch.Tensor) -> torch.Tensor:
    """Folded (N,K) and (B,K) -> the scores s, (N,B)."""
    return text_vectors @ video_vectors.T


def expert_scores(text_embeds: torch.Tensor, video_embeds: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
    """What each expert contributes to the score: (N,E,D), (B,E,D), (B,E) -> (N,B,E), whose sum over E is s."""
    cosines = torch.matmul(text_embeds.transpose(0, 1), video_embeds.permute(1, 2, 0))  # (E,N,B)
    return cosines.permute(1, 2, 0) * gate_weights


class CAMoERetrievalHead(nn.Module):
    """Everything that CAMoE puts on top of CLIP: the experts and the gate.

    Args:
        dim: D.
        experts: name -> frame aggregation, in the order of the E experts.
        gate_log_prior: (E,) logits at which the gate starts, or None for a gate that is always uniform.
        num_layers, num_heads, max_frames: of the temporal transformers.
        reduction: of the excitations.
    """

    def __init__(
        self,
        dim: int,
        experts: dict[str, str],
        gate_log_prior: list[float] | None,
        num_layers: int,
        num_heads: int,
        max_frames: int,
        reduction: int,
    ):
        super().__init__()
        self.experts = nn.ModuleDict(
            {
                name: VideoExpert(dim, aggregation, num_layers, num_heads, max_frames, reduction)
                for name, aggregation in experts.items()
            }
        )
        self.gate = None if gate_log_prior is None else SingleGate(dim, gate_log_prior)

    def forward(
        self, frame_embeds: torch.Tensor, frame_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit frame embeddings (B,T,D) and their mask (B,T) -> experts (B,E,D), gate (B,E), frame weights (B,E,T)."""
        frame_embeds = frame_embeds.to(self.experts[next(iter(self.experts))].projection.weight.dtype)
        views = [expert(frame_embeds, frame_mask) for expert in self.experts.values()]
        video_embeds = torch.stack([embeds for embeds, _ in views], dim=1)
        frame_weights = torch.stack([weights for _, weights in views], dim=1)
        if self.gate is None:
            gate_weights = torch.full_like(video_embeds[..., 0], 1 / len(self.experts))
        else:
            gate_weights = self.gate(frame_embeds, frame_mask)
        return video_embeds, gate_weights, frame_weights


__all__ = [
    "CAMoERetrievalHead",
    "expert_scores",
    "fold_for_cosine",
    "fold_text",
    "fold_video",
    "similarity",
]
