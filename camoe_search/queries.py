# SPDX-License-Identifier: Apache-2.0
"""What people ask for -> a query vector (K,): texts with weights, what they do not want, a video or a picture.

A score is linear in the query, so that a weighted sum of vectors ranks by the same sum of scores. Positive weights are
scaled to a sum of 1, which keeps scores in the range that one text's has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import SearchError
from .results import Condition
from .text_encoder import check_texts


if TYPE_CHECKING:
    from modeling_camoe.frames import Clip


# Our choice: half of what is wanted. With all of it, a search finds rather what differs from NOT than what was asked.
NOT_WEIGHT = 0.5
MAX_WEIGHT = 1000.0  # of a text or an expert, beside 1 for the others
SEGMENT = re.compile(r"(.+)@(\d+(?:\.\d*)?)-(\d+(?:\.\d*)?)")  # film.mp4@12.5-15
WEIGHTED = re.compile(r"(.*\S)\s*\*\s*(\d*\.?\d+)", re.DOTALL)  # on a beach*0.5
CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*", re.DOTALL)


class WeightedText(NamedTuple):
    """A text and how much of it is wanted."""

    text: str
    weight: float = 1.0


def parse_weighted(text: str, weight: float = 1.0) -> WeightedText:
    """ "on a beach*0.5" -> its text and weight; `weight` where none is written."""
    found = WEIGHTED.fullmatch(text)
    return WeightedText(found[1], float(found[2])) if found else WeightedText(text, weight)


def parse_condition(text: str) -> Condition:
    """ "year>=2020" -> a condition on metadata.

    Raises:
        SearchError: it is of another form.
    """
    found = CONDITION.fullmatch(text)
    if found is None:
        raise SearchError(f"{text!r} is not a condition such as year>=2020 or place=Rome")
    return Condition(*found.groups())


def parse_like(source: Any) -> str | bytes | Clip | Any:
    """The path of a video or picture, or "film.mp4@12.5-15" -> what a model encodes. Anything else as it is.

    Raises:
        SearchError: the end of the segment is not after its start.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str) or os.path.exists(source):  # a file may have such a name itself
        return source
    found = SEGMENT.fullmatch(source)
    if found is None:
        return source
    from modeling_camoe.frames import Clip

    start, end = float(found[2]), float(found[3])
    if end <= start:
        raise SearchError(f"{source}: the segment ends before it starts; give FILE@START-END in seconds")
    return Clip(found[1], start, end)


def as_weighted(query: str | Sequence[str | tuple[str, float]] | None) -> list[WeightedText]:
    """A text, or several, each alone or with a weight."""
    if query is None:
        return []
    if isinstance(query, str):
        return [WeightedText(query)]
    return [WeightedText(each) if isinstance(each, str) else WeightedText(*each) for each in query]


def as_negative(query: str | Sequence[str | tuple[str, float]]) -> list[WeightedText]:
    """What is not wanted: weight NOT_WEIGHT where none is given."""
    texts = [query] if isinstance(query, str) else query
    return [WeightedText(each, NOT_WEIGHT) if isinstance(each, str) else WeightedText(*each) for each in texts]


@dataclass(frozen=True)
class Query:
    """What somebody asks for.

    Args:
        wanted, negative: texts.
        like: None, or a video or picture, of weight 1.
        then: texts for what comes later in the same file; None: it does not matter.

    Raises:
        SearchError: nothing is wanted, a text is empty, or a weight is not above 0 or too large.
    """

    wanted: Sequence[WeightedText]
    negative: Sequence[WeightedText] = ()
    like: Any = None
    then: Sequence[WeightedText] | None = None

    def __post_init__(self):
        texts = [*self.wanted, *self.negative, *(self.then or ())]
        for text, weight in texts:
            if not 0 < weight <= MAX_WEIGHT:
                raise SearchError(f"the weight of {text!r} is {weight:g}: give a number above 0, up to {MAX_WEIGHT:g}")
        if (not self.wanted and self.like is None) or (self.then is not None and not self.then):
            raise SearchError("say what to look for: a text, or a video or picture that it is like")
        check_texts([text for text, _ in texts])

    @property
    def text(self) -> str:
        """All that is wanted, for a search by words."""
        return " ".join(text for text, _ in self.wanted)


def make_query(query, negative=(), like: Any = None, then=None) -> Query:
    """From what the arguments of `VideoIndex.search` may be; raises as [`Query`]."""
    return Query(as_weighted(query), as_negative(negative), like, None if then is None else as_weighted(then))


def encode_queries(
    queries: Sequence[Query],
    encode_texts: Callable[[list[str]], np.ndarray],
    encode_clip: Callable[[Any], np.ndarray],
) -> list[np.ndarray]:
    """The vectors of queries: (1,K) each, or (2,K) with what comes later. All texts are encoded together.

    Args:
        encode_texts: texts -> (N,K).
        encode_clip: a video or picture -> (1,K).
    """
    texts = [text for query in queries for text, _ in [*query.wanted, *query.negative, *(query.then or ())]]
    texts = list(dict.fromkeys(texts))
    encoded = dict(zip(texts, encode_texts(texts), strict=True)) if texts else {}
    vectors = []
    for query in queries:
        signed = [*query.wanted, *(WeightedText(text, -weight) for text, weight in query.negative)]
        like = [] if query.like is None else [encode_clip(parse_like(query.like))[0]]
        vectors.append([_weighted_sum(signed, encoded, like)])
        if query.then is not None:
            vectors[-1].append(_weighted_sum(query.then, encoded, []))
    return [np.stack(rows) for rows in vectors]


def _weighted_sum(texts: Sequence[WeightedText], encoded: dict[str, np.ndarray], like: list[np.ndarray]) -> np.ndarray:
    """(K,) of texts, whose weights may be negative, and of at most one video or picture."""
    vectors = [*(encoded[text] for text, _ in texts), *like]
    if len(vectors) == 1:
        return vectors[0]  # the weight of a text alone means nothing
    weights = np.array([weight for _, weight in texts] + [1.0] * len(like), np.float32)
    return (weights / weights[weights > 0].sum()) @ np.stack(vectors)
