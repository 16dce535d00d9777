# SPDX-License-Identifier: Apache-2.0
"""All benches in turn, one table, a chart, and the table of docs/performance.md: `make bench`.

    python benchmarks/run_all.py                     everything, within a quarter of an hour on two cores
    python benchmarks/run_all.py decode search       some of them; the others' figures stay
    python benchmarks/run_all.py --no_run            only the table, the chart and the page, from the JSON at hand

A bench that fails is named at the end, and the others run. The exit code is 1 if one failed; a goal that is not met is
no failure: it is a line of the table.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from harness import RESULTS, Line, read, row, table


HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
CHART = HERE.parent / "docs" / "images" / "performance.png"
BEGIN, END = "<!-- figures: written by benchmarks/run_all.py -->\n", "<!-- end of figures -->\n"

# Program -> options that make it end in time. In this order in the table.
PROGRAMS = {
    "decode": [],
    "keyframes": [],
    "preprocess": [],
    "training_step": [],
    "heads_cost": [],
    "gradient_cache_memory": [],
    "frame_cache_speed": [],
    "embedding": [],
    "search": [],
    "index_changes": ["--repeats", "3"],
    "index_readers": [],
    "library_scale": [],
    "evaluation": [],
    "tagging": [],
    "startup": ["--repeats", "2"],
    "gpu": [],
}

# What the results are about: how their names begin -> a row of the chart.
SUBJECTS = {
    "decode": "decoding sampled frames",
    "keyframes": "decoding from key frames alone",
    "preprocess": "preprocessing frames",
    "training_step": "a training step",
    "heads_cost": "cost of the experts beside CLIP",
    "gradient_cache": "gradient cache",
    "frame_cache": "frame cache and loader",
    "embedding": "embedding files",
    "search": "searching",
    "index_changes": "changing an index",
    "index_readers": "reading while writing",
    "library_scale": "a million moments",
    "encode_rate": "engines that encode a library",
    "index_thumbnails": "pictures of moments",
    "evaluation": "evaluation",
    "tagging": "tagging captions",
    "startup": "starting, loading, a cold search",
    "training_rows": "memory of training rows",
    "gpu": "GPU",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="which benches to run (default: all)")
    parser.add_argument("--no_run", action="store_true", help="measure nothing, show what was measured")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a bench is given up")
    options = parser.parse_args()
    unknown = sorted(set(options.programs) - set(PROGRAMS))
    if unknown:
        parser.error(f"unknown bench {unknown[0]!r}; choose from {', '.join(PROGRAMS)}")
    failed = [] if options.no_run else run(options.programs or list(PROGRAMS), options.limit)
    results = collect()
    print(table([line for lines in results.values() for line in lines]))
    counts = count(results)
    print(f"\n{counts['met']} goals met, {counts['missed']} not met, {counts['skipped']} lines skipped")
    draw(results)
    write_page(results)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def collect() -> dict[str, list[Line]]:
    """All results that are kept, in the order of the programs: each is named like its program or begins its name."""
    names = list(PROGRAMS)

    def position(path: Path) -> int:
        return next((i for i, name in enumerate(names) if name.startswith(path.stem)), len(names))

    return {path.stem: read(path) for path in sorted(RESULTS.glob("*.json"), key=lambda p: (position(p), p.stem))}


def run(names: list[str], limit: float) -> list[str]:
    """Run the programs one after the other; returns the names of those that failed."""
    failed = []
    for name in names:
        begin = time.perf_counter()
        print(f"== {name}", file=sys.stderr)
        command = [sys.executable, str(HERE / f"{name}.py"), *PROGRAMS[name]]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"given up after {limit:.0f} s", file=sys.stderr)
            failed.append(name)
            continue
        if done.returncode:
            failed.append(name)
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return failed


def count(results: dict[str, list[Line]]) -> dict[str, int]:
    lines = [line for of in results.values() for line in of]
    return {
        "met": sum(line.met is True for line in lines),
        "missed": sum(line.met is False for line in lines),
        "skipped": sum(bool(line.skipped) for line in lines),
    }


def draw(results: dict[str, list[Line]]):
    """A row a subject, a dot a line with a goal: its ratio as a multiple of the goal; right of 1 it is met."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects: dict[str, list[Line]] = {}
    for name, lines in results.items():
        subject = next((title for begin, title in SUBJECTS.items() if name.startswith(begin)), name.replace("_", " "))
        with_goal = [line for line in lines if line.met is not None and line.ratio > 0]
        subjects.setdefault(subject, []).extend(with_goal)
    subjects = {subject: lines for subject, lines in subjects.items() if lines}
    lowest, highest = 0.4, 12
    picture, axes = pyplot.subplots(figsize=(8, 1 + 0.36 * len(subjects)), layout="constrained")
    for y, lines in enumerate(subjects.values()):
        axes.axhline(y, color="#e3e7eb", linewidth=1, zorder=0)
        for line in sorted(lines, key=lambda line: line.met, reverse=True):
            share = line.ratio / line.goal if line.at_least else line.goal / line.ratio
            shown = min(max(share, lowest), highest)
            marker = "o" if shown == share else ">" if share > 1 else "<"
            colour = "#2a7f62" if line.met else "#c8553d"
            axes.plot(shown, y, marker=marker, color=colour, markersize=8, alpha=0.75, markeredgewidth=0)
        met = f"{sum(line.met for line in lines)} of {len(lines)}"
        axes.text(highest * 1.25, y, met, va="center", fontsize=10)
    axes.text(highest * 1.25, -0.8, "goals met", va="center", fontsize=10)
    axes.set_yticks(range(len(subjects)), subjects, fontsize=10)
    axes.set_ylim(len(subjects) - 0.4, -1.1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 0.7, 1, 1.5, 2, 4, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=10)
    axes.minorticks_off()
    axes.set_xlim(lowest * 0.92, highest * 1.1)
    axes.set_xlabel("times the goal: right of 1 it is met (arrows: beyond the axis)", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    CHART.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(CHART, dpi=100)
    pyplot.close(picture)


def markdown(results: dict[str, list[Line]]) -> str:
    """The table of docs/performance.md."""
    rows = ["| line | ours | peer | limit | ratio | spread | goal | |", "|---|---|---|---|---|---|---|---|"]
    for lines in results.values():
        for line in lines:
            cells = list(row(line))
            if line.ratio is not None and line.ratio_name:
                cells[4] += f" ({line.ratio_name})"
            if line.met is False:
                by = abs(line.ratio / line.goal - 1)
                cells[-1] = f"**missed by {100 * by:.0f} %**"
            if line.note:
                cells[-1] = "; ".join(filter(None, (cells[-1], line.note)))
            rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def write_page(results: dict[str, list[Line]]):
    """Put the figures between the marks of the page; its text stays."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    counts = count(results)
    summary = f"{counts['met']} goals met, {counts['missed']} missed, {counts['skipped']} lines skipped.\n\n"
    PAGE.write_text(before + BEGIN + "\n" + summary + markdown(results) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
