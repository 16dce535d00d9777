# SPDX-License-Identifier: Apache-2.0
"""What the programs of this folder share: timing in turns, the form of a result, and where it is kept.

A program measures a few lines. A line compares: ours against a peer that a user would take instead, and against a
limit that nothing can beat (bare decoding, the model alone), all in the same run. Calls take turns, so that a busy
machine slows them all, and ratios are taken within a turn: a line's ratio is the median over turns, its spread their
range.

    harness.write("decode", [line, ...])        benchmarks/results/decode.json
    harness.table(lines)                        the same, for people
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"


@dataclass
class Line:
    """One line of the table.

    Args:
        name: what is measured.
        unit: of ours, peer and limit, for example "ms".
        ours, peer, limit: medians over the turns; None where there is none.
        peer_name, limit_name: what the two are.
        ratio: of the comparison that the goal is about, median over the turns.
        ratio_name: how it is formed, for example "peer / ours".
        spread: lowest and highest ratio of a turn.
        goal: what the ratio has to reach, or None for a line that only informs.
        at_least: True where the ratio is to be at least the goal, False where it is to be at most.
        note: what a reader of the table needs to know.
        skipped: why it was not measured, for example that there is no GPU.
    """

    name: str
    unit: str = ""
    ours: float | None = None
    peer: float | None = None
    peer_name: str = ""
    limit: float | None = None
    limit_name: str = ""
    ratio: float | None = None
    ratio_name: str = ""
    spread: tuple[float, float] | None = None
    goal: float | None = None
    at_least: bool = True
    note: str = ""
    skipped: str = ""
    met: bool | None = field(default=None)

    def __post_init__(self):
        if self.goal is not None and self.ratio is not None:
            self.met = self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


def in_turns(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` times, one after the other in every turn.

    `clock`: time.process_time counts this process's work alone, whatever else the machine does: for calls of seconds,
    in one thread (threads that wait for each other count, too).
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    seconds = {name: [] for name in calls}
    for turn in range(repeats):
        # Every other turn backwards: none always finds what another has left in the caches.
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            begin = clock()
            calls[name]()
            seconds[name].append(clock() - begin)
    return seconds


def compare(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    *,
    scale: float = 1.0,
    unit: str = "s",
    speedup: bool = True,
    limit: Sequence[float] | None = None,
    limit_name: str = "",
    goal: float | None = None,
    note: str = "",
) -> Line:
    """A line from the costs of each turn. `speedup`: the ratio is peer / ours and is to be high; else ours / peer."""
    pairs = list(zip(ours, peer, strict=True))
    ratios = [theirs / mine if speedup else mine / theirs for mine, theirs in pairs]
    return Line(
        name=name,
        unit=unit,
        ours=statistics.median(ours) * scale,
        peer=statistics.median(peer) * scale,
        peer_name=peer_name,
        limit=None if limit is None else statistics.median(limit) * scale,
        limit_name=limit_name,
        ratio=statistics.median(ratios),
        ratio_name="peer / ours" if speedup else "ours / peer",
        spread=(min(ratios), max(ratios)),
        goal=goal,
        at_least=speedup,
        note=note,
    )


def machine() -> dict:
    """What a reader needs to know of the machine: no names, no paths."""
    import transformers

    facts = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.machine()


def write(name: str, lines: list[Line], settings: dict | None = None, details: dict | None = None) -> Path:
    """Keep the lines of a program, what it was told and the machine: results/NAME.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "benchmark": name,
        "machine": machine(),
        # Folders given as absolute paths are of this machine, and say nothing to others.
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in (settings or {}).items()
            if not (isinstance(value, Path) and value.is_absolute())
        },
        "lines": [asdict(line) for line in lines],
        "details": details or {},
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(content), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read(path: Path) -> list[Line]:
    """The lines that `write` kept."""
    return [
        Line(**{**line, "spread": line["spread"] and tuple(line["spread"])})
        for line in json.loads(path.read_text())["lines"]
    ]


def _rounded(value):
    """Four digits are more than the spread allows."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


HEADINGS = ("line", "ours", "peer", "limit", "ratio", "spread", "goal", "")


def row(line: Line) -> tuple[str, ...]:
    """The cells of a line, in the order of HEADINGS."""
    if line.skipped:
        return (line.name, "", "", "", "", "", "", f"skipped: {line.skipped}")
    verdict = "" if line.met is None else "met" if line.met else "NOT MET"
    goal = "" if line.goal is None else f"{'>=' if line.at_least else '<='} {line.goal:g}"
    return (
        line.name,
        f"{figure(line.ours)} {line.unit}" if line.ours is not None else "",
        f"{figure(line.peer)} {line.peer_name}" if line.peer is not None else "",
        f"{figure(line.limit)} {line.limit_name}" if line.limit is not None else "",
        figure(line.ratio),
        f"{figure(line.spread[0])} to {figure(line.spread[1])}" if line.spread else "",
        goal,
        verdict,
    )


def figure(value: float | None) -> str:
    """Three digits; thousands in full."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def table(lines: list[Line]) -> str:
    """The lines in columns, for a terminal."""
    rows = [HEADINGS, *map(row, lines)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(HEADINGS) - 1)]
    return "\n".join(
        "  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=False)] + [cells[-1]]).rstrip()
        for cells in rows
    )


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every program has; a program adds its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=positive, default=5, help="turns (default: %(default)s)")
    return made


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def finish(name: str, lines: list[Line], options: argparse.Namespace, details: dict | None = None):
    """Write the lines and show them."""
    print(table(lines))
    path = write(name, lines, vars(options), details)
    print(f"-> {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", file=sys.stderr)
