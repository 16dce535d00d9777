# SPDX-License-Identifier: Apache-2.0
"""Readers beside a writer: no search may fail, and every answer must be the state of some commit.

    python benchmarks/index_readers.py                     a minute, four readers

Every commit of the writer adds or removes a whole block of ten moments; every third is followed by a compaction. A
reader asks for all moments, and opens the index again for every fifth answer: an answer with a part of a block is
wrong.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Line, finish, parser
from synthetic_index import random_vectors, stored_windows, write_index

from camoe_search.writer import IndexWriter


ROOT = Path(__file__).parents[1]
BLOCK, BLOCKS, WIDTH = 10, 50, 256

READ = f"""
import sys, time
from pathlib import Path
import numpy as np
from camoe_search.index import VideoIndex
folder, stop = sys.argv[1], time.time() + float(sys.argv[2])
query, answers, failed, wrong, loads = np.ones((1, {WIDTH}), np.float32), 0, 0, 0, 0
while time.time() < stop:
    try:
        if answers % 5 == 0:
            index, loads = VideoIndex(folder), loads + 1
        hits = index.search_vectors(query, k=10_000, correction="query_bank", merge=False)[0]
    except Exception as error:
        print(repr(error), file=sys.stderr)
        failed += 1
        continue
    numbers = sorted(int(Path(hit.path).stem) for hit in hits)
    blocks = sorted({{number // {BLOCK} for number in numbers}})
    wrong += numbers != [number for block in blocks for number in range({BLOCK} * block, {BLOCK} * (block + 1))]
    answers += 1
print(answers, loads, failed, wrong)
"""


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--readers", type=int, default=4)
    options = arguments.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        write_index(folder, BLOCK, WIDTH)
        command = [sys.executable, "-c", READ, str(folder), str(options.seconds)]
        readers = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(options.readers)
        ]
        commits = change_until(lambda: all(reader.poll() is not None for reader in readers), folder)
        counts = [[int(value) for value in reader.communicate()[0].split()] for reader in readers]
    if any(reader.returncode for reader in readers):
        raise SystemExit("a reader failed")
    answers, loads, failed, wrong = (sum(column) for column in zip(*counts, strict=True))
    note = f"{answers:,} answers and {loads:,} openings by {options.readers} readers, {commits:,} changes"
    lines = [
        Line(
            f"{name}, {options.seconds:g} s of changes", "", count, ratio=count, ratio_name="answers", goal=0,
            at_least=False, note=note,
        )
        for name, count in (("failed searches", failed), ("answers that are no commit's state", wrong))
    ]  # fmt: skip
    finish("index_readers", lines, options)


def change_until(is_over, folder: Path) -> int:
    """Add and remove blocks; returns how many times."""
    vectors = random_vectors(BLOCK * BLOCKS, WIDTH, seed=0) / 4
    random_numbers, there, changes = random.Random(0), {0}, 0
    with IndexWriter(folder) as writer:
        while not is_over():
            block = random_numbers.randrange(BLOCKS)
            if block in there:
                numbers = range(BLOCK * block, BLOCK * (block + 1))
                files = writer.connection.execute(
                    "SELECT id FROM files WHERE CAST(substr(path, 4, 7) AS INTEGER) BETWEEN ? AND ?",
                    (numbers[0], numbers[-1]),
                )
                writer.remove_files([file for (file,) in files])
                there.remove(block)
            else:
                first = BLOCK * block
                writer.add_moments("/videos", stored_windows(first, BLOCK), vectors[first : first + BLOCK])
                there.add(block)
            changes += 1
            if changes % 3 == 0:
                writer.tidy()
            time.sleep(0.002)
    return changes


if __name__ == "__main__":
    main()
