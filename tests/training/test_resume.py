# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A run survives what happens to runs: SIGKILL, SIGTERM, a gradient that is not finite, a disk that is full."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "training" / "run_retrieval.py"

RECIPE = """
clip_config:
  projection_dim: 16
  vision_config: {image_size: 16, patch_size: 8, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
                  num_attention_heads: 2, attention_dropout: 0.1}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 600
num_frames: 2
captions_per_video: one
train_sampling: jitter
batch_size: 4
num_train_epochs: 3
learning_rate: 1.0e-3
clip_learning_rate: 1.0e-3
num_workers: 1
logging_steps: 1
checkpointing_steps: 2
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    command = [sys.executable, ROOT / "training" / "make_motion_clips.py", "--output", folder, "--num_train", "40"]
    subprocess.run([*command, "--num_validation", "4", "--num_test", "2"], check=True, capture_output=True)
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset_name: {folder}\nframe_cache: {folder / 'frames'}\n")
    return folder


def start(clips, output_dir, *arguments, code=None):
    """Start a run; `code` is executed before the program, in its process."""
    arguments = ["--config", clips / "recipe.yaml", "--output_dir", output_dir, *arguments]
    program = f"import sys, runpy; sys.path.insert(0, {str(PROGRAM.parent)!r})\n{code or ''}\n"
    program += f"sys.argv = ['run_retrieval.py', *sys.argv[1:]]; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(run) -> str:
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return errors


def steps_done(output_dir) -> int:
    log = output_dir / "training_log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_step(output_dir, step, run):
    deadline = time.monotonic() + 120
    while steps_done(output_dir) < step:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(clips, folder))
    return folder


def test_five_kills_at_random_moments_and_resumes_end_in_the_same_bytes(clips, undisturbed, tmp_path):
    moments = sorted(random.Random(0).sample(range(1, 30), 5))
    for moment in moments:
        run = start(clips, tmp_path, "--resume_from_checkpoint", "latest")
        wait_for_step(tmp_path, moment, run)
        time.sleep(random.Random(moment).uniform(0, 0.05))  # in the middle of a step, a write, a validation
        run.send_signal(signal.SIGKILL)
        run.wait(60)
        assert run.returncode == -signal.SIGKILL
    errors = finish(start(clips, tmp_path, "--resume_from_checkpoint", "latest"))
    assert "from step_" in errors
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    losses = [
        [json.loads(line).get("loss") for line in (folder / "training_log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, undisturbed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 33  # 30 steps and 3 validations, none twice
    assert not list(tmp_path.glob("checkpoints/.*")) or len(list(tmp_path.glob("checkpoints/step_*"))) == 2


def test_sigterm_saves_and_the_run_goes_on_from_there(clips, undisturbed, tmp_path):
    run = start(clips, tmp_path, "--checkpointing_steps", "null")
    wait_for_step(tmp_path, 4, run)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143 and "go on with --resume_from_checkpoint latest" in errors
    saved = json.loads(errors.split("saved step ")[1].split(";")[0])
    assert (tmp_path / "checkpoints" / f"step_{saved:08d}").is_dir() and saved < 30
    finish(start(clips, tmp_path, "--resume_from_checkpoint", "latest"))
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


# Makes the loss of step 13 (and of step 14, when skipping) not a number.
NAN = """
import modeling_camoe.modeling_camoe as m
original, calls = m.CAMoEModel.retrieval_loss, []
def poisoned(self, *args, **kwargs):
    calls.append(1)
    loss = original(self, *args, **kwargs)
    return loss * float("nan") if len(calls) in (13, 14) else loss
m.CAMoEModel.retrieval_loss = poisoned
"""


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_videos(clips, tmp_path):
    run = start(clips, tmp_path, code=NAN)
    _, errors = run.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in errors
    assert "at step 13; the batch's videos: train_000" in last and "step_00000012" in last
    names = last.split("videos: ")[1].split(";")[0].split(", ")
    assert len(names) == 4 and all((clips / "train" / f"{name}.mp4").is_file() for name in names)


def test_steps_that_are_not_finite_are_skipped_and_counted_when_the_policy_says_so(clips, tmp_path):
    errors = finish(start(clips, tmp_path, "--on_nan", "skip", code=NAN))
    assert "skipped a step (2)" in errors
    assert json.loads((tmp_path / "all_results.json").read_text())["skipped_steps"] == 2
    run = start(clips, tmp_path / "limit", "--on_nan", "skip", "--max_nan_skips", "1", code=NAN)
    assert run.wait(120) == 2


# The disk is full from the second checkpoint on.
FULL = """
import accelerate
original, calls = accelerate.Accelerator.save_state, []
def save_state(self, folder, *args, **kwargs):
    calls.append(1)
    original(self, folder, *args, **kwargs)
    if len(calls) > 1:
        raise OSError(28, "No space left on device")
accelerate.Accelerator.save_state = save_state
"""


def test_a_full_disk_stops_the_run_and_leaves_the_previous_checkpoint_whole(clips, undisturbed, tmp_path):
    run = start(clips, tmp_path, code=FULL)
    _, errors = run.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert run.returncode == 2 and "No space left on device" in last and "--resume_from_checkpoint latest" in last
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    finish(start(clips, tmp_path, "--resume_from_checkpoint", "latest"))
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
