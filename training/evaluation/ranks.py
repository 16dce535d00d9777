# SPDX-License-Identifier: Apache-2.0
"""Retrieval ranks of N texts and M videos, in both directions and under every correction, without an N x M matrix.

A score s is the inner product of two vectors, or an entry of a given matrix. Candidates are ranked by

    none, query_bank, sinkhorn    s - bias                       the candidate's bias, 0 for none
    dual_softmax                  s * exp(slope * s - bias)      slope = scale / temp; bias: logsumexp over queries

One pass over tiles of scores computes the biases. Another counts, for all corrections and both directions, how many
candidates are above each query's right answer, and how many at least equal. Small sets are float64 throughout. Large
ones have float32 tiles, and candidates closer than its rounding are compared again in float64: ranks do not depend on
the tiles. (Biases of a large set are sums in float32, good to six digits or so.)
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .protocol import Ranks, RetrievalRanks, checked_corrections, checked_tensors, checked_videos, not_finite


logger = logging.getLogger(__name__)

SINKHORN_ITERATIONS = 5  # as DBSN, arXiv 2508.02538
FLOAT64_LIMIT = 2**22  # scores up to which all is float64: 2,000 texts and videos, a second or so
CPU_BLOCK, GPU_BLOCK = 1000, 4096  # rows and columns of a tile: it fits a cache; it is worth a kernel's launch
MAX_THREADS = 16  # more outrun the memory


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
        text_vectors: (N,K) folded, used in float32; or, with `video_vectors` None, (N,M) scores (tensor, array, memory
            map). video_vectors: (M,K) folded, or None.
        video_of_text: (N,) index of each text's right video; None: text n belongs to video n. Several texts may share
            one. A video without a text is a distractor for text to video and no query for video to text.
        scale: exp(logit_scale); only dual softmax uses it, as S = scale * s.
        corrections: names from `CORRECTIONS`. dual_softmax_temp: in units of S; the other temperatures: of s.
        text_bank: (Q,K) vectors of training captions or, where scores are given, (Q,M) scores: corrects text to video.
        video_bank: (P,K) of training videos, or (P,N): video to text. Query banks leave out a direction without one.
        tau: of the bank of captions. video_tau: of the bank of videos; None: as `tau`. sinkhorn_temp: of sinkhorn.
        block_size: rows and columns of a tile (default: by device). Changes memory and speed, not results.
        shard, gather: (index, count) of this process, and a function that returns a tensor of every process
            (accelerate: `lambda tensor: accelerator.gather(tensor[None])`). Every process gets the whole result.

    Raises: ValueError for shapes that do not fit, an unknown correction, a wrong index, a score that is not finite.
    """
    blocks = Blocks(block_size, shard, gather, device)
    scores = Scores(text_vectors, video_vectors, device, ("text", "video"))
    num_texts, num_videos = scores.shape
    corrections = checked_corrections(corrections, text_bank, video_bank)
    given_video_of_text = checked_videos(video_of_text, num_texts, num_videos).to(scores.device)
    asked = given_video_of_text.bincount(minlength=num_videos) > 0  # (M,)
    grouped = int(asked.sum()) < num_texts
    order = given_video_of_text.argsort(stable=True)
    video_of_text = given_video_of_text[order]  # ascending: captions of a video are neighbours
    scores.reorder(order)
    strips = blocks.strips(video_of_text)

    own = scores.pairs(torch.arange(num_texts, device=scores.device), video_of_text)  # (N,), each text with its video
    biases, hubs, settings = {"none": (None, None)}, {}, {"scale": scale}  # biases: of texts, of videos, and more
    if "dual_softmax" in corrections:
        slope = scale / dual_softmax_temp
        biases["dual_softmax"] = *log_sum_exp(scores, blocks, strips, slope), 1.0, slope
        settings |= {"dual_softmax_temp": dual_softmax_temp}
    if "sinkhorn" in corrections:
        biases["sinkhorn"] = *sinkhorn(scores, blocks, strips, sinkhorn_temp), sinkhorn_temp
        settings |= {"sinkhorn_temp": sinkhorn_temp, "sinkhorn_iterations": SINKHORN_ITERATIONS}
    rankings = {
        (name, by_text): Ranking(scores, own, video_of_text, by_text, bias[1 if by_text else 0], *bias[2:])
        for name, bias in biases.items()
        for by_text in (True, False)
    }
    for by_text, bank, candidates, query, candidate, tau_name, temp in (
        (True, text_bank, video_vectors, "text", "video", "tau", tau),
        (False, video_bank, text_vectors, "video", "text", "video_tau", tau if video_tau is None else video_tau),
    ):
        if bank is None or not any("query_bank" in name for name in corrections):
            continue
        bank = Scores(bank, None if scores.exact else candidates, device, (f"bank {query}", candidate))
        if bank.shape[1] != scores.shape[1 if by_text else 0]:
            raise ValueError(f"The {query} bank scores {bank.shape[1]} {candidate}s, not every {candidate}.")
        bias, hubs[by_text] = (x if by_text else x[order] for x in bank_bias_and_hubs(bank, blocks, temp))
        rankings["query_bank", by_text] = Ranking(scores, own, video_of_text, by_text, bias, temp)
        settings |= {tau_name: temp, f"{query}_bank": bank.shape[0]}

    counts = count_candidates(scores, rankings, blocks, strips, video_of_text)
    for by_text, hub in hubs.items() if "dynamic_query_bank" in corrections else ():
        use_bank = best_is_hub(scores, blocks, strips, hub, by_text)
        by_bank, uncorrected = counts["query_bank", by_text], counts["none", by_text]
        counts["dynamic_query_bank", by_text] = torch.where(use_bank, by_bank, uncorrected)

    ranks, groups = {correction: {} for correction in corrections}, {}
    for (correction, by_text), count in counts.items():
        count = count[:, order.argsort() if by_text else asked].long().cpu().numpy()
        directions = ("text_to_video",) if by_text else ("video_to_text", "video_to_text_caption_max")[: 1 + grouped]
        for direction, above, reach in zip(directions, count[::2], count[1::2], strict=False):
            groups[direction] = (given_video_of_text if by_text else asked.nonzero().flatten()).cpu().numpy()
            if correction in ranks:
                ranks[correction][direction] = Ranks(above, reach - above)
    return RetrievalRanks(ranks, groups, settings, num_texts, num_videos)


class Ranking:
    """One correction in one direction: which candidates are above or equal to each query's right answer.

    Dual softmax is taken relative to the right answer, so that nothing overflows: s * exp(slope * s - bias - shift)
    is compared with the right answer's own s, where shift is its slope * s - bias.

    Args:
        own: (N,) float64, each text's score with its video. by_text: texts are the queries (rows), videos candidates.
        bias: of the candidates, float64, or None. unit: the temperature that it is in. slope: of dual softmax.
    """

    def __init__(self, scores: "Scores", own, video_of_text, by_text: bool, bias=None, unit=0.0, slope=None):
        self.axis, self.slope = 1 if by_text else 0, slope  # axis: of the candidates
        self.exact = scores.exact and bias is None
        own_bias = 0.0 if bias is None else bias[video_of_text] if by_text else bias
        right, shift = (own - own_bias, torch.zeros_like(own)) if slope is None else (own, slope * own - own_bias)
        if not by_text:  # of each video's best caption; without one it is no query, and nothing reaches it
            log = right.abs().clamp_min(1e-37).log() + shift - shift.min() + 100  # positive
            best = best_of_groups(right if slope is None else right.sign() * log, video_of_text, scores.shape[1])
            right, shift = (values[best].masked_fill(best < 0, 1e30) for values in (right, shift))

        # Levels within `tie` are equal: the same candidate twice may differ by as much. Float32 may add `error`.
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

    def compare(self, s, rows, columns, scratch=(None, None, None)):
        """Yields 1 where a candidate is above its query's right answer, then where it is at least equal; like s.

        s: (R,C) scores of rows and columns (slices or indices), or (P,) of pairs. Not-a-number is neither.
        scratch: three like s. The last two are yielded; without a slope they may be one.
        """
        level, above, reach = scratch

        def along(axis, values):
            return values[rows][:, None] if axis == 0 and s.ndim == 2 else values[columns if axis else rows]

        *values, bias, rounding = self.limits[s.dtype]
        high, low, shift = (along(1 - self.axis, x) for x in values)
        bias = s.new_zeros(()) if bias is None else along(self.axis, bias)
        if self.slope is None:
            level = torch.sub(s, bias, out=level) if bias.ndim else s
            yield torch.gt(level, high, out=above)
            yield torch.ge(level, low, out=reach)
            return
        level = torch.add(-bias, s, alpha=self.slope, out=level).sub_(shift)
        level.clamp_max_(700 if s.dtype == torch.float64 else 80).exp_()  # 0 * infinity is not a number
        product = torch.mul(s, level, out=reach)
        yield torch.sub(product, level, alpha=rounding, out=above).gt_(high)  # the least that it may be
        yield product.add_(level, alpha=rounding).ge_(low)  # the most

    def count(self, scores: "Scores", s, rows: slice, columns: slice, group, scratch) -> torch.Tensor:
        """(4,Q) candidates of a tile above and at least equal, and groups of captions; group (R,): of each row."""
        grouped, query = self.axis == 0 and len(group) > group[-1] + 1, 1 - self.axis
        level, above, reach = scratch
        if self.slope is None and not grouped:
            reach = above  # a smaller part of the cache
        sums = torch.stack([x.sum(self.axis) for x in self.compare(s, rows, columns, (level, above, reach))])
        unsure = (sums[0] != sums[1]).nonzero().flatten()  # queries
        if s.dtype == torch.float32 and not self.exact and len(unsure):
            places = (unsure + rows.start, columns) if self.axis else (rows, unsure + columns.start)
            near = torch.ne(*self.compare(s.index_select(query, unsure), *places)).nonzero()
            near[:, query] = unsure[near[:, query]]
            row, column = near.T
            if len(near) <= s.numel() // 64:
                pairs = row + rows.start, column + columns.start
                exact = [*self.compare(scores.pairs(*pairs), *pairs)]
            else:  # a collapsed model, everything is close to everything
                s = scores.tile(rows, columns, torch.float64)
                exact = [x[row, column] for x in self.compare(s, rows, columns)]
            is_above, reaches = torch.stack(exact).float()
            sums.index_add_(1, near[:, query], torch.stack([is_above, reaches - 1]))  # they were counted as equal
            if grouped:
                above[row, column], reach[row, column] = is_above, reaches
        if not grouped:
            return torch.cat([sums, sums])
        none = above.new_zeros(int(group[-1]) + 1, above.shape[1])  # a group counts if one of its captions does
        return torch.cat([sums, torch.stack([(none.index_add(0, group, x) > 0).sum(0) for x in (above, reach)])])


def count_candidates(scores, rankings: dict, blocks, strips, video_of_text) -> dict:
    """Key of a ranking -> (4,Q): candidates above and at least equal, and groups of captions likewise."""
    counts = {key: scores.full(0 if key[1] else 1, 0.0).repeat(4, 1) for key in rankings}

    def of_strip(rows: slice) -> dict:
        video, counts_here = video_of_text[rows], {key: torch.zeros_like(count) for key, count in counts.items()}
        group = video.unique_consecutive(return_inverse=True)[1]
        for columns, s, scratch in scores.tiles(rows, blocks):
            own = ((video >= columns.start) & (video < columns.stop)).nonzero().flatten()
            s[own, video[own] - columns.start] = math.nan  # a query's right answers do not count
            for key, ranking in rankings.items():
                of_tile = ranking.count(scores, s, rows, columns, group, scratch)
                counts_here[key][:, rows if key[1] else columns] += of_tile
        return counts_here

    for _, counts_here in blocks.each(of_strip, strips):
        for key, count in counts_here.items():
            counts[key] += count
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
            for bias, places in ((row_bias, (rows, None)), (column_bias, columns)):
                if bias is not None:
                    s.sub_(bias[places].to(s.dtype), alpha=1 / slope)
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
        for columns, s, _ in scores.tiles(rows, blocks):
            query, is_hub = (rows, hubs[columns]) if by_text else (columns, hubs[rows, None])
            tops = torch.stack([s.amax(axis), s.masked_fill_(~is_hub, -math.inf).amax(axis)])
            best[:, query] = best[:, query].maximum(tops)
    of_all, of_hubs = blocks.merge(best, "amax")
    return of_hubs >= of_all


class Blocks:
    """How scores are cut into tiles, and shared out over processes and threads."""

    def __init__(self, size: int | None, shard: tuple[int, int], gather: Callable | None, device: str):
        on_cpu = torch.device(device).type == "cpu"
        self.size, self.shard, self.gather = size or (CPU_BLOCK if on_cpu else GPU_BLOCK), shard, gather
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

    exact: it is a matrix; products are rounded, even in float64. bound: no |s| is larger. rounding: of a float32 tile.
    """

    def __init__(self, left, right, device: str, names: tuple[str, str]):
        self.device, self.exact, self.order, self.rounding = torch.device(device), right is None, None, 0.0
        self.left, self.right = checked_tensors(left, right, names)
        if self.exact:
            chunks = self.left.split(max(1, 2**22 // self.left.shape[1]))
            found = [(float(x.double().abs().max()), x.isfinite().all(1)) for x in chunks]
            self.shape, self.bound = tuple(self.left.shape), max(largest for largest, _ in found)
            finite = torch.cat([of_rows for _, of_rows in found])
            wide = self.left.dtype in (torch.float64, torch.int32, torch.int64)  # float32 cannot hold these
        else:
            self.left, self.right = (x.to(device).float() for x in (self.left, self.right))
            norms = [x.norm(dim=1) for x in (self.left, self.right)]
            self.shape, self.bound = (len(self.left), len(self.right)), float(norms[0].max()) * float(norms[1].max())
            finite = norms[0].isfinite() & norms[1].isfinite().all()  # a bad column spoils all rows
        if not finite.all():
            row = int(finite.int().argmin())  # the first
            in_row = self.left[row] if self.exact else norms[0][row] + norms[1]
            raise not_finite(names, row, int(in_row.isfinite().int().argmin()))
        if not self.exact:  # 32 roundings of |x||y|; 13 was the most in 240 million products, K from 64 to 2,048
            self.rounding = min(self.left.shape[1], 32) * torch.finfo(torch.float32).eps / 2 * self.bound
            narrow, exact = (self.tile(slice(512), slice(512), dtype) for dtype in (torch.float32, torch.float64))
            wide = bool((narrow - exact).abs().max() > self.rounding)
            if wide:
                logger.warning("Float32 products are computed in TF32 or bfloat16 here: scoring in float64 instead.")
        self.dtype = torch.float64 if wide or math.prod(self.shape) <= FLOAT64_LIMIT else torch.float32

    def reorder(self, order: torch.Tensor):
        """Bring the rows into another order; of a matrix, which may be a large file, when they are read."""
        if self.exact:
            self.order = order.to(self.left.device)
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

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype, out=None) -> torch.Tensor:
        """(R,C) scores."""
        if not self.exact:
            return torch.mm(self.left[rows].to(dtype), self.right[columns].to(dtype).T, out=out)
        rows = rows if self.order is None else self.order[rows]
        s = self.left[rows, columns].to(self.device, dtype)
        return s if out is None else out.copy_(s)

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(P,) float64 scores of single pairs."""
        if self.exact:
            rows = rows if self.order is None else self.order[rows.to(self.order.device)]
            return self.left[rows, columns.to(self.left.device)].to(self.device, torch.float64)
        chunks = zip(rows.split(128), columns.split(128), strict=True)  # they fit a cache
        return torch.cat([(self.left[row].double() * self.right[column].double()).sum(1) for row, column in chunks])
