# SPDX-License-Identifier: Apache-2.0
"""How many candidates are above, and how many are at least equal to, each query's right one, counted over tiles.

A `Ranking` is one correction in one direction. Float32 tiles serve all rankings at once (`count_in_float32`); what
their rounding may have changed is compared again in float64, and queries that float32 cannot serve, or all of them in
a small set, are counted in float64 alone (`count_in_float64`).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .score_tiles import Buffers, TiledScores, Work, as_array


TINY = 1e-37  # scores are raised to this before their logarithm, -85.2


@dataclass
class Order:
    """How a correction orders the candidates of one direction: first by a sign, then by a level.

        additive        sign 1,       level s - bias
        dual softmax    sign of s,    level sign * (log |s| + slope * s - bias)      slope = scale / temp

    which for dual softmax is the order of s * exp(slope * s - bias), in logarithms.

    Args:
        bias: of the candidates, (M,) or (N,) float64, or None.
        unit: the temperature that turned the logarithm of a sum into the bias.
        slope: of dual softmax, or None.
    """

    bias: torch.Tensor | None = None
    unit: float = 0.0
    slope: float | None = None

    def key(self, s: torch.Tensor, bias: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Sign and level of float64 scores; not-a-number stays that."""
        if self.slope is None:
            return torch.ones_like(s), s - bias
        sign = s.sign() + 0 * s  # the sign of not-a-number is 0, its product is not
        return sign, sign * (s.abs().clamp_min(TINY).log() + self.slope * s - bias)  # 0 and 0 where s is 0


class Levels:
    """Part of a tile s (R,C) in float32; then, in its place, the levels that rankings with a slope share.

    The less memory is in use, the more of it stays in the cache: so rankings without a slope must come first.
    """

    def __init__(self, s: torch.Tensor, buffers: Buffers):
        self.s, self.other, self.slope = s, buffers.like("other", s), None
        self.arrays = as_array(s), as_array(self.other)

    def get(self, slope: float | None, least: float, bias: torch.Tensor | None):
        """s or, with a slope, log s + slope * s, less the bias, `as_array`.

        Where s is below `least` it is only known to be lower than there.
        """
        if slope != self.slope:
            torch.clamp_min(self.s, least, out=self.other).log_()
            torch.add(self.other, self.s, alpha=slope, out=self.s)
            self.slope = slope
        if bias is None:
            return self.arrays[0]
        torch.sub(self.s, bias, out=self.other)
        return self.arrays[1]


class Ranking:
    """Counts, for each query of one direction, the candidates above its right one under one correction.

    Queries are the rows of the tiles (text to video) or their columns (video to text). `counts` has two lines, the
    candidates above and those at least equal, and two more for groups of captions where `grouped`.

    Args:
        own: (N,) float64, every text's score with its right video.
    """

    def __init__(self, scores: TiledScores, own, video_of_text, by_text: bool, order: Order, grouped: bool):
        self.scores, self.by_text, self.order, self.grouped = scores, by_text, order, grouped
        self.axis = 1 if by_text else 0  # that candidates lie along
        bias = order.bias
        self.sign, self.level = order.key(own, 0.0 if bias is None else bias[video_of_text] if by_text else bias)
        if not by_text:
            self.sign, self.level = _best_captions(self.sign, self.level, video_of_text, scores.shape[1])
        num_queries = scores.shape[0 if by_text else 1]
        self.counts = torch.zeros(4 if grouped else 2, num_queries, dtype=torch.float64, device=scores.device)
        self.tie = 0.0  # levels closer than this are equal: as two candidates that are the same may differ in float64
        if not scores.exact or bias is not None:
            self.tie = 1e-14 * scores.bound * (order.slope or 1.0)
            if bias is not None:
                largest = order.unit + (order.slope or 1.0) * scores.bound  # of what the bias is a sum of
                self.tie += 4 * torch.finfo(scores.dtype).eps * largest
        if scores.dtype == torch.float64:
            self.slow = torch.ones_like(self.sign, dtype=torch.bool)
        else:
            self._prepare_float32()

    def _prepare_float32(self):
        """Which queries float32 tiles serve, and between which levels of theirs its rounding decides."""
        order, scores, bias = self.order, self.scores, self.order.bias
        self.slow = torch.zeros_like(self.sign, dtype=torch.bool)
        slope = order.slope or 1.0
        self.rounding = self.least = largest = 0.0
        if order.slope is not None:
            # Scores below `least`, negative ones too, need not be right, because queries that could tell are slow: a
            # logarithm is as exact as slope * s down to 1 / slope.
            self.least = max(min(1 / slope, scores.bound / 16), 4 * scores.rounding, TINY)
            self.rounding = scores.rounding / (self.least - scores.rounding)
            largest = abs(math.log(self.least))
        if not scores.exact or bias is not None:
            largest = max(largest, _largest(bias), scores.bound * slope)
            self.rounding += self.tie + 4 * torch.finfo(torch.float32).eps * largest + slope * scores.rounding
        if order.slope is not None:
            floor = math.log(self.least) + slope * self.least - float(bias.min())
            self.slow = (self.sign < 1) | (self.level < floor + 2 * self.rounding)
        level = self.level.masked_fill(self.slow, math.inf)  # infinity: none is above or equal
        low, high = (level - self.rounding).float(), (level + self.rounding).float()
        bias = None if bias is None else bias.float()
        # as they lie along a tile
        self.low, self.high = (as_array(t[:, None] if self.by_text else t) for t in (low, high))
        self.bias32 = bias if bias is None or self.by_text else bias[:, None]

    def compare(self, s: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor):
        """Which float64 scores are above, and which at least equal, their query's right one. Broadcasts."""
        sign, level = self.order.key(s, 0.0 if self.order.bias is None else self.order.bias[candidate])
        own_sign, ahead = self.sign[query], level - self.level[query]
        same = sign == own_sign
        return (sign > own_sign) | (same & (ahead > self.tie)), (sign > own_sign) | (same & (ahead >= -self.tie))

    def compare_pairs(self, rows: np.ndarray, columns: np.ndarray):
        """The same of single pairs, (P,) and (P,)."""
        rows, columns = (torch.from_numpy(index).to(self.counts.device) for index in (rows, columns))
        pairs = (rows, columns) if self.by_text else (columns, rows)
        return self.compare(self.scores.pairs(rows, columns), *pairs)

    def ranks(self, work: Work) -> torch.Tensor:
        """(1, queries), or (2, queries) with the ranks among groups."""
        above_and_at_least_equal = work.merge(self.counts, "sum").view(-1, 2, self.counts.shape[1])
        return 1 + above_and_at_least_equal.sum(dim=1) / 2  # = 1 + above + equal / 2


class StripCounts:
    """What one strip of rows adds to the counts of a ranking, from float32 tiles.

    Args:
        groups: (G,R) of 0 and 1, which rows are captions of which video; None where the ranking is not grouped.
    """

    def __init__(self, ranking: Ranking, rows: slice, groups: torch.Tensor | None):
        self.ranking, self.rows, self.groups, self.buffers = ranking, rows, groups, Buffers()
        num_queries = rows.stop - rows.start if ranking.by_text else ranking.counts.shape[1]
        self.counts = np.zeros((len(ranking.counts), num_queries))
        self.near = []

    def begin(self, columns: slice):
        """Begin a tile."""
        size, device = self.rows.stop - self.rows.start, self.ranking.counts.device
        self.columns, self.flags = columns, self.buffers.flags(size, columns.stop - columns.start, device)
        bias = self.ranking.bias32
        self.bias = bias if bias is None or not self.ranking.by_text else bias[columns]

    def compare(self, part: slice, levels: Levels):
        """Compare part of the tile, without its right pairs, with the right ones' levels."""
        ranking, bias = self.ranking, self.bias
        queries = rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
        if not ranking.by_text:
            queries, bias = self.columns, None if bias is None else bias[rows]
        level = levels.get(ranking.order.slope, ranking.least, bias)
        self.flags.compare(part, level, ranking.high[queries], ranking.low[queries])

    def end(self, s: torch.Tensor):
        """Count the tile. s: (R,C), of which only not-a-number, the right pairs, is of interest now."""
        ranking, flags = self.ranking, self.flags
        place = slice(None) if ranking.by_text else self.columns
        sums = flags.sum(ranking.axis)
        unsure = np.flatnonzero(sums[0] != sums[1]) if ranking.rounding > 0 else ()
        if len(unsure) and self._settle(s, *flags.differing(ranking.axis, unsure)):
            sums = flags.sum(ranking.axis)
        self.counts[:2, place] += sums
        if self.groups is not None:
            self.counts[2:, place] += count_groups(self.groups, flags.values.float()).cpu().numpy()

    def _settle(self, s: torch.Tensor, row: np.ndarray, column: np.ndarray) -> bool:
        """See to the tile's pairs that are at least equal, but perhaps not above: compare them in float64, now or at
        the end. Returns whether flags changed."""
        ranking, above_reach = self.ranking, self.flags.values
        if len(row) > s.numel() // 64:  # a collapsed model: everything is close to everything
            rows = torch.arange(self.rows.start, self.rows.stop, device=s.device)
            exact = torch.empty_like(s, dtype=torch.float64)
            exact = ranking.scores.fill(ranking.scores.load(rows, torch.float64), self.columns, exact)
            exact.masked_fill_(torch.isnan(s), math.nan)
            columns = torch.arange(self.columns.start, self.columns.stop, device=s.device)
            rows, near = rows[:, None], torch.ne(*above_reach)
            flags = ranking.compare(exact, *((rows, columns) if ranking.by_text else (columns, rows)))
            above_reach.copy_(torch.where(near, torch.stack(flags), above_reach))
        elif self.groups is not None:
            flags = ranking.compare_pairs(row + self.rows.start, column + self.columns.start)
            above_reach[:, row, column] = torch.stack(flags)
        else:  # one comparison of all of the strip's is cheaper than many of a few
            self.near.append((row + self.rows.start, column + self.columns.start))
            return False
        return True

    def finished(self) -> torch.Tensor:
        """The counts, when all tiles are counted."""
        if self.near:
            row, column = (np.concatenate(parts) for parts in zip(*self.near, strict=True))
            above_reach = torch.stack(self.ranking.compare_pairs(row, column)).cpu().numpy()
            above_reach = above_reach - np.array([[0.0], [1.0]])  # was counted as equal
            np.add.at(self.counts, (slice(2), row - self.rows.start if self.ranking.by_text else column), above_reach)
        return torch.from_numpy(self.counts).to(self.ranking.counts.device)


def count_groups(groups: torch.Tensor, above_reach: torch.Tensor) -> torch.Tensor:
    """(2,C): how many groups are above, and at least equal; a group is if one of its captions is.

    Args:
        groups: (G,R) of 0 and 1. above_reach: (2,R,C) of 0 and 1.
    """
    return (groups @ above_reach > 0).sum(dim=1)


def _largest(values: torch.Tensor | None) -> float:
    return 0.0 if values is None else float(values.abs().max())


def _best_captions(sign: torch.Tensor, level: torch.Tensor, video_of_text: torch.Tensor, num_videos: int):
    """The highest sign and level among each video's captions, (M,) and (M,). Without a caption: nothing is above."""
    best_sign = sign.new_full((num_videos,), -math.inf).scatter_reduce_(0, video_of_text, sign, "amax")
    level = torch.where(sign == best_sign[video_of_text], level, -math.inf)
    best_level = level.new_full((num_videos,), -math.inf).scatter_reduce_(0, video_of_text, level, "amax")
    empty = best_sign == -math.inf
    return best_sign.masked_fill_(empty, 1), best_level.masked_fill_(empty, math.inf)


def _groups_of(video: torch.Tensor) -> torch.Tensor:
    """(G,R) of 0 and 1: which rows are captions of which of their videos."""
    return F.one_hot(video.unique_consecutive(return_inverse=True)[1]).T.float()


def count_in_float32(
    scores: TiledScores, rankings: Sequence[Ranking], strips, work: Work, video_of_text: torch.Tensor
):
    """Fill the rankings' counts, in one pass over float32 tiles. `video_of_text`: (N,) ascending."""
    grouped = any(ranking.grouped for ranking in rankings)

    def of_strip(rows: slice) -> tuple:
        buffers, video = Buffers(), video_of_text[rows]
        groups, right = _groups_of(video) if grouped else None, video.tolist()
        counts = [StripCounts(ranking, rows, groups if ranking.grouped else None) for ranking in rankings]
        for columns, s in scores.tiles(rows, work, buffers):
            first, last = bisect_left(right, columns.start), bisect_left(right, columns.stop)
            if first < last:  # the right pairs: not-a-number is above nothing and equal to nothing
                s[torch.arange(first, last, device=s.device), video[first:last] - columns.start] = math.nan
            for of_ranking in counts:
                of_ranking.begin(columns)
            for part in work.parts(s):
                levels = Levels(s[part], buffers)
                for of_ranking in counts:
                    of_ranking.compare(part, levels)
            for of_ranking in counts:
                of_ranking.end(s)
        return rows, [of_ranking.finished() for of_ranking in counts]

    rankings = sorted(rankings, key=lambda ranking: ranking.order.slope is not None)  # as `Levels` wants
    for rows, counts in work.each(of_strip, strips):
        for ranking, of_ranking in zip(rankings, counts, strict=True):
            ranking.counts[:, rows if ranking.by_text else slice(None)] += of_ranking


def count_in_float64(scores: TiledScores, ranking: Ranking, strips, work: Work, video_of_text):
    """Fill the counts of the queries that float32 tiles do not serve."""
    queries = ranking.slow.nonzero().flatten()
    if not len(queries):
        return
    pieces = work.strips(len(queries)) if ranking.by_text else strips
    everything = torch.arange(scores.shape[1], device=scores.device)

    def of_piece(piece: slice) -> tuple:
        rows = queries[piece] if ranking.by_text else torch.arange(piece.start, piece.stop, device=scores.device)
        video = video_of_text[rows]
        groups = _groups_of(video) if ranking.grouped else None
        counts, done = torch.zeros_like(ranking.counts[:, queries[piece] if ranking.by_text else queries]), 0
        for columns, s in scores.float64_tiles(rows, everything if ranking.by_text else queries, work):
            s.masked_fill_(video[:, None] == columns, math.nan)
            query, candidate = (rows[:, None], columns) if ranking.by_text else (columns, rows[:, None])
            above, reach = (flags.float() for flags in ranking.compare(s, query, candidate))
            place = slice(None) if ranking.by_text else slice(done, done + len(columns))
            counts[0, place] += above.sum(dim=ranking.axis)
            counts[1, place] += reach.sum(dim=ranking.axis)
            if ranking.grouped:
                counts[2:, place] += count_groups(groups, torch.stack([above, reach]))
            done += len(columns)
        return piece, counts

    for piece, counts in work.each(of_piece, pieces):
        ranking.counts[:, queries[piece] if ranking.by_text else queries] += counts
