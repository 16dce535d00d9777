# SPDX-License-Identifier: Apache-2.0
"""A run survives SIGKILL, SIGTERM, Ctrl-C, gradients that are not finite and a full disk."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from tests.programs import RunningProgram, run_program, wait_until


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
RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sizes = ("--num_train", 40, "--num_validation", 4, "--num_test", 2, "--num_workers", 1)
    made = run_program("make_motion_clips.py", "--output", folder, *sizes)
    assert made.returncode == 0, made.stderr
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset_name: {folder}\nframe_cache: {folder / 'frames'}\n")
    return folder


def start(clips, output_dir, *arguments, code=None) -> RunningProgram:
    recipe = ("--config", clips / "recipe.yaml", "--output_dir", output_dir)
    return RunningProgram("run_retrieval.py", *recipe, *arguments, code=code)


def finish(run: RunningProgram) -> str:
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return errors


def steps_done(output_dir) -> int:
    log = output_dir / "training_log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(clips, folder))
    return folder


def assert_same_end(output_dir, undisturbed):
    assert (output_dir / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_five_kills_at_random_moments_and_resumes_end_in_the_same_bytes(clips, undisturbed, tmp_path):
    moments = sorted(random.Random(0).sample(range(1, 30), 5))
    for moment in moments:
        run = start(clips, tmp_path, *RESUME)
        wait_until(lambda moment=moment: steps_done(tmp_path) >= moment, run)
        time.sleep(random.Random(moment).uniform(0, 0.05))  # in the middle of a step, a write, a validation
        run.send_signal(signal.SIGKILL)
        assert run.wait(60) == -signal.SIGKILL
    errors = finish(start(clips, tmp_path, *RESUME))
    assert "from step_" in errors
    assert_same_end(tmp_path, undisturbed)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "training_log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, undisturbed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 33  # 30 steps and 3 validations, none twice
    assert not list(tmp_path.glob("checkpoints/.*")) or len(list(tmp_path.glob("checkpoints/step_*"))) == 2


def test_sigterm_to_all_processes_saves_and_the_run_goes_on_from_there(clips, undisturbed, tmp_path):
    run = start(clips, tmp_path, "--checkpointing_steps", "null")
    wait_until(lambda: steps_done(tmp_path) >= 4, run)
    run.send_signal_to_group(signal.SIGTERM)  # as a cluster does: the workers, too
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143 and "go on with --resume_from_checkpoint latest" in errors
    assert "Traceback" not in errors
    saved = int(re.search(r"saved step (\d+)", errors)[1])
    assert (tmp_path / "checkpoints" / f"step_{saved:08d}").is_dir() and saved < 30
    finish(start(clips, tmp_path, *RESUME))
    assert_same_end(tmp_path, undisturbed)


def test_ctrl_c_ends_in_one_line_and_leaves_the_last_checkpoint_whole(clips, undisturbed, tmp_path):
    run = start(clips, tmp_path)
    wait_until(lambda: steps_done(tmp_path) >= 5, run)
    run.send_signal_to_group(signal.SIGINT)  # as a terminal does
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and errors.strip().splitlines()[-1] == "interrupted" and "Traceback" not in errors
    finish(start(clips, tmp_path, *RESUME))
    assert_same_end(tmp_path, undisturbed)


@pytest.fixture
def half_done(undisturbed, tmp_path):
    """A copy of the finished run whose last checkpoint, of the end, is gone: the one of step 28 is the latest."""
    folder = tmp_path / "half_done"
    shutil.copytree(undisturbed, folder)
    last, end = sorted((folder / "checkpoints").iterdir())
    assert (last.name, end.name) == ("step_00000028", "step_00000030")
    shutil.rmtree(end)
    return folder


def damage(folder):
    weights = folder / "checkpoints" / "step_00000028" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (damage, (), "a damaged checkpoint may be deleted"),
        (None, ("--batch_size", 5), "was written with batch_size 4, now it is 5"),
        (None, ("--learning_rate", 2e-3), "was written with learning_rate 0.001, now it is 0.002"),
        (None, ("--num_train_epochs", 4), "was written with num_train_epochs 3, now it is 4"),
        (None, ("--model.dual_softmax_temp", 3), "was written with model {}, now it is {'dual_softmax_temp': 3}"),
        (None, ("--tagger", "none"), "was written with tagger en_core_web_sm, now it is none"),
        (None, ("--model.experts", "[fusion]"), "one of another model does not fit"),
        (None, ("--resume_from_checkpoint", "/nowhere"), "/nowhere is not a training checkpoint; give 'latest'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_with_remedy(clips, half_done, change, arguments, message):
    if change is not None:
        change(half_done)
    recipe = (half_done / "recipe.yaml").read_bytes()
    run = start(clips, half_done, *RESUME, *arguments)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in errors
    assert message in errors.strip().splitlines()[-1]
    assert (half_done / "recipe.yaml").read_bytes() == recipe  # what is there was made with it


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


# The disk is full from the second checkpoint on: no file can grow beyond 20 kB.
FULL = """
import accelerate, resource, signal
original, calls = accelerate.Accelerator.save_state, []
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def save_state(self, folder, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return original(self, folder, *args, **kwargs)
accelerate.Accelerator.save_state = save_state
"""


def test_a_full_disk_stops_the_run_and_leaves_the_previous_checkpoint_whole(clips, undisturbed, tmp_path):
    run = start(clips, tmp_path, code=FULL)
    _, errors = run.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in errors, errors
    assert "cannot write the checkpoint of step 4" in last and "--resume_from_checkpoint latest" in last
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    finish(start(clips, tmp_path, *RESUME))
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_frame_cache_that_cannot_be_written_is_one_line(clips, tmp_path, workers):
    run = start(clips, tmp_path, "--frame_cache", "/proc/frames", "--num_workers", workers)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in errors
    assert "cannot write the frame cache /proc/frames" in errors.strip().splitlines()[-1]
