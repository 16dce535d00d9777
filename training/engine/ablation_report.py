# SPDX-License-Identifier: Apache-2.0
"""The tables and the chart of `run_ablations.py`, from the results of its runs.

Each number is the mean over the seeds, with their standard deviation, and the lowest and highest in brackets. A
paired test compares a row with the first one on the same queries, of all seeds that both have, resampled by video.
"""

import statistics
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np

from evaluation.compare_runs import RANKS_FILE, RunRanks, compare_runs


BEGIN = "<!-- the table begins here: written by training/run_ablations.py -->"
END = "<!-- the table ends here -->"
DIRECTION_LABELS = {"text_to_video": "text to video", "video_to_text": "video to text"}
CORRECTION_LABELS = {"none": "uncorrected", "dual_softmax": "dual softmax", "query_bank": "query bank"}
COLORS = ("#3b6ea5", "#c96f4a", "#6a9a58", "#8a6aa8", "#b59a3c", "#5f8a8b", "#a65f7c")


def spread(values: list[float], digits: int = 1) -> str:
    """[27.4, 29.8] -> "28.6 ± 1.7 (27.4–29.8)"."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    deviation = f"{statistics.stdev(values):.{digits}f}"
    return f"{mean} ± {deviation} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def row_results(row: dict, results: dict) -> list[dict]:
    """The results of one row's seeds."""
    return [result for (name, _), result in sorted(results.items()) if name == row["name"]]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    align = [" --- ", *[" ---: "] * (len(header) - 1)]
    lines = [" | ".join(header), "|".join(align).strip(), *(" | ".join(cells) for cells in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"| {line.strip()} |" for line in lines)


def recall_table(table: dict, results: dict, direction: str) -> str:
    """One line per row of the ablation: R@1 under each correction, and uncorrected R@5 and R@10."""
    header = ["row", "seeds", *(f"R@1 {name}" for name in CORRECTION_LABELS.values()), "R@5", "R@10"]
    lines = []
    for row in table["rows"]:
        done = row_results(row, results)
        if not done:
            lines.append([row["name"], "not run", *[""] * (len(header) - 2)])
            continue
        cells = [
            spread([result["results"][correction][direction]["R@1"] for result in done])
            if all(correction in result["results"] for result in done)
            else ""
            for correction in CORRECTION_LABELS
        ]
        cells += [spread([result["results"]["none"][direction][name] for result in done]) for name in ("R@5", "R@10")]
        lines.append([row["name"], str(len(done)), *cells])
    return markdown_table(header, lines)


def cost_table(table: dict, results: dict) -> str:
    """One line per row: how often the best clip has an attribute of the right one, parameters, seconds per step."""
    columns = list(dict.fromkeys(name for result in results.values() for name in result["best_clip_shares"]))
    header = ["row", *(f"right {name} (%)" for name in columns), "parameters", "of which the head", "seconds per step"]
    lines = []
    for row in table["rows"]:
        done = row_results(row, results)
        if done:
            shares = [spread([result["best_clip_shares"].get(name, 0.0) for result in done]) for name in columns]
            sizes = [f"{done[0][name]:,}" for name in ("parameters", "head_parameters")]
            lines.append([row["name"], *shares, *sizes, spread([r["seconds_per_step"] for r in done], digits=2)])
    return markdown_table(header, lines)


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


def paired_table(table: dict, results: dict, runs_dir: Path) -> str:
    """One line per row after the first: the difference of R@1 to it, with interval and p-value; "" without ranks."""
    ranks: dict[str, dict[int, RunRanks]] = {}
    for (name, seed), result in results.items():
        path = runs_dir / result["key"] / RANKS_FILE if "key" in result else None
        if path is not None and path.is_file():
            ranks.setdefault(name, {})[seed] = RunRanks.load(path)
    reference = table["rows"][0]["name"]
    corrections = {name: label for name, label in CORRECTION_LABELS.items() if name != "query_bank"}
    lines = []
    for row in table["rows"][1:]:
        seeds = ranks.get(row["name"], {}).keys() & ranks.get(reference, {}).keys()
        if not seeds:
            continue
        pooled = [pooled_ranks({seed: ranks[name][seed] for seed in seeds}) for name in (row["name"], reference)]
        tests = compare_runs(*pooled, reference)
        cells = []
        for direction in DIRECTION_LABELS:
            for correction in corrections:
                test = tests.get(correction, {}).get(direction, {}).get("R@1")
                low, high = test["ci95"] if test else (0, 0)
                cells.append(
                    f"{test['difference']:+.1f} [{low:+.1f}, {high:+.1f}], p {test['p_value']:.3f}" if test else ""
                )
        lines.append([row["name"], str(len(seeds)), *cells])
    if not lines:
        return ""
    header = [f"{direction}, {label}" for direction in DIRECTION_LABELS.values() for label in corrections.values()]
    return (
        f"### Paired tests: R@1 minus that of {reference}\n\n"
        "Difference on the same queries [95 % interval], p-value; videos are resampled, seeds are not.\n\n"
        + markdown_table(["row", "seeds", *header], lines)
    )


def write_page(table: dict, results: dict, page: Path, options):
    """Write the tables between the two markers of the page; a page without markers gets them at its end."""
    missing = sum(len(row.get("seeds", table["seeds"])) - len(row_results(row, results)) for row in table["rows"])
    parts = [
        f"Command: `python training/run_ablations.py {_what(options)}`. Means over seeds ± standard deviation, lowest "
        f"and highest in brackets; R@K in percent. Runs of the table that are not done: {missing}.",
        "\n".join(f"- **{row['name']}**: {row['note']}" for row in table["rows"] if row.get("note")),
    ]
    for direction, label in DIRECTION_LABELS.items():
        parts.append(f"### {label.capitalize()}\n\n{recall_table(table, results, direction)}")
    parts.append(paired_table(table, results, Path(options.runs_dir)))
    parts.append(f"### What the best clips share with the right ones, and the cost\n\n{cost_table(table, results)}")
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


def draw_chart(table: dict, results: dict, path: Path):
    """Horizontal bars of uncorrected text-to-video R@1, with a dot for each seed; rows without a run are left out."""
    rows = [row for row in table["rows"] if row_results(row, results)]
    if not rows:
        return
    groups = list(dict.fromkeys(row.get("group", "") for row in rows))
    figure, axis = plt.subplots(figsize=(8.5, 0.9 + 0.34 * len(rows)))
    for position, row in enumerate(rows):
        values = [result["results"]["none"]["text_to_video"]["R@1"] for result in row_results(row, results)]
        color = COLORS[groups.index(row.get("group", "")) % len(COLORS)]
        axis.barh(position, sum(values) / len(values), color=color, height=0.7, alpha=0.85)
        axis.plot(values, [position] * len(values), "o", color="black", markersize=3)
        axis.text(max(values) + 0.6, position, f"{sum(values) / len(values):.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("text-to-video R@1, uncorrected (%); dots are seeds")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
