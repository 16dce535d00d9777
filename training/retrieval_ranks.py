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
"""Retrieval ranks of N texts against M videos, computed in tiles: no N x M matrix is ever held.

A score is s = <text vector, video vector>, or an entry of a given matrix. Every correction orders candidates by

    none, query_bank, sinkhorn    s - bias                                     the candidate's bias, 0 for none
    dual_softmax                  S * softmax(S / temp, over the queries)      S = scale * s

so one pass over the tiles computes the priors, and a second counts, for all corrections and both directions at once,
how many candidates are above each query's right one. Notable features:
- rank = 1 + #greater + #equal / 2 (ties take the middle rank: a constant model scores chance); other captions of the
  same video are never distractors;
- ranks do not depend on the tiles: a float32 product decides only what its rounding cannot have changed; candidates
  closer to the right one than that (few) are compared again in float64. Small sets are float64 throughout. (The prior
  of dual softmax over a large set is itself a sum in float32, good to six digits or so);
- dual softmax is computed as log S + S / temp - logsumexp, so nothing under- or overflows, whatever the temperature;
- its product form orders negative S backwards (a larger prior makes them smaller). That is the published formula, and
  it is kept.

One file, importing torch and numpy alone, because the `evaluate.Metric` in metrics/ ships it.
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)

CORRECTIONS = ("none", "dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
RECALL_AT = (1, 5, 10)
SINKHORN_ITERATIONS = 5  # as DBSN, arXiv 2508.02538

# Up to this many multiply-adds the tiles are float64: a second or so, and no rounding to think about.
_FLOAT64_LIMIT = 2**36
# Scores are clamped here before their logarithm, -85.2; what is below -80 then becomes minus infinity.
_TINY, _LOG_TINY = 1e-37, -80.0


@dataclass
class RetrievalRanks:
    """What `rank_retrieval` returns.

    Attributes:
        ranks: correction -> direction -> ranks, float64. `text_to_video`: one per text, in the order given.
            `video_to_text` (best caption) and, where a video has several, `video_to_text_caption_max`: one per video
            that has a caption, in the order of the videos.
        groups: direction -> the video of each rank.
        settings: temperatures, and the sizes of the banks.
    """

    ranks: dict[str, dict[str, np.ndarray]]
    groups: dict[str, np.ndarray]
    settings: dict[str, float | int]
    num_texts: int
    num_videos: int


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """R@K in percent, median rank, mean rank, and Rsum, the sum of the R@K."""
    at = {f"R@{k}": 100 * float(np.mean(ranks <= k)) for k in RECALL_AT}
    return at | {"MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks)), "Rsum": sum(at.values())}


# ---------------------------------------------------------------------------------------------------------------------
# Where scores come from


class _Buffers:
    """Tiles that are written again and again: fresh memory would cost more than the arithmetic on it."""

    def __init__(self):
        self.flat = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < rows * columns:
            flat = self.flat[name, dtype] = torch.empty(rows * columns, dtype=dtype, device=device)
        return flat[: rows * columns].view(rows, columns)

    def like(self, name: str, tile: torch.Tensor) -> torch.Tensor:
        return self.get(name, *tile.shape, tile.dtype, tile.device)


class _Plan:
    """How the work is cut: into tiles, and over processes."""

    def __init__(self, block_size: int, shard: tuple[int, int], gather: Callable | None):
        self.block_size, self.shard, self.gather = block_size, shard, gather
        self.tile_size = block_size**2

    def strips(self, num_rows: int, video_of_text: torch.Tensor | None = None) -> list[slice]:
        """This process's strips of `block_size` rows or so; `video_of_text`: captions of a video stay together."""
        if video_of_text is None:
            starts = range(0, num_rows, self.block_size)
            strips = [slice(start, min(start + self.block_size, num_rows)) for start in starts]
        else:
            strips, start = [], 0
            for end in video_of_text.unique_consecutive(return_counts=True)[1].cumsum(0).tolist():
                if strips and end - strips[-1].start <= self.block_size:
                    strips[-1] = slice(strips[-1].start, end)
                else:
                    strips.append(slice(start, end))
                start = end
        return strips[self.shard[0] :: self.shard[1]]

    def merge(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum, maximum or logsumexp over processes."""
        if self.gather is None:
            return tensor
        tensors = torch.stack(list(self.gather(tensor)))
        return {"sum": torch.sum, "amax": torch.amax, "logsumexp": torch.logsumexp}[how](tensors, dim=0)


class _Scores:
    """s of all rows and columns, a tile at a time. `order`, if set, says which text each row is."""

    def __init__(self, shape: tuple[int, int], terms: int, bound: float, in_float64: bool, device: str):
        self.shape, self.terms, self.bound, self.device = shape, terms, bound, torch.device(device)
        small = shape[0] * shape[1] * max(terms, 1) <= _FLOAT64_LIMIT
        self.dtype = torch.float64 if in_float64 or small else torch.float32
        self.order = None

    def error(self, dtype: torch.dtype) -> float:
        """How far a tile's entry may be from s: nothing for a matrix, 0 `terms`.

        A product of K terms rounds like a random walk. The worst of 16 million that we measured was off by sqrt(K)/4
        units in the last place of |x||y|; this is sqrt(K) units, of twice the size (eps).
        """
        return math.sqrt(self.terms) * torch.finfo(dtype).eps * self.bound

    def texts(self, rows: slice | torch.Tensor) -> slice | torch.Tensor:
        rows = rows.cpu() if isinstance(rows, torch.Tensor) else rows
        return rows if self.order is None else self.order[rows]

    def tiles(self, strips: Sequence[slice], plan: _Plan, buffers: _Buffers) -> Iterator[tuple]:
        """Yields rows, columns and their s, in a buffer that the next tile overwrites."""
        for rows in strips:
            left = self.load(rows, self.dtype)
            width = max(plan.tile_size // (rows.stop - rows.start), 1)
            for start in range(0, self.shape[1], width):
                columns = slice(start, min(start + width, self.shape[1]))
                out = buffers.get("s", rows.stop - rows.start, columns.stop - start, self.dtype, self.device)
                yield rows, columns, self.fill(left, columns, out)

    def float64_tile(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), len(columns), dtype=torch.float64, device=self.device)
        return self.fill(self.load(rows, torch.float64), columns, out)


class _VectorScores(_Scores):
    """Inner products of (N,K) and (M,K) vectors. `names` are what a row and a column are, for messages."""

    def __init__(self, left, right, device: str, names: tuple[str, str]):
        self.left, self.right = torch.as_tensor(left).float(), torch.as_tensor(right).to(device).float()
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise ValueError(
                f"Vectors must be (N,K) and (M,K) with the same K: {names[0]}s are {tuple(self.left.shape)}, "
                f"{names[1]}s {tuple(self.right.shape)}."
            )
        norms = self.left.norm(dim=1), self.right.norm(dim=1)
        bad_row, bad_column = (_first((~norm.isfinite()).flatten()) for norm in norms)
        if bad_column is not None:  # spoils every row, so the first that meets it; row 0 may itself be spoilt
            raise _not_finite(0, 0 if bad_row == 0 else bad_column, names)
        if bad_row is not None:
            raise _not_finite(bad_row, 0, names)
        bound = float(norms[0].max()) * float(norms[1].max())
        super().__init__((len(self.left), len(self.right)), self.left.shape[1], bound, False, device)
        if self.dtype == torch.float32 and not self._products_are_float32():
            logger.warning("Float32 products are computed in TF32 or bfloat16 here: scoring in float64 instead.")
            self.dtype = torch.float64

    def _products_are_float32(self) -> bool:
        rows, columns = (torch.arange(min(512, size), device=self.device) for size in self.shape)
        product = self.load(rows, torch.float32) @ self.right[columns].T
        return float((product - self.float64_tile(rows, columns)).abs().max()) <= self.error(torch.float32)

    def load(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.left[self.texts(rows)].to(self.device, dtype)

    def fill(self, left: torch.Tensor, columns: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(left, self.right[columns].to(left.dtype).T, out=out)

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """s of single pairs, (P,) and (P,) -> (P,) float64."""
        s = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for start in range(0, len(rows), 2048):  # 2,048 pairs of 2,048 dims: 64 MB
            part = slice(start, start + 2048)
            left = self.left[self.texts(rows[part])].to(self.device, torch.float64)
            s[part] = (left * self.right[columns[part]].double()).sum(dim=1)
        return s


class _MatrixScores(_Scores):
    """Entries of a stored (N,M) matrix: a tensor, an array, a memory-mapped file."""

    def __init__(self, matrix, device: str, names: tuple[str, str]):
        self.matrix = matrix if isinstance(matrix, torch.Tensor | np.ndarray) else np.asarray(matrix)
        if self.matrix.ndim != 2 or 0 in self.matrix.shape:
            raise ValueError(f"Scores must be ({names[0]}s, {names[1]}s), not of shape {tuple(self.matrix.shape)}.")
        bound, rows_at_once = 0.0, max(1, 2**22 // self.matrix.shape[1])
        for start in range(0, self.matrix.shape[0], rows_at_once):
            rows = torch.as_tensor(self.matrix[start : start + rows_at_once])
            bad = _first((~rows.isfinite()).flatten())
            if bad is not None:
                raise _not_finite(start + bad // rows.shape[1], bad % rows.shape[1], names)
            bound = max(bound, float(rows.abs().max()))
        in_float64 = str(self.matrix.dtype).removeprefix("torch.") in ("float64", "int32", "int64")
        super().__init__(tuple(self.matrix.shape), 0, bound, in_float64, device)

    def load(self, rows: slice | torch.Tensor, dtype: torch.dtype):
        return self.texts(rows)

    def fill(self, left, columns: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if isinstance(left, torch.Tensor) and isinstance(columns, torch.Tensor):
            left = left[:, None]
        return out.copy_(self.entries(left, columns))

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return self.entries(self.texts(rows), columns).to(self.device, torch.float64)

    def entries(self, rows: slice | torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(self.matrix, np.ndarray):  # takes a tensor of one element for a number
            rows, columns = (index if isinstance(index, slice) else index.cpu().numpy() for index in (rows, columns))
        return torch.as_tensor(self.matrix[rows, columns])


def _first(flags: torch.Tensor) -> int | None:
    return int(flags.int().argmax()) if flags.any() else None


def _not_finite(row: int, column: int, names: tuple[str, str]) -> ValueError:
    return ValueError(
        f"The score of ({names[0]} {row}, {names[1]} {column}) is not a finite number, and it is the first such. "
        "A rank among such scores means nothing: look for damaged frames or overflow in half precision."
    )


def _scores(left, right, device: str, names: tuple[str, str]) -> _Scores:
    return _MatrixScores(left, device, names) if right is None else _VectorScores(left, right, device, names)


# ---------------------------------------------------------------------------------------------------------------------
# First pass: priors and biases


def _log_sum_exp(
    scores: _Scores,
    strips: Sequence[slice],
    plan: _Plan,
    slope: float,
    row_bias: torch.Tensor | None = None,
    column_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp(slope * s - biases) over every row, (N,), and over every column, (M,), float64."""
    by_row = torch.full((scores.shape[0],), -math.inf, dtype=torch.float64, device=scores.device)
    by_column = torch.full((scores.shape[1],), -math.inf, dtype=torch.float64, device=scores.device)
    least = 1e8 * torch.finfo(scores.dtype).tiny  # a smaller sum has lost digits to underflow
    buffers = _Buffers()
    for rows, columns, s in scores.tiles(strips, plan, buffers):
        s.mul_(slope)
        if row_bias is not None:
            s.sub_(row_bias[rows, None].to(s.dtype))
        if column_bias is not None:
            s.sub_(column_bias[None, columns].to(s.dtype))
        # one exp serves both sums, less the tile's peak, unless rows or columns are too far apart for a common one
        peak = s.max()
        powers = torch.sub(s, peak, out=buffers.like("powers", s)).exp_()
        row_sum, column_sum = powers.sum(dim=1), powers.sum(dim=0)
        if min(row_sum.min(), column_sum.min()) > least:
            row_part, column_part = row_sum.double().log_() + peak, column_sum.double().log_() + peak
        else:
            row_part, column_part = torch.logsumexp(s, dim=1), torch.logsumexp(s, dim=0)
        by_row[rows] = torch.logaddexp(by_row[rows], row_part.double())
        by_column[columns] = torch.logaddexp(by_column[columns], column_part.double())
    return plan.merge(by_row, "logsumexp"), plan.merge(by_column, "logsumexp")


def _sinkhorn(scores: _Scores, strips: Sequence[slice], plan: _Plan, temp: float):
    """Biases of texts (N,) and videos (M,) that bring exp(s / temp) to uniform marginals (DBSN, arXiv 2508.02538).

    Columns, then rows, in turn. The first half step alone is inverted softmax over the test queries.
    """
    of_texts = torch.zeros(scores.shape[0], dtype=torch.float64, device=scores.device)
    for _ in range(SINKHORN_ITERATIONS):
        _, of_videos = _log_sum_exp(scores, strips, plan, 1 / temp, row_bias=of_texts)
        of_texts, _ = _log_sum_exp(scores, strips, plan, 1 / temp, column_bias=of_videos)
    return temp * of_texts, temp * of_videos


def _bank_bias(scores: _Scores, plan: _Plan, tau: float) -> torch.Tensor:
    """tau * logmeanexp over the bank's queries of s / tau, one per candidate (`query_bank_bias` of modeling_camoe)."""
    _, by_candidate = _log_sum_exp(scores, plan.strips(scores.shape[0]), plan, 1 / tau)
    return tau * (by_candidate - math.log(scores.shape[0]))


def _hubs(scores: _Scores, plan: _Plan) -> torch.Tensor:
    """Candidates that come first for some query of the bank, boolean."""
    best = torch.full((scores.shape[0],), -math.inf, dtype=scores.dtype, device=scores.device)
    first = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
    strips = plan.strips(scores.shape[0])
    for rows, columns, s in scores.tiles(strips, plan, _Buffers()):
        value, index = s.max(dim=1)
        first[rows] = torch.where(value > best[rows], index + columns.start, first[rows])
        best[rows] = best[rows].maximum(value)
    hubs = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    for rows in strips:
        hubs[first[rows]] = 1
    return plan.merge(hubs, "amax") > 0


# ---------------------------------------------------------------------------------------------------------------------
# Second pass: ranks


class _Tile:
    """s of some rows and columns without the right pairs, and what the rankings derive from it.

    Args:
        video: (R,), the right video of each row.
        groups: (G,R), 1 where row r is a caption of group g; None where captions are not grouped.
    """

    def __init__(self, scores, rows: slice, columns: slice, s, video, groups, buffers: _Buffers):
        self.scores, self.rows, self.columns, self.s = scores, rows, columns, s
        self.video, self.groups, self.buffers = video, groups, buffers
        self._levels_of = None
        own = ((video >= columns.start) & (video < columns.stop)).nonzero().flatten()
        s[own, video[own] - columns.start] = math.nan  # compares false with everything: never counted

    def levels(self, slope: float | None, floor: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Lower and upper bounds of each score's level before the bias, and by how much they may fail.

        The level is s, or with a slope log s + slope * s, minus infinity for scores that are not positive.

        Args:
            floor: levels below it need not be right, as long as they stay below it.
        """
        if slope is None:
            return self.s, self.s, 0.0
        error, like = max(self.scores.error(self.s.dtype), 1e-30), self.buffers.like
        # One logarithm does where the scores that matter are far enough from 0 for it to be as exact as slope * s.
        least = max(1 / slope, 4 * error)
        exact_enough = math.log(least) + slope * least + 4 * error * slope < floor
        if self._levels_of != (slope, exact_enough):
            if exact_enough:
                level = torch.clamp_min(self.s, least, out=like("low", self.s)).log_().add_(self.s, alpha=slope)
                self._levels = level, level, error / (least - error)
            else:
                bounds = []
                for name, shift in (("low", -error), ("high", error)):
                    level = torch.add(self.s, shift, out=like(name, self.s)).clamp_min_(_TINY).log_()
                    bounds.append(F.threshold_(level, _LOG_TINY, -math.inf).add_(self.s, alpha=slope))
                self._levels = *bounds, 0.0
            self._levels_of = slope, exact_enough
        return self._levels

    def in_float64(self, by_text: bool, chosen: torch.Tensor | None):
        """Rows (R,), columns (C,) and s (R,C) in float64, of the chosen rows (by_text) or columns, or of all."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.s.device)
        columns = torch.arange(self.columns.start, self.columns.stop, device=self.s.device)
        if chosen is None and self.s.dtype == torch.float64:
            return rows, columns, self.s
        video = self.video
        if chosen is not None and by_text:
            rows, video = rows[chosen], video[chosen]
        elif chosen is not None:
            columns = columns[chosen]
        s = self.scores.float64_tile(rows, columns)
        return rows, columns, s.masked_fill_(video[:, None] == columns, math.nan)


class _Ranking:
    """Counts, for each query of one direction, the candidates above its right one under one correction.

    Queries are the rows of the tiles (text to video) or their columns (video to text). Every score has a sign and a
    level, and is ordered first by sign, then by level:

        additive        sign 1,       level s - bias
        dual softmax    sign of s,    level sign * (log |s| + slope * s - bias)      slope = scale / temp

    which for dual softmax is the order of s * exp(slope * s - bias), in logarithms.

    Args:
        own: (N,) float64, every text's score with its right video.
        bias: of the candidates, (M,) or (N,) float64, or None.
        bias_unit: the temperature that turned the logarithm of a sum into the bias.
        slope: of dual softmax, or None.
        grouped: count groups of captions, too.
    """

    def __init__(self, scores: _Scores, own, video_of_text, by_text: bool, bias, bias_unit, slope, grouped: bool):
        self.scores, self.by_text, self.bias, self.slope, self.grouped = scores, by_text, bias, slope, grouped
        self.sign, self.level = self.order(own, bias[video_of_text] if by_text and bias is not None else bias)
        if not by_text:
            self.sign, self.level = _best_captions(self.sign, self.level, video_of_text, scores.shape[1])
        # rows: candidates above, candidates at least equal, and the same of groups
        size = 4 if grouped else 2, scores.shape[0 if by_text else 1]
        self.counts = torch.zeros(size, dtype=torch.float64, device=scores.device)

        # Levels closer than `tie` are equal: what two candidates that are the same may differ by in float64. Levels of
        # a float32 tile closer than `rounding` may be in the wrong order. Entries of a matrix are exact.
        self.tie = self.rounding = 0.0
        if scores.terms > 0 or bias is not None:
            self.tie = 1e-14 * scores.bound * (slope or 1.0)
            if bias is not None:
                self.tie += 8 * bias_unit * torch.finfo(scores.dtype).eps
            largest = max(_largest(bias), _largest(own) * (slope or 1.0), 0.0 if slope is None else -_LOG_TINY)
            roundings = 16 * torch.finfo(torch.float32).eps * largest
            self.rounding = self.tie + roundings + (slope or 1.0) * scores.error(torch.float32)

    def order(self, s: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sign and level of float64 scores."""
        bias = 0.0 if bias is None else bias
        if self.slope is None:
            return torch.ones_like(s), s - bias
        sign = s.sign() + 0 * s  # the sign of not-a-number is 0, its product is not
        return sign, sign * (s.abs().clamp_min(_TINY).log() + self.slope * s - bias)  # 0 and 0 where s is 0

    def compare(self, s: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor):
        """Which float64 scores are above, and which at least equal, their query's right one. Broadcasts."""
        sign, level = self.order(s, None if self.bias is None else self.bias[candidate])
        own_sign, ahead = self.sign[query], level - self.level[query]
        same = sign == own_sign
        return (sign > own_sign) | (same & (ahead > self.tie)), (sign > own_sign) | (same & (ahead >= -self.tie))

    def count(self, tile: _Tile):
        """Count what the tile has above, and at least equal to, each query's right score."""
        if tile.s.dtype == torch.float64:
            return self.count_in_float64(tile)
        if self.slope is not None:  # float32 levels are for queries whose right score is positive; others are rare
            others = (self.sign[tile.rows if self.by_text else tile.columns] < 1).nonzero().flatten()
            if len(others):
                self.count_in_float64(tile, others)
        self.count_in_float32(tile)

    def count_in_float64(self, tile: _Tile, chosen: torch.Tensor | None = None):
        """For the chosen queries of the tile, or for all."""
        rows, columns, s = tile.in_float64(self.by_text, chosen)
        query, candidate = (rows[:, None], columns[None]) if self.by_text else (columns[None], rows[:, None])
        above, reach = self.compare(s, query, candidate)
        self.add(tile, query.flatten(), above.float(), reach.float())

    def count_in_float32(self, tile: _Tile):
        """For the queries of sign 1, in a fraction of the time. What rounding may have changed is compared again."""
        s, rows, columns, like = tile.s, tile.rows, tile.columns, tile.buffers.like
        query, candidate, axis = (rows, columns, 1) if self.by_text else (columns, rows, 0)
        upright = (-1, 1) if self.by_text else (1, -1)
        level = torch.where(self.sign[query] == 1, self.level[query], math.inf)  # infinity: none is above
        floor = 0.0 if self.slope is None else float(level.min() + self.bias[candidate].min()) - self.rounding
        low, high, failing = tile.levels(self.slope, floor)
        rounding = self.rounding + failing

        if self.bias is not None:
            bias = self.bias[candidate].to(s.dtype).view(upright[::-1])
            shifted = torch.sub(low, bias, out=like("above", s))
            low, high = shifted, shifted if high is low else torch.sub(high, bias, out=like("reach", s))
        # compared into float tiles and summed as float: on a CPU several times faster than through booleans
        reach = torch.ge(high, (level - rounding).to(s.dtype).view(upright), out=like("reach", s))
        above = torch.gt(low, (level + rounding).to(s.dtype).view(upright), out=like("above", s))
        num_above, num_reach = above.sum(dim=axis), reach.sum(dim=axis)
        if rounding > 0 and not torch.equal(num_above, num_reach):
            unsure = (num_above != num_reach).nonzero().flatten()
            near = (above.index_select(1 - axis, unsure) != reach.index_select(1 - axis, unsure)).nonzero()
            if len(near) > s.numel() // 64:  # a collapsed model: everything is close to everything
                return self.count_in_float64(tile, (self.sign[query] == 1).nonzero().flatten())
            near[:, 1 - axis] = unsure[near[:, 1 - axis]]
            row, column = near.unbind(1)
            pairs = row + rows.start, column + columns.start
            is_above, is_reach = self.compare(self.scores.pairs(*pairs), *(pairs if self.by_text else pairs[::-1]))
            above[row, column], reach[row, column] = is_above.to(s.dtype), is_reach.to(s.dtype)  # were 0 and 1
            num_above.index_add_(0, near[:, 1 - axis], is_above.to(s.dtype))
            num_reach.index_add_(0, near[:, 1 - axis], is_reach.to(s.dtype) - 1)
        self.add(tile, query, above, reach, num_above, num_reach)

    def add(self, tile: _Tile, query, above: torch.Tensor, reach: torch.Tensor, num_above=None, num_reach=None):
        """Add tiles of 0 and 1, (R,C), and their sums if known."""
        axis = 1 if self.by_text else 0
        self.counts[0, query] += above.sum(dim=axis) if num_above is None else num_above
        self.counts[1, query] += reach.sum(dim=axis) if num_reach is None else num_reach
        if self.grouped:  # a group is above if one of its captions is
            self.counts[2, query] += (tile.groups @ above > 0).sum(dim=0)
            self.counts[3, query] += (tile.groups @ reach > 0).sum(dim=0)

    def ranks(self, plan: _Plan) -> torch.Tensor:
        """(1, queries), or (2, queries) with the ranks among groups."""
        above_and_at_least_equal = plan.merge(self.counts, "sum").view(-1, 2, self.counts.shape[1])
        return 1 + above_and_at_least_equal.sum(dim=1) / 2  # = 1 + above + equal / 2


def _largest(values: torch.Tensor | None) -> float:
    return 0.0 if values is None else float(values.abs().max())


def _best_captions(sign: torch.Tensor, level: torch.Tensor, video_of_text: torch.Tensor, num_videos: int):
    """The highest sign and level among each video's captions, (M,) and (M,). Without a caption: nothing is above."""
    best_sign = sign.new_full((num_videos,), -math.inf).scatter_reduce_(0, video_of_text, sign, "amax")
    level = torch.where(sign == best_sign[video_of_text], level, -math.inf)
    best_level = level.new_full((num_videos,), -math.inf).scatter_reduce_(0, video_of_text, level, "amax")
    empty = best_sign == -math.inf
    return best_sign.masked_fill_(empty, 1), best_level.masked_fill_(empty, math.inf)


def _count(
    scores: _Scores,
    rankings: Sequence[_Ranking],
    strips: Sequence[slice],
    plan: _Plan,
    video_of_text: torch.Tensor,
    hubs: dict[bool, torch.Tensor],
) -> dict[bool, torch.Tensor]:
    """Fill the rankings' counts, in one pass.

    Args:
        video_of_text: (N,), in the order of the rows.
        hubs: by_text -> which candidates are hubs, boolean.

    Returns:
        by_text -> whether each query's best candidate (or one as good) is a hub, boolean.
    """
    best = {}  # of each query, among all candidates and among the hubs
    for by_text in hubs:
        size = 2, scores.shape[0 if by_text else 1]
        best[by_text] = torch.full(size, -math.inf, dtype=scores.dtype, device=scores.device)
    buffers, grouped = _Buffers(), any(ranking.grouped for ranking in rankings)
    groups, groups_of = None, None
    for rows, columns, s in scores.tiles(strips, plan, buffers):
        for by_text, hub in hubs.items():
            query, candidate, axis = (rows, columns, 1) if by_text else (columns, rows, 0)
            of_hubs = s.index_select(axis, hub[candidate].nonzero().flatten())
            best[by_text][0, query] = best[by_text][0, query].maximum(s.amax(dim=axis))
            if of_hubs.numel():
                best[by_text][1, query] = best[by_text][1, query].maximum(of_hubs.amax(dim=axis))
        if grouped and groups_of != rows:
            _, group = video_of_text[rows].unique_consecutive(return_inverse=True)
            groups, groups_of = F.one_hot(group).T.float(), rows
        tile = _Tile(scores, rows, columns, s, video_of_text[rows], groups, buffers)
        for ranking in rankings:
            ranking.count(tile)
    best = {by_text: plan.merge(values, "amax") for by_text, values in best.items()}
    return {by_text: of_hubs >= of_all for by_text, (of_all, of_hubs) in best.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The whole


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
    sinkhorn_temp: float = 0.01,
    block_size: int = 1152,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None,
) -> RetrievalRanks:
    """Ranks in both directions under every correction asked for, and always uncorrected.

    Args:
        text_vectors: (N,K) folded, used in float32; or, with `video_vectors` None, the (N,M) scores themselves
            (tensor, array or memory map).
        video_vectors: (M,K) folded, or None.
        video_of_text: (N,) index of each text's right video. Several texts may share one; a video without a text is
            a distractor for text to video and no query for video to text. None: text n belongs to video n.
        scale: exp(logit_scale); only dual softmax sees it, as S = scale * s.
        corrections: names from `CORRECTIONS`.
        dual_softmax_temp: in units of S. The other temperatures are in units of s.
        text_bank: (Q,K) vectors of training captions, or (Q,M) scores where scores are given: corrects text to video.
        video_bank: (P,K) vectors of training videos, or (P,N) scores of each with every text: corrects video to text.
            A missing bank leaves its direction out of the query banks' ranks, which need one at least.
        tau: of the query banks. sinkhorn_temp: of sinkhorn.
        block_size: rows and columns of a tile. Changes memory and speed, not results. (A power of two is slower:
            sums over its columns collide in the cache.)
        shard, gather: (index, count) of this process, and a function that returns a tensor of every process
            (accelerate: `lambda tensor: accelerator.gather(tensor[None])`). Every process gets the whole result.

    Raises:
        ValueError: shapes that do not fit, an unknown correction, an index out of range, or a score that is not
            finite (the first is named).
    """
    scores = _scores(text_vectors, video_vectors, device, ("text", "video"))
    num_texts, num_videos = scores.shape
    given_video_of_text = _right_videos(video_of_text, num_texts, num_videos).to(scores.device)
    captions = given_video_of_text.bincount(minlength=num_videos)  # (M,)
    several = int(captions.max()) > 1
    corrections = _checked_corrections(corrections, text_bank, video_bank)

    order = given_video_of_text.argsort(stable=True)  # captions of a video in neighbouring rows
    video_of_text = given_video_of_text[order]
    if not torch.equal(video_of_text, given_video_of_text):
        scores.order = order.cpu()
    plan = _Plan(block_size, shard, gather)
    strips = plan.strips(num_texts, video_of_text if several else None)

    # Which rankings there are: (correction, by_text) -> bias of the candidates, its unit, slope
    wanted = {("none", True): (None, 0.0, None), ("none", False): (None, 0.0, None)}
    hubs, settings = {}, {"scale": scale}
    if "dual_softmax" in corrections:
        slope = scale / dual_softmax_temp
        of_texts, of_videos = _log_sum_exp(scores, strips, plan, slope)
        wanted["dual_softmax", True] = of_videos, 1.0, slope
        wanted["dual_softmax", False] = of_texts, 1.0, slope
        settings |= {"dual_softmax_temp": dual_softmax_temp}
    if "sinkhorn" in corrections:
        of_texts, of_videos = _sinkhorn(scores, strips, plan, sinkhorn_temp)
        wanted["sinkhorn", True] = of_videos, sinkhorn_temp, None
        wanted["sinkhorn", False] = of_texts, sinkhorn_temp, None
        settings |= {"sinkhorn_temp": sinkhorn_temp, "sinkhorn_iterations": SINKHORN_ITERATIONS}
    if "query_bank" in corrections or "dynamic_query_bank" in corrections:
        settings |= {"tau": tau}
        for by_text, name, of, bank, candidates in (
            (True, "text", "video", text_bank, video_vectors),
            (False, "video", "text", video_bank, text_vectors),
        ):
            if bank is None:
                continue
            bank_scores = _scores(bank, None if video_vectors is None else candidates, device, (f"bank {name}", of))
            if bank_scores.shape[1] != scores.shape[1 if by_text else 0]:
                raise ValueError(f"The {name} bank has scores of {bank_scores.shape[1]} {of}s, not of every {of}.")
            bias = _bank_bias(bank_scores, plan, tau)
            wanted["query_bank", by_text] = (bias if by_text else bias[order]), tau, None
            if "dynamic_query_bank" in corrections:
                hub = _hubs(bank_scores, plan)
                hubs[by_text] = hub if by_text else hub[order]
            settings |= {f"{name}_bank": bank_scores.shape[0]}

    own = scores.pairs(torch.arange(num_texts, device=scores.device), video_of_text)
    rankings = {
        (correction, by_text): _Ranking(scores, own, video_of_text, by_text, *parts, grouped=several and not by_text)
        for (correction, by_text), parts in wanted.items()
    }
    best_is_hub = _count(scores, list(rankings.values()), strips, plan, video_of_text, hubs)
    found = {key: ranking.ranks(plan) for key, ranking in rankings.items()}
    for by_text, is_hub in best_is_hub.items():
        corrected, raw = found["query_bank", by_text], found["none", by_text]
        found["dynamic_query_bank", by_text] = torch.where(is_hub, corrected, raw)

    asked = captions > 0  # a video without a caption is no query
    ranks = {correction: {} for correction in corrections}
    for (correction, by_text), by_query in found.items():
        if correction not in ranks:
            continue
        by_query = torch.empty_like(by_query).index_copy_(1, order, by_query) if by_text else by_query[:, asked]
        directions = ("text_to_video",) if by_text else ("video_to_text", "video_to_text_caption_max")
        ranks[correction] |= dict(zip(directions, by_query.cpu().numpy(), strict=False))
    video = {"text_to_video": given_video_of_text, "video_to_text": asked.nonzero().flatten()}
    video["video_to_text_caption_max"] = video["video_to_text"]
    groups = {direction: video[direction].cpu().numpy() for direction in ranks["none"]}
    return RetrievalRanks(ranks, groups, settings, num_texts, num_videos)


def _right_videos(video_of_text, num_texts: int, num_videos: int) -> torch.Tensor:
    if video_of_text is None:
        if num_texts != num_videos:
            raise ValueError(
                f"{num_texts} texts and {num_videos} videos do not pair up by position: pass the index of each text's "
                "video."
            )
        return torch.arange(num_texts)
    video_of_text = torch.as_tensor(video_of_text)
    if video_of_text.shape != (num_texts,) or video_of_text.is_floating_point():
        raise ValueError(
            f"One video index per text is needed, {num_texts} integers; got {video_of_text.dtype} of shape "
            f"{tuple(video_of_text.shape)}."
        )
    wrong = _first((video_of_text < 0) | (video_of_text >= num_videos))
    if wrong is not None:
        raise ValueError(
            f"Text {wrong} belongs to video {int(video_of_text[wrong])}, but the videos are 0 to {num_videos - 1}."
        )
    return video_of_text.long()


def _checked_corrections(corrections: Sequence[str], text_bank, video_bank) -> list[str]:
    for name in corrections:
        if name not in CORRECTIONS:
            near = difflib.get_close_matches(name, CORRECTIONS, n=1) or list(CORRECTIONS)
            raise ValueError(f"Unknown correction {name!r}. Did you mean {' or '.join(near)}?")
        if "query_bank" in name and text_bank is None and video_bank is None:
            raise ValueError(f"{name} needs a bank of training captions (`text_bank`) or training videos.")
    return [name for name in CORRECTIONS if name == "none" or name in corrections]
