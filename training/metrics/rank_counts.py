# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How many candidates are above, and how many are at least equal to, each query's right one, counted over tiles.

A `Ranking` is one correction in one direction. Float32 tiles serve all rankings at once (`count_in_float32`); what
their rounding may have changed is compared again in float64, and queries that float32 cannot serve, or all of them in
a small set, are counted in float64 alone (`count_in_float64`).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .score_tiles import Buffers, TiledScores, Work


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


class Tile:
    """s (R,C) in float32, without the right pairs; then, in its place, the levels that rankings with a slope share.

    The fewer tiles are in use, the more of them stay in the cache: so rankings without a slope must come first.
    """

    def __init__(self, s: torch.Tensor, buffers: Buffers):
        self.s, self.buffers, self.slope = s, buffers, None

    def level(self, slope: float | None, least: float) -> torch.Tensor:
        """s or, with a slope, log s + slope * s. Where s is below `least` it is only known to be lower than there."""
        if slope != self.slope:
            log = torch.clamp_min(self.s, least, out=self.buffers.like("other", self.s)).log_()
            torch.add(log, self.s, alpha=slope, out=self.s)
            self.slope = slope
        return self.s


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
        self.low, self.high = (level - self.rounding).float(), (level + self.rounding).float()
        self.bias32 = None if bias is None else bias.float()

    def compare(self, s: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor):
        """Which float64 scores are above, and which at least equal, their query's right one. Broadcasts."""
        sign, level = self.order.key(s, 0.0 if self.order.bias is None else self.order.bias[candidate])
        own_sign, ahead = self.sign[query], level - self.level[query]
        same = sign == own_sign
        return (sign > own_sign) | (same & (ahead > self.tie)), (sign > own_sign) | (same & (ahead >= -self.tie))

    def compare_pairs(self, rows: torch.Tensor, columns: torch.Tensor):
        """The same of single pairs, (P,) and (P,)."""
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

    def __init__(self, ranking: Ranking, rows: slice, groups: torch.Tensor | None, buffers: Buffers):
        self.ranking, self.rows, self.groups, self.buffers = ranking, rows, groups, buffers
        num_queries = rows.stop - rows.start if ranking.by_text else ranking.counts.shape[1]
        # float32 counts are exact up to 16 million, and cheaper to add sums of float32 tiles to
        self.counts = torch.zeros(len(ranking.counts), num_queries, device=ranking.counts.device)
        self.num_above, self.num_reach = self.counts[0], self.counts[1]
        self.near = []
        # what lies along the rows is the same for all tiles
        self.low, self.high, self.bias = ranking.low, ranking.high, ranking.bias32
        if ranking.by_text:
            self.low, self.high = self.low[rows, None], self.high[rows, None]
        elif self.bias is not None:
            self.bias = self.bias[rows, None]

    def add(self, columns: slice, tile: Tile):
        """Count a tile, without its right pairs."""
        ranking, bias, low, high = self.ranking, self.bias, self.low, self.high
        if ranking.by_text:
            axis, place = 1, slice(None)
            bias = None if bias is None else bias[columns]
        else:
            axis, place = 0, columns
            low, high = low[columns], high[columns]
        level = tile.level(ranking.order.slope, ranking.least)
        other = self.buffers.like("other", level)
        if bias is not None:
            level = torch.sub(level, bias, out=other)
        # compared into float tiles and summed as float: on a CPU several times faster than through booleans
        reach = torch.ge(level, low, out=self.buffers.like("reach", level))
        above = torch.gt(level, high, out=other)
        num_above, num_reach = above.sum(dim=axis), reach.sum(dim=axis)
        if ranking.rounding > 0 and not torch.equal(num_above, num_reach):
            unsure = (num_above != num_reach).nonzero().flatten()
            near = above.index_select(1 - axis, unsure) != reach.index_select(1 - axis, unsure)
            if self._settle(columns, tile, above, reach, unsure, near):
                num_above, num_reach = above.sum(dim=axis), reach.sum(dim=axis)
        self.num_above[place].add_(num_above)
        self.num_reach[place].add_(num_reach)
        if self.groups is not None:
            count_groups(self.groups, above, reach, self.counts, place)

    def _settle(self, columns, tile, above, reach, unsure, near) -> bool:
        """See to pairs that are at least equal, but perhaps not above: compare them in float64, now or at the end.

        Args:
            above, reach: (R,C). unsure: queries whose sums of these differ. near: where theirs differ.

        Returns:
            Whether above and reach changed.
        """
        ranking = self.ranking
        row, column = near.nonzero().unbind(1)
        row, column = (unsure[row], column) if ranking.by_text else (row, unsure[column])
        if len(row) > above.numel() // 64:  # a collapsed model: everything is close to everything
            rows = torch.arange(self.rows.start, self.rows.stop, device=above.device)
            s = torch.empty_like(above, dtype=torch.float64)
            s = ranking.scores.fill(ranking.scores.load(rows, torch.float64), columns, s)
            s.masked_fill_(torch.isnan(tile.s), math.nan)
            columns = torch.arange(columns.start, columns.stop, device=above.device)
            rows, near = rows[:, None], (above != reach)
            flags = ranking.compare(s, *((rows, columns) if ranking.by_text else (columns, rows)))
            for counted, flag in zip((above, reach), flags, strict=True):
                counted.copy_(torch.where(near, flag.float(), counted))
        elif self.groups is not None:
            flags = ranking.compare_pairs(row + self.rows.start, column + columns.start)
            for counted, flag in zip((above, reach), flags, strict=True):
                counted[row, column] = flag.float()
        else:  # one comparison of all of the strip's is cheaper than many of a few
            self.near.append((row + self.rows.start, column + columns.start))
            return False
        return True

    def finished(self) -> torch.Tensor:
        """The counts, when all tiles are counted."""
        if self.near:
            row, column = (torch.cat(parts) for parts in zip(*self.near, strict=True))
            is_above, is_reach = self.ranking.compare_pairs(row, column)
            query = row - self.rows.start if self.ranking.by_text else column
            self.counts[0].index_add_(0, query, is_above.float())
            self.counts[1].index_add_(0, query, is_reach.float() - 1)  # was counted as equal
        return self.counts


def count_groups(groups, above, reach, counts, place):
    """A group is above if one of its captions is. groups (G,R), tiles (R,C), place of the columns in `counts`."""
    counts[2, place] += (groups @ above > 0).sum(dim=0)
    counts[3, place] += (groups @ reach > 0).sum(dim=0)


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
        counts = [StripCounts(ranking, rows, groups if ranking.grouped else None, buffers) for ranking in rankings]
        for columns, s in scores.tiles(rows, work, buffers):
            first, last = bisect_left(right, columns.start), bisect_left(right, columns.stop)
            if first < last:  # the right pairs: not-a-number is above nothing and equal to nothing
                s[torch.arange(first, last, device=s.device), video[first:last] - columns.start] = math.nan
            tile = Tile(s, buffers)
            for of_ranking in counts:
                of_ranking.add(columns, tile)
        return rows, [of_ranking.finished() for of_ranking in counts]

    rankings = sorted(rankings, key=lambda ranking: ranking.order.slope is not None)  # as `Tile` wants
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
                count_groups(groups, above, reach, counts, place)
            done += len(columns)
        return piece, counts

    for piece, counts in work.each(of_piece, pieces):
        ranking.counts[:, queries[piece] if ranking.by_text else queries] += counts
