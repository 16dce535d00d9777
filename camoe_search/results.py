# SPDX-License-Identifier: Apache-2.0
"""What a search returns, what it can be filtered by, and what every vector store must do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import numpy as np

from .database import Description


class Hit(NamedTuple):
    """A moment that was found.

    Where windows were merged, `start` and `end` span all of them; score, key and peak are those of the best one.
    """

    score: float
    path: str
    start: float  # seconds
    end: float
    key: str  # of the moment: hash of the file's content, a dot, number of the window (a hash in Milvus)
    peak: tuple[float, float] = ()  # start and end of the best window: where to play from, and what to show
    paths: tuple[str, ...] = ()  # of all files with this content that pass the filters, `path` among them
    # Grouped by file: all moments of the file that stand out, by time, this one among them. Of a query with `then`:
    # the two moments, in order.
    moments: tuple[Hit, ...] = ()


class Condition(NamedTuple):
    """On a column of metadata.jsonl, such as year >= 2020."""

    name: str
    operator: str  # = != < <= > >=
    value: str  # compared as a number where the column holds one


@dataclass(frozen=True)
class Filters:
    """Which moments may be found; None for no limit. Those after the first three need an index folder."""

    path: str | None = None  # part of the path, case-insensitive
    min_seconds: float | None = None  # of a moment
    max_seconds: float | None = None
    glob: str | None = None  # pattern of whole paths: * ? [a-z]; without a leading / or *, of their last parts
    min_duration: float | None = None  # seconds, of the file
    max_duration: float | None = None
    after: float | None = None  # time of the file, seconds since 1970: from then on
    before: float | None = None  # earlier than then
    min_resolution: int | None = None  # pixels of the picture's short side: 720 for 720p
    max_resolution: int | None = None
    where: tuple[Condition, ...] = ()  # all must hold

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """Of those that are set."""
        return [name for name in FILTER_NAMES if getattr(self, name) not in (None, ())]


FILTER_NAMES = tuple(field.name for field in fields(Filters))


@dataclass(frozen=True)
class Grouping:
    """How windows become results."""

    merge: bool = True  # overlapping windows of a file are one moment, identical files one result
    by_file: bool = False  # one result per file
    min_score: float | None = None  # of the best window


class VectorStore(Protocol):
    """What finds vectors: `LocalStore` or `MilvusStore`. N queries, K entries a folded vector."""

    description: Description  # of the index, as of the last look at it

    def refresh(self):
        """Look whether the index has changed."""

    def __len__(self) -> int:
        """How many windows can be found."""

    def search(
        self, queries: np.ndarray, k: int, filters: Filters, corrected: np.ndarray, dynamic: bool = False
    ) -> list[list[Hit]]:
        """The k best windows for each of (N,K) queries, best first; fewer where fewer pass the filters.

        Args:
            corrected: (N,) bool, the queries from whose scores the bias is subtracted.
            dynamic: subtract it also for queries whose best uncorrected window is a hub.
        """

    def search_moments(
        self,
        queries: np.ndarray,
        k: int,
        filters: Filters,
        corrected: np.ndarray,
        dynamic: bool,
        grouping: Grouping,
    ) -> list[list[Hit]]:
        """As `search`, but windows are merged into moments or grouped by file as `grouping` says."""

    def locate(self, key: str) -> Hit:
        """The file and time of a moment, with score 0.

        Raises:
            KeyError: there is no such moment.
        """

    def vectors(self, keys: list[str]) -> dict[str, np.ndarray]:
        """(K,) of each key that there is, without the bias."""

    def close(self):
        """Release connections. The store cannot be used afterwards."""


def single_window(score: float, path: str, start: float, end: float, key: str) -> Hit:
    """A hit that is one window of one file."""
    return Hit(score, path, start, end, key, (start, end), (path,))


def sort_hits(hits: list[Hit]) -> list[Hit]:
    """Best first; ties by path and time, so that every store returns the same moments in the same order."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.start))
