# SPDX-License-Identifier: Apache-2.0
"""Where texts and videos meet: the score, its folding into one inner product, the losses and the corrections of hubs.

N texts, B videos, E experts, D dims, K = E*D. S is `logits_per_text` = exp(logit_scale) * s, rows texts, columns
videos, where

    s[n,b] = sum_e g[b,e] <t[n,e], v[b,e]>     in [-1, 1]     (CAMoE, arXiv 2109.04290: one gate, the video's)

Notable features:
- folding: s is the inner product of two vectors of K entries, so that any vector database serves the whole mixture
  exactly;
- the dual softmax loss as the paper's authors published it, over the global batch of all processes, exact to the
  gradient;
- the query bank: what test-time dual softmax gains, for one live query at a time, as one number added to each video.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .experts import SingleGate, VideoExpert


# ---------------------------------------------------------------------------------------------------------------------
# The score and its fold


def fold_video(video_embeds: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
    """(B,E,D) unit vectors and (B,E) gates -> (B,K) vectors, `concat_e(g[b,e] v[b,e])`."""
    return (gate_weights[..., None] * video_embeds).flatten(1)


def fold_text(text_embeds: torch.Tensor) -> torch.Tensor:
    """(N,E,D) unit vectors -> (N,K) vectors, `concat_e(t[n,e])`."""
    return text_embeds.flatten(1)


def fold_for_cosine(text_vectors: torch.Tensor, video_vectors: torch.Tensor, num_experts: int):
    """Folded vectors for a store that knows cosine only: their cosine is exactly s / sqrt(E).

    A folded text has length sqrt(E) and a folded video at most 1, so the video is completed to a unit vector in one
    more dimension, in which every text is 0.

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


# ---------------------------------------------------------------------------------------------------------------------
# Corrections of hubs: videos (or texts) that are near to everything and so come first for too many queries


def dual_softmax(logits: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    """Dual softmax at test time: `S * softmax(S / temp, dim=0)`. Transductive: it sees all queries at once.

    Each direction has its own prior over its own queries: pass S to rank videos for texts and S.T to rank texts for
    videos.

    Args:
        logits: (queries, candidates), scaled by exp(logit_scale).
        temp: the authors of CAMoE say 1 at test time.
    """
    return logits * (logits / temp).softmax(dim=0)


def query_bank_bias(bank_scores: torch.Tensor, tau: float) -> torch.Tensor:
    """How much of a hub each candidate is: `b_v = tau * logmeanexp_q(s(q,v) / tau)`. Rank by `s - b_v`.

    The inverted softmax of QB-Norm (arXiv 2112.12777) written as an additive bias, so that it folds into an index. The
    bank is training captions (for video to text: training videos), never the queries of a test set.

    Args:
        bank_scores: (Q, candidates) scores s of the bank's queries.
        tau: temperature in units of s. Large: the candidate's mean score. Small: its best.

    Returns:
        (candidates,), to be subtracted from every query's scores.
    """
    return tau * (torch.logsumexp(bank_scores / tau, dim=0) - math.log(bank_scores.shape[0]))


def hubs_of_bank(bank_scores: torch.Tensor) -> torch.Tensor:
    """The candidates that come first for some query of the bank: (Q, candidates) -> boolean (candidates,)."""
    is_hub = torch.zeros(bank_scores.shape[1], dtype=torch.bool, device=bank_scores.device)
    is_hub[bank_scores.argmax(dim=1)] = True
    return is_hub


def dynamic_query_bank(scores: torch.Tensor, bias: torch.Tensor, is_hub: torch.Tensor) -> torch.Tensor:
    """The correction only for queries whose uncorrected best candidate is a hub (QB-Norm's dynamic form).

    Args:
        scores: (queries, candidates) s. bias: (candidates,), from `query_bank_bias`. is_hub: (candidates,), from
            `hubs_of_bank`.
    """
    corrected = is_hub[scores.argmax(dim=1)]  # (queries,)
    return torch.where(corrected[:, None], scores - bias, scores)


def fold_bias(text_vectors: torch.Tensor, video_vectors: torch.Tensor, bias: torch.Tensor, strength: float = 1.0):
    """Fold the bank's correction into the vectors: their inner product is `s - strength * b_v`.

    Args:
        text_vectors: (N,K). video_vectors: (B,K). bias: (B,). strength: 1 corrects, 0 does not: the index need not
            change.

    Returns:
        (N,K+1) and (B,K+1).
    """
    switch = torch.full_like(text_vectors[:, :1], strength)
    return torch.cat([text_vectors, switch], dim=1), torch.cat([video_vectors, -bias[:, None]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


class _GatherWithGrad(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums every rank's gradient for this rank's rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = tensor.shape[0]
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in the order of their ranks, differentiable. One process: the tensor itself.

    Every process must hold equally many rows (drop the last incomplete batch).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _GatherWithGrad.apply(tensor)


def contrastive_loss(
    text_vectors: torch.Tensor,
    video_vectors: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
) -> torch.Tensor:
    """Symmetric cross entropy of matching pairs, optionally with the dual softmax prior, over the global batch.

    Dual softmax loss (CAMoE, and the file that its authors released):

        CE(S * softmax(S / temp, dim=0) * N) over rows, and the same on S.T, halved.

    On W processes each takes its own rows against the columns of all; averaged over the processes, as DDP averages
    gradients, this is the loss of the one global batch, to the gradient.

    Args:
        text_vectors, video_vectors: (N,K), pair n in row n of both.
        scale: exp(logit_scale).
        video_ids: (N,) integers; pairs of the same video are not each other's negatives.
        dual_softmax_temp: temperature of the prior, None for none. 1000, in the authors' file, is almost none.

    Returns:
        Scalar, the mean over this process's rows.
    """
    rows = text_vectors.shape[0]
    if video_vectors.shape[0] != rows:
        raise ValueError(f"The loss takes pairs, got {rows} texts and {video_vectors.shape[0]} videos.")
    # (N,N), of all processes
    logits = scale * similarity(gather_with_grad(text_vectors), gather_with_grad(video_vectors))
    if video_ids is not None:
        video_ids = gather_with_grad(video_ids)
        same_video = video_ids[:, None] == video_ids[None, :]
        same_video.fill_diagonal_(False)
        logits = logits.masked_fill(same_video, torch.finfo(logits.dtype).min)

    first = dist.get_rank() * rows if logits.shape[0] > rows else 0
    own = slice(first, first + rows)
    return (_matching_loss(logits, own, dual_softmax_temp) + _matching_loss(logits.T, own, dual_softmax_temp)) / 2


def _matching_loss(logits: torch.Tensor, own: slice, temp: float | None) -> torch.Tensor:
    """Cross entropy of the diagonal over the rows `own` of (N,N) logits, times the dual softmax prior."""
    own_logits = logits[own]
    if temp is not None:
        masked = own_logits == torch.finfo(logits.dtype).min  # the prior is 0 there, and 0 would be a fair logit
        prior = (logits / temp).softmax(dim=0)[own]
        own_logits = (own_logits * prior * logits.shape[0]).masked_fill(masked, torch.finfo(logits.dtype).min)
    target = torch.arange(own.start, own.stop, device=logits.device)
    return F.cross_entropy(own_logits, target)


def expert_contrastive_loss(
    text_embeds: torch.Tensor,
    video_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
) -> torch.Tensor:
    """Mean over experts of each expert's own contrastive loss: (N,E,D), (N,E,D) -> scalar. Our addition."""
    losses = [
        contrastive_loss(text_embeds[:, e], video_embeds[:, e], scale, video_ids, dual_softmax_temp)
        for e in range(text_embeds.shape[1])
    ]
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The head


class CAMoERetrievalHead(nn.Module):
    """Everything that CAMoE puts on top of CLIP: the experts and the gate.

    Args:
        dim: D.
        experts: name -> frame aggregation, in order.
        gate_log_prior: (E,) logits at which the gate starts, or None for a gate that is uniform for good.
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
    "contrastive_loss",
    "dual_softmax",
    "dynamic_query_bank",
    "expert_contrastive_loss",
    "expert_scores",
    "fold_bias",
    "fold_for_cosine",
    "fold_text",
    "fold_video",
    "gather_with_grad",
    "hubs_of_bank",
    "query_bank_bias",
    "similarity",
]
