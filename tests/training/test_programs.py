# SPDX-License-Identifier: Apache-2.0
"""The programs, run as a user runs them: train, score and load back; and the errors that mistakes give."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import TRAINING, run_program
from tests.video_files import spoil, write_audio, write_video


RECIPE = """
clip_config:
  projection_dim: 16
  vision_config:
    {image_size: 32, patch_size: 16, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
     num_attention_heads: 2}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 600
num_frames: 3
captions_per_video: one
train_sampling: jitter
batch_size: 8
num_train_epochs: 2
learning_rate: 1.0e-3
clip_learning_rate: 1.0e-3
num_workers: 0
logging_steps: 1
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    made = run_program(
        "make_motion_clips.py", "--output", folder, "--num_train", 24, "--num_validation", 6, "--num_test", 10,
        "--num_workers", 1,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def trained(clips, recipe, tmp_path_factory):
    """A finished run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("run")
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", clips, "--output_dir", folder,
        "--frame_cache", folder / "frames",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_a_model_that_the_auto_classes_load(trained, clips):
    from transformers import AutoModel, AutoProcessor

    import modeling_camoe  # noqa: F401 — registers

    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    videos = sorted((clips / "test").glob("*.mp4"))[:2]
    inputs = processor(text=["a red star spins", "a blue ring grows"], videos=videos, return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        video = model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).pooler_output
    scores = output.logits_per_text / model.clip.logit_scale.exp().item()
    torch.testing.assert_close(text @ video.T, scores, atol=1e-5, rtol=0)


def test_a_run_records_what_it_did(trained, clips):
    log = [json.loads(line) for line in (trained / "training_log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    gate = sum(steps[-1][f"gate_{expert}"] for expert in ("fusion", "entity", "action", "scene"))
    assert gate == pytest.approx(1, abs=1e-5)
    assert [line["step"] for line in log if "validation_Rsum" in line] == [3, 6]
    results = json.loads((trained / "all_results.json").read_text())
    assert results["steps"] == 6 and results["best"]["step"] in (3, 6) and results["bad_videos"] == 0
    bank = (trained / "query_bank.txt").read_text().splitlines()
    train = [json.loads(line) for line in (clips / "train" / "metadata.jsonl").read_text().splitlines()]
    assert len(bank) == 24 * 5 and set(bank) == {text for row in train for text in row["captions"]}
    assert "dataset_name" in (trained / "recipe.yaml").read_text()


def test_evaluation_reports_every_correction_in_both_directions(trained, clips):
    done = run_program("evaluate_retrieval.py", "--checkpoint", trained, "--dataset_name", clips, "--num_workers", 0)
    assert done.returncode == 0, done.stderr
    results = json.loads((trained / "eval_results.json").read_text())
    assert (results["num_texts"], results["num_videos"], results["split"]) == (10, 10, "test")
    assert list(results["results"]) == ["none", "dual_softmax", "query_bank"]
    for by_direction in results["results"].values():
        for direction in ("text_to_video", "video_to_text"):
            assert 0 <= by_direction[direction]["R@1"] <= by_direction[direction]["R@10"] <= 100
    assert results["results"]["none"]["text_to_video"]["R@10"] == 100  # ten clips
    assert "validation" in results["temperatures_from"]["tau"]
    assert "transductive" in results["notes"]["dual_softmax"]
    assert "query_bank" in done.stdout and "R@10" in done.stdout


def test_pictures_are_drawn(trained, clips):
    done = run_program("show_retrieval.py", "--checkpoint", trained, "--dataset_name", clips, "--num_workers", 0)
    assert done.returncode == 0, done.stderr
    for name in ("retrieval_grid.png", "training_curves.png"):
        assert (trained / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (trained / name).stat().st_size > 10_000
    assert "  1. " in done.stdout


def test_the_program_runs_by_its_path_and_explains_its_options(tmp_path):
    command = [sys.executable, TRAINING / "run_retrieval.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for name in ("--gradient_cache_chunk", "--feature_cache", "--lora", "--resume_from_checkpoint"):
        assert name in done.stdout
    assert "exact contrastive batches larger than memory (default: None)" in " ".join(done.stdout.split())


def test_a_dry_run_says_what_it_would_do_and_leaves_nothing(clips, recipe, tmp_path):
    given = ("--config", recipe, "--dataset_name", clips, "--output_dir", tmp_path / "run", "--dry_run", "true")
    done = run_program("run_retrieval.py", *given)
    assert done.returncode == 0, done.stderr
    assert "24 clips" in done.stdout and not (tmp_path / "run").exists()


def copy_with(clips, folder, change):
    """The clips with one thing changed: `change(train folder, rows of its metadata)`."""
    shutil.copytree(clips, folder)
    metadata = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    change(folder / "train", rows)
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def break_video(folder, rows):
    (folder / rows[3]["file_name"]).write_bytes((folder / rows[3]["file_name"]).read_bytes()[:200])


def mute(folder, rows):
    write_audio(folder / rows[3]["file_name"])


def empty_caption(folder, rows):
    rows[5]["captions"][2] = "  "


def drop_captions(folder, rows):
    for row in rows:
        del row["captions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_video, "train_00003.mp4"),
        (mute, "no video stream"),
        (empty_caption, "row 5 of the data set has an empty caption"),
        (drop_captions, "no column 'captions'"),
    ],
)
def test_bad_data_is_one_line_with_cause_and_exit_code_2(clips, recipe, tmp_path, change, message):
    data = copy_with(clips, tmp_path / "clips", change)
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def empty_window(folder, rows):
    for n, row in enumerate(rows):
        row["start"], row["end"] = (0.5, 0.5) if n == 3 else (0.0, 1.0)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_window_that_is_empty_follows_the_policy_for_bad_videos(clips, recipe, tmp_path, policy):
    data = copy_with(clips, tmp_path / "clips", empty_window)
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--on_bad_video", policy,
    )  # fmt: skip
    cause = "train_00003.mp4: the window is empty: it starts at 0.5 s and ends at 0.5 s"
    if policy == "raise":
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert cause in done.stderr.strip().splitlines()[-1]
    else:
        assert done.returncode == 0, done.stderr
        (listed,) = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
        assert cause in listed["cause"]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_validation_data_without_a_good_clip_is_one_line_before_training(clips, recipe, tmp_path, policy):
    data = shutil.copytree(clips, tmp_path / "clips")
    for path in (data / "validation").glob("*.mp4"):
        path.write_bytes(path.read_bytes()[:200])
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--on_bad_video", policy,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no clip of split 'validation' can be decoded; the first: ") and ".mp4" in last
    assert not (tmp_path / "run" / "training_log.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown option 'learning_rat' in the command line, did you mean 'learning_rate'?"),
        (
            ["--dataset_name", "data/nowhere"],
            "the data set folder data/nowhere does not exist",
        ),  # not asked of the Hub
        (["--model.experts", "[fusion, fusion]"], "`experts` must be a non-empty list of distinct names"),
    ],
)
def test_a_wrong_option_is_one_line_with_cause_and_exit_code_2(clips, recipe, tmp_path, arguments, message):
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", clips, "--output_dir", tmp_path, *arguments
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize("checkpoint", ["missing", "empty"])
def test_a_wrong_checkpoint_folder_is_one_line_with_remedy_and_exit_code_2(clips, tmp_path, checkpoint):
    if checkpoint == "empty":
        (tmp_path / checkpoint).mkdir()
    done = run_program("evaluate_retrieval.py", "--checkpoint", tmp_path / checkpoint, "--dataset_name", clips)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    expected = (
        "has no config.json; give the output_dir of a finished run" if checkpoint == "empty" else "does not exist"
    )
    assert expected in done.stderr.strip().splitlines()[-1]


def test_a_bad_clip_is_skipped_and_listed_when_the_policy_says_so(clips, recipe, tmp_path):
    data = copy_with(clips, tmp_path / "clips", break_video)
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--on_bad_video", "skip",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert {line["video_id"] for line in listed} == {"train_00003"} and "train_00003.mp4" in listed[0]["cause"]
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["bad_videos"] == len(listed)


def test_frames_around_damage_are_taken_when_the_policy_says_so_and_counted(clips, recipe, tmp_path):
    def spoil_some(folder, rows):
        spoil(write_video(folder / rows[3]["file_name"], 72, gop=24, size=(128, 96)), 24, 48)

    data = copy_with(clips, tmp_path / "clips", spoil_some)
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--on_damage", "around",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert line["video_id"] == "train_00003" and line["is_used"] and "damaged from 2.000 to 4.000 s" in line["cause"]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert (results["bad_videos"], results["damaged_videos"]) == (0, 1)
    scored = [("--on_damage", "error"), ()]  # the run's processor remembers
    for options, code in zip(scored, (2, 0), strict=True):
        done = run_program(
            "evaluate_retrieval.py", "--checkpoint", tmp_path / "run", "--dataset_name", data, "--split", "train",
            "--train_split", "null", "--num_workers", 0, *options,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert len(results["damaged_videos"]) == 1 and results["bad_videos"] == []


def test_where_no_clip_can_be_decoded_the_run_stops_with_one_line(clips, recipe, tmp_path):
    def break_all(folder, rows):
        for row in rows:
            (folder / row["file_name"]).write_bytes(b"no video")

    data = copy_with(clips, tmp_path / "clips", break_all)
    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--on_bad_video", "skip", "--captions_per_video", "all",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no clip of the training split can be decoded" in done.stderr.strip().splitlines()[-1]
    assert len((tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()) == 24


def test_the_choices_of_the_method_go_together_and_the_test_curve_chooses_nothing(clips, recipe, tmp_path):
    from modeling_camoe import CAMoEProcessor

    done = run_program(
        "run_retrieval.py", "--config", recipe, "--dataset_name", clips, "--output_dir", tmp_path,
        "--ema_decay", 0.5, "--layer_decay", 0.5, "--gradient_checkpointing", "--frames_per_second", 1,
        "--report_test_split", "test", "--checkpointing_steps", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch 1: test R@1" in done.stdout and "(not used for selection)" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "test_Rsum" in line]) == 2
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["best"]["Rsum"] == max(line["validation_Rsum"] for line in lines if "validation_Rsum" in line)
    assert results["same_captions"] == sum(line.get("same_captions", 0) for line in lines)
    assert CAMoEProcessor.from_pretrained(tmp_path).video_processor.fps == 1
    average = torch.load(tmp_path / "checkpoints" / "step_00000006" / "custom_checkpoint_2.pkl", weights_only=False)
    published = load_file(tmp_path / "model.safetensors")
    assert average["average"][0].shape in {tensor.shape for tensor in published.values()}


def test_a_second_run_on_the_same_clips_tags_nothing(clips, recipe, tmp_path):
    count = f"""
import data.captioned_clips as c
original = c.caption_streams
def counted(captions, *arguments):
    with open({str(tmp_path / "tagged")!r}, "a") as file:
        file.write("x" * len(captions))
    return original(captions, *arguments)
c.caption_streams = counted
import datasets
datasets.config.HF_DATASETS_CACHE = {str(tmp_path / "cache")!r}
"""
    tagged = []
    for name in ("first", "second"):
        (tmp_path / "tagged").write_text("")
        done = run_program(
            "run_retrieval.py", "--config", recipe, "--dataset_name", clips, "--output_dir", tmp_path / name,
            "--max_train_steps", 1, code=count,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tagged.append(len((tmp_path / "tagged").read_text()))
    assert tagged == [(24 + 6) * 5, 0]
