# SPDX-License-Identifier: Apache-2.0
"""What people ask for -> one query vector (K,): texts with weights, what they do not want, a video or a picture.

A score is linear in the query, so that a weighted sum of vectors ranks by the same sum of scores. Positive weights are
scaled to a sum of 1, which keeps scores in the range that one text's has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import SearchError
from .results import Condition


if TYPE_CHECKING:
    from modeling_camoe.frames import Clip


# Our choice: half of what is wanted. With all of it, a search finds rather what differs from NOT than what was asked.
NOT_WEIGHT = 0.5
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


def query_vector(
    wanted: Sequence[WeightedText],
    negative: Sequence[WeightedText],
    like: Any,
    encode_texts: Callable[[list[str]], np.ndarray],
    encode_clip: Callable[[Any], np.ndarray],
) -> np.ndarray:
    """The vector (K,) of a query.

    Args:
        wanted, negative: texts.
        like: None, or a video or picture, of weight 1.
        encode_texts: texts -> (N,K).
        encode_clip: a video or picture -> (1,K).

    Raises:
        SearchError: nothing is wanted, or a weight is not above 0.
    """
    for text, weight in [*wanted, *negative]:
        if not 0 < weight < float("inf"):
            raise SearchError(f"the weight of {text!r} is {weight:g}: give a number above 0")
    if not wanted and like is None:
        raise SearchError("say what to look for: a text, or a video or picture that it is like")
    vectors, weights = [], []
    if wanted or negative:
        vectors.append(encode_texts([text for text, _ in [*wanted, *negative]]))
        weights += [weight for _, weight in wanted] + [-weight for _, weight in negative]
    if like is not None:
        vectors.append(encode_clip(parse_like(like)))
        weights.append(1.0)
    weights = np.asarray(weights, np.float32)
    if len(weights) > 1:
        weights = weights / weights[weights > 0].sum()
    else:
        weights = np.ones(1, np.float32)  # the weight of a text alone means nothing
    return weights @ np.concatenate(vectors)
