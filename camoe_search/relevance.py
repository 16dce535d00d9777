# SPDX-License-Identifier: Apache-2.0
"""How good a score is, in words and from 0 to 1: measured against what windows of the index score on average, so that
a weak first result does not look strong. K entries a folded vector."""

from collections.abc import Callable
from functools import partial

import numpy as np

from .local_store import LocalStore
from .search import IndexSearch


SAMPLE = 256  # windows whose scores say what an average moment of the index scores
# Standard deviations above the average moment -> words. Our choice: scores are not calibrated across models.
WORDS = ((3.0, "Strong match"), (2.0, "Good match"), (1.0, "Fair match"))
WEAK = "Weak match"


class Relevance:
    """The scale of an index, which is read again when the index changes."""

    def __init__(self):
        self._sample: tuple = (None,)  # rows of the index that it is of, vectors, biases

    def judges(
        self, index: IndexSearch, queries: np.ndarray, weights: dict[str, float], correction: str
    ) -> list[Callable[[float, float], tuple[float, str]]]:
        """For each query a function: a score, and that of the best result -> (relevance from 0 to 1, in words).

        Args:
            queries: (N,K) vectors.
            weights: expert -> weight.
        """
        if weights:
            names = index.description.experts
            factors = np.array([weights.get(name, 1.0) for name in names], np.float32)
            queries = queries * np.repeat(factors, index.description.dim)
        vectors, bias = self._vectors(index)
        scores = queries @ vectors.T - (0 if correction == "none" else bias)  # (N,s)
        return [partial(_judge, float(row.mean()), float(row.std())) if len(row) else _judge_alone for row in scores]

    def _vectors(self, index: IndexSearch) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (s,K) and biases (s,) of windows spread evenly over the index; none of an index in Milvus only."""
        if not isinstance(index.store, LocalStore):
            return np.empty((0, index.description.width), np.float32), np.empty(0, np.float32)
        with index.store.state() as rows:
            known, *sample = self._sample
            if known is not rows:
                step = max(1, -(-sum(len(part.vectors) for part in rows.parts) // SAMPLE))
                vectors = [np.asarray(part.vectors[::step], np.float32) for part in rows.parts]
                biases = [part.bias[::step] for part in rows.parts]
                empty = np.empty((0, index.description.width), np.float32)
                sample = np.concatenate([empty, *vectors]), np.concatenate([empty[:, 0], *biases])
                self._sample = (rows, *sample)
            return tuple(sample)


def _judge(mean: float, deviation: float, score: float, best: float) -> tuple[float, str]:
    distance = (score - mean) / max(deviation, 1e-6)
    word = next((word for least, word in WORDS if distance >= least), WEAK)
    return min(1.0, max(0.0, (score - mean) / max(best - mean, 1e-6))), word


_judge_alone = partial(_judge, 0.0, 0.0)  # where nothing is known of the index
