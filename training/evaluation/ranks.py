# SPDX-License-Identifier: Apache-2.0
"""Retrieval ranks of N texts and M videos, in both directions and under every correction, without an N x M matrix.

A score s is the inner product of two vectors, or an entry of a given matrix. Candidates are ranked by

    none, query_bank, sinkhorn    s - bias                       the candidate's bias, 0 for none
    dual_softmax                  s * exp(slope * s - bias)      slope = scale / temp, bias = logsumexp over the queries

One pass over tiles of scores computes the biases. A second counts, for all corrections and both directions, the
candidates above and below each query's right answer; the others are equal. Small sets are float64 throughout. Of large
ones the tiles are float32, and queries with a candidate closer than rounding allows are compared again in float64, so
ranks do not depend on the tiles. (The biases of a large set are sums in float32, good to six digits or so.)
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .recalls import Ranks


logger = logging.getLogger(__name__)

CORRECTIONS = ("none", "dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
SINKHORN_ITERATIONS = 5  # as DBSN, arXiv 2508.02538
FLOAT64_LIMIT = 2**22  # scores up to which all is float64: 2,000 texts and videos, a second or so
CPU_BLOCK, GPU_BLOCK = 1000, 4096  # rows and columns of a tile: it fits a cache; it is worth a kernel's launch
MAX_THREADS = 16  # more outrun the memory


@dataclass
class RetrievalRanks:
    """What `rank_retrieval` returns.

    Attributes:
        ranks: correction -> direction -> ranks. `text_to_video`: one per text, in the order given. `video_to_text`
            (best caption) and, where a video has several, `video_to_text_caption_max`: one per video that has a
            caption, in the order of the videos.
        groups: direction -> the video of each rank.
        settings: temperatures, and the sizes of the banks.
    """

    ranks: dict[str, dict[str, Ranks]]
    groups: dict[str, np.ndarray]
    settings: dict[str, float | int]
    num_texts: int
    num_videos: int


@torch.inference_mode()
def rank_retrieval(
    text_vectors,
    video_vectors,
    video_of_text=None,
    *,
    scale: float = 1.0,
    corrections: Sequence[str] = ("none", "dual_softmax"),
    dual_softmax_temp: float = 1.0,
    text_bank=None,
    video_bank=None,
    tau: float = 0.05,
    video_tau: float | None = None,
    sinkhorn_temp: float = 0.01,
    block_size: int | None = None,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None,
) -> RetrievalRanks:
    """Ranks in both directions under every correction asked for, and always uncorrected.

    Args:
        text_vectors: (N,K) folded, used in float32; or, with `video_vectors` None, the (N,M) scores themselves
            (tensor, array or memory map).
        video_vectors: (M,K) folded, or None.
        video_of_text: (N,) index of each text's right video; None: text n belongs to video n. Several texts may share
            one. A video without a text is a distractor for text to video and no query for video to text.
        scale: exp(logit_scale); only dual softmax uses it, as S = scale * s.
        corrections: names from `CORRECTIONS`.
        dual_softmax_temp: in units of S. The other temperatures are in units of s.
        text_bank: (Q,K) vectors of training captions, or (Q,M) scores where scores are given: corrects text to video.
        video_bank: (P,K) vectors of training videos, or (P,N) scores of each with every text: corrects video to text.
            A missing bank leaves its direction out of the query banks' ranks, which need one at least.
        tau: of the bank of captions. video_tau: of the bank of videos; None: as `tau`. sinkhorn_temp: of sinkhorn.
        block_size: rows and columns of a tile (default: by device). Changes memory and speed, not results.
        shard, gather: (index, count) of this process, and a function that returns a tensor of every process
            (accelerate: `lambda tensor: accelerator.gather(tensor[None])`). Every process gets the whole result.

    Raises:
        ValueError: shapes that do not fit, an unknown correction, an index out of range, or a score that is not
            finite (the first is named).
    """
    blocks = Blocks(block_size, shard, gather, device)
    scores = Scores(text_vectors, video_vectors, device, ("text", "video"))
    num_texts, num_videos = scores.shape
    corrections = _checked_corrections(corrections, text_bank, video_bank)
    given_video_of_text = _checked_videos(video_of_text, num_texts, num_videos).to(scores.device)
    num_captions = given_video_of_text.bincount(minlength=num_videos)  # (M,)
    asked, grouped = num_captions > 0, bool((num_captions > 1).any())
    order = given_video_of_text.argsort(stable=True)
    video_of_text = given_video_of_text[order]  # ascending: captions of a video are neighbours
    scores.reorder(order)
    strips = blocks.strips(video_of_text)

    # the keyword arguments of a Ranking: (correction, by_text) -> bias, unit, slope
    biases, hubs, settings = {("none", True): {}, ("none", False): {}}, {}, {"scale": scale}
    if "dual_softmax" in corrections:
        slope = scale / dual_softmax_temp
        for by_text, bias in zip((True, False), log_sum_exp(scores, blocks, strips, slope)[::-1], strict=True):
            biases["dual_softmax", by_text] = {"bias": bias, "unit": 1.0, "slope": slope}
        settings |= {"dual_softmax_temp": dual_softmax_temp}
    if "sinkhorn" in corrections:
        for by_text, bias in zip((True, False), sinkhorn(scores, blocks, strips, sinkhorn_temp)[::-1], strict=True):
            biases["sinkhorn", by_text] = {"bias": bias, "unit": sinkhorn_temp}
        settings |= {"sinkhorn_temp": sinkhorn_temp, "sinkhorn_iterations": SINKHORN_ITERATIONS}
    for by_text, names, bank, candidates, tau_name, bank_tau in (
        (True, ("text", "video"), text_bank, video_vectors, "tau", tau),
        (False, ("video", "text"), video_bank, text_vectors, "video_tau", tau if video_tau is None else video_tau),
    ):
        if bank is None or not {"query_bank", "dynamic_query_bank"} & set(corrections):
            continue
        bank = Scores(bank, None if scores.exact else candidates, device, (f"bank {names[0]}", names[1]))
        if bank.shape[1] != scores.shape[1 if by_text else 0]:
            raise ValueError(
                f"The {names[0]} bank has scores of {bank.shape[1]} {names[1]}s, not of every {names[1]}."
            )
        bias, hub = bank_bias_and_hubs(bank, blocks, bank_tau)
        biases["query_bank", by_text] = {"bias": bias if by_text else bias[order], "unit": bank_tau}
        hubs[by_text] = hub if by_text else hub[order]
        settings |= {tau_name: bank_tau, f"{names[0]}_bank": bank.shape[0]}

    own = scores.pairs(torch.arange(num_texts, device=scores.device), video_of_text)  # (N,), each text with its video
    rankings = {key: Ranking(scores, own, video_of_text, key[1], **kwargs) for key, kwargs in biases.items()}
    counts = count_candidates(scores, rankings, blocks, strips, video_of_text, grouped)
    if "dynamic_query_bank" in corrections:
        for by_text, hub in hubs.items():
            use_bank = best_is_hub(scores, blocks, strips, hub, by_text)
            either = counts["query_bank", by_text], counts["none", by_text]
            counts["dynamic_query_bank", by_text] = torch.where(use_bank, *either)

    ranks = {correction: {} for correction in corrections}
    for correction, by_text in (key for key in counts if key[0] in ranks):
        # above and below, of candidates and of groups
        queries = order.argsort() if by_text else asked
        above, below = counts[correction, by_text][:, queries].view(2, 2, -1).long().unbind(1)
        equal = torch.tensor([[num_videos if by_text else num_texts], [int(asked.sum())]], device=above.device)
        equal = equal - above - below
        directions = ("text_to_video",) if by_text else ("video_to_text", "video_to_text_caption_max")[: 1 + grouped]
        for n, direction in enumerate(directions):
            ranks[correction][direction] = Ranks(above[n].cpu().numpy(), equal[n].cpu().numpy())
    video = {True: given_video_of_text.cpu().numpy(), False: asked.nonzero().flatten().cpu().numpy()}
    groups = {direction: video[direction == "text_to_video"] for direction in ranks["none"]}
    return RetrievalRanks(ranks, groups, settings, num_texts, num_videos)


class Ranking:
    """One correction in one direction: which candidates are above, and which below, each query's right answer.

    Dual softmax is taken relative to the right answer, so that nothing overflows: s * exp(slope * s - bias - shift)
    is compared with the right answer's own s, where shift is its slope * s - bias.

    Args:
        own: (N,) float64, each text's score with its video. by_text: texts are the queries (rows), videos candidates.
        bias: of the candidates, float64, or None. unit: the temperature that it is in. slope: of dual softmax.
    """

    def __init__(self, scores: "Scores", own, video_of_text, by_text: bool, bias=None, unit=0.0, slope=None):
        self.by_text, self.slope, self.exact = by_text, slope, scores.exact and bias is None
        own_bias = 0.0 if bias is None else bias[video_of_text] if by_text else bias
        right, shift = (own - own_bias, torch.zeros_like(own)) if slope is None else (own, slope * own - own_bias)
        if not by_text:  # of each video's best caption; without one it is no query, and all is below it
            log = right.abs().clamp_min(1e-37).log() + shift - shift.min() + 100  # positive
            best = best_of_groups(right if slope is None else right.sign() * log, video_of_text, scores.shape[1])
            right, shift = (values[best].masked_fill(best < 0, 1e30) for values in (right, shift))

        # Levels within `tie` are equal: the same candidate twice may differ by as much, in its product and its bias.
        # `error` is what float32 may add to that.
        reach, eps = (slope or 1.0) * scores.bound, torch.finfo(scores.dtype).eps
        tie = (0.0 if self.exact else 1e-14 * reach) + (0.0 if bias is None else 4 * eps * (unit + reach))
        largest = reach + (0.0 if bias is None else float(bias.abs().max()))
        error = (slope or 1.0) * scores.rounding + 4 * torch.finfo(torch.float32).eps * (largest + unit)
        self.limits = {}
        for dtype, slack, rounding in (
            (torch.float64, tie, 0.0 if scores.exact else 1e-14 * scores.bound),
            (torch.float32, tie if self.exact else tie + error, scores.rounding),
        ):
            if slope is not None:
                tiny = 1e-30 * scores.bound if dtype == torch.float32 else 0.0  # below it exp may have underflowed
                slack, rounding = math.expm1(min(slack, 80.0)) * right.abs() + tiny, max(rounding, tiny)
            tensors = (right + slack, right - slack, shift, bias)
            self.limits[dtype] = (*(None if x is None else x.to(dtype) for x in tensors), rounding)

    def compare(self, s, rows, columns, scratch=None):
        """1 where a candidate is above its query's right answer, and where it is below; like s, in `scratch`.

        Args:
            s: (R,C) scores of rows and columns (slices or indices), or (P,) scores of pairs. scratch: three like s.
        """
        above, below, level = (torch.empty_like(s) for _ in range(3)) if scratch is None else scratch

        def at(values: torch.Tensor, of_rows: bool) -> torch.Tensor:
            values = values[rows if of_rows else columns]
            return values[:, None] if of_rows and s.ndim == 2 else values

        high, low, shift, bias, rounding = self.limits[s.dtype]
        high, low, shift = (at(values, self.by_text) for values in (high, low, shift))
        if bias is not None:
            bias = at(bias, not self.by_text)
        if self.slope is None:
            level = s if bias is None else torch.sub(s, bias, out=level)
            return torch.gt(level, high, out=above), torch.lt(level, low, out=below)
        torch.add(-bias, s, alpha=self.slope, out=level)
        level.sub_(shift)
        if (
            s.dtype == torch.float64
        ):  # 0 * infinity is not a number; in float32 neither above nor below, so settled here
            level.clamp_max_(700)
        level.exp_()
        torch.sub(s, rounding, out=above).mul_(level)  # the least that it may be
        torch.add(above, level, alpha=2 * rounding, out=below)  # the most
        return above.gt_(high), below.lt_(low)

    def count(self, scores: "Scores", s, rows: slice, columns: slice, own, group, scratch) -> torch.Tensor:
        """(2,Q) how many candidates of a tile are above and below; of groups of candidates, too: (4,Q).

        Args:
            own: rows and columns of the pairs that do not count, right answers and other captions of the same video.
            group: (R,) which rows are captions of one video, or None.
        """
        axis = 1 if self.by_text else 0  # of the candidates
        flags = self.compare(s, rows, columns, scratch)
        if len(own[0]):
            flags[0][own], flags[1][own] = 0, 1
        sums = torch.stack([x.sum(axis) for x in flags])
        unsure = (sums[0] + sums[1] < s.shape[axis]).nonzero().flatten()  # queries
        if s.dtype == torch.float32 and not self.exact and len(unsure):
            of_unsure = [x.index_select(1 - axis, unsure) for x in flags]
            self._compare_in_float64(scores, rows, columns, unsure, *of_unsure, s.numel() // 64)
            sums[:, unsure] = torch.stack([x.sum(axis) for x in of_unsure])
            if group is not None:
                for x, exact in zip(flags, of_unsure, strict=True):
                    x.index_copy_(1 - axis, unsure, exact)
        if group is None or self.by_text:
            return sums
        # a group is above if one of its captions is, and below if all are
        some = [
            s.new_zeros(int(group[-1]) + 1, s.shape[1]).index_add_(0, group, x) > 0 for x in (flags[0], 1 - flags[1])
        ]
        return torch.cat([sums, some[0].sum(0, keepdim=True), (~some[1]).sum(0, keepdim=True)])

    def _compare_in_float64(self, scores: "Scores", rows: slice, columns: slice, unsure, above, below, few: int):
        """Settle what is neither above nor below; of a tile's queries `unsure`, the rows (U,C) or the columns (R,U)."""
        near = row, column = torch.eq(above, below).nonzero().T
        if self.by_text:
            row = unsure[row]
        else:
            column = unsure[column]
        if len(row) <= few:
            row, column = row + rows.start, column + columns.start
            exact = self.compare(scores.pairs(row, column), row, column)
        else:  # a collapsed model, everything is close to everything
            s = scores.tile(rows, columns, torch.float64)
            exact = [x[row, column] for x in self.compare(s, rows, columns)]
        above[tuple(near)], below[tuple(near)] = (x.float() for x in exact)


def count_candidates(scores, rankings: dict, blocks, strips, video_of_text, grouped: bool) -> dict:
    """Key of a ranking -> (4,Q): candidates above and below, and groups of captions above and below."""

    def empty(by_text: bool, num_rows: int) -> torch.Tensor:
        width = num_rows if by_text else scores.shape[1]
        return torch.zeros(4, width, dtype=torch.float64, device=scores.device)

    def of_strip(rows: slice) -> dict:
        video = video_of_text[rows]
        group = video.unique_consecutive(return_inverse=True)[1] if grouped else None
        counts = {key: empty(key[1], len(video)) for key in rankings}
        for columns, s, scratch in scores.tiles(rows, blocks):
            own_row = ((video >= columns.start) & (video < columns.stop)).nonzero().flatten()
            own = own_row, video[own_row] - columns.start
            for key, ranking in rankings.items():
                of_tile = ranking.count(scores, s, rows, columns, own, group, scratch)
                counts[key][: len(of_tile), slice(None) if ranking.by_text else columns] += of_tile
        return counts

    counts = {key: empty(key[1], scores.shape[0]) for key in rankings}
    for rows, of_rows in blocks.each(of_strip, strips):
        for key, ranking in rankings.items():
            counts[key][:, rows if ranking.by_text else slice(None)] += of_rows[key]
    return {key: blocks.merge(count, "sum") for key, count in counts.items()}


def best_of_groups(level: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(G,) the position of each group's highest level, -1 where a group is empty."""
    highest = level.new_full((num_groups,), -math.inf).scatter_reduce(0, group, level, "amax")
    position = torch.arange(len(level), device=level.device).masked_fill(level < highest[group], -1)
    return position.new_full((num_groups,), -1).scatter_reduce(0, group, position, "amax")


def log_sum_exp(scores, blocks, strips, slope: float, row_bias=None, column_bias=None):
    """log sum exp(slope * s - biases) over every row, (N,), and over every column, (M,), float64."""
    by_row, by_column = scores.full(0, -math.inf), scores.full(1, -math.inf)
    smallest = 1e8 * torch.finfo(scores.dtype).tiny  # a smaller sum has lost digits to underflow

    def of_strip(rows: slice):
        of_rows, of_columns = by_row[rows], scores.full(1, -math.inf)
        for columns, s, scratch in scores.tiles(rows, blocks):
            if row_bias is not None:
                s.sub_(row_bias[rows, None].to(s.dtype), alpha=1 / slope)
            if column_bias is not None:
                s.sub_(column_bias[columns].to(s.dtype), alpha=1 / slope)
            peak = slope * s.max()
            powers = torch.add(-peak, s, alpha=slope, out=scratch[0]).exp_()
            sums = [powers.sum(axis) for axis in (1, 0)]  # one exp serves both, where it does not underflow
            if min(float(x.min()) for x in sums) > smallest:
                sums = [x.double().log() + peak for x in sums]
            else:
                sums = [torch.logsumexp(slope * s, axis).double() for axis in (1, 0)]
            of_rows, of_columns[columns] = torch.logaddexp(of_rows, sums[0]), sums[1]
        return of_rows, of_columns

    for rows, (of_rows, of_columns) in blocks.each(of_strip, strips):
        by_row[rows], by_column = of_rows, torch.logaddexp(by_column, of_columns)
    return blocks.merge(by_row, "logsumexp"), blocks.merge(by_column, "logsumexp")


def sinkhorn(scores, blocks, strips, temp: float):
    """Biases of texts (N,) and videos (M,) that bring exp(s / temp) to uniform marginals (DBSN, arXiv 2508.02538)."""
    of_texts = scores.full(0, 0.0)
    for _ in range(SINKHORN_ITERATIONS):  # columns, then rows; the first half step alone is inverted softmax
        _, of_videos = log_sum_exp(scores, blocks, strips, 1 / temp, row_bias=of_texts)
        of_texts, _ = log_sum_exp(scores, blocks, strips, 1 / temp, column_bias=of_videos)
    return temp * of_texts, temp * of_videos


def bank_bias_and_hubs(bank, blocks, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each candidate: tau * logmeanexp of s / tau over the bank, and whether it is best for some query of it."""
    strips, hubs = blocks.strips(torch.arange(bank.shape[0])), bank.full(1, 0.0)
    _, by_candidate = log_sum_exp(bank, blocks, strips, 1 / tau)
    for rows in strips:
        tops = [(*s.max(1), columns.start) for columns, s, _ in bank.tiles(rows, blocks)]
        best_tile = torch.stack([value for value, _, _ in tops]).argmax(0, keepdim=True)  # (1,R)
        hubs[torch.stack([index + start for _, index, start in tops]).gather(0, best_tile)] = 1
    return tau * (by_candidate - math.log(bank.shape[0])), blocks.merge(hubs, "amax") > 0


def best_is_hub(scores, blocks, strips, hubs: torch.Tensor, by_text: bool) -> torch.Tensor:
    """Whether the best candidate of each text (by_text) or video, or one as good, is a hub, boolean."""
    axis = 1 if by_text else 0  # of the candidates
    best = scores.full(1 - axis, -math.inf).repeat(2, 1)  # of all candidates, and of the hubs
    for rows in strips:
        for columns, s, scratch in scores.tiles(rows, blocks):
            query, is_hub = (rows, hubs[columns]) if by_text else (columns, hubs[rows, None])
            of_hubs = scratch[0].copy_(s).masked_fill_(~is_hub, -math.inf)
            best[:, query] = best[:, query].maximum(torch.stack([s.amax(axis), of_hubs.amax(axis)]))
    of_all, of_hubs = blocks.merge(best, "amax")
    return of_hubs >= of_all


class Blocks:
    """How scores are cut into tiles, and shared out over processes and threads."""

    def __init__(self, size: int | None, shard: tuple[int, int], gather: Callable | None, device: str):
        on_cpu = torch.device(device).type == "cpu"
        self.size = size or (CPU_BLOCK if on_cpu else GPU_BLOCK)
        self.shard, self.gather = shard, gather
        self.threads = min(torch.get_num_threads(), MAX_THREADS) if on_cpu else 1

    def strips(self, video_of_row: torch.Tensor) -> list[slice]:
        """This process's strips of about `size` rows. Rows of one video, which are neighbours, stay together."""
        size = min(self.size, -(-len(video_of_row) // (self.shard[1] * self.threads)))
        cuts = torch.searchsorted(video_of_row, video_of_row[::size].contiguous()).unique().tolist()
        strips = [slice(*ends) for ends in zip(cuts, [*cuts[1:], len(video_of_row)], strict=True)]
        return strips[self.shard[0] :: self.shard[1]]

    def each(self, work: Callable, strips: Sequence[slice]) -> Iterator:
        """Yields (rows, work(rows)) in order; a strip is one thread's, as sharing out small operations costs more."""
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                yield from zip(strips, executor.map(torch.inference_mode()(work), strips), strict=True)
        finally:
            torch.set_num_threads(threads)

    def merge(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum, maximum (amax) or logsumexp over processes."""
        return tensor if self.gather is None else getattr(torch, how)(torch.stack(list(self.gather(tensor))), dim=0)


class Scores:
    """Scores of rows with columns: products of (N,K) and (M,K) vectors, or with `right` None the (N,M) matrix `left`.

    Attributes:
        exact: it is a matrix; even in float64 a product is rounded. bound: no |s| is larger. rounding: of a float32
            tile. dtype: of the tiles.
    """

    def __init__(self, left, right, device: str, names: tuple[str, str]):
        self.device, self.exact, self.order, self.dtype = torch.device(device), right is None, None, torch.float32
        if self.exact:
            self.matrix = left if isinstance(left, torch.Tensor | np.ndarray) else np.asarray(left)
            self.shape = tuple(self.matrix.shape)
        else:
            self.left, self.right = (torch.as_tensor(vectors).to(device).float() for vectors in (left, right))
            same = self.left.ndim == self.right.ndim == 2 and self.left.shape[1] == self.right.shape[1]
            self.shape = (len(self.left), len(self.right)) if same else ()
        if len(self.shape) != 2 or 0 in self.shape:
            shapes = " and ".join(str(tuple(np.shape(given))) for given in (left, right) if given is not None)
            wanted = "of vectors, (N,K) and (M,K) with the same K" if right is not None else "of scores, (N,M)"
            raise ValueError(f"{names[0]}s and {names[1]}s need arrays {wanted}, that are not empty; got {shapes}.")
        self.bound = self._checked_bound(names)
        self.rounding = 0.0
        if self.exact:
            wide = str(self.matrix.dtype).removeprefix("torch.") in ("float64", "int32", "int64")
        else:  # 32 roundings of |x||y|; 13 was the most in 240 million products, K from 64 to 2,048
            self.rounding = min(self.left.shape[1], 32) * torch.finfo(torch.float32).eps / 2 * self.bound
            part = slice(0, 512)
            error = self.tile(part, part, torch.float32) - self.tile(part, part, torch.float64)
            wide = bool(error.abs().max() > self.rounding)
            if wide and self.shape[0] * self.shape[1] > FLOAT64_LIMIT:
                logger.warning("Float32 products are computed in TF32 or bfloat16 here: scoring in float64 instead.")
        if wide or self.shape[0] * self.shape[1] <= FLOAT64_LIMIT:
            self.dtype = torch.float64

    def _checked_bound(self, names: tuple[str, str]) -> float:
        """No |s| is larger. Raises: ValueError, naming the first score that is not finite."""
        bound, bad, step = 0.0, None, max(1, 2**22 // self.shape[1])
        if not self.exact:
            norms = self.left.norm(dim=1), self.right.norm(dim=1)
            bound = float(norms[0].max() * norms[1].max())
            bad_rows, bad_columns = (~norm.isfinite() for norm in norms)
            if bad_rows.any() or bad_columns.any():
                row = 0 if bad_columns.any() else int(bad_rows.int().argmax())
                bad = row, 0 if bad_rows[row] else int(bad_columns.int().argmax())
        for start in range(0, self.shape[0] if self.exact else 0, step):
            rows = self.tile(slice(start, start + step), slice(None), torch.float64)
            if bad is None and not rows.isfinite().all():
                row, column = (~rows.isfinite()).nonzero()[0].tolist()
                bad = start + row, column
            bound = max(bound, float(rows.abs().max()))
        if bad is not None:
            raise ValueError(
                f"The score of ({names[0]} {bad[0]}, {names[1]} {bad[1]}) is not a finite number, and it is the first "
                "such. A rank among such scores means nothing: look for damaged frames or overflow in half precision."
            )
        return bound

    def reorder(self, order: torch.Tensor):
        """Bring the rows into another order."""
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            if self.exact:
                self.order = order  # the matrix may be a large file
            else:
                self.left = self.left[order]

    def full(self, axis: int, value: float) -> torch.Tensor:
        """A float64 for every row (0) or column (1)."""
        return torch.full((self.shape[axis],), value, dtype=torch.float64, device=self.device)

    def tiles(self, rows: slice, blocks: Blocks) -> Iterator:
        """Yields columns (a slice), their s (R,C), and three tensors like it to work in; the next tile reuses all."""
        height = rows.stop - rows.start
        width = min(max(blocks.size**2 // height, 1), self.shape[1])
        buffers = torch.empty(4, height * width, dtype=self.dtype, device=self.device)
        for start in range(0, self.shape[1], width):
            columns = slice(start, min(start + width, self.shape[1]))
            s, *scratch = buffers[:, : height * (columns.stop - start)].view(4, height, -1)
            yield columns, self.tile(rows, columns, self.dtype, out=s), scratch

    def tile(self, rows, columns, dtype: torch.dtype, out=None) -> torch.Tensor:
        """(R,C) scores of rows and columns, slices."""
        if not self.exact:
            return torch.mm(self.left[rows].to(dtype), self.right[columns].to(dtype).T, out=out)
        entries = self._entries(rows, columns).to(self.device, dtype)
        return entries if out is None else out.copy_(entries)

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(P,) float64 scores of single pairs."""
        if self.exact:
            return self._entries(rows, columns).to(self.device, torch.float64)
        chunks = zip(rows.split(2048), columns.split(2048), strict=True)
        return torch.cat([(self.left[row].double() * self.right[column].double()).sum(1) for row, column in chunks])

    def _entries(self, rows, columns) -> torch.Tensor:
        rows = rows if self.order is None else self.order[rows]
        if isinstance(self.matrix, torch.Tensor):
            return self.matrix[rows, columns]
        rows, columns = (
            index.cpu().numpy() if isinstance(index, torch.Tensor) else index for index in (rows, columns)
        )
        return torch.from_numpy(np.array(self.matrix[rows, columns]))  # a copy: the file may be mapped read-only


def _checked_videos(video_of_text, num_texts: int, num_videos: int) -> torch.Tensor:
    if video_of_text is None and num_texts != num_videos:
        raise ValueError(
            f"{num_texts} texts and {num_videos} videos do not pair up by position: pass the index of each text's video."
        )
    video_of_text = torch.arange(num_texts) if video_of_text is None else torch.as_tensor(video_of_text)
    if video_of_text.shape != (num_texts,) or video_of_text.is_floating_point():
        raise ValueError(
            f"One video index per text is needed, {num_texts} integers; got {video_of_text.dtype} of shape "
            f"{tuple(video_of_text.shape)}."
        )
    wrong = ((video_of_text < 0) | (video_of_text >= num_videos)).nonzero().flatten().tolist()
    if wrong:
        video = int(video_of_text[wrong[0]])
        raise ValueError(f"Text {wrong[0]} belongs to video {video}, but the videos are 0 to {num_videos - 1}.")
    return video_of_text.long()


def _checked_corrections(corrections: Sequence[str], text_bank, video_bank) -> list[str]:
    for name in corrections:
        if name not in CORRECTIONS:
            near = difflib.get_close_matches(name, CORRECTIONS, n=1) or list(CORRECTIONS)
            raise ValueError(f"Unknown correction {name!r}. Did you mean {' or '.join(near)}?")
        if "query_bank" in name and text_bank is None and video_bank is None:
            raise ValueError(f"{name} needs a bank of training captions (`text_bank`) or training videos.")
    return [name for name in CORRECTIONS if name == "none" or name in corrections]
