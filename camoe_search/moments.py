# SPDX-License-Identifier: Apache-2.0
"""From windows that were found to moments: overlapping windows of a file become one result.

The best window is the peak of a moment. Its neighbours belong to the moment as long as they overlap or touch it, and
score at least half way from the average of their file to the peak (the full width at half maximum, as of a peak in a
signal). Windows that overlap a moment and score less are part of no result. So results never overlap, and a moment
ends where the film turns to something else, not where the list of candidates happens to end.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np


# Windows of a file, evenly spaced, whose mean score is its average: reading all vectors of a long film takes long.
AVERAGED = 64
EPSILON = 1e-6  # seconds


@dataclass(frozen=True)
class Windows:
    """The windows of one file's content, by start."""

    owner: int | str  # id of the content, or the path
    starts: np.ndarray  # (w,) seconds
    ends: np.ndarray
    keys: list[str]
    rows: np.ndarray | None = None  # (w,) their places among the vectors


@dataclass
class Timeline:
    """The scores of a file's windows for one query, computed when they are asked for.

    Args:
        windows: of the file.
        score: numbers of windows -> their scores.
    """

    windows: Windows
    score: Callable[[np.ndarray], np.ndarray]
    fixed: set[int] = field(default_factory=set)  # windows that were not found by their score: moments as they are
    _known: dict[int, float] = field(default_factory=dict)

    def note(self, number: int, score: float):
        """A score that a search has found."""
        self._known[number] = score

    def scores(self, numbers: Iterable[int]) -> np.ndarray:
        numbers = list(numbers)
        unknown = [number for number in numbers if number not in self._known]
        if unknown:
            self._known.update(zip(unknown, self.score(np.array(unknown)).tolist(), strict=True))
        return np.array([self._known[number] for number in numbers])

    @cached_property
    def average(self) -> float:
        count = len(self.windows.starts)
        return float(self.scores(np.unique(np.linspace(0, count - 1, min(count, AVERAGED)).astype(int))).mean())

    def level(self, peak: float) -> float:
        """What a window has to score to belong to a moment."""
        return (peak + self.average) / 2


class Moment(NamedTuple):
    """A peak and the time of its moment."""

    score: float  # by which results are ranked
    timeline: Timeline
    number: int  # of the best window
    start: float  # seconds
    end: float


Span = tuple[float, float]


def merge_windows(candidates: Iterable[tuple[float, Timeline, int]], k: int, by_file: bool = False) -> list[Moment]:
    """The first k moments.

    Args:
        candidates: (score, timeline, number of the window), best first.
        by_file: only the best moment of each file.
    """
    moments: list[Moment] = []
    taken: dict[int | str, list[Span]] = {}
    for score, timeline, number in candidates:
        if len(moments) == k:
            break
        spans = taken.setdefault(timeline.windows.owner, [])
        start, end = float(timeline.windows.starts[number]), float(timeline.windows.ends[number])
        if spans and (by_file or _overlaps(start, end, spans)):
            continue
        start, end = _extend(timeline, number, spans)
        spans.append((start, end))
        moments.append(Moment(score, timeline, number, start, end))
    return moments


def stand_out(timeline: Timeline) -> list[Moment]:
    """The moments of a file that reach half way from its average to its best window, by time."""
    scores = timeline.scores(range(len(timeline.windows.starts)))
    order = np.argsort(-scores, kind="stable")
    level = timeline.level(float(scores.max()))
    candidates = [(float(scores[n]), timeline, int(n)) for n in order if scores[n] >= level]
    return sorted(merge_windows(candidates, len(candidates)), key=lambda moment: moment.start)


def best_pair(windows: Windows, first: np.ndarray, second: np.ndarray) -> tuple[float, int, int] | None:
    """The two windows, the second beginning where the first has ended or later, with the highest sum of scores.

    Args:
        first, second: (w,) scores of all windows for the two queries.

    Returns:
        The mean of the two scores and the windows' numbers; None where no two windows follow each other.
    """
    order = np.argsort(windows.ends, kind="stable")
    ended = np.searchsorted(windows.ends[order], windows.starts + EPSILON, side="right")  # windows before each
    if not ended.any():
        return None
    scores = first[order]
    best = np.maximum.accumulate(scores)
    sums = np.where(ended > 0, second + best[np.maximum(ended, 1) - 1], -np.inf)
    later = int(sums.argmax())
    earlier = int(order[: ended[later]][scores[: ended[later]].argmax()])
    return float(sums[later]) / 2, earlier, later


def _extend(timeline: Timeline, number: int, spans: list[Span]) -> Span:
    """The time of a moment: its best window, and what belongs to it on both sides."""
    starts, ends = timeline.windows.starts, timeline.windows.ends
    start, end = float(starts[number]), float(ends[number])
    if len(starts) == 1 or number in timeline.fixed:
        return start, end
    level = timeline.level(float(timeline.scores([number])[0]))
    for step in (-1, 1):
        other = number + step
        while 0 <= other < len(starts):
            begin, finish = float(starts[other]), float(ends[other])
            touches = begin <= end + EPSILON and finish >= start - EPSILON
            if not touches or _overlaps(begin, finish, spans) or timeline.scores([other])[0] < level:
                break
            start, end = min(start, begin), max(end, finish)
            other += step
    return start, end


def _overlaps(start: float, end: float, spans: list[Span]) -> bool:
    return any(start < other_end - EPSILON and end > other_start + EPSILON for other_start, other_end in spans)
