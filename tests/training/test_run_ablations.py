# SPDX-License-Identifier: Apache-2.0
"""The ablation runner: what it runs, what it does not run again, and what it writes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import run_ablations
import torch
import yaml

from data.errors import UserError
from engine import ablation_report
from engine.ablation_results import AblationResults
from engine.ablation_tests import right_of_twins
from engine.options import TrainOptions
from engine.recipe import parse_options
from evaluation.compare_runs import RunRanks
from evaluation.protocol import Ranks
from tests.benchmark_files import write_msrvtt, write_videos
from tests.programs import run_program
from tests.tiny_backbones import tiny_backbone


TABLE = """
title: Parts
base: [base.yaml]
seeds: [0, 1]
train: {num_workers: 0}
evaluate: {dataset_name: clips, bank: 5}
rows:
  - {name: "mean pool", group: baselines, train: {model.experts: [fusion], tagger: null}}
  - {name: full, note: everything on}
"""

# Stands in for both programs: writes the files that they write, and logs its calls.
STUB = """
import json, os, pathlib, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1] if name in words else None
training = value("--output_dir") is not None and value("--checkpoint") is None
folder = pathlib.Path(value("--output_dir") if training else value("--checkpoint"))
with open(folder / "calls.txt", "a") as calls:
    calls.write(" ".join(words) + "\\n")
with open(folder / "device.txt", "a") as devices:
    devices.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
if (folder / "fail").exists():
    sys.exit("error: the disk is full")
if training:
    (folder / "all_results.json").write_text(json.dumps(
        {"steps": 10, "seconds": 2.5, "parameters": 1234, "head_parameters": 56}))
else:
    r1 = 20.0 + 10 * ("full" in folder.name) + int(folder.name[-1])
    metrics = {"R@1": r1, "R@5": 60.0, "R@10": 80.0}
    both = {"text_to_video": metrics, "video_to_text": metrics}
    (folder / "eval_results.json").write_text(json.dumps({
        "num_texts": 5, "num_videos": 5, "settings": {}, "best_clip_shares": {"color": 99.0},
        "results": {"none": both, "dual_softmax": both, "query_bank": both}}))
    import numpy as np
    from safetensors.numpy import save_file
    arrays = {f"{name}/{direction}": np.arange(5) for name in ("groups", "keys") for direction in both}
    ranks = {f"{name}/{direction}": np.zeros((2, 5), int) for name in ("none", "dual_softmax") for direction in both}
    save_file({**arrays, **ranks}, folder / "eval_ranks.safetensors")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a table and stand-ins for the programs."""
    (tmp_path / "table.yaml").write_text(TABLE)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("run_retrieval.py", "evaluate_retrieval.py"):
        (programs / name).write_text(STUB)
    monkeypatch.setattr(run_ablations, "PROGRAMS", programs)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["run_ablations.py", "--table", "table.yaml", *words])
    run_ablations.main()


def runs_in(project, name="parts") -> dict:
    """The runs of a table's results."""
    return json.loads((project / f"training/results/{name}.json").read_text())["runs"]


def calls(folder: str) -> list[str]:
    return Path("runs/ablations", folder, "calls.txt").read_text().splitlines()


def test_each_row_is_trained_and_scored_with_its_own_options_and_seed(project, monkeypatch):
    run(monkeypatch)
    train, evaluate = calls("mean_pool_seed1")
    assert train == (
        "--config base.yaml --num_workers 0 --model.experts [fusion] --tagger null --seed 1 "
        "--output_dir runs/ablations/mean_pool_seed1 --resume_from_checkpoint latest"
    )
    assert evaluate == "--checkpoint runs/ablations/mean_pool_seed1 --dataset_name clips --bank 5"
    result = runs_in(project)["full_seed0"]
    assert (result["seconds_per_step"], result["head_parameters"]) == (0.25, 56)
    assert result["tests"]["test"]["results"]["none"]["text_to_video"]["R@1"] == 30.0


def test_the_page_holds_means_over_seeds_and_keeps_the_text_around_the_table(project, monkeypatch):
    run(monkeypatch)
    page = project / "docs/ablations.md"
    assert page.read_text().startswith("# Parts\n")
    assert "| mean pool | 2 | 20.5 ± 0.7 | 20.5 ± 0.7 |" in page.read_text()
    assert "| 60.0 ± 0.0 | 99.0 ± 0.0 |" in page.read_text()  # R@5, right color
    assert "| full | 1,234 | 56 | 0.25 ± 0.00 |" in page.read_text()
    assert "- **full**: everything on" in page.read_text()
    assert (project / "docs/images/ablations.png").stat().st_size > 5000
    page.write_text("# Mine\n\nBefore.\n" + page.read_text().removeprefix("# Parts\n").rstrip() + "\n\nAfter.\n")
    run(monkeypatch, "--report")
    text = page.read_text()
    assert text.startswith("# Mine\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert text.count("| mean pool | 2 |") == 1
    (project / "table.yaml").write_text(TABLE + "page: docs/other.md\n")  # a second table has a page of its own
    run(monkeypatch, "--report")
    assert page.read_text() == text and "| mean pool | 2 |" in (project / "docs/other.md").read_text()
    assert (project / "docs/images/other.png").exists()


def test_a_finished_run_is_not_run_again_unless_the_table_changed_it(project, monkeypatch):
    run(monkeypatch)
    run(monkeypatch)
    assert len(calls("full_seed0")) == 2  # trained once, scored once
    (project / "table.yaml").write_text(TABLE.replace("bank: 5", "bank: 6"))
    run(monkeypatch)
    assert calls("full_seed0")[-1].endswith("--bank 6")


def test_only_chosen_rows_run_and_the_others_are_listed_as_not_run(project, monkeypatch):
    run(monkeypatch, "--only", "[full]", "--seeds", "[1]")
    assert sorted(path.name for path in Path("runs/ablations").iterdir()) == ["full_seed1"]
    text = (project / "docs/ablations.md").read_text()
    assert "\n\nNot run: mean pool.\n" in text and "| full | 1 | 31.0 |" in text
    assert "Runs of the table that are not done: 3." in text


def test_a_dry_run_runs_nothing(project, monkeypatch, capsys):
    run(monkeypatch, "--dry_run")
    assert not any(Path(folder).exists() for folder in ("runs", "docs", "training"))
    assert "would run: full, seed 1: run_retrieval.py --config base.yaml" in capsys.readouterr().out


def test_options_of_the_command_line_reach_every_row_that_sets_no_other(project, monkeypatch, capsys):
    run(monkeypatch, "--dry_run", "--train.batch_size", "8", "--train.model.experts", "[scene]", "--seeds", "[0]")
    mean_pool, full = [line for line in capsys.readouterr().out.splitlines() if line.startswith("would run")]
    assert all("--num_workers 0 --batch_size 8" in line for line in (mean_pool, full))
    assert "--model.experts '[scene]'" in full and "--model.experts '[fusion]'" in mean_pool


def test_a_failed_run_is_named_with_its_last_line_and_the_others_continue(project, monkeypatch):
    folder = project / "runs/ablations/mean_pool_seed0"
    folder.mkdir(parents=True)
    (folder / "fail").touch()
    with pytest.raises(UserError, match="1 of 4 runs failed, the first: mean pool, seed 0: .*the disk is full"):
        run(monkeypatch)
    assert "full_seed1" in runs_in(project) and "mean_pool_seed0" not in runs_in(project)
    assert "| mean pool | 1 |" in (project / "docs/ablations.md").read_text()


def test_a_stopped_runner_ends_its_program_and_starts_no_other(project, monkeypatch):
    (project / "programs/run_retrieval.py").write_text(
        "import pathlib, time; pathlib.Path('started.txt').touch(); time.sleep(60)"
    )
    table = run_ablations.read_table("table.yaml")
    runner = run_ablations.Runner(parse_options(run_ablations.AblationOptions, ["--table", "table.yaml"]), table)
    runs = run_ablations.plan(table, "table.yaml")
    thread = threading.Thread(target=runner.run_all, args=(runs,))
    thread.start()
    while not Path("started.txt").exists():
        time.sleep(0.01)
    runner.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [path.name for path in Path("runs/ablations").iterdir()] == ["mean_pool_seed0"]
    assert not Path("training/results").exists()


def test_a_launcher_goes_before_every_program(project, monkeypatch):
    run(monkeypatch, "--launcher", "env LAUNCHED=1 sh -c 'echo launched > launched.txt; exec \"$@\"' -", "--jobs", "2")
    assert (project / "launched.txt").read_text() == "launched\n"
    assert len(runs_in(project)) == 4  # of two jobs, in one file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("rows:", "row:"), "needs `base` (recipes), `seeds` and `rows`"),
        (("group:", "grup:"), "['grup']: a row may have"),
        (("name: full", 'name: "mean pool"'), "two rows"),
        (("title:", "titel:"), "['titel']: a table may have"),
        (("rows:", "rows: ["), "not valid YAML"),
    ],
)
def test_a_wrong_table_is_named(project, change, words):
    (project / "table.yaml").write_text(TABLE.replace(*change))
    with pytest.raises(UserError) as error:
        run_ablations.read_table("table.yaml")
    assert words in str(error.value)


def test_an_unknown_row_is_an_error_that_lists_the_names(project, monkeypatch):
    with pytest.raises(UserError, match="--only 'ful': the table's rows are 'full', 'mean pool'"):
        run(monkeypatch, "--only", "[ful]")


def test_spread_is_the_mean_with_deviation():
    assert ablation_report.spread([27.4, 29.8]) == "28.6 ± 1.7"
    assert ablation_report.spread([28.6]) == "28.6"


@pytest.mark.parametrize(
    "path, temps",
    [("ablations.yaml", {None, 10, 20, 100, 1000}), ("ablations_full.yaml", {None})],
)
def test_the_rows_of_the_repository_are_runs_that_the_trainer_understands(path, temps, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = f"training/recipes/{path}"
    table = yaml.safe_load(Path(path).read_text())
    runs = run_ablations.plan(table, path)
    assert len({one.key for one in runs}) == len(runs) >= 2 * len(table["rows"])
    options = {one.name: parse_options(TrainOptions, [*one.train, "--output_dir", "x"]) for one in runs}
    same = {"batch_size", "num_train_epochs", "num_frames", "learning_rate", "clip_config"}
    same_size = [one for name, one in options.items() if not name.endswith("as many parameters")]
    assert all(len({str(getattr(one, name)) for one in same_size}) == 1 for name in same)
    assert {one.max_train_steps for name, one in options.items() if not name.endswith("644 steps")} == {184}
    assert all(one.spatial_start and one.validation_split == "validation" for one in options.values())
    assert {one.model.get("dual_softmax_temp") for one in options.values()} == temps
    read = run_ablations.read_table(path)  # and checks that it compares rows that there are
    assert [test["name"] for test in read["tests"]][:1] == ["validation"] and read["compares"]


def test_a_row_of_the_repository_changes_what_it_names(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = "training/recipes/ablations.yaml"
    runs = run_ablations.plan(yaml.safe_load(Path(path).read_text()), path)
    models = {one.name: parse_options(TrainOptions, [*one.train, "--output_dir", "x"]).model for one in runs}
    assert models["mean pool, one text"]["frame_aggregation"] == {"fusion": "mean"}
    assert models["ours, prior detached, temp 10"]["dual_softmax_prior"] == "detached"
    assert models["ours, uniform gate, 644 steps"]["gate"] == "uniform"


def test_the_program_explains_itself(tmp_path):
    done = run_program("run_ablations.py", "--help")
    assert done.returncode == 0 and "--dry_run" in done.stdout and "is not run again" in done.stdout
    wrong = run_program("run_ablations.py", "--table", tmp_path / "none.yaml")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "cannot read the table" in wrong.stderr


def test_jobs_at_a_time_have_a_device_each(project, monkeypatch):
    run(monkeypatch, "--devices", "[3, 5]")
    used = [path.read_text().split() for path in Path("runs/ablations").glob("*/device.txt")]
    assert len(used) == 4 and all(len(set(devices)) == 1 for devices in used)  # trained and scored on the same
    assert {devices[0] for devices in used} == {"3", "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert run_ablations.devices_of(run_ablations.AblationOptions()) == ["6", "7"]


def test_any_recipe_makes_a_table_with_a_row_for_each_method(project, monkeypatch):
    Path("bench.yaml").write_text("dataset_name: data/bench\n")
    Path("method.yaml").write_text("learning_rate: 0\n")
    words = ("--recipes", "[bench.yaml]", "--methods", "[method.yaml]", "--seeds", "[7]", "--train.num_workers", "0")
    monkeypatch.setattr("sys.argv", ["run_ablations.py", *words, "--evaluate.split", "test_1k"])
    run_ablations.main()
    train, evaluate = calls("method_seed7")
    assert train.startswith("--config bench.yaml --config method.yaml --num_workers 0 --seed 7 --output_dir")
    assert evaluate.endswith("--split test_1k --dataset_name data/bench")
    page = (project / "docs/ablations.md").read_text()
    assert "--recipes '[bench.yaml]' --methods '[method.yaml]'" in page and "| bench | 1 |" in page
    with pytest.raises(UserError, match="either --table, a file of rows, or --recipes"):
        run(monkeypatch, "--recipes", "[bench.yaml]")


def test_an_entry_given_to_every_row_leaves_the_other_entries_of_a_recipe_as_they_are(project):
    Path("meanp.yaml").write_text("dataset_name: x\nclip_config: {}\nmodel: {experts: [fusion], gate: uniform}\n")
    words = ["--recipes", "[meanp.yaml]", "--train.model.dual_softmax_temp", "100", "--train.batch_size", "8"]
    table = run_ablations.table_of(parse_options(run_ablations.AblationOptions, words))
    options = parse_options(TrainOptions, [*run_ablations.plan(table, None)[0].train, "--output_dir", "x"])
    assert options.model == {"experts": ["fusion"], "gate": "uniform", "dual_softmax_temp": 100}
    assert options.batch_size == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipes", "[]"), "--recipes is empty"),
        (("--recipes", "[bench.yaml]", "--methods", "[other/bench.yaml]"), "two of .* are named bench.yaml"),
        (("--recipes", "[empty.yaml]", "--seeds", "[]"), "no row has one of these --seeds"),
        (("--table", "table.yaml", "--seeds", "[7]"), "no row has one of these --seeds"),
    ],
)
def test_a_wrong_choice_of_recipes_or_seeds_is_one_line(project, monkeypatch, words, message):
    Path("other").mkdir()
    for name in ("bench.yaml", "other/bench.yaml"):
        Path(name).write_text("dataset_name: data/bench\n")
    Path("empty.yaml").write_text("# every option is a default\n")
    monkeypatch.setattr("sys.argv", ["run_ablations.py", *words, "--dry_run"])
    with pytest.raises(UserError, match=message):
        run_ablations.main()


def ranks_with(above: np.ndarray, order: np.ndarray) -> RunRanks:
    """Ranks of both directions, two captions a video, the queries in another order."""
    directions = ("text_to_video", "video_to_text")
    ranks = {direction: Ranks(above[order], np.zeros_like(above)) for direction in directions}
    groups, keys = (dict.fromkeys(directions, column[order]) for column in (np.arange(200) // 2, np.arange(200) - 100))
    return RunRanks({"none": ranks}, groups, keys)


def test_rows_are_compared_query_by_query_over_all_seeds(tmp_path):
    table = {"rows": [{"name": "base"}, {"name": "better"}, {"name": "same"}]}
    results, done = AblationResults(tmp_path / "results.json"), {}
    for seed in range(3):
        above = np.random.default_rng(seed).integers(0, 4, size=200)
        order = np.random.default_rng(7).permutation(200)
        for name, ranks in (("base", above), ("better", np.maximum(above - 1, 0)), ("same", above)):
            done[name, seed] = f"{name}_seed{seed}"
            results.add(done[name, seed], {})
            results.add_test(done[name, seed], "test", {}, ranks_with(ranks, order))
    lines = ablation_report.paired_table(table, AblationResults(results.path), done, ["test"]).splitlines()
    (better,) = [line for line in lines if line.startswith("| better | better − base | 3 |")]
    (same,) = [line for line in lines if line.startswith("| same | same − base | 3 |")]
    share = np.mean([np.random.default_rng(s).integers(0, 4, size=200) == 1 for s in range(3)])
    assert f"{100 * share:+.1f}\\*\\* [" in better and better.endswith("] 3/3 |")
    assert "| +0.0 [+0.0, +0.0] 0/3 |" in same
    table["compares"] = [{"what": "one", "row": "same", "with": "better"}]
    line = ablation_report.paired_table(table, results, done, ["test"]).splitlines()[-1]
    assert line.startswith(f"| one | same − better | 3 | {-100 * share:+.1f}")


def test_results_are_packed_without_loss_and_of_one_set_of_queries(tmp_path):
    results = AblationResults(tmp_path / "results.json")
    above = np.random.default_rng(0).integers(0, 500, size=200)
    ranks = ranks_with(above, np.arange(200))
    ranks.ranks["none"]["text_to_video"].equal[3] = 2
    results.add("a_seed0", {"row": "a"})
    results.add_test("a_seed0", "test", {"num_texts": 200}, ranks)
    found = AblationResults(results.path).ranks("a_seed0", "test")
    assert found.ranks["none"]["text_to_video"].equal.tolist() == [0, 0, 0, 2] + [0] * 196
    np.testing.assert_array_equal(found.ranks["none"]["video_to_text"].above, above)
    for name in ("groups", "keys"):
        np.testing.assert_array_equal(getattr(found, name)["text_to_video"], getattr(ranks, name)["text_to_video"])
    ranks.keys["text_to_video"] = ranks.keys["text_to_video"] + 1
    with pytest.raises(UserError, match="results of other queries as 'test'"):
        results.add_test("a_seed0", "test", {}, ranks)
    results.path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        AblationResults(results.path)


def test_a_text_is_right_of_twins_where_it_prefers_its_video():
    texts, videos = torch.eye(4), torch.eye(4)
    assert right_of_twins(texts, videos) == {"text_to_video": 100.0, "video_to_text": 100.0}
    swapped = videos[[1, 0, 2, 3]]
    assert right_of_twins(texts, swapped) == {"text_to_video": 50.0, "video_to_text": 50.0}


def test_a_table_with_tests_is_scored_when_it_is_asked_for_and_each_run_once(project, monkeypatch):
    tests = "tests: [{name: fresh, dataset_name: clips}]\ncompares: [{row: full, with: mean pool}]\n"
    (project / "table.yaml").write_text(TABLE + tests)
    run(monkeypatch, "--seeds", "[0]")
    assert [len(calls(f"{name}_seed0")) for name in ("full", "mean_pool")] == [1, 1]  # trained only
    scored = []

    def score(folder, tests, evaluate):
        scored.append(folder.name)
        metrics = dict.fromkeys(("text_to_video", "video_to_text"), {"R@1": 12.5, "R@5": 50.0})
        return {"fresh": ({"results": {"none": metrics}}, ranks_with(np.arange(200) % 3, np.arange(200)))}

    monkeypatch.setattr(run_ablations, "score_on_tests", score)
    for _ in range(2):
        run(monkeypatch, "--score")
    assert scored == ["mean_pool_seed0", "full_seed0"]
    page = (project / "docs/ablations.md").read_text()
    assert "### Fresh" in page and "| full | 1 | 12.5 | 12.5 | 50.0 |" in page
    assert "| full | full − mean pool | 1 | +0.0 [+0.0, +0.0] 0/1 | +0.0 [+0.0, +0.0] 0/1 |" in page


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("tests: [{name: fresh}]", "no name or dataset_name"),
        ("tests: [{name: fresh, dataset_name: x, splits: y}]", "['splits']: a test may have"),
        ("compares: [{row: full, with: half}]", "`row` and `with` are names of rows"),
    ],
)
def test_a_wrong_test_or_comparison_is_named(project, added, words):
    (project / "table.yaml").write_text(f"{TABLE}{added}\n")
    with pytest.raises(UserError) as error:
        run_ablations.read_table("table.yaml")
    assert words in str(error.value)


def test_the_table_of_msrvtt_has_every_method_with_both_losses_and_three_seeds(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = "training/recipes/reproduce_msrvtt.yaml"
    runs = run_ablations.plan(run_ablations.read_table(path), path)
    assert len(runs) == 31 and {one.seed for one in runs} == {0, 1, 2}
    options = {one.name: parse_options(TrainOptions, [*one.train, "--output_dir", "x"]) for one in runs}
    assert {one.frames_per_second for one in options.values()} == {1}
    for name, one in options.items():
        assert one.model["dual_softmax_temp"] == (100 if name.endswith("dual softmax loss") else None)
        assert one.train_split == "train_7k"
        assert one.validation_split == (None if name == "zero-shot" else "validation_7k")
    assert options["motion, one text"].model["frame_aggregation"] == {"fusion": "motion"}
    assert options["motion, one text"].model["temporal_num_layers"] == 4
    assert options["CAMoE"].model == {"dual_softmax_temp": None}


@pytest.mark.slow
def test_msrvtt_goes_from_its_public_files_to_one_table(tmp_path):
    root = Path(__file__).parents[2]
    names = write_msrvtt(tmp_path / "annotations")
    write_videos(tmp_path / "videos", names)
    clip = tiny_backbone(tmp_path / "clip", "clip")
    (tmp_path / "recipes").mkdir()
    small = {"model_name_or_path": str(clip), "frame_cache": str(tmp_path / "frames"), "num_workers": 0}
    small |= {"batch_size": 2, "num_train_epochs": 1, "num_frames": 2, "max_words": 16}
    words = [
        str(root / "training/recipes/reproduce_msrvtt.sh"),
        str(tmp_path / "annotations"),
        str(tmp_path / "videos"),
    ]
    words += [word for name, value in small.items() for word in (f"--train.{name}", str(value))]
    words += ["--evaluate.num_workers", "0", "--evaluate.frame_cache", "null", "--seeds", "[0]"]
    for name in ("runs_dir", "results_dir", "page", "chart"):
        suffix = {"page": ".md", "chart": ".png"}.get(name, "")
        words += [f"--{name}", str(tmp_path / f"{name}{suffix}")]
    words += ["--only", '["CAMoE, dual softmax loss"]']
    environment = os.environ | {"PYTHON": sys.executable, "DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}

    def run_script(*more):
        return subprocess.run([*words, *more], env=environment, capture_output=True, text=True, timeout=1200)

    dry = run_script("--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("would run: ") == 1 and not (tmp_path / "runs_dir").exists()
    done = run_script()
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "page.md").read_text()
    (scored,) = [line for line in page.splitlines() if line.startswith("| CAMoE, dual softmax loss | 1 |")]
    assert scored.count("|") == 12  # four corrections in two directions, and R@5
    assert "T→V sinkhorn" in page and "; CAMoE.\n" in page
    results = json.loads((tmp_path / "results_dir/msr_vtt.json").read_text())
    assert results["runs"]["camoe__dual_softmax_loss_seed0"]["tests"]["test"]["num_videos"] == 2
