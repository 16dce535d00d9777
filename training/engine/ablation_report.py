# SPDX-License-Identifier: Apache-2.0
"""The tables and the chart of `run_ablations.py`, from the results of its runs.

Each number is the mean over the seeds, with their standard deviation. A paired test compares two rows on the same
queries, of all seeds that both have, resampled by video: what it says holds for these models, not for other seeds.
"""

import statistics
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np

from evaluation.compare_runs import RunRanks, compare_runs
from evaluation.protocol import recalls

from .ablation_results import AblationResults


BEGIN = "<!-- the table begins here: written by training/run_ablations.py -->"
END = "<!-- the table ends here -->"
DIRECTION_LABELS = {"text_to_video": "text to video", "video_to_text": "video to text"}
CORRECTION_LABELS = {
    "none": "uncorrected",
    "dual_softmax": "dual softmax",
    "query_bank": "query bank",
    "dynamic_query_bank": "dynamic bank",
    "sinkhorn": "sinkhorn",
}
COLORS = ("#3b6ea5", "#c96f4a", "#6a9a58", "#8a6aa8", "#b59a3c", "#5f8a8b", "#a65f7c")


def spread(values: list[float], digits: int = 1) -> str:
    """[27.4, 29.8] -> "28.6 ± 1.7"."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def runs_of(row: str, results: AblationResults, done: dict, test: str | None = None) -> list[dict]:
    """The finished runs of a row in the order of their seeds; with `test`, what each scored there.

    Args:
        done: (row, seed) -> key in `results`, of finished runs.
    """
    runs = [results.runs[key] for (name, _), key in sorted(done.items()) if name == row]
    return runs if test is None else [run["tests"][test] for run in runs if test in run["tests"]]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    align = [" --- ", *[" ---: "] * (len(header) - 1)]
    lines = [" | ".join(header), "|".join(align).strip(), *(" | ".join(cells) for cells in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"| {line.strip()} |" for line in lines)


def recall_table(table: dict, results: AblationResults, done: dict, test: str) -> str:
    """One line per row of the ablation: R@1 in both directions under each correction, R@5, and what the test adds."""
    everything = [scores for row in table["rows"] for scores in runs_of(row["name"], results, done, test)]
    corrections = [name for name in CORRECTION_LABELS if any(name in scores["results"] for scores in everything)]
    columns = list(dict.fromkeys(name for scores in everything for name in scores.get("best_clip_shares", {})))
    twins = any("right_of_twins" in scores for scores in everything)
    header = ["row", "seeds"]
    header += [f"{short} {CORRECTION_LABELS[name]}" for name in corrections for short in ("T→V", "V→T")]
    header += ["T→V R@5"] + ["of twins T→V", "of twins V→T"] * twins + [f"right {name}" for name in columns]
    lines, not_run = [], []
    for row in table["rows"]:
        scored = runs_of(row["name"], results, done, test)
        if not scored:
            not_run.append(row["name"])
            continue
        cells = []
        for correction in corrections:
            for direction in DIRECTION_LABELS:
                has_it = all(correction in scores["results"] for scores in scored)
                cells.append(spread([s["results"][correction][direction]["R@1"] for s in scored]) if has_it else "")
        cells.append(spread([scores["results"]["none"]["text_to_video"]["R@5"] for scores in scored]))
        if twins:
            cells += [
                spread([scores["right_of_twins"][direction] for scores in scored]) for direction in DIRECTION_LABELS
            ]
        cells += [spread([scores["best_clip_shares"][name] for scores in scored]) for name in columns]
        lines.append([row["name"], str(len(scored)), *cells])
    return markdown_table(header, lines) + (f"\n\nNot run: {'; '.join(not_run)}." if not_run else "")


def cost_table(table: dict, results: AblationResults, done: dict) -> str:
    """One line per row: parameters and seconds per step."""
    lines = []
    for row in table["rows"]:
        runs = runs_of(row["name"], results, done)
        if runs:
            sizes = [f"{runs[0][name]:,}" for name in ("parameters", "head_parameters")]
            lines.append([row["name"], *sizes, spread([run["seconds_per_step"] for run in runs], digits=2)])
    return markdown_table(["row", "parameters", "of which the head", "seconds per step"], lines)


def pooled_ranks(runs: dict[int, RunRanks]) -> RunRanks:
    """The ranks of one row's seeds as those of one run: every query once a seed, in the group of its video."""
    seeds = sorted(runs)
    first = runs[seeds[0]]

    def join(arrays):
        return np.concatenate(list(arrays), axis=-1)

    return RunRanks(
        ranks={
            correction: {
                direction: type(ranks)(
                    join(runs[seed].ranks[correction][direction].above for seed in seeds),
                    join(runs[seed].ranks[correction][direction].equal for seed in seeds),
                )
                for direction, ranks in directions.items()
            }
            for correction, directions in first.ranks.items()
        },
        groups={direction: join(runs[seed].groups[direction] for seed in seeds) for direction in first.groups},
        keys={direction: join(runs[seed].keys[direction] ^ seed for seed in seeds) for direction in first.keys},
    )


def paired_table(table: dict, results: AblationResults, done: dict, tests: list[str]) -> str:
    """One line per comparison of two rows: the difference of R@1 on each test; "" where nothing can be compared."""
    first = table["rows"][0]["name"]
    pairs = table.get("compares") or [{"row": row["name"], "with": first} for row in table["rows"][1:]]
    lines = []
    for pair in pairs:
        cells, counts = [], set()
        for test in tests:
            of_row, of_other = (
                {
                    seed: key
                    for (name, seed), key in done.items()
                    if name == pair[which] and test in results.runs[key]["tests"]
                }
                for which in ("row", "with")
            )
            seeds = sorted(of_row.keys() & of_other.keys())
            if not seeds:
                cells += ["", ""]
                continue
            counts.add(len(seeds))
            runs = [{seed: results.ranks(of[seed], test) for seed in seeds} for of in (of_row, of_other)]
            compared = compare_runs(*map(pooled_ranks, runs), pair["with"])["none"]
            for direction in DIRECTION_LABELS:
                of_seeds = ([recalls(of[seed].ranks["none"][direction])["R@1"] for seed in seeds] for of in runs)
                better = sum(mine > other for mine, other in zip(*of_seeds, strict=True))
                cells.append(f"{_difference(compared[direction]['R@1'])} {better}/{len(seeds)}")
        if counts:
            what = pair.get("what") or pair["row"]
            of = f"{pair['row']} − {pair['with']}"
            lines.append([what, of, ", ".join(map(str, sorted(counts))), *cells])
    if not lines:
        return ""
    header = [f"{test}, {short}" for test in tests for short in ("T→V", "V→T")]
    return (
        "### Paired tests: what each part is worth\n\n"
        "Difference of uncorrected R@1 on the same queries [95 % interval], \\* p < 0.05, \\*\\* p < 0.001. Videos "
        "are resampled, seeds are not; after it, in how many of the seeds the first row is above the second.\n\n"
        + markdown_table(["part", "rows", "seeds", *header], lines)
    )


def _difference(test: dict) -> str:
    low, high = test["ci95"]
    stars = "**" if test["p_value"] < 0.001 else "*" if test["p_value"] < 0.05 else ""
    return f"{test['difference']:+.1f}{stars.replace('*', chr(92) + '*')} [{low:+.1f}, {high:+.1f}]"


def tests_of(table: dict) -> list[str]:
    """Names of the table's tests; a table without any has one, the split that each run was scored on."""
    return [test["name"] for test in table.get("tests") or [{"name": "test"}]]


def write_page(table: dict, results: AblationResults, done: dict, page: Path, options):
    """Write the tables between the two markers of the page; a page without markers gets them at its end.

    Args:
        done: (row, seed) -> key in `results`, of finished runs.
    """
    missing = sum(
        len(row.get("seeds", table["seeds"])) - len(runs_of(row["name"], results, done)) for row in table["rows"]
    )
    parts = [
        f"Command: `python training/run_ablations.py {_what(options)}`. R@1 in percent, text to video (T→V) and video "
        f"to text (V→T), means over seeds ± standard deviation. Runs of the table that are not done: {missing}.",
        "\n".join(f"- **{row['name']}**: {row['note']}" for row in table["rows"] if row.get("note")),
        paired_table(table, results, done, tests_of(table)),
    ]
    notes = {test["name"]: test.get("note", "") for test in table.get("tests") or []}
    for test in tests_of(table):
        note = f"{notes[test]}\n\n" if notes.get(test) else ""
        parts.append(f"### {test.capitalize()}\n\n{note}{recall_table(table, results, done, test)}")
    parts.append(f"### Cost\n\n{cost_table(table, results, done)}")
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {table.get('title', 'Ablations')}\n"
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    body = "\n\n".join(part for part in parts if part)
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(f".{page.name}.part")
    partial.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    partial.replace(page)


def _what(options) -> str:
    if options.table is not None:
        return f"--table {options.table}"
    methods = f" --methods '[{', '.join(options.methods)}]'" if options.methods else ""
    return f"--recipes '[{', '.join(options.recipes)}]'{methods}"


def draw_chart(table: dict, results: AblationResults, done: dict, path: Path):
    """Horizontal bars of uncorrected text-to-video R@1 on the last test that a run has, with a dot for each seed."""
    scored = [test for test in tests_of(table) if any(test in results.runs[key]["tests"] for key in done.values())]
    if not scored:
        return
    test = "test A" if "test A" in scored else scored[0]
    rows = [row for row in table["rows"] if runs_of(row["name"], results, done, test)]
    groups = list(dict.fromkeys(row.get("group", "") for row in rows))
    figure, axis = plt.subplots(figsize=(8.5, 0.9 + 0.34 * len(rows)))
    for position, row in enumerate(rows):
        runs = runs_of(row["name"], results, done, test)
        values = [scores["results"]["none"]["text_to_video"]["R@1"] for scores in runs]
        color = COLORS[groups.index(row.get("group", "")) % len(COLORS)]
        axis.barh(position, sum(values) / len(values), color=color, height=0.7, alpha=0.85)
        axis.plot(values, [position] * len(values), "o", color="black", markersize=3)
        axis.text(max(values) + 0.6, position, f"{sum(values) / len(values):.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(f"{test}, text-to-video R@1, uncorrected (%); dots are seeds")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
