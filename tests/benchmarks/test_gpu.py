# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py without a GPU: its lines on tiny models, and what happens when one of them fails."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import harness
from harness import Line


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_every_line_runs_on_the_cpu(results, monkeypatch):
    monkeypatch.setattr(gpu.torch, "compile", lambda call: call)  # minutes on a CPU
    gpu.main(["--device", "cpu", "--tiny", "--minutes", "1000"])
    lines = {line["name"]: line for line in json.loads((results / "gpu_tried.json").read_text())["lines"]}
    names = [*gpu.MODELS, "camoe, gradient cache", "camoe, checkpointing"]
    wanted = [f"GPU training, {name}" for name in names] + ["GPU embedding from uint8 frames", "GPU loss, batch 16"]
    for name in wanted:
        assert not lines[name]["skipped"] and lines[name]["ours"] > 0, lines[name]
    # Whether torchcodec loads is a matter of the machine.
    assert lines["GPU decoding, torchcodec"]["skipped"] or lines["GPU decoding, torchcodec"]["peer"] > 0
    assert lines["GPU training, camoe"]["ratio"] > 0 and lines["GPU training, camoe"]["peer_name"] == "clip"


def test_without_a_gpu_one_line_says_so(results):
    gpu.main([])
    (line,) = json.loads((results / "gpu.json").read_text())["lines"]
    assert line["skipped"] == "no CUDA device"


def test_a_line_that_fails_is_named_with_its_cause_and_the_others_run():
    def missing():
        raise ImportError("No module named 'torchcodec'\nmore")

    def broken():
        raise RuntimeError("CUDA error: an illegal access")

    lines = gpu.measure_all({"a": missing, "b": broken, "c": lambda: Line("c", "s", 1.0)}, minutes=1)
    assert [line.skipped for line in lines] == [
        "ImportError: No module named 'torchcodec'", "RuntimeError: CUDA error: an illegal access", "",
    ]  # fmt: skip
    late = gpu.measure_all({"a": missing}, minutes=-1)
    assert late[0].skipped == "the -1 minutes were over"


def test_where_memory_runs_out_the_batch_is_halved_and_the_line_says_so():
    tried = []

    def measure(batch):
        tried.append(batch)
        if batch > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Line("training", "samples/s", 1.0, note="card")

    assert gpu.with_smaller_batches(measure, 128).note == "card; batch 32: memory ran out at 64"
    assert tried == [128, 64, 32]
    with pytest.raises(torch.OutOfMemoryError):
        gpu.with_smaller_batches(lambda batch: measure(1000), 8)


def test_options_are_read_and_wrong_ones_refused(capsys):
    options = gpu.parse(["--batch", "64", "--minutes", "3"])
    assert (options.batch, options.frames, options.minutes, options.device) == (64, 12, 3.0, "cuda")
    for wrong in (["--batch", "0"], ["--device", "tpu"], ["--bach", "4"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)
