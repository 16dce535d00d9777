# SPDX-License-Identifier: Apache-2.0
"""A Markdown page with results measured by this project beside published ones.

    python hub_cards/results_table.py [--results hub_cards/results] [--output docs/results.md]

Measured: every `*.json` in the results folder, each an eval_results.json of training/evaluate_retrieval.py, renamed
after its system. Published: published_results.json beside this program, each row with its source; none of them was
measured here. The rows of a table share data set and split; every row names its correction.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path


HERE = Path(__file__).parent
METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTION_TITLES = {
    "text_to_video": "text to video",
    "video_to_text": "video to text",
    "video_to_text_caption_max": "video to text (caption max)",
}


class ResultsError(Exception):
    """A file that is not a result: one line and exit code 2."""


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path}: {error}") from error


def measured_rows(folder: Path) -> Iterable[dict]:
    """One row per result and correction, in the form of published_results.json."""
    if not folder.is_dir():
        raise ResultsError(f"the results folder {folder} does not exist; set --results")
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        missing = [name for name in ("dataset", "split", "results") if name not in run]
        if missing:
            raise ResultsError(
                f"{path} has no {missing[0]!r}: put the eval_results.json of evaluate_retrieval.py there"
            )
        for correction, directions in run["results"].items():
            yield {
                "system": path.stem,
                "dataset": run["dataset"],
                "split": run["split"],
                "correction": correction,
                "source": f"measured here, {path.name}",
                **directions,
            }


def render(measured: Iterable[dict], published: Iterable[dict]) -> str:
    """Markdown: one table per data set, split and direction, measured rows first."""
    rows = [(row, "measured") for row in measured] + [(row, "published") for row in published]
    lines = [
        "# Results",
        "",
        "Rows marked *published* are quoted from the source given and were not measured by this project. Numbers with "
        "dual softmax or sinkhorn are transductive: they use all test queries at once.",
    ]
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row, _ in rows):
        lines += ["", f"## {dataset}, {split}"]
        for direction, title in DIRECTION_TITLES.items():
            shown = [
                (row, origin)
                for row, origin in rows
                if (row["dataset"], row["split"]) == (dataset, split) and row.get(direction)
            ]
            if not shown:
                continue
            heads = ("", "system", "correction", *METRICS, "source")
            lines += ["", f"### {title.capitalize()}", "", _table_row(heads), _table_row("---" for _ in heads)]
            for row, origin in shown:
                numbers = [_number(row[direction], metric) for metric in METRICS]
                lines.append(_table_row((origin, row["system"], row["correction"], *numbers, row["source"])))
    return "\n".join(lines) + "\n"


def _number(metrics: dict, name: str) -> str:
    """One decimal, with the 95 % interval if there is one; a dash if nothing was reported."""
    if name not in metrics:
        return "–"
    interval = metrics.get(f"{name}_ci95")
    return f"{metrics[name]:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def _table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of measured results")
    parser.add_argument("--output", type=Path, help="file to write (default: print)")
    options = parser.parse_args()
    try:
        page = render(measured_rows(options.results), read_json(HERE / "published_results.json"))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.output is None:
        print(page, end="")
    else:
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
