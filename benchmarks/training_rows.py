# SPDX-License-Identifier: Apache-2.0
"""Memory of one training process against the rows of its data: captions, streams and paths stay in Arrow files.

    python benchmarks/training_rows.py                        2,500,000 rows, some minutes

Makes a table of that many rows, reads it as run_retrieval.py does (without a tagger: each stream repeats the caption),
and draws batches over a whole epoch's order. No video is decoded. Measured is the resident memory of the process: all
of it, with the pages of the Arrow files that the system may drop, and without them. Linux only.
"""

import gc
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

from run_retrieval import query_bank

from data.batches import RunBatchSampler, TrainPairs
from data.captioned_clips import load_split, read_captioned_clips
from modeling_camoe.captions import STREAMS
from modeling_camoe.frames import SampledFrames


LIMIT = 2.0  # GB a process


class NoVideo:
    """Stands in for the decoder."""

    def decode(self, clip, sampling, seed) -> SampledFrames:
        return SampledFrames(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (0.0,), 1.0)


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


def main():
    options = parser(__doc__)
    options.add_argument("--rows", type=positive, default=2_500_000, help="(default: %(default)s)")
    options.add_argument("--batches", type=positive, default=200, help="of 128 pairs (default: %(default)s)")
    options = options.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
        write_table(Path(folder) / "train.parquet", options.rows)
        gc.collect()
        before = memory("RssAnon")
        split = read_captioned_clips(load_split(folder, "train"), STREAMS, None)
        pairs = TrainPairs(split, NoVideo(), 0, "uniform", "all", "skip")
        batches = RunBatchSampler(len(pairs), 128, seed=0)
        batches.start_from(0, 0, options.batches)
        for keys in batches:
            for key in keys:
                pairs[key]
        query_bank(split.captions, split.caption_counts, 5000, 0)
        peak, own = memory("VmHWM"), memory("RssAnon")
    lines = [
        Line(
            f"memory of a rank, {options.rows:,} rows", "GB", peak, limit=LIMIT, limit_name="allowed", ratio=peak,
            ratio_name="GB at most", goal=LIMIT, at_least=False,
            note=f"{own:.2f} GB of it its own, {own - before:+.2f} GB since before the rows were read",
        )
    ]  # fmt: skip
    print(lines[0].note)
    finish("training_rows", lines, options, {"own_gb": own, "own_gb_before": before})


if __name__ == "__main__":
    main()
