# SPDX-License-Identifier: Apache-2.0
"""The query bank of an index: which videos are hubs, and by how much.

A hub ranks high for many queries, whatever they ask. The bank holds captions (training captions, or a user's own query
log); the bias of a moment is how similar it is to all of them (`modeling_camoe.hubs.query_bank_bias`). Q queries,
B moments, K entries a vector.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import cached_file

from modeling_camoe.hubs import query_bank_bias
from modeling_camoe.retrieval import similarity


# The same as in evaluate_retrieval.py, so that evaluation and search agree.
BANK_SIZE = 1000
DEFAULT_TAU = 0.05  # in units of the score, for models whose evaluation chose none

BLOCK = 4096  # moments scored at a time: (1000, 4096) floats are 16 MB


@dataclass(frozen=True)
class QueryBank:
    """Texts that represent what users will ask, and their vectors."""

    texts: list[str]
    vectors: np.ndarray  # (Q,K) float32
    tau: float


def load_model_bank(model_id: str) -> tuple[list[str], float]:
    """The training captions saved with a model (an empty list if there are none), and the temperature that its
    evaluation chose on validation data."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model_id, "query_bank.txt", **options)
    texts = subsample(Path(path).read_text(encoding="utf-8").splitlines()) if path else []
    path = cached_file(model_id, "eval_results.json", **options)
    results = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return texts, results.get("settings", {}).get("tau", DEFAULT_TAU)


def subsample(texts: list[str], size: int = BANK_SIZE) -> list[str]:
    """At most `size` of the texts, evenly spaced."""
    return texts[:: max(1, len(texts) // size)][:size]


def hub_bias(bank: QueryBank | None, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bias b_v of each of (B,K) vectors, and whether it is the best one for some query of the bank: (B,), (B,).

    Works in blocks, so that the whole (Q,B) matrix is never in memory: a bias depends on its own column alone, and the
    best moment of a query is a running maximum.
    """
    bias, is_hub = np.zeros(len(vectors), np.float32), np.zeros(len(vectors), bool)
    if bank is None or not len(vectors):
        return bias, is_hub
    queries = torch.from_numpy(bank.vectors)
    best_score = torch.full((len(queries),), -torch.inf)
    best = torch.zeros(len(queries), dtype=torch.long)  # best moment of each query so far
    for start in range(0, len(vectors), BLOCK):
        block = slice(start, start + BLOCK)
        scores = similarity(queries, torch.tensor(vectors[block]))  # (Q, block)
        bias[block] = query_bank_bias(scores, bank.tau).numpy()
        block_score, block_best = scores.max(dim=1)
        is_better = block_score > best_score  # on a tie the first one stays, as with argmax
        best[is_better] = block_best[is_better] + start
        best_score = torch.maximum(best_score, block_score)
    is_hub[best] = True
    return bias, is_hub
