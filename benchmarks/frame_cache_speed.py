# SPDX-License-Identifier: Apache-2.0
"""The frame cache (training/data/frame_cache.py): loading clips from the second epoch on, against decoding them.

    python benchmarks/frame_cache_speed.py

Clips of ten seconds, 640 x 360, a key frame every 250 pictures; 12 frames of 224 pixels a clip, read as the trainer's
workers read them, in one process. An epoch of decoding and an epoch of loading take turns. The files are in the
system's page cache for both: what is compared is the work of the processor, which is what runs out.

A second part is the whole loader (`TrainPairs`, `PairCollator` with ring and tokenizer): batches of 128 pairs from
a filled cache, in processor seconds, beside a copy of the same bytes between memory that is touched already, which no
loader can beat.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bars import draw
from captions import make_captions
from clips import write_clip
from harness import Line, compare, finish, in_turns, parser, positive


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from data.batches import PairCollator, RunBatchSampler, TrainPairs
from data.captioned_clips import CaptionedClips
from data.frame_cache import FrameCache
from data.frame_ring import FrameRing, RingLoader
from modeling_camoe import CAMoEProcessor, CAMoEVideoProcessor
from modeling_camoe.frames import Clip, SampledFrames
from motion.clip_tokenizer import train_clip_tokenizer


LOADER_GOAL = 1500  # clips of 12 x 224 x 224 a second and core


def epoch(pairs: TrainPairs, number: int):
    for position in range(len(pairs)):
        frames = pairs[number, position]["clip"]
        frames if isinstance(frames, SampledFrames) else frames.read()


class NoisyFrames:
    """Stands in for the decoder: filling a cache of hundreds of clips is not what is measured."""

    def __init__(self, processor: CAMoEVideoProcessor):
        self.processor = processor
        self.generator = np.random.default_rng(0)

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def decode(self, clip, sampling, num_frames, **kwargs) -> SampledFrames:
        frames = self.generator.integers(0, 256, size=(num_frames, 3, 224, 224), dtype=np.uint8)
        return SampledFrames(torch.from_numpy(frames), (0.0,) * num_frames, 10.0)


def loader_line(folder: Path, options) -> tuple[Line, dict]:
    """Clips a second and core of the loader, beside bare copies."""
    captions = make_captions(options.loader_clips)
    words = [caption.split() for caption in captions]
    # As a tagger cuts them: things, actions, and a place in every second caption.
    streams = [
        [[caption, " ".join(w[:3]), " ".join(w[3:6]), " ".join(w[-3:]) if n % 2 else caption]]
        for n, (caption, w) in enumerate(zip(captions, words, strict=True))
    ]
    paths = [folder / f"{n}.bin" for n in range(len(captions))]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n % 256]))
    names = [path.stem for path in paths]
    split = CaptionedClips([Clip(str(p)) for p in paths], names, [[text] for text in captions], streams)
    video_processor = CAMoEVideoProcessor()
    processor = CAMoEProcessor(video_processor, train_clip_tokenizer(captions, 600), tagger=None)
    pairs = TrainPairs(split, FrameCache(folder / "cache", NoisyFrames(video_processor)), 0, "uniform")
    ring = FrameRing(options.batch, (12, 3, 224, 224), workers=0, prefetch=1)
    collator = PairCollator(processor, processor.experts, ring)
    steps = len(pairs) // options.batch

    def load():
        batches = RunBatchSampler(len(pairs), options.batch, seed=0)
        batches.start_from(0, 0, steps)
        for _ in RingLoader(pairs, batch_sampler=batches, collate_fn=collator, num_workers=0, ring=ring):
            pass

    source, target = (torch.randint(0, 256, ring.frames.shape[1:], dtype=torch.uint8) for _ in range(2))

    def copy():
        for _ in range(steps):
            target.copy_(source)

    seconds = in_turns({"loader": load, "copy": copy}, options.repeats, warm_up=2, clock=time.process_time)
    clips, size = steps * options.batch, 12 * 3 * 224 * 224
    rate = {name: clips / statistics.median(values) for name, values in seconds.items()}
    line = Line(
        "the loader, from a filled frame cache", "clips/s a core", rate["loader"],
        limit=rate["copy"], limit_name="a bare copy", ratio=rate["loader"], ratio_name="clips a second and core",
        spread=(clips / max(seconds["loader"]), clips / min(seconds["loader"])), goal=LOADER_GOAL,
        note=f"{rate['loader'] * size / 1e6:,.0f} MB/s; a bare copy {rate['copy'] * size / 1e6:,.0f} MB/s",
    )  # fmt: skip
    return line, {"loader_mb_a_second": rate["loader"] * size / 1e6, "copy_mb_a_second": rate["copy"] * size / 1e6}


def main():
    options = parser(__doc__)
    options.add_argument("--clips", type=positive, default=12, help="distinct clips (default: %(default)s)")
    options.add_argument("--loader_clips", type=positive, default=512, help="1.8 MB each (default: %(default)s)")
    options.add_argument("--batch", type=positive, default=128, help="pairs (default: %(default)s)")
    options.add_argument("--only_loader", action="store_true", help="leave the comparison with decoding out")
    options = options.parse_args()
    torch.set_num_threads(1)
    if options.only_loader:
        with tempfile.TemporaryDirectory() as folder:
            line, details = loader_line(Path(folder), options)
        print(line.note)
        finish("frame_cache_loader", [line], options, details)
        return

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
        (Path(folder) / "loader").mkdir()
        line, rates = loader_line(Path(folder) / "loader", options)
        details |= rates
        details["bytes_of_a_video_file"] = sum(path.stat().st_size for path in paths) // len(paths)
    bars = {line.name.split(", ")[1]: {"decoding": line.peer, "frame cache": line.ours} for line in lines}
    draw("frame_cache", "Loading a clip from the second epoch on", {f"{k}: ms a clip": v for k, v in bars.items()})
    finish("frame_cache", [*lines, line], options, details)


if __name__ == "__main__":
    main()
