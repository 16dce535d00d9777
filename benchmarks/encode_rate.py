# SPDX-License-Identifier: Apache-2.0
"""What the engines of `camoe encode` cost: one process against decoding and the model alone, Ray against processes.

    python benchmarks/encode_rate.py                    some minutes
    python benchmarks/encode_rate.py --layers 12        of ViT-B/32 shapes

- **Local engine**: headers, hashes, windows, tables and Parquet files come on top of the bare loop, `encode_videos`
  over the same clips. Both run in this process, in turns, without workers, and their own time (CPU) is compared.
- **Ray** with two workers against two processes, `--shard 0/2` and `--shard 1/2`. Parts are counted while they run.
  What a file takes without start-up is measured between the parts at FROM and TO of all; with it, over all the time.
  On a machine that does other work, too, the CPU time of all processes, Ray's own among them, says more; those of
  Ray take about a tenth of a core, however many workers there are.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch
from clips import write_clip
from harness import Line, compare, finish, in_turns, parser
from startup import save_models

from camoe_search.encode_parts import encode_parts
from camoe_search.encoder import CAMoEEncoder
from camoe_search.parts import PartFolder, plan_parts
from camoe_search.prepare import IndexOptions, describe_index
from modeling_camoe.encode import encode_videos


GOAL = 0.9  # of the rate of the peer
FROM, TO = 0.25, 0.85  # all workers are busy, and none has run out of parts
FILES_PER_PART = 16
TICKS = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parent.parent


# --- one process -----------------------------------------------------------------------------------------------------


def local_line(model: Path, paths: list[str], options) -> Line:
    """CPU of the engine beside that of the bare loop."""
    encoder = CAMoEEncoder.from_pretrained(str(model), device="cpu")
    description = describe_index(encoder, None, IndexOptions())
    manifest = pa.table({"path": paths})

    def engine():
        with tempfile.TemporaryDirectory() as out:
            target = PartFolder(out)
            parts, _ = plan_parts(manifest, description, target)
            reports = encode_parts(parts, target, encoder, description, batch_size=options.batch_size, num_workers=0)
            moments = sum(report.moments for report in reports)
        if moments != len(paths):
            raise SystemExit(f"{moments} moments of {len(paths)} clips")

    calls = {
        "engine": engine,
        "bare": lambda: encode_videos(encoder.model, encoder.processor, paths, batch_size=options.batch_size),
    }
    seconds = in_turns(calls, options.repeats, clock=time.process_time)
    return compare(
        f"local engine, {len(paths)} clips of {options.seconds:g} s, CPU", seconds["engine"], seconds["bare"],
        "decoding and model alone", goal=GOAL,
    )  # fmt: skip


# --- several ---------------------------------------------------------------------------------------------------------


def watch(commands: list[list[str]], out: Path, count: int) -> dict[str, float]:
    """Run commands side by side that make `count` parts in all; seconds that a file takes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    marks, used, wanted = {}, {}, {"from": round(FROM * count), "to": round(TO * count), "end": count}
    while "end" not in marks:
        failed = [each for each in running if each.poll()]
        if failed:
            raise SystemExit(failed[0].stderr.read().decode()[-2000:])
        there = len(list(out.glob("part-*")))
        used |= cpu_of_descendants(os.getpid())  # of a process that ends, the last number stays
        for name, number in wanted.items():
            if name not in marks and there >= number:
                workers = [cpu for command, cpu in used.values() if "MapWorker" in command]
                of_all = sum(cpu for _, cpu in used.values())
                marks[name] = there, time.perf_counter() - begin, of_all, sum(workers) or of_all
        time.sleep(0.05)
    for each in running:
        each.wait()
    (first, t0, cpu0, workers0), (last, t1, cpu1, workers1) = marks["from"], marks["to"]
    files = FILES_PER_PART * (last - first)
    return {
        "a file, without start-up": (t1 - t0) / files,
        "a file, without start-up, CPU": (cpu1 - cpu0) / files,
        "a file, without start-up, CPU of the workers": (workers1 - workers0) / files,
        "a file, with start-up": marks["end"][1] / (FILES_PER_PART * count),
        "until the first parts": t0,
    }


def cpu_of_descendants(process: int) -> dict[int, tuple[str, float]]:
    """Command and seconds of CPU of each process that a process started, and theirs."""
    parents, seconds = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_text()
                fields = re.sub(r"^.*\) ", "", (entry / "stat").read_text()).split()  # a name may hold spaces
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = command, sum(map(int, fields[11:13])) / TICKS
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new and child not in found}
        found |= new
    return {child: seconds[child] for child in found}


def cluster_lines(model: Path, paths: list[str], folder: Path, options) -> tuple[list[Line], dict]:
    """Ray beside two processes, in turns."""
    manifest = folder / "manifest.csv"
    manifest.write_text("path\n" + "\n".join(paths) + "\n")
    kinds = {"ray": [["--engine", "ray", "--concurrency", "2"]], "processes": [["--shard", f"{i}/2"] for i in (0, 1)]}
    found = {name: [] for name in kinds}
    for turn in range(options.turns):
        for name in list(kinds)[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                out = Path(temporary) / "parts"
                begin = [sys.executable, "-m", "camoe_search", "encode", str(manifest), "--model", str(model)]
                begin += ["--out", str(out), "--device", "cpu", "--files-per-part", str(FILES_PER_PART)]
                begin += ["--num-workers", "0", "--batch-size", str(options.batch_size)]
                commands = [begin + more for more in kinds[name]]
                found[name].append(watch(commands, out, len(paths) // FILES_PER_PART))
    lines = []
    for name in found["ray"][0]:
        ours, theirs = ([each[name] for each in found[kind]] for kind in kinds)
        is_goal = "without" in name
        scale, unit = (1000, "ms") if name.startswith("a file") else (1, "s")
        lines.append(
            compare(f"Ray, 2 workers, {name}", ours, theirs, "two processes", scale=scale, unit=unit,
                    goal=GOAL if is_goal else None)
        )  # fmt: skip
    return lines, found


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--turns", type=int, default=2, help="of Ray and the processes; each starts anew")
    arguments.add_argument("--clips", type=int, default=24, help="of the local engine")
    arguments.add_argument("--many", type=int, default=640, help="clips of Ray and the processes")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of a clip")
    arguments.add_argument("--layers", type=int, default=2, help="of the model's towers")
    arguments.add_argument("--batch-size", type=int, default=8)
    options = arguments.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, _ = save_models(folder, options.layers)
        first = write_clip(folder / "clip_0.mp4", options.seconds, (426, 240), gop=250)
        paths = [str(first)]
        for n in range(1, options.many):
            paths.append(str(folder / f"clip_{n}.mp4"))
            Path(paths[-1]).write_bytes(first.read_bytes() + n.to_bytes(4))  # another content, the same pictures
        lines = [local_line(model, paths[: options.clips], options)]
        more, details = cluster_lines(model, paths, folder, options)
    finish("encode_rate", lines + more, options, details)


if __name__ == "__main__":
    main()
