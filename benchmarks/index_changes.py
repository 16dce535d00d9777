# SPDX-License-Identifier: Apache-2.0
"""What changing an index costs, against writing the bytes that it adds.

    python benchmarks/index_changes.py                        20,000 moments of 2,048 entries
    python benchmarks/index_changes.py --moments 100000       0.8 GB of disk

- removing a row: seconds, and the memory of a process that does only that;
- adding 1,000 rows, with and without a query bank, against writing and syncing their bytes;
- a plan of 10,000 files, 40 % done when the process is killed; files come and go: what is encoded again;
- a library that moved: clips encoded again.

A model that makes vectors of file names stands for the encoder: the bench is about the index.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Line, compare, finish, in_turns, parser
from synthetic_index import random_vectors, stored_windows, write_index


ROOT = Path(__file__).parents[1]
ADDED = 1000
FILES = 10_000

# Removes one row in a new process: prints seconds and the peak of its memory in MB.
REMOVE = """
import sys, time
from camoe_search.remove import remove_files
begin = time.perf_counter()
remove_files(sys.argv[1], [sys.argv[2]])
seconds = time.perf_counter() - begin
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # getrusage counts the parent, too
print(seconds, int(peak.split()[1]) / 1024)
"""

# Indexes a folder with a model that makes vectors of names; kills itself after so many clips. Prints clips encoded.
INDEX = """
import os, signal, sys
import numpy as np
from camoe_search import contents
from camoe_search.encoder import ClipBatch
from camoe_search.index import VideoIndex

class Probe:
    duration, width, height, start = 10.0, 64, 48, 0.0

contents.probe_video = lambda path: Probe

class Names:
    name, weights, experts, dim, num_frames, sampling = "names", "names", ["all"], 64, 12, "uniform"
    count = 0
    def encode_clips(self, clips, batch_size, num_workers, thumbnails):
        for first in range(0, len(clips), batch_size):
            indices = list(range(first, min(first + batch_size, len(clips))))
            if 0 < limit <= self.count:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += len(indices)
            yield ClipBatch(indices, np.ones((len(indices), self.dim), np.float32), {})
    def encode_texts(self, texts):
        return np.ones((len(texts), self.dim), np.float32)

videos, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
encoder = Names()
options = {"queries": ["a"], "tau": 0.05, "prune": True, "text_encoder": False, "thumbnails": False}
index = VideoIndex.create_or_update([videos], folder, encoder, **options)
print(encoder.count, len(index))
"""


def run(program: str, *arguments: str, killed: bool = False) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode and not killed:
        raise SystemExit(f"failed: {done.stderr.strip().splitlines()[-1:]}")
    return [float(value) for value in done.stdout.split()]


def removing(folder: Path, repeats: int) -> list[Line]:
    found = [run(REMOVE, str(folder), f"*/{i:07}.mp4") for i in range(repeats)]
    seconds, memory = zip(*found, strict=True)
    lines = []
    for name, unit, values, goal in (("seconds", "s", seconds, 0.1), ("memory", "MB", memory, 300)):
        middle = float(np.median(values))
        lines.append(
            Line(
                f"remove a row: {name}", unit, middle, ratio=middle, ratio_name=unit,
                spread=(min(values), max(values)), goal=goal, at_least=False,
            )
        )  # fmt: skip
    return lines


def adding(folder: Path, width: int, repeats: int, bank_size: int) -> Line:
    from camoe_search.writer import IndexWriter

    vectors = random_vectors(ADDED, width, seed=9)
    added = iter([stored_windows(10_000_000 + i * ADDED, ADDED) for i in range(1 + repeats)])
    with IndexWriter(folder) as writer:

        def add():
            writer.add_moments("/videos", next(added), vectors)

        def write():
            path = folder / "bare"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, vectors)
            os.fsync(descriptor)
            os.close(descriptor)
            path.unlink()

        cost = in_turns({"add": add, "write": write}, repeats)
    name = f"add {ADDED:,} rows, " + (f"query bank of {bank_size:,}" if bank_size else "no query bank")
    return compare(
        name, cost["add"], cost["write"], "write and sync", speedup=False, scale=1000, unit="ms",
        goal=None if bank_size else 1.2, note="the bias is a product of the bank and the rows" if bank_size else "",
    )  # fmt: skip


def resuming(temporary: Path) -> list[Line]:
    videos, folder = temporary / "videos", temporary / "plan"
    for i in range(FILES):
        path = videos / f"{i % 100:02}" / f"{i:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"video {i}".encode())
    run(INDEX, str(videos), str(folder), str(FILES * 4 // 10), killed=True)
    from camoe_search.index import VideoIndex

    done = len(VideoIndex(folder))
    for i in range(10):  # before, between and after what is done
        (videos / f"{i:02}" / "00000a.mp4").write_bytes(f"new {i}".encode())
    for i in range(20, 30):
        (videos / f"{i % 100:02}" / f"{i:05}.mp4").unlink()
    encoded, moments_now = run(INDEX, str(videos), str(folder), "0")
    again = encoded - (FILES - done) - 10  # ten new ones came; the ten that went were done
    begin = time.perf_counter()
    shutil.move(videos, temporary / "elsewhere")
    moved, after = run(INDEX, str(temporary / "elsewhere"), str(folder), "0")
    seconds = time.perf_counter() - begin
    if moments_now != FILES or after != FILES:
        raise SystemExit(f"the index has {moments_now:.0f}, then {after:.0f} moments, not {FILES}")
    return [
        Line(
            f"plan of {FILES:,} files, killed after {done:,}: clips encoded again", "", max(again, 0.0),
            ratio=max(again, 0.0), ratio_name="clips", goal=0, at_least=False,
            note="then 10 files were added and 10 removed",
        ),
        Line(
            f"library of {FILES:,} files moved: clips encoded again", "", moved, ratio=moved, ratio_name="clips",
            goal=0, at_least=False, note=f"{seconds:.1f} s, of which most is importing torch",
        ),
    ]  # fmt: skip


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--moments", type=int, default=20_000)
    arguments.add_argument("--width", type=int, default=2048, help="entries of a folded vector, a multiple of 4")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        write_index(temporary / "bank", options.moments, options.width, bank_size=1000)
        lines = removing(temporary / "bank", options.repeats)
        lines.append(adding(temporary / "bank", options.width, options.repeats, 1000))
        shutil.rmtree(temporary / "bank")
        write_index(temporary / "no bank", options.moments, options.width, bank_size=0)
        lines.append(adding(temporary / "no bank", options.width, options.repeats, 0))
        lines += resuming(temporary)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finish("index_changes", lines, options, {"memory of the bench, MB": memory})


if __name__ == "__main__":
    main()
