# SPDX-License-Identifier: Apache-2.0
"""The frame cache (training/data/frame_cache.py): loading clips from the second epoch on, against decoding them.

    python benchmarks/frame_cache_speed.py

Clips of ten seconds, 640 x 360, a key frame every 250 pictures; 12 frames of 224 pixels a clip, read as the trainer's
workers read them (`TrainPairs`), in one process. An epoch of decoding and an epoch of loading take turns. The files
are in the system's page cache for both: what is compared is the work of the processor, which is what runs out.
"""

import sys
import tempfile
from pathlib import Path

import torch
from bars import draw
from clips import write_clip
from harness import compare, finish, in_turns, parser, positive


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from data.batches import TrainPairs
from data.captioned_clips import CaptionedClips
from data.frame_cache import FrameCache
from modeling_camoe import CAMoEVideoProcessor
from modeling_camoe.frames import Clip


def epoch(pairs: TrainPairs, number: int):
    for position in range(len(pairs)):
        pairs[number, position]


def main():
    options = parser(__doc__)
    options.add_argument("--clips", type=positive, default=12, help="distinct clips (default: %(default)s)")
    options = options.parse_args()
    torch.set_num_threads(1)

    lines, details = [], {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_clip(Path(folder) / f"{n}.mp4", 10, (640, 360), 250, seed=n) for n in range(options.clips)]
        names = [path.stem for path in paths]
        split = CaptionedClips([Clip(str(p)) for p in paths], names, [["a"]] * len(paths), [[["a"] * 4]] * len(paths))
        processor = CAMoEVideoProcessor()
        for sampling in ("uniform", "jitter"):
            decoded = TrainPairs(split, processor, seed=0, sampling=sampling)
            cached = TrainPairs(split, FrameCache(Path(folder) / "cache", processor), seed=0, sampling=sampling)
            epoch(cached, 0)
            calls = {"decoding": lambda p=decoded: epoch(p, 1), "loading": lambda p=cached: epoch(p, 1)}
            times = in_turns(calls, options.repeats)
            lines.append(
                compare(
                    f"a clip from the second epoch on, {sampling}",
                    times["loading"],
                    times["decoding"],
                    "decoding",
                    scale=1000 / options.clips,
                    unit="ms",
                    goal=10.0,
                )
            )
        files = list((Path(folder) / "cache").rglob("*.npy"))
        details["bytes_a_clip"] = {
            "uniform": min(f.stat().st_size for f in files),
            "jitter": max(f.stat().st_size for f in files),
        }
        details["bytes_of_a_video_file"] = sum(path.stat().st_size for path in paths) // len(paths)
    bars = {line.name.split(", ")[1]: {"decoding": line.peer, "frame cache": line.ours} for line in lines}
    draw("frame_cache", "Loading a clip from the second epoch on", {f"{k}: ms a clip": v for k, v in bars.items()})
    finish("frame_cache", lines, options, details)


if __name__ == "__main__":
    main()
