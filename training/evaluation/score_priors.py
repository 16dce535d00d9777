# SPDX-License-Identifier: Apache-2.0
"""What corrections are made of, in tiles: priors of dual softmax, Sinkhorn, biases and hubs of a query bank.

All of them are sums of exponentials over the rows or the columns of the scores s (N,M), kept as logarithms in float64,
one number a row or column. The sums inside a tile are taken in the tile's own format: over a large set, whose tiles
are float32, they are good to six digits or so.
"""

import math
from collections.abc import Sequence

import torch

from .score_tiles import Buffers, TiledScores, Work


SINKHORN_ITERATIONS = 5  # as DBSN, arXiv 2508.02538


def log_sum_exp(
    scores: TiledScores,
    strips: Sequence[slice],
    work: Work,
    slope: float,
    row_bias: torch.Tensor | None = None,
    column_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp(slope * s - biases) over every row, (N,), and over every column, (M,), float64."""
    by_row, by_column = scores.full(0, -math.inf), scores.full(1, -math.inf)
    least = 1e8 * torch.finfo(scores.dtype).tiny  # a smaller sum has lost digits to underflow

    def of_strip(rows: slice) -> torch.Tensor:
        of_columns, buffers, peak = scores.full(1, -math.inf), Buffers(), None
        for columns, s in scores.tiles(rows, work, buffers):
            if row_bias is not None:
                s.sub_(row_bias[rows, None].to(s.dtype), alpha=1 / slope)
            if column_bias is not None:
                s.sub_(column_bias[None, columns].to(s.dtype), alpha=1 / slope)
            # one exp serves both sums, less the first tile's peak, unless some are too far apart for a common one
            peak = slope * s.max() if peak is None else peak
            sums = s.new_zeros(len(s) + s.shape[1])
            for part in work.parts(s):
                powers = torch.add(-peak, s[part], alpha=slope, out=buffers.like("powers", s[part])).exp_()
                sums[part] = powers.sum(dim=1)
                sums[len(s) :] += powers.sum(dim=0)
            if least < sums.min() and sums.max() < math.inf:
                parts = sums.double().log_() + peak
            else:
                parts = torch.cat([torch.logsumexp(slope * s, dim=1), torch.logsumexp(slope * s, dim=0)]).double()
            by_row[rows] = torch.logaddexp(by_row[rows], parts[: len(s)])
            of_columns[columns] = parts[len(s) :]
        return of_columns

    for of_columns in work.each(of_strip, strips):
        by_column = torch.logaddexp(by_column, of_columns)
    return work.merge(by_row, "logsumexp"), work.merge(by_column, "logsumexp")


def sinkhorn(scores: TiledScores, strips: Sequence[slice], work: Work, temp: float):
    """Biases of texts (N,) and videos (M,) that bring exp(s / temp) to uniform marginals (DBSN, arXiv 2508.02538).

    Columns, then rows, in turn. The first half step alone is inverted softmax over the test queries.
    """
    of_texts = scores.full(0, 0.0)
    for _ in range(SINKHORN_ITERATIONS):
        _, of_videos = log_sum_exp(scores, strips, work, 1 / temp, row_bias=of_texts)
        of_texts, _ = log_sum_exp(scores, strips, work, 1 / temp, column_bias=of_videos)
    return temp * of_texts, temp * of_videos


def bank_bias(scores: TiledScores, work: Work, tau: float) -> torch.Tensor:
    """tau * logmeanexp over the bank's queries of s / tau, one per candidate (`query_bank_bias` of modeling_camoe)."""
    _, by_candidate = log_sum_exp(scores, work.strips(scores.shape[0]), work, 1 / tau)
    return tau * (by_candidate - math.log(scores.shape[0]))


def bank_hubs(scores: TiledScores, work: Work) -> torch.Tensor:
    """Candidates that come first for some query of the bank, boolean."""

    def of_strip(rows: slice) -> torch.Tensor:
        best = torch.full((rows.stop - rows.start,), -math.inf, dtype=scores.dtype, device=scores.device)
        first = torch.zeros(rows.stop - rows.start, dtype=torch.long, device=scores.device)
        for columns, s in scores.tiles(rows, work, Buffers()):
            value, index = s.max(dim=1)
            first = torch.where(value > best, index + columns.start, first)
            best = best.maximum(value)
        return first

    hubs = scores.full(1, 0.0)
    for first in work.each(of_strip, work.strips(scores.shape[0])):
        hubs[first] = 1
    return work.merge(hubs, "amax") > 0


def best_is_hub(
    scores: TiledScores, strips: Sequence[slice], work: Work, hubs: torch.Tensor, by_text: bool
) -> torch.Tensor:
    """Whether the best candidate of each text (by_text) or video, or one as good, is a hub, boolean."""
    axis = 1 if by_text else 0  # that candidates lie along

    def nothing() -> torch.Tensor:
        return scores.full(1 - axis, -math.inf).expand(2, -1).clone()  # best of all candidates, best of the hubs

    def of_strip(rows: slice) -> torch.Tensor:
        best = nothing()
        for columns, s in scores.tiles(rows, work, Buffers()):
            query, candidate = (rows, columns) if by_text else (columns, rows)
            of_hubs = s.index_select(axis, hubs[candidate].nonzero().flatten())
            best[0, query] = best[0, query].maximum(s.amax(dim=axis))
            if of_hubs.numel():
                best[1, query] = best[1, query].maximum(of_hubs.amax(dim=axis))
        return best

    best = nothing()
    for of_strip_best in work.each(of_strip, strips):
        best = best.maximum(of_strip_best)
    of_all, of_hubs = work.merge(best, "amax")
    return of_hubs >= of_all
