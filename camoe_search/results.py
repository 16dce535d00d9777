# SPDX-License-Identifier: Apache-2.0
"""What a search returns, what it can be filtered by, and what every vector store must do."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .database import Description


class Hit(NamedTuple):
    """A moment that was found."""

    score: float
    path: str
    start: float  # seconds
    end: float
    key: str  # of the moment: hash of the file's content, a dot, number of the window (a hash in Milvus)


@dataclass(frozen=True)
class Filters:
    """Which moments may be found; None for no limit."""

    path: str | None = None  # part of the path, case-insensitive
    min_seconds: float | None = None
    max_seconds: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.path, self.min_seconds, self.max_seconds))


class VectorStore(Protocol):
    """What finds vectors: `LocalStore` or `MilvusStore`. N queries, K entries a folded vector."""

    description: Description  # of the index, as of the last look at it

    def refresh(self):
        """Look whether the index has changed."""

    def __len__(self) -> int:
        """How many moments can be found."""

    def search(
        self, queries: np.ndarray, k: int, filters: Filters, corrected: np.ndarray, dynamic: bool = False
    ) -> list[list[Hit]]:
        """The k best moments for each of (N,K) queries, best first; fewer where fewer pass the filters.

        Args:
            corrected: (N,) bool, the queries from whose scores the bias is subtracted.
            dynamic: subtract it also for queries whose best uncorrected moment is a hub.
        """

    def locate(self, key: str) -> Hit:
        """The file and time of a moment, with score 0.

        Raises:
            KeyError: there is no such moment.
        """

    def vectors(self, keys: list[str]) -> dict[str, np.ndarray]:
        """(K,) of each key that there is, without the bias."""

    def close(self):
        """Release connections. The store cannot be used afterwards."""


def sort_hits(hits: list[Hit]) -> list[Hit]:
    """Best first; ties by path and time, so that every store returns the same moments in the same order."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.start))
