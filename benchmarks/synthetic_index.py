# SPDX-License-Identifier: Apache-2.0
"""Indexes of random vectors, without videos and models, for the benches of search."""

from pathlib import Path

import numpy as np

from camoe_search.bank import QueryBank
from camoe_search.database import Description, create
from camoe_search.writer import IndexWriter, StoredWindow


EXPERTS = ["fusion", "entity", "action", "scene"]
BLOCK = 8192  # rows made at a time


def random_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) float32: unit vectors per expert, as a folded text has; a quarter of that for a uniform gate."""
    vectors = np.random.default_rng(seed).standard_normal((count, len(EXPERTS), width // len(EXPERTS)), np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors.reshape(count, width)


def stored_windows(first: int, count: int) -> list[StoredWindow]:
    """Files of one moment each."""
    return [
        StoredWindow(f"{i % 100:02}/{i:07}.mp4", 0.0, 10.0, i, i, f"{i:032x}") for i in range(first, first + count)
    ]


def write_index(
    folder: Path,
    count: int,
    width: int,
    bank_size: int = 16,
    model: str = "random",
    weights: str = "random",
    **settings,
):
    """An index of `count` moments, made block by block; `bank_size` 0 gives it no query bank."""
    create(folder, Description(model, weights, EXPERTS, width // len(EXPERTS), 12, "uniform", **settings))
    with IndexWriter(folder) as writer:
        if bank_size:
            writer.set_bank(QueryBank([""] * bank_size, random_vectors(bank_size, width, seed=1), tau=0.05))
        for first in range(0, count, BLOCK):
            size = min(BLOCK, count - first)
            vectors = random_vectors(size, width, seed=first + 3) / len(EXPERTS)
            writer.add_moments("/videos", stored_windows(first, size), vectors)
        writer.tidy()
