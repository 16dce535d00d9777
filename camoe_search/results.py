# SPDX-License-Identifier: Apache-2.0
"""What a search returns, what it can be filtered by, and what every vector store must do."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Hit(NamedTuple):
    """A moment that was found."""

    score: float
    path: str
    start: float  # seconds
    end: float
    row: int | str  # of the index; in Milvus the moment's key


@dataclass(frozen=True)
class Filters:
    """Which moments may be found; None for no limit."""

    path: str | None = None  # part of the path, case-insensitive
    min_seconds: float | None = None
    max_seconds: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.path, self.min_seconds, self.max_seconds))


class VectorStore(Protocol):
    """What finds vectors: `FaissStore` or `MilvusStore`. N queries, K entries a folded vector."""

    def __len__(self) -> int:
        """How many moments can be found."""

    def search(self, queries: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        """The k best moments for each of (N,K+1) queries, best first; fewer where fewer pass the filters."""

    def is_hub(self, row: int | str) -> bool:
        """Whether a moment is the best one for some query of the bank."""

    def locate(self, row: int | str) -> Hit:
        """The file and time of a row, with score 0.

        Raises:
            KeyError: there is no such row.
        """

    def vector(self, row: int | str) -> np.ndarray:
        """(K,), without the bias."""

    def close(self):
        """Release connections. The store cannot be used afterwards."""


def sort_hits(hits: list[Hit]) -> list[Hit]:
    """Best first; ties by path and time, so that every store returns the same moments in the same order."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.start))
