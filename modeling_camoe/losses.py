# SPDX-License-Identifier: Apache-2.0
"""The training losses: symmetric cross entropy of matching pairs, with or without CAMoE's dual softmax prior.

n pairs on each of W processes, N = W*n pairs in the global batch, K entries a folded vector, E experts, D dims.

Processes: where torch.distributed is initialised, every process must call the loss, with equally many pairs. Each
scores its own n rows against the columns of all. The mean of these losses, as DDP averages gradients, is the loss of
the one global batch, exact to the gradient. In one process nothing is communicated.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .retrieval import similarity


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
    """Rows of all processes in rank order, (n,...) -> (N,...), differentiable. One process: the tensor itself.

    Every process must hold equally many rows (drop the last incomplete batch).
    """
    _, world_size = _rank_and_world_size()
    return tensor if world_size == 1 else _GatherWithGrad.apply(tensor)


def contrastive_loss(
    text_vectors: torch.Tensor,
    video_vectors: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
) -> torch.Tensor:
    """Symmetric cross entropy of matching pairs over the global batch, optionally with the dual softmax prior.

    Dual softmax loss (CAMoE, arXiv 2109.04290, and the file that its authors released), of (N,N) logits S:

        CE(S * softmax(S / temp, dim=0) * N) over rows, and the same on S.T, halved.

    Args:
        text_vectors, video_vectors: (n,K) of this process, pair i in row i of both.
        scale: exp(logit_scale).
        video_ids: (n,) integers; pairs of the same video are not each other's negatives. With (n,J), pairs that agree
            in any of the J numbers are not: for example the video and a hash of the caption.
        dual_softmax_temp: temperature of the prior, None for no prior. 1000, in the authors' file, is close to none.

    Returns:
        Scalar, the mean over this process's rows.

    Raises:
        ValueError: the numbers of texts and videos differ.
    """
    rows = text_vectors.shape[0]
    if video_vectors.shape[0] != rows:
        raise ValueError(f"The loss takes pairs, got {rows} texts and {video_vectors.shape[0]} videos.")
    rank, world_size = _rank_and_world_size()
    own = slice(rank * rows, (rank + 1) * rows)
    all_texts, all_videos = gather_with_grad(text_vectors), gather_with_grad(video_vectors)  # (N,K)
    if world_size == 1 or dual_softmax_temp is not None:  # the prior is over all rows of a column
        used = slice(None)
        text_logits = scale * similarity(all_texts, all_videos)  # (N,N)
        video_logits = text_logits.T
    else:
        used = own
        text_logits = scale * similarity(all_texts[own], all_videos)  # (n,N)
        video_logits = scale * similarity(all_videos[own], all_texts)

    excluded = None
    if video_ids is not None:
        video_ids = gather_with_grad(video_ids)
        video_ids = video_ids.flatten(1) if video_ids.ndim > 1 else video_ids[:, None]  # (N,J)
        excluded = (video_ids[used, None] == video_ids).any(dim=-1)  # as the logits, the same for both directions
        excluded[:, used].fill_diagonal_(False)
        text_logits, video_logits = (_mask(logits, excluded) for logits in (text_logits, video_logits))
    if dual_softmax_temp is not None:
        text_logits, video_logits = (
            _apply_prior(logits, own, excluded, dual_softmax_temp) for logits in (text_logits, video_logits)
        )
    targets = torch.arange(own.start, own.stop, device=text_logits.device)
    return (F.cross_entropy(text_logits, targets) + F.cross_entropy(video_logits, targets)) / 2


def _mask(logits: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(excluded, torch.finfo(logits.dtype).min)


def _apply_prior(logits: torch.Tensor, own: slice, excluded: torch.Tensor | None, temp: float) -> torch.Tensor:
    """Rows `own` of the masked (N,N) logits, times the dual softmax prior and N -> (n,N)."""
    prior = (logits / temp).softmax(dim=0)[own]
    weighted = logits[own] * prior * logits.shape[0]
    # The prior of an excluded pair is 0, and a logit of 0 would count as a negative: mask it again.
    return weighted if excluded is None else _mask(weighted, excluded[own])


def expert_contrastive_loss(
    text_embeds: torch.Tensor,
    video_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
) -> torch.Tensor:
    """Mean over experts of each expert's own contrastive loss: (n,E,D), (n,E,D) -> scalar. Our addition."""
    losses = [
        contrastive_loss(text_embeds[:, e], video_embeds[:, e], scale, video_ids, dual_softmax_temp)
        for e in range(text_embeds.shape[1])
    ]
    return torch.stack(losses).mean()


__all__ = ["contrastive_loss", "expert_contrastive_loss", "gather_with_grad"]
