# SPDX-License-Identifier: Apache-2.0
"""The query bank of an index: which videos are hubs, and by how much.

A hub ranks high for many queries, whatever they ask. The bank holds captions (training captions, or a user's own query
log); the bias of a moment is how similar it is to all of them (`modeling_camoe.hubs.query_bank_bias`): it depends on
that moment and the bank alone. Q queries, B moments, K entries a vector.
"""

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .exact import products


# The same as in evaluate_retrieval.py, so that evaluation and search agree.
BANK_SIZE = 1000
DEFAULT_TAU = 0.05  # in units of the score, for models whose evaluation chose none


@dataclass(frozen=True)
class QueryBank:
    """Texts that represent what users will ask, and their vectors."""

    texts: list[str]
    vectors: np.ndarray  # (Q,K) float32
    tau: float

    @property
    def hash(self) -> str:
        """The same for the same texts and temperature: with the model it decides every bias."""
        return hashlib.blake2b(json.dumps([self.texts, self.tau]).encode(), digest_size=8).hexdigest()

    def bias(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bias of each of (b,K) vectors, (b,), and the scores of the bank's queries, (Q,b)."""
        import torch

        from modeling_camoe.hubs import query_bank_bias

        scores = products(vectors, self.vectors)
        return query_bank_bias(torch.from_numpy(scores), self.tau).numpy(), scores


def load_model_bank(model_id: str) -> tuple[list[str], float]:
    """The training captions saved with a model (an empty list if there are none), and the temperature that its
    evaluation chose on validation data."""
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model_id, "query_bank.txt", **options)
    texts = subsample(Path(path).read_text(encoding="utf-8").splitlines()) if path else []
    path = cached_file(model_id, "eval_results.json", **options)
    results = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return texts, results.get("settings", {}).get("tau", DEFAULT_TAU)


def subsample(texts: list[str], size: int = BANK_SIZE) -> list[str]:
    """At most `size` of the texts, evenly spaced."""
    size = min(size, len(texts))
    return [texts[i * len(texts) // size] for i in range(size)]


def read_bank(connection: sqlite3.Connection, tau: float | None) -> QueryBank | None:
    """The bank of an index; None if it has none."""
    if tau is None:
        return None
    rows = connection.execute("SELECT text, vector FROM bank ORDER BY query").fetchall()
    vectors = np.frombuffer(b"".join(vector for _, vector in rows), np.float32)
    return QueryBank([text for text, _ in rows], vectors.reshape(len(rows), -1), tau)
