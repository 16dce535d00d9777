# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses of matching pairs: symmetric cross entropy, with or without CAMoE's dual softmax prior.

They take plain vectors, of any pair of encoders: nothing here needs a [`CAMoEModel`]. n pairs on each of W processes,
N = W*n pairs in the global batch, K entries a vector, E experts, D dims.

    loss_function = DualSoftmaxLoss(temp=100.0)
    loss = loss_function(text_vectors, video_vectors, logit_scale.exp())  # (n,K), (n,K), scalar

Requirements:
    Pairs: row i of the texts belongs to row i of the videos. All other rows of the batch are negatives, so a batch
    should be large (128 and more) and hold no second match of a pair; where it can, give `video_ids`.

Relations:
    - `sentence_transformers.losses.MultipleNegativesRankingLoss(directions=("query_to_doc", "doc_to_query"),
      partition_mode="per_direction")` and open_clip's `ClipLoss` are this loss with `temp=None`, but for `video_ids`.
    - `training/engine/gradient_cache.py` computes it for batches larger than memory, as GradCache does (arXiv
      2101.06983, sentence-transformers' `CachedMultipleNegativesRankingLoss`).
    - At test time the same prior re-ranks a whole matrix of scores: `dual_softmax` in hubs.py.

When to choose which:
    `temp=None` is CLIP's loss, the common yardstick (InfoNCE, arXiv 1807.03748; CLIP, arXiv 2103.00020). The dual
    softmax prior (CAMoE, arXiv 2109.04290) lowers a pair's logit where the video prefers other texts: for retrieval in
    both directions, with one match per item in the batch. The lower `temp`, the stronger it is; at 1000, which the
    authors' file has, it is hardly felt, and it makes no sense where many texts match one video.

Processes:
    Nothing is communicated unless `gather_across_devices=True` asks for it. Then every process of the group must call
    the loss, with equally many pairs (drop the last incomplete batch). Each scores its own n rows against the columns
    of all; the mean of these losses, as DDP averages gradients, is the loss of the one global batch, exact to the
    gradient.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .retrieval import similarity


# What the prior of the dual softmax loss is. "trained": CAMoE's, a softmax over the axis that the cross entropy does
# not normalise, with its gradient. "detached": the same numbers as constants. "own_axis": over the one it does.
DUAL_SOFTMAX_PRIORS = ("trained", "detached", "own_axis")


def _rank_and_world_size(gather: bool, group) -> tuple[int, int]:
    if gather and dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


class _GatherWithGrad(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums every rank's gradient for this rank's rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group) -> torch.Tensor:
        ctx.rows, ctx.group = tensor.shape[0], group
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[start : start + ctx.rows], None


def gather_with_grad(tensor: torch.Tensor, process_group=None) -> torch.Tensor:
    """Rows of all processes of a group in rank order, (n,...) -> (N,...), differentiable.

    Every process of the group must call it, with equally many rows. Without torch.distributed: the tensor itself.
    """
    _, world_size = _rank_and_world_size(True, process_group)
    return tensor if world_size == 1 else _GatherWithGrad.apply(tensor, process_group)


def contrastive_loss(
    text_vectors: torch.Tensor,
    video_vectors: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
    *,
    dual_softmax_prior: str = "trained",
    gather_across_devices: bool = False,
    process_group=None,
) -> torch.Tensor:
    """Symmetric cross entropy of matching pairs, optionally with the dual softmax prior.

    Dual softmax loss (CAMoE, arXiv 2109.04290, and the file that its authors released), of (N,N) logits S:

        CE(S * softmax(S / temp, dim=0) * N) over rows, and the same on S.T, halved.

    Args:
        text_vectors, video_vectors: (n,K), pair i in row i of both. Logits are their inner products times `scale`:
            normalise them for cosines.
        scale: exp(logit_scale), or one over a temperature.
        video_ids: (n,) integers; pairs of the same video are not each other's negatives. With (n,J), pairs that agree
            in any of the J numbers are not: for example the video and a hash of the caption.
        dual_softmax_temp: temperature of the prior, None for no prior. 1000, in the authors' file, is close to none.
        dual_softmax_prior: "trained" is CAMoE's. Ours, to see what in it works: "detached" keeps its numbers and stops
            its gradient, so that a falling score never raises its own logit; "own_axis" is softmax(S / temp, dim=1).
        gather_across_devices: the negatives are the pairs of all processes, which must all call this.
        process_group: of torch.distributed, the processes to gather from; None is all of them.

    Returns:
        Scalar, the mean over this process's rows, in float32 or better whatever the vectors are.

    Raises:
        ValueError: the numbers of texts, videos and `video_ids` differ, or there is no such prior.
    """
    if dual_softmax_prior not in DUAL_SOFTMAX_PRIORS:
        raise ValueError(f"`dual_softmax_prior` is {dual_softmax_prior!r}; choose from {DUAL_SOFTMAX_PRIORS}.")
    rows = text_vectors.shape[0]
    if video_vectors.shape[0] != rows:
        raise ValueError(f"The loss takes pairs, got {rows} texts and {video_vectors.shape[0]} videos.")
    if video_ids is not None and video_ids.shape[:1] != (rows,):
        raise ValueError(f"`video_ids` of shape {tuple(video_ids.shape)} are not one row for each of {rows} pairs.")
    # In bf16, logits near 100 are multiples of 0.5: no mixed precision here.
    with torch.autocast(text_vectors.device.type, enabled=False):
        dtype = torch.promote_types(text_vectors.dtype, torch.float32)
        vectors = text_vectors.to(dtype), video_vectors.to(dtype)
        scale = scale.to(dtype) if isinstance(scale, torch.Tensor) else scale
        prior = None if dual_softmax_temp is None else (dual_softmax_temp, dual_softmax_prior)
        return _loss_of_pairs(*vectors, scale, video_ids, prior, gather_across_devices, process_group)


def _loss_of_pairs(
    text_vectors, video_vectors, scale, video_ids, prior, gather_across_devices, process_group
) -> torch.Tensor:
    rows = text_vectors.shape[0]
    rank, world_size = _rank_and_world_size(gather_across_devices, process_group)
    own = slice(rank * rows, (rank + 1) * rows)
    all_texts, all_videos = text_vectors, video_vectors
    if world_size > 1:
        all_texts, all_videos = (gather_with_grad(v, process_group) for v in (text_vectors, video_vectors))  # (N,K)
    if world_size == 1 or prior is not None:  # the prior is over all rows of a column
        used = slice(None)
        text_logits = scale * similarity(all_texts, all_videos)  # (N,N)
        video_logits = text_logits.T
    else:
        used = own
        text_logits = scale * similarity(all_texts[own], all_videos)  # (n,N)
        video_logits = scale * similarity(all_videos[own], all_texts)

    excluded = None
    if video_ids is not None:
        video_ids = gather_with_grad(video_ids, process_group) if world_size > 1 else video_ids
        video_ids = video_ids.flatten(1) if video_ids.ndim > 1 else video_ids[:, None]  # (N,J)
        excluded = (video_ids[used, None] == video_ids).any(dim=-1)  # as the logits, the same for both directions
        excluded[:, used].fill_diagonal_(False)
        text_logits, video_logits = (_mask(logits, excluded) for logits in (text_logits, video_logits))
    if prior is not None:
        text_logits, video_logits = (
            _apply_prior(logits, own, excluded, *prior) for logits in (text_logits, video_logits)
        )
    targets = torch.arange(own.start, own.stop, device=text_logits.device)
    return (F.cross_entropy(text_logits, targets) + F.cross_entropy(video_logits, targets)) / 2


def _mask(logits: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(excluded, torch.finfo(logits.dtype).min)


def _apply_prior(
    logits: torch.Tensor, own: slice, excluded: torch.Tensor | None, temp: float, kind: str
) -> torch.Tensor:
    """Rows `own` of the masked (N,N) logits, times the dual softmax prior and N -> (n,N)."""
    prior = (logits / temp).softmax(dim=1 if kind == "own_axis" else 0)[own]
    prior = prior.detach() if kind == "detached" else prior
    weighted = logits[own] * prior * logits.shape[0]
    # The prior of an excluded pair is 0, and a logit of 0 would count as a negative: mask it again.
    return weighted if excluded is None else _mask(weighted, excluded[own])


def expert_contrastive_loss(
    text_embeds: torch.Tensor,
    video_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    video_ids: torch.Tensor | None = None,
    dual_softmax_temp: float | None = None,
    **options,
) -> torch.Tensor:
    """Mean over experts of each expert's own contrastive loss: (n,E,D), (n,E,D) -> scalar. Our addition.

    The other arguments are those of `contrastive_loss`.
    """
    losses = [
        contrastive_loss(text_embeds[:, e], video_embeds[:, e], scale, video_ids, dual_softmax_temp, **options)
        for e in range(text_embeds.shape[1])
    ]
    return torch.stack(losses).mean()


class DualSoftmaxLoss(nn.Module):
    """`contrastive_loss` as a module, for programs that hold their loss as one.

    Args:
        temp: temperature of the dual softmax prior; None is plain symmetric cross entropy, CLIP's loss.
        prior: "trained", "detached" or "own_axis": `dual_softmax_prior` of `contrastive_loss`.
        gather_across_devices, process_group: as for `contrastive_loss`.

    Example:

    ```python
    >>> loss_function = DualSoftmaxLoss(temp=100.0)
    >>> texts, videos = (torch.nn.functional.normalize(torch.randn(8, 512), dim=-1) for _ in range(2))
    >>> loss = loss_function(texts, videos, scale=20.0)
    ```
    """

    def __init__(
        self,
        temp: float | None = 100.0,
        gather_across_devices: bool = False,
        process_group=None,
        prior: str = "trained",
    ):
        super().__init__()
        if temp is not None and temp <= 0:
            raise ValueError(f"`temp` must be positive or None, got {temp}.")
        if prior not in DUAL_SOFTMAX_PRIORS:
            raise ValueError(f"`prior` is {prior!r}; choose from {DUAL_SOFTMAX_PRIORS}.")
        self.temp = temp
        self.prior = prior
        self.gather_across_devices = gather_across_devices
        self.process_group = process_group

    def forward(
        self,
        text_vectors: torch.Tensor,
        video_vectors: torch.Tensor,
        scale: torch.Tensor | float = 20.0,
        video_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(n,K) and (n,K) vectors of matching pairs -> scalar."""
        return contrastive_loss(
            text_vectors,
            video_vectors,
            scale,
            video_ids,
            self.temp,
            dual_softmax_prior=self.prior,
            gather_across_devices=self.gather_across_devices,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"temp={self.temp}, prior={self.prior}, gather_across_devices={self.gather_across_devices}"


__all__ = ["DualSoftmaxLoss", "contrastive_loss", "expert_contrastive_loss", "gather_with_grad"]
