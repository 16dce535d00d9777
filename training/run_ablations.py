# SPDX-License-Identifier: Apache-2.0
"""Train and score the rows of an ablation table, then write the table and its chart.

    python training/run_ablations.py --table training/recipes/ablations.yaml [--only "[full]"] [--dry_run]
    python training/run_ablations.py --table training/recipes/ablations.yaml --score
    python training/run_ablations.py --recipes '[training/recipes/msrvtt_7k.yaml]' --seeds '[0, 1, 2]' \
        --methods '[training/recipes/clip4clip_meanp.yaml]' --evaluate.split test_1k --page docs/msrvtt.md

A table names base recipes, options for every row, seeds, and what each row changes; `--recipes` makes one of any
recipe: a row for it, and a row for it with each of the methods on top. Every row is trained with run_retrieval.py,
once per seed: first all rows with the first seed, and so on. It is scored with evaluate_retrieval.py right after or,
where the table has `tests`, when `--score` asks for it: all trained runs on all tests, the temperatures of the
corrections chosen on validation data, once. A look at a test before everything is chosen is then a decision.
Notable features:
- a finished run is not run again unless its options in the table changed; the results, ranks of single queries among
  them, are one JSON file a table, small enough to be committed, and the page is made from it alone;
- a run that was killed continues from its last checkpoint: run the same command again;
- the tables in `page` stand between two markers, and the text around them is kept; rows without a run are named below;
- means and deviations over seeds, and paired tests, query by query, of the rows that the table `compares`, or of all
  with the first;
- every job has a GPU of its own (`--devices`), so eight GPUs train eight rows at a time.

`--report` writes the page and the chart again without running anything. On a cluster, or to share a machine,
`--launcher "srun -n 1"` puts a command before every program, and `--jobs` sets how many run at a time.
"""

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from data.errors import UserError
from engine.ablation_report import draw_chart, write_page
from engine.ablation_results import AblationResults
from engine.ablation_tests import score_on_tests
from engine.recipe import exit_on_user_error, option, parse_options
from evaluation.compare_runs import RANKS_FILE, RunRanks


PROGRAMS = Path(__file__).parent
TABLE_FIELDS = {"title", "base", "train", "evaluate", "tests", "seeds", "rows", "compares", "page"}
ROW_FIELDS = {"name", "group", "note", "base", "train", "seeds"}
TEST_FIELDS = {"name", "note", "dataset_name", "split", "shared_columns", "twins"}


@dataclass
class AblationOptions:
    """What to run, and where the results go."""

    table: str | None = option(None, "YAML file of the rows, e.g. training/recipes/ablations.yaml")
    recipes: list | None = option(None, "instead of --table: recipes of one experiment; later ones win")
    methods: list = option([], "with --recipes: recipes that go on top of them; each makes one more row")
    train: dict = option({}, "options of run_retrieval.py for rows that do not set them, e.g. --train.batch_size 256")
    evaluate: dict = option({}, "options of evaluate_retrieval.py, e.g. --evaluate.split test_1k")
    only: list | None = option(None, "names of the rows to run; the page still shows all rows")
    seeds: list | None = option(None, "seeds to run (default: the table's; with --recipes 0, 1 and 2)")
    dry_run: bool = option(False, "print what is done and what would run, then stop")
    score: bool = option(False, "train nothing: score each trained run once on the table's tests")
    report: bool = option(False, "run nothing: write the page and the chart from the existing results")
    launcher: str | None = option(None, "command put before every program, e.g. 'taskset -c 0'")
    devices: list | None = option(None, 'GPUs, one per run; \'["0,1", "2,3"]\': two per run (default: all)')
    jobs: int | None = option(None, "runs at a time (default: one per GPU)")
    runs_dir: str = option("runs/ablations", "folder for checkpoints and logs")
    results_dir: str = option("training/results", "folder for the results, one JSON file per table")
    page: str | None = option(None, "page that holds the table (default: the table's `page`, or docs/ablations.md)")
    chart: str | None = option(None, "bar chart of the results (default: images/ beside the page)")


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    name: str
    seed: int
    train: list[str]  # arguments of run_retrieval.py, without output_dir
    evaluate: list[str]  # arguments of evaluate_retrieval.py, without checkpoint

    @property
    def key(self) -> str:
        """A file name: "single gate" -> "single_gate_seed0"."""
        return f"{file_name(self.name)}_seed{self.seed}"


def file_name(name: str) -> str:
    """ "Single gate" -> "single_gate"."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")


def read_table(path: str) -> dict:
    """Read and check a table.

    Raises:
        UserError: it cannot be read, a field is unknown or missing, or two rows have one name.
    """
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"the table {path} is not valid YAML: {error}") from error
    if not isinstance(table, dict) or not table.get("base") or not table.get("seeds") or not table.get("rows"):
        raise UserError(f"the table {path} needs `base` (recipes), `seeds` and `rows`")
    for row in table["rows"]:
        unknown = sorted(set(row) - ROW_FIELDS)
        if unknown or not row.get("name"):
            raise UserError(f"a row of {path} has {unknown or 'no name'}: a row may have {sorted(ROW_FIELDS)}")
    unknown = sorted(set(table) - TABLE_FIELDS)
    if unknown:
        raise UserError(f"the table {path} has {unknown}: a table may have {sorted(TABLE_FIELDS)}")
    for test in table.get("tests") or []:
        unknown = sorted(set(test) - TEST_FIELDS)
        if unknown or not test.get("name") or not test.get("dataset_name"):
            what = unknown or "no name or dataset_name"
            raise UserError(f"a test of {path} has {what}: a test may have {sorted(TEST_FIELDS)}")
    names = [row["name"] for row in table["rows"]]
    for pair in table.get("compares") or []:
        if not {pair.get("row"), pair.get("with")} <= set(names):
            raise UserError(f"`compares` of {path} has {pair}: `row` and `with` are names of rows")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two rows of {path} are named {twice!r}: give each its own name")
    return table


def table_of(options: AblationOptions) -> dict:
    """The table that the options name or, with `--recipes`, are.

    Raises:
        UserError: as `read_table`; none or both are given.
    """
    if (options.table is None) == (options.recipes is None):
        raise UserError("give either --table, a file of rows, or --recipes")
    if options.table is not None:
        table = read_table(options.table)
        for name in ("train", "evaluate"):
            table[name] = {**(table.get(name) or {}), **by_entry(getattr(options, name))}
        return table
    if not options.recipes:
        raise UserError("--recipes is empty: give at least one, e.g. --recipes '[training/recipes/msrvtt_7k.yaml]'")
    evaluate = dict(options.evaluate)
    for recipe in (*options.recipes, *options.methods):
        try:
            values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"cannot read the recipe {recipe}: {error}") from error
        if isinstance(values, dict) and "dataset_name" in values:
            evaluate.setdefault("dataset_name", values["dataset_name"])
    evaluate["dataset_name"] = options.train.get("dataset_name", evaluate.get("dataset_name"))
    plain = {"name": Path(options.recipes[-1]).stem}
    names = [plain["name"], *(Path(method).stem for method in options.methods)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two of --recipes and --methods are named {twice}.yaml: a row has the name of its file")
    return {
        "title": plain["name"],
        "base": options.recipes,
        "train": by_entry(options.train),
        "evaluate": evaluate,
        "seeds": options.seeds or [0, 1, 2],
        "rows": [plain, *({"name": Path(method).stem, "base": [method]} for method in options.methods)],
    }


def by_entry(options: dict) -> dict:
    """{"model": {"gate": "uniform"}} -> {"model.gate": "uniform"}, which leaves other entries as they are."""
    entries = {}
    for name, value in options.items():
        parts = value if isinstance(value, dict) else {None: value}
        entries |= {name if key is None else f"{name}.{key}": part for key, part in parts.items()}
    return entries


def plan(table: dict, path: str | None) -> list[Run]:
    """All runs of a table: every row with the first seed, then every row with the second, and so on."""
    folder = Path(path).parent if path is not None else Path()  # recipes are named relative to the table
    rows = []
    for row in table["rows"]:
        recipes = [folder / recipe for recipe in (*table["base"], *row.get("base", []))]
        configs = [word for recipe in recipes for word in ("--config", str(recipe))]
        changes = arguments({**(table.get("train") or {}), **(row.get("train") or {})})
        rows.append((row, [*configs, *changes]))
    evaluate = arguments(table.get("evaluate") or {})
    seeds = sorted({seed for row in table["rows"] for seed in row.get("seeds", table["seeds"])})
    return [
        Run(row["name"], seed, [*train, "--seed", str(seed)], evaluate)
        for seed in seeds
        for row, train in rows
        if seed in row.get("seeds", table["seeds"])
    ]


def arguments(options: dict) -> list[str]:
    """{"a": 1, "model.gate": "uniform"} -> ["--a", "1", "--model.gate", "uniform"]; values are YAML, texts are not."""
    words = []
    for name, value in options.items():
        if isinstance(value, str) and "." not in name:
            words += [f"--{name}", value]
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        words += [f"--{name}", text.removesuffix("\n...")]
    return words


def devices_of(options: AblationOptions) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    if options.devices is not None:
        return [str(device) for device in options.devices]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


class Runner:
    """Runs the training and the evaluation of each run.

    Args:
        options: [`AblationOptions`]. table: from `table_of`.
    """

    def __init__(self, options: AblationOptions, table: dict):
        self.options = options
        self.table = table
        self.results = AblationResults(Path(options.results_dir) / f"{file_name(table['title'])}.json")
        self.lock = threading.Lock()  # of the results
        self.devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        names = devices_of(options)
        self.jobs = options.jobs or max(1, len(names))
        for number in range(self.jobs):
            self.devices.put(names[number % len(names)] if names else None)
        self.stopped = threading.Event()
        self.processes: set[subprocess.Popen] = set()

    def result_of(self, run: Run) -> dict | None:
        """The results of a finished run; None if there are none, or its options in the table changed."""
        result = self.results.runs.get(run.key)
        return result if result and (result["train"], result["evaluate"]) == (run.train, run.evaluate) else None

    def folder_of(self, run: Run) -> Path:
        """Where a run's checkpoints and logs are."""
        return Path(self.options.runs_dir) / run.key

    def is_trained(self, run: Run) -> bool:
        """Whether a run has ended, with the options that the table has now."""
        folder = self.folder_of(run)
        if not (folder / "all_results.json").is_file():
            return False
        return json.loads((folder / "ablation.json").read_text()) == run.train

    def run(self, run: Run):
        """Train one run, score it unless the table has tests for that, and keep its results."""
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        options_file = folder / "ablation.json"
        if options_file.is_file() and json.loads(options_file.read_text()) != run.train:
            raise UserError(f"{folder} holds a run with other options: delete it, or choose another --runs_dir")
        options_file.write_text(json.dumps(run.train))
        output = ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        device = self.devices.get()
        try:
            if not self.is_trained(run):
                self._call("run_retrieval.py", [*run.train, *output], folder, device)
            if not self.table.get("tests"):
                self._call("evaluate_retrieval.py", ["--checkpoint", str(folder), *run.evaluate], folder, device)
        finally:
            self.devices.put(device)
        self.keep(run)

    def keep(self, run: Run):
        """Put what a run's folder says into the results."""
        folder = self.folder_of(run)
        training = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        result = {
            "row": run.name,
            "seed": run.seed,
            "train": run.train,
            "evaluate": run.evaluate,
            "steps": training["steps"],
            "seconds_per_step": training["seconds"] / max(1, training["steps"]),
            "parameters": training["parameters"],
            "head_parameters": training["head_parameters"],
            "validation": training.get("best"),
        }
        with self.lock:
            self.results.add(run.key, result)
            if not self.table.get("tests"):
                scores = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
                kept = ("num_texts", "num_videos", "settings", "results", "best_clip_shares")
                scores = {name: scores[name] for name in kept if name in scores}
                self.results.add_test(run.key, "test", scores, RunRanks.load(folder / RANKS_FILE))

    def _call(self, program: str, words: list[str], folder: Path, device: str | None):
        """Run one of our programs on a device; its output goes to a log.

        Raises:
            UserError: it failed.
        """
        log = folder / f"{Path(program).stem}.log"
        command = [*shlex.split(self.options.launcher or ""), sys.executable, str(PROGRAMS / program), *words]
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with (
            open(log, "w") as file,
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
        ):
            self.processes.add(process)
            process.wait()
            self.processes.discard(process)
        if process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            cause = lines[-1] if lines else "no output"
            raise UserError(f"{program} exited with code {process.returncode}: {cause} (see {log})")

    def stop(self):
        """Start no more runs; the current ones save a checkpoint and end."""
        self.stopped.set()
        for process in list(self.processes):
            process.terminate()

    def run_all(self, runs: list[Run]):
        """Run these, `jobs` at a time. A failed run does not stop the others."""
        failures = []

        def run_one(number: int, run: Run):
            if self.stopped.is_set():
                return
            print(f"[{number}/{len(runs)}] {run.name}, seed {run.seed}", flush=True)
            try:
                self.run(run)
            except UserError as error:
                if self.stopped.is_set():
                    return
                failures.append(f"{run.name}, seed {run.seed}: {error}")
                print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(run_one, number, run) for number, run in enumerate(runs, start=1)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                raise
        if failures:
            raise UserError(f"{len(failures)} of {len(runs)} runs failed, the first: {failures[0]}")


def score_all(runner: Runner, runs: list[Run]):
    """Score the trained runs on the tests of the table that they have not been scored on."""
    if not runner.table.get("tests"):
        raise UserError("--score is for a table with `tests`; without them each run is scored after its training")
    names = {test["name"] for test in runner.table["tests"]}
    evaluate = arguments(runner.table.get("evaluate") or {})
    for run in runs:
        if runner.result_of(run) is None and runner.is_trained(run):
            runner.keep(run)
        result = runner.result_of(run)
        if result is None or names <= result["tests"].keys():
            continue
        print(f"scoring {run.name}, seed {run.seed}", flush=True)
        for name, (scores, ranks) in score_on_tests(runner.folder_of(run), runner.table["tests"], evaluate).items():
            runner.results.add_test(run.key, name, scores, ranks)


def main():
    options = parse_options(AblationOptions, description=__doc__)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"option 'jobs' must be at least 1, got {options.jobs}")
    table = table_of(options)
    runner = Runner(options, table)
    runs = plan(table, options.table)
    names = {run.name for run in runs}
    for name in options.only or []:
        if name not in names:
            raise UserError(f"--only {name!r}: the table's rows are {', '.join(map(repr, sorted(names)))}")
    wanted = [
        run
        for run in runs
        if (options.only is None or run.name in options.only) and (options.seeds is None or run.seed in options.seeds)
    ]
    if not wanted:
        raise UserError("no row has one of these --seeds: choose seeds of the table, or add these to it")
    missing = [run for run in wanted if runner.result_of(run) is None]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done")
    if options.dry_run:
        for run in missing:
            print(f"would run: {run.name}, seed {run.seed}: run_retrieval.py {shlex.join(run.train)}")
        return
    page = Path(options.page or table.get("page", "docs/ablations.md"))
    chart = Path(options.chart) if options.chart else page.parent / "images" / f"{page.stem}.png"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends the program as Ctrl-C does
    try:
        if options.score:
            score_all(runner, wanted)
        elif not options.report:
            runner.run_all(missing)
    finally:
        done = {(run.name, run.seed): run.key for run in runs if runner.result_of(run) is not None}
        draw_chart(table, runner.results, done, chart)
        write_page(table, runner.results, done, page, options)
        print(f"wrote {page} and {chart}: {len(done)} of {len(runs)} runs")


if __name__ == "__main__":
    exit_on_user_error(main)
