# SPDX-License-Identifier: Apache-2.0
"""The `evaluate.Metric`, loaded from its file as a user loads it."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from evaluation.scoring import score_retrieval


METRIC = Path(__file__).parents[2] / "training" / "evaluation" / "video_text_retrieval.py"


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRIC))


def test_scores_with_positions(metric):
    result = metric.compute(predictions=[[0.9, 0.1], [0.8, 0.3]], references=[0, 1])
    assert result["text_to_video_R@1"] == 50 and result["text_to_video_MnR"] == 1.5
    assert result["video_to_text_R@1"] == 100 and "video_to_text_caption_max_R@1" not in result


def test_embeddings_with_names_and_a_correction_equal_score_retrieval(metric):
    rng = np.random.default_rng(0)
    texts, videos = rng.standard_normal((30, 8)).astype("float32"), rng.standard_normal((10, 8)).astype("float32")
    names, right = [f"video{m}" for m in range(10)], np.arange(30) % 10
    result = metric.compute(
        predictions=texts,
        references=[names[m] for m in right],
        video_embeddings=videos,
        video_ids=names,
        correction="dual_softmax",
        scale=2.0,
    )
    expected = score_retrieval(texts, videos, right, scale=2.0, bootstrap=0).results["dual_softmax"]
    assert result == {f"{direction}_{name}": x for direction, row in expected.items() for name, x in row.items()}
    assert len(result) == 18


def test_rows_may_come_in_batches(metric):
    scores = np.random.default_rng(1).standard_normal((6, 6))
    for rows in (slice(0, 4), slice(4, 6)):
        metric.add_batch(predictions=scores[rows], references=np.arange(6)[rows])
    assert metric.compute() == metric.compute(predictions=scores, references=list(range(6)))


def test_bad_references_are_named(metric):
    scores = [[0.1, 0.2], [0.3, 0.4]]
    with pytest.raises(ValueError, match="Text 1 belongs to video 'c'"):
        metric.compute(predictions=scores, references=["a", "c"], video_ids=["a", "b"])
    with pytest.raises(ValueError, match="pass `video_ids`"):
        metric.compute(predictions=scores, references=["a", "b"])
    with pytest.raises(ValueError, match="not a finite number"):
        metric.compute(predictions=[[0.1, float("nan")], [0.3, 0.4]], references=[0, 1])
