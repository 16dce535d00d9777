# SPDX-License-Identifier: Apache-2.0
"""The benchmark of scoring compares like with like: its peer gives the same ranks, its embeddings are CLIP's kind."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # for its harness
spec = importlib.util.spec_from_file_location("evaluation_benchmark", BENCHMARKS / "evaluation.py")
evaluation = importlib.util.module_from_spec(spec)  # by its path: training/evaluation has the same name
spec.loader.exec_module(evaluation)


@pytest.mark.parametrize("cosines", ["clip", "zero"])
def test_both_ways_give_the_same_ranks(cosines):
    texts, videos = evaluation.embeddings(400, 64, cosines)
    corrections = ("none", "dual_softmax")
    tiles, full = (way(texts, videos, corrections) for way in (evaluation.in_tiles, evaluation.full_matrix))
    for correction in corrections:
        for direction, ranks in tiles[correction].items():
            expected = full[correction][direction]  # in float32, where a product may underflow
            assert np.mean(ranks == expected) > 0.99, (correction, direction)
            assert ranks.mean() == pytest.approx(expected.mean(), rel=1e-3)


def test_embeddings_have_the_cosines_of_clip():
    texts, videos = evaluation.embeddings(2000, 512, "clip")
    cosines = texts @ videos.T
    right = cosines.diagonal().clone()
    cosines.fill_diagonal_(float("nan"))
    others = cosines[~cosines.isnan()]
    assert texts.norm(dim=1).mean() == pytest.approx(1)
    assert others.mean() == pytest.approx(0.2, abs=0.02) and others.std() == pytest.approx(0.04, abs=0.01)
    assert right.mean() == pytest.approx(0.3, abs=0.02)
