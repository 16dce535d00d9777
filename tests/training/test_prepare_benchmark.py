# SPDX-License-Identifier: Apache-2.0
"""From a benchmark's public files, in miniature but with real videos, to tables for training and evaluation."""

import json
import os
import pickle
import sys
from pathlib import Path

import datasets
import prepare_benchmark
import pytest

from engine.recipe import exit_on_user_error
from tests import benchmark_files as files
from tests.programs import run_program
from tests.video_files import cut_off


RECIPES = Path(__file__).parents[2] / "training" / "recipes"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The tables of one test must not be found in another's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def prepare(monkeypatch, *arguments):
    """Run the program in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare_benchmark.py", *map(str, arguments)])
    exit_on_user_error(prepare_benchmark.main)


def error_of(monkeypatch, capsys, *arguments) -> str:
    """The single line that a mistake prints."""
    with pytest.raises(SystemExit) as raised:
        prepare(monkeypatch, *arguments)
    assert raised.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def tables(folder: Path) -> dict[str, list[dict]]:
    """Split name -> rows."""
    return {p.stem: datasets.Dataset.from_parquet(str(p)).to_list() for p in sorted(folder.glob("*.parquet"))}


@pytest.fixture
def make_tables(tmp_path, monkeypatch):
    """make_tables(benchmark, writer, options...) -> the tables prepared from a miniature tree."""

    def run(benchmark, writer, *options):
        names = writer(tmp_path / "annotations")
        files.write_videos(tmp_path / "videos", names)
        prepare(
            monkeypatch, benchmark, "--annotations", tmp_path / "annotations", "--videos", tmp_path / "videos",
            "--output", tmp_path / "out", *options,
        )  # fmt: skip
        return tables(tmp_path / "out")

    return run


TINY_CLIP = """
clip_config:
  projection_dim: 16
  vision_config:
    {image_size: 32, patch_size: 16, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
     num_attention_heads: 2}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 600
model_name_or_path: null
num_frames: 2
max_words: 16
tagger: null
batch_size: 2
max_train_steps: 2
num_workers: 0
"""


MSRVTT_SIZES = {
    "train_9k": (10, 20), "train_7k": (6, 12), "validation_7k": (4, 8), "test_1k": (2, 2),
    "train_full": (5, 10), "validation_full": (3, 6), "test_full": (4, 8),
}  # fmt: skip
# What a recipe does not set: (recipe, split to score, options of both programs)
MSRVTT_RUNS = [("msrvtt_9k", "test_1k"), ("msrvtt_7k", "test_1k"), ("msrvtt_full", "test_full", "--captions", "all")]
WITHOUT_VALIDATION = ("--validation_split", "null")

# benchmark, writer of the files, split -> (clips, captions), the runs to make with its tables
LAYOUTS = {
    "msrvtt": ("msrvtt", files.write_msrvtt, MSRVTT_SIZES, MSRVTT_RUNS),
    "msrvtt with a split field": (
        "msrvtt", lambda folder: files.write_msrvtt(folder, with_split_field=True), MSRVTT_SIZES, [],
    ),
    "msrvtt hub": (
        "msrvtt", files.write_msrvtt_hub, {"train_9k": (5, 10), "train_7k": (3, 6), "test_1k": (2, 2)},
        [("msrvtt_9k", "test_1k"), ("msrvtt_7k", "test_1k", *WITHOUT_VALIDATION)],
    ),
    "msrvtt hub, one caption": (
        "msrvtt", files.write_msrvtt_one_caption_hub, {"train_full": (3, 3), "validation_full": (1, 1)},
        [("msrvtt_full", "validation_full", *WITHOUT_VALIDATION)],
    ),
    "msvd": (
        "msvd", files.write_msvd, {"train": (2, 3), "validation": (1, 3), "test": (3, 15)},
        [("msvd", "test", "--captions", "all")],
    ),
    "msvd hub": (
        "msvd", files.write_msvd_hub, {"train": (2, 4), "validation": (1, 2), "test": (2, 4)},
        [("msvd", "test", "--captions", "all")],
    ),
    "lsmdc": (
        "lsmdc", files.write_lsmdc, {"train": (2, 3), "validation": (1, 1), "test": (2, 2)}, [("lsmdc", "test")],
    ),
    "didemo": (
        "didemo", files.write_didemo, {"train": (2, 2), "validation": (1, 1), "test": (1, 1)}, [("didemo", "test")],
    ),
    "didemo hub": (
        "didemo", files.write_didemo_hub, {"train": (2, 2), "test": (1, 1)}, [("didemo", "test", *WITHOUT_VALIDATION)],
    ),
    "activitynet": (
        "activitynet", files.write_activitynet, {"train": (2, 2), "test": (2, 2)}, [("activitynet", "test")],
    ),
    "activitynet hub": (
        "activitynet", files.write_activitynet_hub, {"train": (2, 2), "test": (1, 1), "test_val2": (1, 1)},
        [("activitynet", "test"), ("activitynet", "test_val2")],
    ),
    "activitynet hub, parquet": (
        "activitynet", files.write_activitynet_leyo_hub, {"train": (2, 2), "test": (1, 1)}, [("activitynet", "test")],
    ),
}  # fmt: skip


def train_and_score(data, folder, recipe, split, *options) -> dict:
    """Two steps with the recipe of the benchmark, on a tiny model; then eval_results.json."""
    (folder / "tiny.yaml").write_text(TINY_CLIP)
    validation = options[:2] if options[:1] == ("--validation_split",) else ()
    trained = run_program(
        "run_retrieval.py", "--config", RECIPES / f"{recipe}.yaml", "--config", folder / "tiny.yaml",
        "--dataset_name", data, "--output_dir", folder / recipe, "--frame_cache", folder / "frames", *validation,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads((folder / recipe / "all_results.json").read_text())["steps"] == 2
    scored = run_program(
        "evaluate_retrieval.py", "--checkpoint", folder / recipe, "--dataset_name", data, "--split", split,
        "--corrections", "[dual_softmax]", "--dual_softmax_temp", 1, "--bootstrap", 20, "--num_workers", 0, *options,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    return json.loads((folder / recipe / "eval_results.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_becomes_tables_that_train_and_score(make_tables, tmp_path, layout):
    benchmark, writer, sizes, runs = LAYOUTS[layout]
    made = make_tables(benchmark, writer, "--check_videos")
    assert {name: (len(rows), sum(len(row["captions"]) for row in rows)) for name, rows in made.items()} == sizes
    for rows in made.values():
        assert all(os.path.isfile(row["video"]) and os.path.isabs(row["video"]) for row in rows)
        assert len({row["video_id"] for row in rows}) == len(rows)
    for run in runs:
        results = train_and_score(tmp_path / "out", tmp_path, *run)
        clips, captions = sizes[run[1]]
        every_caption = "all" in run
        assert (results["num_videos"], results["num_texts"]) == (clips, captions if every_caption else clips)
        directions = results["results"]["dual_softmax"]
        assert ("video_to_text_caption_max" in directions) == (every_caption and captions > clips)
        assert directions["text_to_video"]["R@5"] == 100  # at most four videos


def test_msrvtt_groups_captions_by_video_and_finds_other_extensions(make_tables):
    made = make_tables("msrvtt", files.write_msrvtt)
    assert made["train_9k"][0]["captions"] == ["a red dog moves", "a red ball, the big one, moves"]
    assert [row["captions"] for row in made["test_1k"]] == [
        ["video7012 shows a cat, and more"],
        ["video9999 shows a cat, and more"],
    ]
    assert made["test_1k"][1]["video"].endswith("video9999.webm")
    seen = {row["video_id"] for row in made["train_7k"] + made["test_1k"]}
    assert not seen & {row["video_id"] for row in made["validation_7k"]}


def test_lsmdc_keeps_the_sentences_of_a_clip_together(make_tables):
    first = make_tables("lsmdc", files.write_lsmdc)["train"][0]
    assert first["captions"] == ["SOMEONE opens door 0.", "SOMEONE opens door 0."]
    assert first["video"].endswith("1004_Juno/1004_Juno_00.00.32.938-00.00.37.166.avi")


def test_paragraphs_join_the_sentences_and_keep_the_published_window(make_tables):
    row = make_tables("didemo", files.write_didemo)["test"][0]
    assert (row["captions"], row["start"], row["end"]) == (["the start of test a dog of test"], 0.0, 31.0)


def test_activitynet_paragraphs_are_of_whole_videos(make_tables):
    row = make_tables("activitynet", files.write_activitynet)["test"][0]
    assert (row["captions"], row["start"], row["end"]) == (["A man runs. He jumps."], None, None)


RUNS, JUMPS = ("A man runs.", 0.0, 0.8), ("He jumps.", 0.5, 2.0)


@pytest.mark.parametrize(
    ("benchmark", "writer", "expected"),
    [
        ("activitynet", files.write_activitynet, [("v_cc#0", *RUNS), ("v_cc#1", *JUMPS)]),
        ("activitynet", files.write_activitynet_hub, [("v_c#0", *RUNS), ("v_c#1", *JUMPS)]),
        ("activitynet", files.write_activitynet_leyo_hub, [("v_c#0", *RUNS), ("v_c#1", *JUMPS)]),
        (  # segments of five seconds, the mean of three annotators: 0 to (1 + 1) * 5
            "didemo",
            files.write_didemo,
            [("6@N01_d#0", "the start of test", 0.0, 10.0), ("6@N01_d#1", "a dog of test", 0.0, 10.0)],
        ),
    ],
)
def test_windows_make_a_clip_of_each_sentence(make_tables, tmp_path, benchmark, writer, expected):
    rows = make_tables(benchmark, writer, "--windows")["test"]
    assert [(row["video_id"], *row["captions"], row["start"], row["end"]) for row in rows[:2]] == expected
    if writer in (files.write_activitynet, files.write_didemo):  # windows are decoded, too
        results = train_and_score(tmp_path / "out", tmp_path, benchmark, "test")
        assert results["num_videos"] == len(rows)


def test_held_out_videos_leave_the_training_split(make_tables):
    made = make_tables("msrvtt", files.write_msrvtt, "--hold_out", 3)
    train, held = ({row["video_id"] for row in made[name]} for name in ("train_9k", "validation_9k"))
    assert (len(train), len(held)) == (7, 3) and not train & held
    assert len(made["train_7k"]) == 6  # has validation data of its own


def test_missing_and_broken_videos_are_left_out_and_listed(tmp_path, monkeypatch, capsys):
    names = files.write_msvd(tmp_path / "annotations")
    videos = files.write_videos(tmp_path / "videos", names)
    (videos / names[0]).unlink()
    cut_off(videos / names[4], 0.02)
    prepare(
        monkeypatch, "msvd", "--annotations", tmp_path / "annotations", "--videos", videos, "--output",
        tmp_path / "out", "--check_videos", "--allow_missing", 0.5,
    )  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / "out" / "missing_videos.jsonl").read_text().splitlines()]
    assert [(entry["split"], entry["video_id"]) for entry in listed] == [
        ("train", Path(names[0]).stem),
        ("test", Path(names[4]).stem),
    ]
    assert listed[0]["cause"] == "no such file" and names[4] in listed[1]["cause"]
    assert {name: len(rows) for name, rows in tables(tmp_path / "out").items()} == {
        "train": 1,
        "validation": 1,
        "test": 2,
    }
    assert "left out" in capsys.readouterr().out


# --- deliberate mistakes ---------------------------------------------------------------------------------------------


@pytest.fixture
def msrvtt(tmp_path):
    """A complete MSR-VTT: (annotation folder, video folder)."""
    names = files.write_msrvtt(tmp_path / "annotations")
    return tmp_path / "annotations", files.write_videos(tmp_path / "videos", names)


def rewrite(path: Path, old: str, new: str):
    path.write_text(path.read_text().replace(old, new))


def other_column(annotations, videos):
    rewrite(annotations / "MSRVTT_JSFUSION_test.csv", "sentence", "caption")


def duplicate_id(annotations, videos):
    rewrite(annotations / "MSRVTT_train.9k.csv", "video3\n", "video2\n")
    rewrite(annotations / "MSRVTT_train.9k.csv", "video3\r\n", "video2\r\n")


def empty_split(annotations, videos):
    (annotations / "MSRVTT_train.7k.csv").write_text("video_id\n")


def a_third_missing(annotations, videos):
    for name in ("video0", "video1", "video2"):  # of the ten of train_9k
        (videos / f"{name}.mp4").unlink()


def uncaptioned(annotations, videos):
    rewrite(annotations / "MSRVTT_train.9k.csv", "video3", "video4")


def broken_json(annotations, videos):
    cut_off(annotations / "MSRVTT_data.json")


def no_annotations(annotations, videos):
    for path in annotations.iterdir():
        path.unlink()


def no_videos(annotations, videos):
    for path in videos.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (other_column, ["MSRVTT_JSFUSION_test.csv has no column 'sentence'", "with its header"]),
        (duplicate_id, ["MSRVTT_train.9k.csv names video 'video2' 2 times", "keep one line for each video"]),
        (empty_split, ["split 'train_7k'", "is empty", "download the annotations again"]),
        (
            a_third_missing,
            ["split 'train_9k': 3 of 10 clips", "30 %, allowed 5 %", "missing_videos.jsonl", "--allow_missing 0.3 "],
        ),
        (uncaptioned, ["MSRVTT_train.9k.csv lists video 'video4'", "take both files from one release"]),
        (broken_json, ["MSRVTT_data.json is not valid JSON", "download it again"]),
        (no_annotations, ["neither MSRVTT_data.json", "give the folder"]),
        (no_videos, ["there is no video under", "--videos"]),
    ],
)
def test_a_mistake_in_the_files_is_one_line_with_file_and_remedy(
    msrvtt, tmp_path, monkeypatch, capsys, mistake, words
):
    annotations, videos = msrvtt
    mistake(annotations, videos)
    message = error_of(
        monkeypatch, capsys, "msrvtt", "--annotations", annotations, "--videos", videos, "--output", tmp_path / "out"
    )
    for part in words:
        assert part in message
    assert not list(tmp_path.glob("out/*.parquet*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["msvd"], ["MSRVTT_data.json", "the annotations of msrvtt, not of msvd", "prepare_benchmark.py msrvtt"]),
        (["msrvt"], ["one of msrvtt, msvd, lsmdc, didemo, activitynet", "'msrvt'"]),
        (["msrvtt", "--windows"], ["--windows", "msrvtt have no times"]),
        (["msrvtt", "--annotations", "./nowhere"], ["annotation folder ./nowhere does not exist"]),
        (["msrvtt", "--hold_out", "10"], ["--hold_out 10 would leave nothing of train_9k"]),
        (["msrvtt", "--splits", "tests"], ["--splits tests", "the annotations have only train_9k, train_7k"]),
        (["msrvtt", "--allow_missing", "30"], ["'allow_missing' must be from 0 to 1, got 30"]),
    ],
)
def test_a_wrong_option_is_one_line_with_remedy(msrvtt, tmp_path, monkeypatch, capsys, arguments, words):
    annotations, videos = msrvtt
    message = error_of(
        monkeypatch, capsys, arguments[0], "--annotations", annotations, "--videos", videos,
        "--output", tmp_path / "out", *arguments[1:],
    )  # fmt: skip
    for part in words:
        assert part in message


def test_a_pickle_that_could_run_code_is_refused(tmp_path, monkeypatch, capsys):
    videos = files.write_videos(tmp_path / "videos", files.write_msvd(tmp_path / "annotations"))
    (tmp_path / "annotations" / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Path("/")}))
    message = error_of(
        monkeypatch, capsys, "msvd", "--annotations", tmp_path / "annotations", "--videos", videos,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert "raw-captions.pkl" in message and "not only lists of words" in message


# --- videos under other names ----------------------------------------------------------------------------------------


def found_in(tmp_path, monkeypatch, annotated: list[str], given: list[str], *options) -> dict[str, str]:
    """Video id -> file name (relative to the video folder) of DiDeMo's test split."""
    annotations = tmp_path / "annotations"
    files.write_didemo(annotations)
    (annotations / "test_list.txt").write_text("\n".join(annotated))
    moments = [{"video": name, "description": "a dog", "times": [[0, 0]]} for name in annotated]
    (annotations / "test_data.json").write_text(json.dumps(moments))
    if not (tmp_path / "videos").exists():
        files.write_videos(tmp_path / "videos", given)
    prepare(
        monkeypatch, "didemo", "--annotations", annotations, "--videos", tmp_path / "videos", "--output",
        tmp_path / "out", "--splits", "test", "--allow_missing", 0.9, *options,
    )  # fmt: skip
    rows = tables(tmp_path / "out")["test"]
    return {row["video_id"]: os.path.relpath(row["video"], tmp_path / "videos") for row in rows}


def test_a_video_is_found_by_its_annotated_name_whatever_its_suffix(tmp_path, monkeypatch, capsys):
    names = [
        "1@N00_a.",
        "1@N00_b.3g2",
        "1@N00_c.qt",
        "1@N00_d.3gpp",
        "1@N00_e.null",
        "1@N00_f.divx",
        "1@N00_g",
        "h.gif",
    ]
    assert found_in(tmp_path, monkeypatch, names, names) == {name: name for name in names}
    assert "videos found: 8 by its name, 0 with another suffix" in capsys.readouterr().out


def test_a_video_is_found_with_another_suffix_that_opens(tmp_path, monkeypatch, capsys):
    pairs = {"a.": "a.mp4", "b.3g2": "b.MP4", "c": "c.3gpp", "d.avi": "deep/d.divx", "e.mov": "e.mov.mp4"}
    files.write_videos(tmp_path / "videos", [*pairs.values()])
    for decoy in ("a.json", "c.en.vtt", "d.txt", "b.jpg"):
        (tmp_path / "videos" / decoy).write_text("no video")
    (tmp_path / "videos" / "c.3g2").write_bytes(b"no video")  # sorted before the one that opens
    assert found_in(tmp_path, monkeypatch, list(pairs), []) == pairs
    assert "0 by its name, 5 with another suffix" in capsys.readouterr().out


def test_activitynet_is_found_with_and_without_v(tmp_path, monkeypatch, capsys):
    assert found_in(tmp_path, monkeypatch, ["v_-a", "b1", "v_c"], ["-a.mp4", "v_b1.webm", "v_c.mp4"]) == {
        "v_-a": "-a.mp4",
        "b1": "v_b1.webm",
        "v_c": "v_c.mp4",
    }
    assert "1 with another suffix, 2 with or without v_" in capsys.readouterr().out


def test_a_video_is_found_within_one_longer_name_only(tmp_path, monkeypatch, capsys):
    annotated = ["-abc_5", "video1", "twice", "lost"]
    given = ["A title [-abc_5].mp4", "video10.mp4", "my video1 (copy).mp4", "twice (1).mp4", "twice (2).mp4"]
    assert found_in(tmp_path, monkeypatch, annotated, given) == {
        "-abc_5": "A title [-abc_5].mp4",
        "video1": "my video1 (copy).mp4",
    }
    assert "2 within a longer name" in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "out" / "missing_videos.jsonl").read_text().splitlines()]
    assert {entry["video_id"]: entry["cause"] for entry in listed} == {
        "twice": "several files have it in their names: twice (1).mp4, twice (2).mp4",
        "lost": "no such file",
    }


def test_lsmdc_clips_that_begin_alike_are_not_taken_for_each_other(tmp_path):
    names = ["1004_Juno_00.03.32.938-00.03.37.166.avi", "1004_Juno_00.03.32.938-00.03.37.avi"]
    videos = prepare_benchmark.VideoFolder(files.write_videos(tmp_path / "videos", names))
    assert videos.find("1004_Juno_00.03.32.938-00.03.37.166")[0].name == names[0]
    assert videos.find("1004_Juno_00.03.32.938-00.03.37.999")[0] is None


def test_linked_folders_are_entered_once_and_loops_end(tmp_path, monkeypatch):
    files.write_videos(tmp_path / "disk", ["more/a.mp4"])
    files.write_videos(tmp_path / "videos", ["b.mp4"])
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "more" / "loop").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "videos" / "again").symlink_to(tmp_path / "videos", target_is_directory=True)
    (tmp_path / "videos" / "c.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "videos" / "._b.mp4").write_bytes(b"notes of macOS")
    assert found_in(tmp_path, monkeypatch, ["a", "b", "c"], []) == {"a": "linked/more/a.mp4", "b": "b.mp4"}


# --- what is left out ------------------------------------------------------------------------------------------------


def test_empty_windows_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    names = files.write_activitynet(tmp_path / "annotations")
    path = tmp_path / "annotations" / "val_1.json"
    path.write_text(path.read_text().replace("[0.5, 2.0]", "[1.5, 1.5]"))
    videos = files.write_videos(tmp_path / "videos", names)
    prepare(
        monkeypatch, "activitynet", "--annotations", tmp_path / "annotations", "--videos", videos, "--output",
        tmp_path / "out", "--windows", "--allow_missing", 0,
    )  # fmt: skip
    made = tables(tmp_path / "out")
    assert [row["video_id"] for row in made["test"]] == ["v_cc#0", "v_dd#0"] and len(made["train"]) == 4
    listed = [json.loads(line) for line in (tmp_path / "out" / "missing_videos.jsonl").read_text().splitlines()]
    assert listed[0] == {"split": "test", "video_id": "v_cc#1", "cause": "the window is empty: 1.5 to 1.5 s"}
    assert "2 of the clips left out have an empty window" in capsys.readouterr().out


def only_test_videos(tmp_path):
    names = files.write_msvd(tmp_path / "annotations")
    return ["msvd", "--annotations", tmp_path / "annotations", "--videos",
            files.write_videos(tmp_path / "videos", names[3:]), "--output", tmp_path / "out"]  # fmt: skip


def test_the_test_videos_alone_are_prepared_with_splits_test(tmp_path, monkeypatch):
    arguments = only_test_videos(tmp_path)
    prepare(monkeypatch, *arguments, "--splits", "test")
    assert {name: len(rows) for name, rows in tables(tmp_path / "out").items()} == {"test": 3}


def test_allow_missing_1_writes_the_splits_that_have_videos(tmp_path, monkeypatch, capsys):
    arguments = only_test_videos(tmp_path)
    message = error_of(monkeypatch, capsys, *arguments)
    assert "--allow_missing 1 continues without them, and --splits leaves out whole splits" in message
    (tmp_path / "out" / "train.parquet").write_bytes(b"of an earlier run")
    prepare(monkeypatch, *arguments, "--allow_missing", 1)
    assert {name: len(rows) for name, rows in tables(tmp_path / "out").items()} == {"test": 3}
    printed = capsys.readouterr().out
    assert "no table" in printed and "wrote 1 tables" in printed


def test_allow_missing_1_without_any_video_is_one_line(tmp_path, monkeypatch, capsys):
    files.write_msvd(tmp_path / "annotations")
    videos = files.write_videos(tmp_path / "videos", ["other.mp4"])
    message = error_of(
        monkeypatch, capsys, "msvd", "--annotations", tmp_path / "annotations", "--videos", videos, "--output",
        tmp_path / "out", "--allow_missing", 1,
    )  # fmt: skip
    assert "none of the 6 clips has a readable video" in message


@pytest.mark.parametrize(
    ("names", "made"),
    [("test", ["test_1k", "test_full"]), ("[train_7k, test_1k]", ["test_1k", "train_7k"])],
)
def test_splits_are_chosen_by_name_or_by_what_they_begin_with(make_tables, names, made):
    assert sorted(make_tables("msrvtt", files.write_msrvtt, "--splits", names)) == made
