# SPDX-License-Identifier: Apache-2.0
"""Exact search: blocks of the mapped vectors times the queries, and the best rows of each block.

Its limit is the memory's bandwidth for one query and the processor's matrix product for many; what it adds to the bare
product is small (benchmarks/search.py). N queries, B rows, K entries a vector.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


# Scores of a block: 4 MB, which stay in the processor's cache. For one query that is a whole segment; smaller blocks
# would make BLAS's threads wait for each other more often.
BLOCK_SCORES = 1 << 20
# Entries of float16 vectors that are made float32 at a time: 1 MB, which stay in a core's cache.
HALF_ENTRIES = 1 << 18
# Rows whose scores are sorted before all others are compared with the best of them.
FIRST_ROWS = 1024
# With fewer allowed rows than this share of a block, copying them costs less than multiplying all.
SPARSE = 0.25


@dataclass(frozen=True)
class Part:
    """Some rows of an index, in one piece.

    Args:
        first: number of the first row.
        vectors: (b,K) float32 or float16.
        bias: (b,) float32.
        allowed: (b,) bool, the rows that may be found; None: all of them.
    """

    first: int
    vectors: np.ndarray
    bias: np.ndarray
    allowed: np.ndarray | None = None


def best_rows(
    parts: Iterable[Part], queries: np.ndarray, k: int, corrected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows for each query.

    Args:
        queries: (N,K) float32.
        corrected: (N,) bool, the queries from whose scores the bias is subtracted.

    Returns:
        Scores (N,k) float32 and rows (N,k), best first; -inf and -1 where fewer rows are allowed.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best = _Best(len(queries), k)
    for part in parts:
        size = max(1, BLOCK_SCORES // len(queries))
        for start in range(0, len(part.vectors), size):
            _search_block(part, slice(start, start + size), queries, corrected, best)
    return best.sorted()


def _search_block(part: Part, block: slice, queries: np.ndarray, corrected: np.ndarray, best: "_Best"):
    vectors, bias = part.vectors[block], part.bias[block]
    rows = None
    forbidden = None
    if part.allowed is not None:
        allowed = part.allowed[block]
        count = np.count_nonzero(allowed)
        if not count:
            return
        if count < SPARSE * len(allowed):
            rows = np.flatnonzero(allowed)
            vectors, bias = vectors[rows], bias[rows]
        elif count < len(allowed):
            forbidden = ~allowed
    scores = products(vectors, queries)
    if corrected.all():
        scores -= bias
    elif corrected.any():
        scores[corrected] -= bias
    if forbidden is not None:
        scores[:, forbidden] = -np.inf
    best.add(scores, part.first + block.start, rows)


def products(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Scores (N,b) of stored vectors (b,K), float32 or float16, for queries (N,K) float32."""
    if vectors.dtype == np.float16:
        return _half_products(vectors, queries)
    if len(queries) == 1:
        return (vectors @ queries[0])[None]  # a matrix-vector product
    return queries @ vectors.T


def _half_products(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Scores (N,b) of float16 vectors (b,K), finite ones, in float32: numpy's own conversion is ten times as slow.

    The bits of a float16, moved to where a float32 has them, are its value times 2^-112. The queries are scaled by the
    inverse, which is exact.
    """
    scaled = queries * np.float32(2.0**112)
    scores = np.empty((len(queries), len(vectors)), np.float32)
    size = max(1, HALF_ENTRIES // queries.shape[1])
    bits = np.empty((min(size, len(vectors)), queries.shape[1]), np.int32)
    for start in range(0, len(vectors), size):
        part = vectors[start : start + size].view(np.int16)
        moved = bits[: len(part)]
        np.left_shift(part, 13, out=moved, dtype=np.int32, casting="unsafe")
        moved &= np.int32(0x8FFFE000 - (1 << 32))  # sign, exponent, mantissa; not the copies of the sign
        block = slice(start, start + len(part))
        if len(queries) == 1:
            np.dot(moved.view(np.float32), scaled[0], out=scores[0, block])
        else:
            scores[:, block] = scaled @ moved.view(np.float32).T
    return scores


class _Best:
    """The k best (score, row) of each query so far."""

    def __init__(self, count: int, k: int):
        self.k = k
        self.scores = np.full((count, k), -np.inf, np.float32)
        self.rows = np.full((count, k), -1, np.int64)
        self.least = np.full((count, 1), -np.inf, np.float32)  # what a row has to exceed

    def add(self, scores: np.ndarray, first: int, numbers: np.ndarray | None):
        """Scores (N,b) of rows first + numbers (default: 0 to b-1)."""
        if numbers is None:
            numbers = np.arange(scores.shape[1])
        if np.isneginf(self.least).any():  # a few rows first: they tell what the others have to exceed
            self._add(scores[:, :FIRST_ROWS], first, numbers[:FIRST_ROWS])
            scores, numbers = scores[:, FIRST_ROWS:], numbers[FIRST_ROWS:]
        self._add(scores, first, numbers)

    def _add(self, scores: np.ndarray, first: int, numbers: np.ndarray):
        count, width = scores.shape
        if width > self.k and np.isneginf(self.least).any():
            # Nearly every score would be a candidate.
            columns = np.argpartition(scores, width - self.k, axis=1)[:, width - self.k :]
            found = np.take_along_axis(scores, columns, axis=1).ravel()
            queries, columns = np.repeat(np.arange(count), self.k), columns.ravel()
        else:
            places = np.flatnonzero(scores > self.least)  # few: the longer the search, the fewer
            if not len(places):
                return
            queries, columns = np.divmod(places, width)
            found = scores[queries, columns]
        rows = first + numbers[columns]
        rows[np.isneginf(found)] = -1
        queries = np.concatenate([np.repeat(np.arange(count), self.k), queries])
        found, rows = np.concatenate([self.scores.ravel(), found]), np.concatenate([self.rows.ravel(), rows])
        order = np.lexsort((-found, queries))  # by query, best first; equal scores keep the order of rows
        starts = np.searchsorted(queries[order], np.arange(count))
        chosen = order[starts[:, None] + np.arange(self.k)]  # (N,k)
        self.scores, self.rows = found[chosen], rows[chosen]
        self.least = self.scores[:, -1:]

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        return self.scores, self.rows
