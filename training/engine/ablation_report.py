# SPDX-License-Identifier: Apache-2.0
"""The tables and the chart of `run_ablations.py`, from the results of its runs.

Each number is the mean over the seeds, with the lowest and highest in brackets: with two or three seeds a range says
more than a standard deviation.
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt


BEGIN = "<!-- the table begins here: written by training/run_ablations.py -->"
END = "<!-- the table ends here -->"
DIRECTION_LABELS = {"text_to_video": "text to video", "video_to_text": "video to text"}
CORRECTION_LABELS = {"none": "uncorrected", "dual_softmax": "dual softmax", "query_bank": "query bank"}
COLORS = ("#3b6ea5", "#c96f4a", "#6a9a58", "#8a6aa8", "#b59a3c", "#5f8a8b", "#a65f7c")


def spread(values: list[float], digits: int = 1) -> str:
    """[27.4, 29.8] -> "28.6 (27.4–29.8)"."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


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


def write_page(table: dict, results: dict, page: Path, options):
    """Write the tables between the two markers of the page; a page without markers gets them at its end."""
    missing = sum(len(row.get("seeds", table["seeds"])) - len(row_results(row, results)) for row in table["rows"])
    parts = [
        f"Command: `python training/run_ablations.py --table {options.table}`. Means over seeds, lowest and highest "
        f"in brackets; R@K in percent. Runs of the table that are not done: {missing}.",
        "\n".join(f"- **{row['name']}**: {row['note']}" for row in table["rows"] if row.get("note")),
    ]
    for direction, label in DIRECTION_LABELS.items():
        parts.append(f"### {label.capitalize()}\n\n{recall_table(table, results, direction)}")
    parts.append(f"### What the best clips share with the right ones, and the cost\n\n{cost_table(table, results)}")
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {table.get('title', 'Ablations')}\n"
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    body = "\n\n".join(part for part in parts if part)
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(f".{page.name}.part")
    partial.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    partial.replace(page)


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
