# SPDX-License-Identifier: Apache-2.0
"""What scoring.py makes of ranks: results, intervals, temperatures, tests, tables."""

import json
import math

import numpy as np
import pytest
import torch

from data.files import write_json
from evaluation.protocol import Ranks, paired_test, recall_intervals, recalls
from evaluation.scoring import choose_temperature, results_table, score_retrieval
from tests.random_vectors import random_vectors


def untied(ranks) -> Ranks:
    """Ranks of queries whose right answer has a score of its own."""
    return Ranks(np.asarray(ranks) - 1, np.zeros(len(ranks)))


def test_results_name_every_correction_and_say_what_is_transductive():
    texts, videos = random_vectors(30, 30, seed=7)
    scored = score_retrieval(texts, videos, text_bank=texts[:5], corrections=("dual_softmax", "query_bank"), tau=0.2)
    assert list(scored.results) == ["none", "dual_softmax", "query_bank"]
    assert list(scored.results["none"]) == ["text_to_video", "video_to_text"]
    assert list(scored.results["query_bank"]) == ["text_to_video"]  # no bank of videos was given
    assert "transductive" in scored.notes["dual_softmax"] and "transductive" not in scored.notes["query_bank"]
    assert scored.settings["tau"] == 0.2 and scored.settings["text_bank"] == 5
    metrics = scored.results["none"]["text_to_video"]
    assert metrics["Rsum"] == pytest.approx(metrics["R@1"] + metrics["R@5"] + metrics["R@10"])
    low, high = metrics["R@5_ci95"]
    assert low <= metrics["R@5"] <= high
    assert json.loads(json.dumps(scored.to_dict())) == scored.to_dict()


def test_many_captions_are_reported_under_both_protocols():
    texts, videos = random_vectors(12, 4, seed=8)
    scored = score_retrieval(texts, videos, torch.arange(12) // 3)
    assert list(scored.results["none"]) == ["text_to_video", "video_to_text", "video_to_text_caption_max"]
    assert "best caption" in scored.protocol and "CLIP4Clip" in scored.protocol


def test_the_chosen_temperature_is_the_best_on_the_data_it_is_given():
    # Three videos; the last is a hub that only a prior sharper than its lead demotes.
    texts = torch.eye(3)
    videos = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.6, 0.6, 0.9]])
    candidates = (100.0, 1.0, 0.1)
    found = {
        temp: score_retrieval(texts, videos, dual_softmax_temp=temp, bootstrap=0).results["dual_softmax"]
        for temp in candidates
    }
    recall = {temp: result["text_to_video"]["R@1"] for temp, result in found.items()}
    assert recall[0.1] == 100 and recall[100.0] < 50
    assert choose_temperature(texts, videos, candidates=candidates) == max(recall, key=recall.get)
    assert choose_temperature(texts, videos, candidates=(0.1, 0.05)) == 0.1  # equals: the first


def test_the_bank_of_videos_has_a_temperature_of_its_own():
    texts, videos = random_vectors(30, 30, seed=9)
    bank, candidates = random_vectors(40, 1, seed=10)[0], (0.01, 0.05, 0.2, 1.0)

    def recall(direction, **options):
        scored = score_retrieval(texts, videos, corrections=("query_bank",), bootstrap=0, **options)
        return scored.results["query_bank"][direction]["R@1"], scored.results["query_bank"][direction]["Rsum"]

    alone = {temp: recall("video_to_text", video_bank=bank, video_tau=temp) for temp in candidates}
    assert len(set(alone.values())) > 1
    options = {"candidates": candidates, "correction": "query_bank", "direction": "video_to_text", "video_bank": bank}
    assert choose_temperature(texts, videos, **options) == max(alone, key=alone.get)
    for temp in candidates:  # one for both, unless it is said otherwise; and the captions' is not touched
        assert recall("video_to_text", video_bank=bank, tau=temp) == alone[temp]
        both = {"text_bank": bank, "video_bank": bank, "tau": 0.1, "video_tau": temp}
        assert recall("text_to_video", **both) == recall("text_to_video", text_bank=bank, tau=0.1)
        assert recall("video_to_text", **both) == alone[temp]


def test_bootstrap_interval_is_that_of_a_share():
    ranks = untied(np.where(np.arange(1000) < 450, 1.0, 20.0))
    low, high = recall_intervals(ranks, None, bootstrap=4000)["R@1_ci95"]
    width = 1.96 * 100 * math.sqrt(0.45 * 0.55 / 1000)
    assert low == pytest.approx(45 - width, abs=0.3) and high == pytest.approx(45 + width, abs=0.3)


def test_captions_that_rise_and_fall_together_widen_the_interval():
    ranks = untied(np.repeat(np.where(np.arange(100) < 45, 1.0, 20.0), 10))  # ten captions a video, all alike
    low, high = recall_intervals(ranks, np.repeat(np.arange(100), 10), bootstrap=4000)["R@1_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.45 * 0.55 / 100), abs=1.5)


def test_paired_test_sees_a_difference_that_two_intervals_hide():
    a = untied(np.where(np.arange(1000) < 470, 1.0, 20.0))
    b = untied(np.where(np.arange(1000) < 450, 1.0, 20.0))  # a is right wherever b is, and 20 times more
    test = paired_test(a, b)
    assert test["difference"] == pytest.approx(2.0) and test["p_value"] < 0.001
    assert 0 < test["ci95"][0] < 2 < test["ci95"][1]
    assert paired_test(a, a)["p_value"] == 1
    assert paired_test(b, a)["difference"] == pytest.approx(-2.0)
    with pytest.raises(ValueError, match="same queries"):
        paired_test(a, b[:5])


def test_paired_test_is_exact_where_all_differences_have_one_sign():
    a, b = untied(np.ones(200)), untied(np.where(np.arange(200) < 5, 20.0, 1.0))  # 5 of 5: two-sided p = 2 / 2**5
    assert paired_test(a, b)["p_value"] == pytest.approx(2 / 32, abs=0.01)
    # ten captions each of the same five videos are five differences, not fifty
    a, b = (ranks[np.repeat(np.arange(200), 10)] for ranks in (a, b))
    assert paired_test(a, b, np.repeat(np.arange(200), 10))["p_value"] == pytest.approx(2 / 32, abs=0.01)
    assert paired_test(a, b)["p_value"] < 0.001


def test_a_tie_counts_as_the_share_of_orders_in_which_it_is_right():
    ranks = Ranks(np.array([0, 2, 7]), np.array([3, 9, 0]))  # ranks 1 to 4, 3 to 12, 8
    metrics = recalls(ranks)
    assert metrics["R@1"] == pytest.approx(100 * (1 / 4) / 3)
    assert metrics["R@5"] == pytest.approx(100 * (1 + 3 / 10) / 3)
    assert metrics["R@10"] == pytest.approx(100 * (1 + 8 / 10 + 1) / 3)
    assert (metrics["MdR"], metrics["MnR"]) == (7.5, (2.5 + 7.5 + 8) / 3)


def test_ties_take_part_in_intervals_and_in_the_paired_test():
    tied, right = Ranks(np.zeros(400), np.ones(400)), untied(np.ones(400))
    assert recall_intervals(tied, None)["R@1_ci95"] == [50, 50]  # every query is right in half of the orders
    test = paired_test(right, tied)
    assert test["difference"] == 50 and test["ci95"] == [50, 50] and test["p_value"] < 0.001
    assert paired_test(right, tied, at=5)["difference"] == 0


def test_table_has_a_row_for_every_correction_and_direction():
    texts, videos = random_vectors(30, 30, seed=9)
    scored = score_retrieval(texts, videos)
    lines = results_table(scored.to_dict()).splitlines()
    assert lines[0].split() == ["correction", "direction", "R@1", "R@5", "R@10", "MdR", "MnR", "Rsum"]
    metrics = scored.results["none"]["text_to_video"]
    assert lines[2].startswith("none") and f"{metrics['R@1']:.1f} [{metrics['R@1_ci95'][0]:.1f}, " in lines[2]
    assert len(lines) == 2 + 4 + 2 and "transductive" in lines[-1]


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "eval_results.json"
    write_json(path, {"R@1": 1.0})
    with pytest.raises(ValueError):
        write_json(path, {"R@1": math.nan})
    assert json.loads(path.read_text()) == {"R@1": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["eval_results.json"]
