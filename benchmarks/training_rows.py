# SPDX-License-Identifier: Apache-2.0
"""Memory of one training process against the rows of its data: captions, streams and paths stay in Arrow files.

    python benchmarks/training_rows.py                        2,500,000 rows, some minutes

Makes a table of that many rows, reads it as run_retrieval.py does (with a tagger that cuts a caption in three, as fast
as a string is split), and draws batches over a whole epoch's order, in a process that finds the rows prepared, as all
ranks but the first do. No video is decoded. Measured is the resident memory of the process: all of it, with the pages
of the Arrow files that the system may drop, and without them. Linux only.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from captions import make_captions
from harness import Line, finish, parser, positive


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


from data.batches import RunBatchSampler, TrainPairs
from data.captioned_clips import load_split, query_bank, read_captioned_clips
from modeling_camoe.captions import STREAMS
from modeling_camoe.frames import SampledFrames


LIMIT = 2.0  # GB a process


class NoVideo:
    """Stands in for the decoder."""

    def decode(self, clip, sampling, seed) -> SampledFrames:
        return SampledFrames(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (0.0,), 1.0)


def cut(caption: str) -> dict[str, str]:
    """A tagger: a text of its own for every stream."""
    words = caption.split()
    third = max(1, len(words) // 3)
    parts = words[:third], words[third : 2 * third], words[2 * third :]
    return dict(zip(("entity", "action", "scene"), map(" ".join, parts), strict=True))


def memory(name: str) -> float:
    """GB of this process: VmHWM (the most so far), RssAnon (its own, now), ..."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e9


def write_table(path: Path, rows: int):
    captions = make_captions(10_000)
    with pyarrow.parquet.ParquetWriter(path, pa.schema([("video", pa.string()), ("caption", pa.string())])) as writer:
        for start in range(0, rows, 100_000):
            numbers = np.arange(start, min(rows, start + 100_000))
            table = {
                "video": [f"folder/{n // 1000:05d}/{n:09d}.mp4" for n in numbers],
                "caption": [f"{captions[n % len(captions)]} {n}" for n in numbers],
            }
            writer.write_table(pa.table(table))


def read_split(folder: Path):
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    return read_captioned_clips(load_split(str(folder), "train"), STREAMS, cut)


def train(folder: Path, options) -> dict:
    """What a rank does with the rows that the first one has prepared."""
    before = memory("RssAnon")
    split = read_split(folder)
    pairs = TrainPairs(split, NoVideo(), 0, "uniform", "all", "skip")
    batches = RunBatchSampler(len(pairs), 128, seed=0)
    batches.start_from(0, 0, options.batches)
    for keys in batches:
        for key in keys:
            pairs[key]
    query_bank(split, 5000, 0)
    return {"peak": memory("VmHWM"), "own": memory("RssAnon"), "own before": before}


def main():
    options = parser(__doc__)
    options.add_argument("--rows", type=positive, default=2_500_000, help="(default: %(default)s)")
    options.add_argument("--batches", type=positive, default=200, help="of 128 pairs (default: %(default)s)")
    options.add_argument("--part", choices=("prepare", "train"), help="for the processes that this program starts")
    options.add_argument("--folder", type=Path, help="likewise")
    options = options.parse_args()
    if options.part == "prepare":
        write_table(options.folder / "train.parquet", options.rows)
        read_split(options.folder)
        return
    if options.part == "train":
        print(json.dumps(train(options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rows", str(options.rows)]
        command += ["--batches", str(options.batches), "--part"]
        subprocess.run([*command, "prepare"], check=True)
        done = subprocess.run([*command, "train"], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    line = Line(
        f"memory of a rank, {options.rows:,} rows", "GB", found["peak"], limit=LIMIT, limit_name="allowed",
        ratio=found["peak"], ratio_name="GB at most", goal=LIMIT, at_least=False,
        note=f"its own: {found['own']:.2f} GB, before the rows {found['own before']:.2f}",
    )  # fmt: skip
    print(line.note)
    finish("training_rows", [line], options, found)


if __name__ == "__main__":
    main()
