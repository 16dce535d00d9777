# SPDX-License-Identifier: Apache-2.0
"""What a search returns and what it may be narrowed to: the same for every store."""

from dataclasses import dataclass
from typing import NamedTuple


class Hit(NamedTuple):
    """One moment found."""

    score: float
    path: str
    start: float  # seconds
    end: float
    row: int | str  # of the index; in Milvus the moment's key


@dataclass(frozen=True)
class Filters:
    """Which moments may be found; None for no limit."""

    path: str | None = None  # part of the path, upper and lower case are the same
    min_seconds: float | None = None
    max_seconds: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.path, self.min_seconds, self.max_seconds))


def in_order(hits: list[Hit]) -> list[Hit]:
    """Best first; equal scores by path and time, so that the same moments come in the same order from every store."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.start))
