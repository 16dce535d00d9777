# SPDX-License-Identifier: Apache-2.0
"""The ablation runner: what it runs, what it does not run again, and what it writes."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import run_ablations
import yaml

from data.errors import UserError
from engine import ablation_report
from engine.options import TrainOptions
from engine.recipe import parse_options
from evaluation.compare_runs import RANKS_FILE, RunRanks
from evaluation.protocol import Ranks
from tests.programs import run_program


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
    result = json.loads((project / "docs/ablations/full_seed0.json").read_text())
    assert (result["seconds_per_step"], result["head_parameters"]) == (0.25, 56)


def test_the_page_holds_means_over_seeds_and_keeps_the_text_around_the_table(project, monkeypatch):
    run(monkeypatch)
    page = project / "docs/ablations.md"
    assert page.read_text().startswith("# Parts\n")
    assert "| mean pool | 2 | 20.5 ± 0.7 (20.0–21.0) | 20.5 ± 0.7 (20.0–21.0) |" in page.read_text()
    assert "| full | 99.0 ± 0.0 (99.0–99.0) | 1,234 | 56 | 0.25 ± 0.00 (0.25–0.25) |" in page.read_text()
    assert "- **full**: everything on" in page.read_text()
    assert (project / "docs/images/ablations.png").stat().st_size > 5000
    page.write_text("# Mine\n\nBefore.\n" + page.read_text().removeprefix("# Parts\n").rstrip() + "\n\nAfter.\n")
    run(monkeypatch, "--report")
    text = page.read_text()
    assert text.startswith("# Mine\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert text.count("| mean pool | 2 |") == 2  # one per direction


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
    assert "| mean pool | not run |" in text and "| full | 1 | 31.0 |" in text
    assert "Runs of the table that are not done: 3." in text


def test_a_dry_run_runs_nothing(project, monkeypatch, capsys):
    run(monkeypatch, "--dry_run")
    assert not Path("runs").exists() and not Path("docs").exists()
    assert "would run: full, seed 1: run_retrieval.py --config base.yaml" in capsys.readouterr().out


def test_a_failed_run_is_named_with_its_last_line_and_the_others_continue(project, monkeypatch):
    folder = project / "runs/ablations/mean_pool_seed0"
    folder.mkdir(parents=True)
    (folder / "fail").touch()
    with pytest.raises(UserError, match="1 of 4 runs failed, the first: mean pool, seed 0: .*the disk is full"):
        run(monkeypatch)
    assert (project / "docs/ablations/full_seed1.json").exists()
    assert "| mean pool | 1 |" in (project / "docs/ablations.md").read_text()


def test_a_stopped_runner_ends_its_program_and_starts_no_other(project, monkeypatch):
    (project / "programs/run_retrieval.py").write_text(
        "import pathlib, time; pathlib.Path('started.txt').touch(); time.sleep(60)"
    )
    runner = run_ablations.Runner(parse_options(run_ablations.AblationOptions, ["--table", "table.yaml"]))
    runs = run_ablations.plan(run_ablations.read_table("table.yaml"), "table.yaml")
    thread = threading.Thread(target=runner.run_all, args=(runs,))
    thread.start()
    while not Path("started.txt").exists():
        time.sleep(0.01)
    runner.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [path.name for path in Path("runs/ablations").iterdir()] == ["mean_pool_seed0"]
    assert not Path("docs/ablations").exists()


def test_a_launcher_goes_before_every_program(project, monkeypatch):
    run(monkeypatch, "--launcher", "env LAUNCHED=1 sh -c 'echo launched > launched.txt; exec \"$@\"' -", "--jobs", "2")
    assert (project / "launched.txt").read_text() == "launched\n"
    assert len(list((project / "docs/ablations").glob("*.json"))) == 4


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


def test_spread_is_the_mean_with_deviation_lowest_and_highest():
    assert ablation_report.spread([27.4, 29.8]) == "28.6 ± 1.7 (27.4–29.8)"
    assert ablation_report.spread([28.6]) == "28.6"


def test_the_rows_of_the_repository_are_runs_that_the_trainer_understands(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = "training/recipes/ablations.yaml"
    table = yaml.safe_load(Path(path).read_text())
    runs = run_ablations.plan(table, path)
    assert len({one.key for one in runs}) == len(runs) >= 2 * len(table["rows"])
    options = {one.name: parse_options(TrainOptions, [*one.train, "--output_dir", "x"]) for one in runs}
    assert options["mean pool, one text"].model["frame_aggregation"] == {"fusion": "mean"}
    same = {"batch_size", "num_train_epochs", "num_frames", "learning_rate", "clip_config"}
    assert all(len({str(getattr(one, name)) for one in options.values()}) == 1 for name in same)
    longer = {name: one for name, one in options.items() if name.endswith(" steps")}
    assert all(name.endswith(f", {one.max_train_steps} steps") for name, one in longer.items())
    assert len({one.max_train_steps for name, one in options.items() if name not in longer}) == 1


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


def test_rows_are_compared_with_the_first_one_query_by_query_over_all_seeds(tmp_path):
    table = {"rows": [{"name": "base"}, {"name": "better"}, {"name": "same"}]}
    results = {}
    for seed in range(3):
        generator = np.random.default_rng(seed)
        above = generator.integers(0, 4, size=200)
        for name, ranks in (("base", above), ("better", np.maximum(above - 1, 0)), ("same", above)):
            key = f"{name}_seed{seed}"
            results[name, seed] = {"key": key}
            directions = ("text_to_video", "video_to_text")
            ours = {direction: Ranks(ranks, np.zeros_like(ranks)) for direction in directions}
            order = generator.permutation(200)
            shuffled = {d: Ranks(r.above[order], r.equal[order]) for d, r in ours.items()}
            groups, keys = (
                dict.fromkeys(directions, column[order]) for column in (np.arange(200) // 2, np.arange(200))
            )
            (tmp_path / key).mkdir()
            RunRanks({"none": shuffled}, groups, keys).save(tmp_path / key / RANKS_FILE)
    lines = ablation_report.paired_table(table, results, tmp_path).splitlines()
    (better,) = [line for line in lines if line.startswith("| better | 3 |")]
    (same,) = [line for line in lines if line.startswith("| same | 3 |")]
    share = np.mean([np.random.default_rng(s).integers(0, 4, size=200) == 1 for s in range(3)])
    assert f"{100 * share:+.1f} [" in better and ", p 0.0" in better
    assert "+0.0 [+0.0, +0.0], p 1.000" in same
