# SPDX-License-Identifier: Apache-2.0
"""The motion clips are what their metadata says, the same for the same seed, and safe to interrupt."""

import collections
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import datasets
import make_motion_clips
import numpy as np
import pytest

from modeling_camoe.frames import sample_frames
from motion import captions, other_captions, paths, plan, scenes
from tests.programs import TRAINING


COUNTS = ("--num_train", "6", "--num_validation", "3", "--num_test", "4")


def make(folder, *arguments) -> int:
    return make_motion_clips.main(["--output", str(folder), "--num_workers", "1", *map(str, arguments)])


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder, split) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert make(folder, *COUNTS) == 0
    return folder


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(demo, tmp_path):
    assert make(tmp_path, *COUNTS, "--num_workers", 2) == 0
    assert files_of(tmp_path) == files_of(demo)


def test_another_seed_gives_other_clips(demo, tmp_path):
    assert make(tmp_path, *COUNTS, "--seed", 1) == 0
    ours, theirs = files_of(demo), files_of(tmp_path)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] == theirs[name]]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(demo, tmp_path):
    assert make(tmp_path, "--num_train", 4, "--num_validation", 0, "--num_test", 2) == 0
    assert not (tmp_path / "validation").exists()
    for split, count in (("train", 4), ("test", 2)):
        assert rows_of(tmp_path, split) == rows_of(demo, split)[:count]
        for row in rows_of(tmp_path, split):
            assert (tmp_path / split / row["file_name"]).read_bytes() == (demo / split / row["file_name"]).read_bytes()


def test_clips_are_h264_of_varying_form(demo):
    forms = []
    for path in sorted(demo.rglob("*.mp4")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(video=0))
            assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
            assert 0.9 <= frames / stream.average_rate <= 3.1
            assert 80 <= min(stream.width, stream.height) < max(stream.width, stream.height) <= 160
            forms.append((stream.width, stream.height, stream.average_rate, frames))
    assert len(forms) == 13
    for values in zip(*forms, strict=True):
        assert len(set(values)) > 3


def test_the_folder_loads_as_a_video_folder(demo):
    loaded = datasets.load_dataset("videofolder", data_dir=str(demo))
    loaded = loaded.cast_column("video", datasets.Video(decode=False))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "validation": 3, "test": 4}
    for split, rows in loaded.items():
        assert set(rows.column_names) == {"video", "video_id", "captions", "color", "shape", "action", "scene"}
        for row, expected in zip(rows, rows_of(demo, split), strict=True):
            assert Path(row["video"]["path"]).name == expected["file_name"]
            assert row["captions"] == expected["captions"] and len(row["captions"]) == 5


def test_the_full_preset_describes_two_entities(tmp_path):
    assert make(tmp_path, "--preset", "full", "--num_train", 3, "--num_validation", 0, "--num_test", 0) == 0
    for row in rows_of(tmp_path, "train"):
        assert (row["color"], row["shape"]) != (row["second_color"], row["second_shape"])
        if row["relation"] == "while":
            assert {row["action"], row["second_action"]} <= set(paths.ACTIONS)
        else:
            assert row["relation"] in paths.RELATIONS and row["action"] == row["second_action"] == ""


# What the clips show


@pytest.mark.parametrize("name", ["demo", "long_tailed", "full"])
def test_held_out_combinations_are_distinct_and_never_shown_in_training(name):
    preset = plan.PRESETS[name]
    train, validation, test = (plan.plan_split(preset, split, 400, seed=0) for split in plan.SPLITS)
    assert len(set(validation)) == len(set(test)) == 400
    assert not set(train) & set(validation) and not set(train) & set(test) and not set(validation) & set(test)
    for field in ("color", "shape", "scene"):  # only combinations are new in test, not their parts
        assert {getattr(c, field) for c in test} <= {getattr(c, field) for c in train}


@pytest.mark.parametrize("name", ["demo", "long_tailed"])
def test_a_preset_has_its_combinations_for_the_default_counts(name):
    preset = plan.PRESETS[name]
    assert min(len(preset.colors), len(preset.shapes)) >= 8 and len(preset.actions) >= 10 and len(preset.scenes) >= 6
    for split, count in zip(plan.SPLITS, preset.counts, strict=True):
        assert len(plan.plan_split(preset, split, count, seed=0)) == count


def test_the_long_tailed_preset_shows_the_demos_values_with_few_of_them_everywhere():
    train = plan.plan_split(plan.PRESETS["long_tailed"], "train", 1000, seed=0)
    colors = collections.Counter(c.color for c in train)
    assert set(colors) == set(plan.PRESETS["demo"].colors)
    assert colors["red"] > 250 and colors["red"] > 5 * colors["gray"] > 0
    assert not any(c.relation for c in train)


def test_full_frequencies_are_long_tailed_and_alike_in_train_and_test():
    shares = {}
    for split in ("train", "test"):
        scene = collections.Counter(c.scene for c in plan.plan_split(plan.PRESETS["full"], split, 1000, seed=0))
        shares[split] = [scene[name] / 1000 for name in scenes.SCENES]
    expected = 1 / np.arange(1, len(scenes.SCENES) + 1)
    for share in shares.values():
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.05)


def test_while_is_the_same_whichever_is_named_first():
    rng = np.random.default_rng(0)
    drawn = [
        c for c in (plan.draw_combination(plan.PRESETS["full"], rng) for _ in range(300)) if c.relation == "while"
    ]
    assert len(drawn) > 50
    for c in drawn:
        assert (c.color, c.shape, c.action) < (c.second_color, c.second_shape, c.second_action)


# Fresh tests of another set


def test_a_set_with_the_split_seed_of_another_shows_nothing_of_its_training_clips():
    preset = plan.PRESETS["demo"]
    test = plan.plan_split(preset, "test", 400, seed=7, split_seed=0)
    assert {plan.split_of(c, 0) for c in test} == {"test"}
    assert {plan.split_of(c, 7) for c in test} == {"train", "validation", "test"}  # by itself it would be another set
    assert len(set(test) & set(plan.plan_split(preset, "test", 400, seed=0))) < 150


def test_a_twin_is_the_clip_before_it_played_backwards_with_the_caption_that_is_then_right(tmp_path):
    words = ("--seed", 3, "--split_seed", 0, "--num_train", 0, "--num_validation", 0, "--num_test", 6, "--twins")
    assert make(tmp_path, *words) == 0
    rows = rows_of(tmp_path, "test")
    assert len(rows) == 6
    for row, twin in zip(rows[::2], rows[1::2], strict=True):
        assert twin["action"] == paths.REVERSALS[row["action"]]
        assert all(row[name] == twin[name] for name in ("color", "shape", "scene"))
        assert row["captions"] != twin["captions"] and len(set(row["captions"][0].split())) > 3
        for each in (row, twin):
            actions = itertools.chain(*captions.ACTION_WORDS[each["action"]])
            assert any(words in each["captions"][0].lower() for words in actions)
        forwards, backwards = (
            sample_frames(tmp_path / "test" / each["file_name"], num_frames=4).frames for each in (row, twin)
        )
        difference = np.abs(np.asarray(forwards, dtype=float) - np.asarray(backwards, dtype=float)[::-1]).mean()
        same_order = np.abs(np.asarray(forwards, dtype=float) - np.asarray(backwards, dtype=float)).mean()
        assert difference < same_order


@pytest.mark.parametrize(
    "words", [("--twins", "--preset", "full"), ("--twins", "--num_test", 3), ("--other_captions", "--preset", "full")]
)
def test_what_a_set_cannot_have_is_named(tmp_path, capsys, words):
    assert make(tmp_path, "--num_train", 0, "--num_validation", 0, "--num_test", 2, *words) == 2
    assert words[0] in capsys.readouterr().err


def test_other_captions_name_everything_but_share_no_sentence_with_ours():
    shapes = collections.Counter()
    for index, c in enumerate(plan.plan_split(plan.PRESETS["demo"], "train", 100, seed=0)):
        written = other_captions.write_other_captions(c, np.random.default_rng(index), "small", "slowly")
        assert len(set(written)) == 5
        for caption in written:
            missing = [
                part
                for part, words in (
                    ("color", captions.COLOR_WORDS[c.color]),
                    ("shape", captions.SHAPE_WORDS[c.shape]),
                    ("scene", captions.SCENE_PHRASES[c.scene]),
                )
                if not _names(caption, words)
            ]
            shapes["misspelt"] += bool(missing)
            assert len(missing) <= 1, caption
        ours = captions.write_captions(c, np.random.default_rng(index))
        assert not {text.lower().strip(" .!") for text in written} & {text.lower().strip(" .!") for text in ours}
    assert 10 < shapes["misspelt"] < 150  # of 500
    assert set(other_captions.PASSIVE_ACTIONS) == set(captions.ACTION_WORDS)


# Captions


def test_no_phrase_belongs_to_two_values():
    tables = (captions.COLOR_WORDS, captions.SHAPE_WORDS, captions.SCENE_PHRASES)
    phrases = [phrase for table in tables for words in table.values() for phrase in words]
    phrases += [
        form
        for table in (captions.ACTION_WORDS, captions.RELATION_WORDS)
        for pairs in table.values()
        for pair in pairs
        for form in pair
    ]
    assert len(set(phrases)) == len(phrases)


def test_every_value_can_be_drawn_and_described():
    assert list(captions.COLOR_WORDS) == list(scenes.COLORS)
    assert list(captions.SHAPE_WORDS) == list(scenes.SHAPES)
    assert list(captions.SCENE_PHRASES) == list(scenes.SCENES)
    assert set(captions.ACTION_WORDS) == set(paths.ACTIONS)
    assert set(captions.RELATION_WORDS) == set(paths.RELATIONS) >= set(captions.PASSIVES)


def _names(caption, words) -> bool:
    return any(re.search(rf"\b{re.escape(word)}\b", caption.lower()) for word in words)


def test_the_first_caption_names_everything_and_the_others_leave_things_out():
    left_out = collections.Counter()
    for index, c in enumerate(plan.plan_split(plan.PRESETS["demo"], "train", 200, seed=0)):
        first, *others = captions.write_captions(c, np.random.default_rng(index), "small", "slowly")
        assert len({first, *others}) == 5
        parts = {
            "color": captions.COLOR_WORDS[c.color],
            "shape": captions.SHAPE_WORDS[c.shape],
            "action": list(itertools.chain(*captions.ACTION_WORDS[c.action])),
            "scene": captions.SCENE_PHRASES[c.scene],
        }
        assert all(_names(first, words) for words in parts.values()), first
        for caption in others:
            missing = [part for part, words in parts.items() if not _names(caption, words)]
            assert len(missing) <= 1, caption
            left_out.update(missing)
    assert all(left_out[part] > 100 for part in ("color", "shape", "action", "scene"))


@pytest.mark.parametrize("name", ["demo", "full"])
def test_first_captions_of_different_combinations_differ(name):
    test = plan.plan_split(plan.PRESETS[name], "test", 400, seed=0)
    firsts = {captions.write_captions(c, np.random.default_rng(i))[0].lower().rstrip(".") for i, c in enumerate(test)}
    assert len(firsts) == 400


def test_two_entities_with_the_same_words_are_distinguished():
    c = plan.Combination("red", "star", "", "beach", "blue", "star", "", "chase")
    said = {caption for seed in range(40) for caption in captions.write_captions(c, np.random.default_rng(seed))}
    colorless = [caption.lower() for caption in said if not _names(caption, ("red", "crimson", "blue", "azure"))]
    assert colorless and all("a star" in caption and "another star" in caption for caption in colorless)


# Pictures


def frames_of(shape="circle", action="move left", color="red", scene="ocean", frames=16, seed=0, size=(96, 128)):
    rng = np.random.default_rng(seed)
    path = paths.action_path(action, frames, 0.2, rng)
    return np.stack(list(scenes.draw_frames(scene, [(color, shape, path)], *size, rng))).astype(float)


def entity_pixels(video):
    """(F, H, W): where a frame is not the background, of which a red entity on blue water hides little enough."""
    redness = video[..., 0] - video[..., 2]
    return redness > 60


@pytest.mark.parametrize(
    ("action", "axis", "sign"), [("move left", 2, -1), ("move right", 2, 1), ("rise", 1, -1), ("fall", 1, 1)]
)
def test_the_shape_crosses_the_central_square_the_way_the_action_says(action, axis, sign):
    for seed in range(4):
        pixels = entity_pixels(frames_of(action=action, seed=seed))
        place = [np.argwhere(frame)[:, axis - 1].mean() for frame in pixels]
        assert sign * (place[-1] - place[0]) > 0.4 * 96
        assert (sign * np.diff(place) > 0).all()
        square = pixels[:, :, 16:112]
        assert square.sum() > 0.85 * pixels.sum()


@pytest.mark.parametrize(("action", "sign"), [("grow", 1), ("shrink", -1)])
def test_the_shape_grows_or_shrinks_as_the_action_says(action, sign):
    area = entity_pixels(frames_of(action=action)).sum((1, 2))
    assert (sign * np.diff(area) > 0).all()
    assert max(area) > 3 * min(area)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_quarter_turn_shows_on_every_shape(shape):
    picture = np.full((2, 96, 96, 3), 128, dtype=np.uint8)
    for canvas, angle in zip(picture, (0.0, np.pi / 2), strict=True):
        scenes.paint(canvas, shape, scenes.COLORS["red"], 48, 48, 20, angle)
    turned = np.rot90(picture[0], -1)  # clockwise
    assert np.abs(turned.astype(int) - picture[1]).mean() < 2
    assert (np.abs(picture[0].astype(int) - picture[1]).max(-1) > 60).sum() > 40


def test_time_reversal_is_all_that_separates_left_from_right():
    for action, other in (("move left", "move right"), ("rise", "fall"), ("grow", "shrink")):
        there = paths.action_path(action, 20, 0.2, np.random.default_rng(3))
        back = paths.action_path(other, 20, 0.2, np.random.default_rng(3))
        for field in ("x", "y", "radius", "angle"):
            np.testing.assert_allclose(getattr(there, field), getattr(back, field)[::-1], atol=1e-12)


@pytest.mark.parametrize("relation", paths.RELATIONS)
def test_relations_do_what_they_say(relation):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        first, second = paths.relation_paths(relation, 40, 0.12, 0.13, rng)
        gap = np.hypot(first.x - second.x, first.y - second.y)
        travel = [np.hypot(path.x[-1] - path.x[0], path.y[-1] - path.y[0]) for path in (first, second)]
        inside = np.abs([first.x, first.y, second.x, second.y]) < 0.5
        assert inside.mean() > 0.95
        # how far the first is behind the second, along the way that the first goes
        way = np.array([first.x[-1] - first.x[0], first.y[-1] - first.y[0]]) / max(travel[0], 1e-9)
        behind = way[0] * (second.x - first.x) + way[1] * (second.y - first.y)
        if relation == "chase":
            assert min(travel) > 0.3 and gap.min() > 0.25 and (behind > 0.2).all()
        elif relation in ("approach", "leave"):
            assert travel[1] == 0 and (np.diff(gap) < 0).all() == (relation == "approach") != (np.diff(gap) > 0).all()
        elif relation == "pass":
            assert travel[0] > 3 * travel[1] > 0 and behind[0] > 0.2 and behind[-1] < -0.2 and gap.min() > 0.2
        elif relation == "push":
            assert travel[1] > 0.1 and gap[-1] < 0.25 < gap[0]
        elif relation == "bump into":
            assert gap.argmin() in range(15, 25) and gap.min() < 0.26 < min(gap[0], gap[-1])
        elif relation == "circle":
            np.testing.assert_allclose(gap, gap[0])
            assert travel[1] == 0
        elif relation == "jump over":
            assert travel[1] == 0 and travel[0] > 0.7 and first.y[20] < second.y[20] - 0.25


# The folder and the command line


def test_a_finished_folder_is_not_changed(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.mp4")}
    assert make(demo, *COUNTS) == 0
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.mp4")} == before


def test_a_missing_clip_is_made_and_a_temporary_file_removed(demo, tmp_path):
    assert make(tmp_path, *COUNTS) == 0
    (tmp_path / "train" / "train_00002.mp4").unlink()
    (tmp_path / "test" / "metadata.jsonl").unlink()
    (tmp_path / "test" / ".test_00001.mp4.part").write_bytes(b"half")
    assert make(tmp_path, *COUNTS) == 0
    assert files_of(tmp_path) == files_of(demo)


def test_other_settings_are_refused_until_overwrite(demo, tmp_path, capsys):
    assert make(tmp_path, *COUNTS, "--seed", 1) == 0
    (tmp_path / "notes.txt").write_text("mine")
    kept = files_of(tmp_path)
    assert make(tmp_path, *COUNTS) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "seed 1 instead of 0" in message and "--overwrite" in message
    assert files_of(tmp_path) == kept
    assert make(tmp_path, *COUNTS, "--overwrite") == 0
    assert files_of(tmp_path) == {**files_of(demo), "notes.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_files_of_other_programs_are_neither_mixed_in_nor_deleted(tmp_path, capsys, overwrite):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "holiday.mp4").write_bytes(b"mine")
    assert make(tmp_path, *COUNTS, *overwrite) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert files_of(tmp_path) == {"test/holiday.mp4": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_train", 0, "--num_validation", 0, "--num_test", 0), "no clips to make"),
        (("--num_train", 0, "--num_validation", 0, "--num_test", 5000), "--num_test 5000: this preset has only about"),
    ],
)
def test_impossible_counts_are_one_line_errors(tmp_path, capsys, arguments, message):
    assert make(tmp_path / "new", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_a_file_is_a_one_line_error(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert make(tmp_path / "taken", *COUNTS) == 2
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--seed", "-1"), ("--num_train", "many"), ("--num_workers", "0"), ("--preset", "x")]
)
def test_wrong_arguments_exit_with_code_2(tmp_path, arguments):
    with pytest.raises(SystemExit) as exit_info:
        make(tmp_path, *arguments)
    assert exit_info.value.code == 2


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group, as a terminal does on Ctrl-C")
def test_ctrl_c_keeps_what_is_finished_and_a_second_run_goes_on(tmp_path):
    arguments = ["--num_train", "200", "--num_validation", "0", "--num_test", "4"]
    program = subprocess.Popen(
        [sys.executable, str(TRAINING / "make_motion_clips.py"), "--output", str(tmp_path / "a"), *arguments]
        + ["--num_workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "a").rglob("*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(program.pid, signal.SIGINT)
    errors = program.communicate(timeout=60)[1]
    assert program.returncode == 130
    assert "Traceback" not in errors and "run the same command again" in errors.splitlines()[-1]
    left = files_of(tmp_path / "a")
    assert 1 <= len([name for name in left if name.endswith(".mp4")]) < 204
    assert not [name for name in left if name.endswith((".part", "metadata.jsonl"))]

    assert make(tmp_path / "a", *arguments, "--num_workers", 2) == 0
    assert make(tmp_path / "b", *arguments, "--num_workers", 2) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
