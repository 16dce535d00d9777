# SPDX-License-Identifier: Apache-2.0
"""Scores one checkpoint on several tests, with temperatures and banks of the data set that it was trained on."""

import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from evaluation.compare_runs import RunRanks
from evaluation.scoring import score_retrieval
from modeling_camoe.retrieval import similarity

from .checkpoint_inputs import CheckpointInputs
from .evaluation_options import EvaluationOptions, choose_temperatures
from .recipe import parse_options


class TestInputs(CheckpointInputs):
    """A checkpoint whose validation data and banks are of one data set, and its tests of others.

    Args:
        options: [`EvaluationOptions`] of the data set with the validation and training splits. tests: of a table.
    """

    read = {}  # splits, in memory once for all checkpoints

    def __init__(self, options: EvaluationOptions, accelerator: Accelerator, tests: list[dict]):
        super().__init__(options, accelerator)
        home, captions = options.dataset_name, []
        self.tests, self.abouts = {}, {}
        for test in tests:
            split, shared = test.get("split", "test"), test.get("shared_columns", [])
            changes = {"dataset_name": test["dataset_name"], "split": split, "shared_columns": shared}
            self.options = dataclasses.replace(options, validation_split=None, **changes)
            self.about = {}
            self.tests[test["name"]], self.abouts[test["name"]] = self.test(), self.about
            captions += self.test_captions
        self.test_captions = captions  # none of them may be in the bank
        self.options = dataclasses.replace(options, dataset_name=home)
        self.own = super().validation()

    def validation(self):
        return self.own

    def _read(self, split: str, limit: int | None = None):
        tagging = self.processor.experts, str(self.processor.tagger), self.processor.streams
        key = json.dumps([self.options.dataset_name, split, limit, *tagging])
        if key not in TestInputs.read:  # many checkpoints read the same
            TestInputs.read[key] = super()._read(split, limit)
        return TestInputs.read[key]


def score_on_tests(checkpoint: Path, words: list[str], tests: list[dict]) -> dict[str, tuple[dict, RunRanks]]:
    """Name of a test -> what eval_results.json would hold of it, and the ranks.

    Args:
        checkpoint: of a trained run. words: arguments of evaluate_retrieval.py; the data set that they name has the
            splits that choose temperatures and make the banks. tests: of the table.
    """
    options = parse_options(EvaluationOptions, ["--checkpoint", str(checkpoint), *words])
    inputs = TestInputs(options, Accelerator(), tests)
    options.corrections = options.corrections or inputs.default_corrections()
    banks = inputs.banks(inputs.own[0]) if any("query_bank" in name for name in options.corrections) else {}
    chosen, _ = choose_temperatures(options, inputs, banks, {})
    common = {"scale": inputs.scale, "corrections": options.corrections, **chosen, **banks}
    scored = {}
    for test in tests:
        data, about = inputs.tests[test["name"]], inputs.abouts[test["name"]]
        results = score_retrieval(**data.data(), bootstrap=0, **common)
        kept = {name: getattr(results, name) for name in ("num_texts", "num_videos", "settings", "results")}
        if "best_clip_shares" in about:
            kept["best_clip_shares"] = about["best_clip_shares"]
        if test.get("twins"):
            kept["right_of_twins"] = right_of_twins(data.text_vectors, data.video_vectors)
        scored[test["name"]] = kept, RunRanks(results.ranks, results.groups, data.keys_of(results.groups))
    return scored


def right_of_twins(text_vectors: torch.Tensor, video_vectors: torch.Tensor) -> dict[str, float]:
    """How often (%) a text prefers its video to that video's twin, and a video its text; 50 is chance.

    Args:
        text_vectors, video_vectors: (N,K) both; rows 2n and 2n + 1 are twins.
    """
    scores = similarity(text_vectors, video_vectors)
    numbers = torch.arange(len(scores))
    own, twins = scores.diagonal(), numbers ^ 1
    return {
        "text_to_video": 100 * (own > scores[numbers, twins]).float().mean().item(),
        "video_to_text": 100 * (own > scores[twins, numbers]).float().mean().item(),
    }
