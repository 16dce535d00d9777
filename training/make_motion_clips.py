# SPDX-License-Identifier: Apache-2.0
"""Makes a captioned clip set out of nothing: coloured shapes that move over textured scenes, as real H.264 files.

What it writes is a `datasets` VideoFolder:

    OUTPUT/settings.json               what made the set
    OUTPUT/train/train_00000.mp4 ...
    OUTPUT/train/metadata.jsonl        file_name, video_id, captions (five) and the truth: color, shape, action, scene
                                       (full: also second_color, second_shape, second_action, relation)
    OUTPUT/validation, OUTPUT/test     the same

Notable features:
- a search by caption needs all of a clip: its entities (colour and shape), what they do, and where. Some actions
  differ only in the order of their frames (motion/paths.py): a model that averages frames cannot tell them apart;
- validation and test show combinations that training never shows (motion/plan.py);
- every clip has random generators of its own, keyed by seed, split and clip: the same seed gives the same bytes with
  any number of processes (and the same versions of PyAV and numpy);
- a clip is written under a temporary name and renamed: kill the program at any moment and run it again, it goes on.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from motion.captions import write_captions
from motion.paths import action_path, relation_paths
from motion.plan import CAPTIONS, LOOKS, PIXELS, PRESETS, SPLITS, Combination, Preset, UserError, plan_split
from motion.scenes import draw_frames


# Raise it when the same seed would give other clips or captions: a folder made before is then not continued.
GENERATOR_VERSION = 2
FRAME_RATES = (8, 10, 12, 15, 20, Fraction(24000, 1001), 25)


# ---------------------------------------------------------------------------------------------------------------------
# One clip


@dataclass(frozen=True)
class Looks:
    """The form of one clip."""

    width: int
    height: int
    frame_rate: Fraction
    frames: int
    radii: tuple[float, float]  # of the entities, in short sides
    encoder: dict[str, str]

    def size_word(self, preset: Preset, combination: Combination) -> str:
        low, high = preset.radius
        share = (self.radii[0] - low) / (high - low)
        if combination.action in ("grow", "shrink"):
            return ""
        return "small" if share < 0.25 else "large" if share > 0.75 else ""

    def speed_word(self, preset: Preset, combination: Combination) -> str:
        low, high = preset.seconds
        share = (self.frames / self.frame_rate - low) / (high - low)
        if "stay still" in (combination.action, combination.second_action):
            return ""
        return "quickly" if share < 0.25 else "slowly" if share > 0.75 else ""


def draw_looks(preset: Preset, rng: np.random.Generator) -> Looks:
    short = 2 * int(rng.integers(preset.short_side[0] // 2, preset.short_side[1] // 2 + 1))  # even, as 4:2:0 needs
    long = 2 * int(rng.integers(short // 2 + 1, preset.long_side // 2 + 1))
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    frame_rate = Fraction(FRAME_RATES[int(rng.integers(len(FRAME_RATES)))])
    encoder = {
        "preset": ("ultrafast", "superfast", "veryfast")[int(rng.integers(3))],  # the last two reorder frames
        "crf": str(int(rng.integers(18, 24))),
        "g": str(int(rng.integers(6, 49))),  # frames from one key frame to the next
        "threads": "1",  # the processes already fill the machine, and slices would depend on the number of threads
        "mbtree": "0",  # with it x264 on AVX-512 gives clips narrower than 96 other bytes each time
    }
    frames = max(2, round(rng.uniform(*preset.seconds) * frame_rate))
    return Looks(
        width, height, frame_rate, frames, (rng.uniform(*preset.radius), rng.uniform(*preset.radius)), encoder
    )


def draw_clip(combination: Combination, looks: Looks, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the frames of a clip, (H, W, 3) uint8 each."""
    first, second = (combination.color, combination.shape), (combination.second_color, combination.second_shape)
    radius, other = looks.radii
    if not combination.relation:
        entities = [(*first, action_path(combination.action, looks.frames, radius, rng))]
    elif combination.relation == "while":
        # side by side, or one above the other when either needs room to the sides
        sideways = {"move left", "move right", "sway"} & {combination.action, combination.second_action}
        away = 0.23 if rng.random() < 0.5 else -0.23
        center = (0.0, away) if sideways else (away, 0.0)
        entities = [
            (*first, action_path(combination.action, looks.frames, radius, rng, center, room=0.7)),
            (
                *second,
                action_path(combination.second_action, looks.frames, other, rng, (-center[0], -center[1]), room=0.7),
            ),
        ]
    else:
        paths = relation_paths(combination.relation, looks.frames, radius, other, rng)
        entities = [(*second, paths[1]), (*first, paths[0])]
    return draw_frames(combination.scene, entities, looks.height, looks.width, rng)


def encode_h264(frames: Iterator[np.ndarray], looks: Looks) -> bytes:
    """The bytes of an mp4 file; the same frames and looks give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=looks.frame_rate, options=looks.encoder)
        stream.width, stream.height, stream.pix_fmt = looks.width, looks.height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """A file is either there and whole, or not there."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Clip:
    """A clip to make."""

    folder: Path
    preset: str
    seed: int
    split: str
    index: int
    combination: Combination

    @property
    def video_id(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def path(self) -> Path:
        return self.folder / self.split / f"{self.video_id}.mp4"

    def rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), self.index, purpose])

    def looks(self) -> Looks:
        return draw_looks(PRESETS[self.preset], self.rng(LOOKS))

    def make(self) -> None:
        looks = self.looks()
        write_atomically(self.path, encode_h264(draw_clip(self.combination, looks, self.rng(PIXELS)), looks))

    def row(self) -> dict:
        """The clip's line in metadata.jsonl."""
        preset, looks = PRESETS[self.preset], self.looks()
        sizes = looks.size_word(preset, self.combination), looks.speed_word(preset, self.combination)
        captions = write_captions(self.combination, self.rng(CAPTIONS), *sizes)
        truth = dataclasses.asdict(self.combination)
        if not preset.two_entities:
            truth = {name: truth[name] for name in ("color", "shape", "action", "scene")}
        return {"file_name": self.path.name, "video_id": self.video_id, "captions": captions, **truth}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def open_folder(folder: Path, settings: dict, overwrite: bool) -> None:
    """Makes the folder ready for the clips of `settings`: new, to be continued, or (`overwrite`) emptied.

    Only files that this program wrote are ever deleted.

    Raises:
        UserError: when the folder holds something else.
    """
    settings_file = folder / "settings.json"
    split_folders = [folder / split for split in SPLITS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            settings_file.unlink(missing_ok=True)  # first: a folder half emptied must not be continued
            ours = re.compile(rf"(?:{'|'.join(SPLITS)})_\d{{5,}}\.mp4|metadata\.jsonl")
            for file in [file for split in split_folders if split.is_dir() for file in split.iterdir()]:
                if ours.fullmatch(file.name):
                    file.unlink()
        if settings_file.exists():
            check_settings(settings_file, settings)
        elif any(split.is_dir() and any(split.iterdir()) for split in split_folders):
            remedy = "choose another folder" if overwrite else "add --overwrite, or choose another folder"
            raise UserError(f"{folder} holds files that are no finished work of this program: {remedy}")
        for split, count in zip(SPLITS, settings["counts"], strict=True):
            if count:
                (folder / split).mkdir(exist_ok=True)
        for part in folder.glob("*/.*.part"):  # of a run that was killed
            part.unlink()
        write_atomically(settings_file, (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}: choose another folder") from error


def check_settings(settings_file: Path, settings: dict) -> None:
    try:
        found = json.loads(settings_file.read_text())
        different = [name for name, value in settings.items() if found.get(name) != value]
    except (ValueError, AttributeError):
        raise UserError(f"{settings_file} cannot be read: add --overwrite to make the clips again") from None
    if different:
        changes = ", ".join(f"{name} {found.get(name)} instead of {settings[name]}" for name in different)
        raise UserError(
            f"{settings_file.parent} was made with other settings ({changes}): "
            "add --overwrite to replace its clips, or choose another folder"
        )


def make_clips(clips: list[Clip], num_workers: int, progress: tqdm) -> None:
    """Makes the clips in `num_workers` processes. On Ctrl-C the clips in hand are finished and the processes ended."""
    if num_workers == 1:
        for clip in clips:
            clip.make()
            progress.update()
        return
    size = max(1, min(8, len(clips) // (4 * num_workers)))  # clips a task: Ctrl-C waits for the tasks in hand
    tasks = [clips[start : start + size] for start in range(0, len(clips), size)]
    # The processes start while Ctrl-C is ignored, and inherit that: the terminal sends it to them too, but only this
    # one is to answer. "spawn" because the fork of a process that has threads can hang.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    executor = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=end_with_parent)
    try:
        futures = [executor.submit(make_task, task) for task in tasks]
        signal.signal(signal.SIGINT, handler)
        for future in as_completed(futures):
            progress.update(future.result())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        executor.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)


def end_with_parent() -> None:
    """In a worker: do not outlive a program that was killed without a chance to say goodbye."""

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_task(clips: list[Clip]) -> int:
    for clip in clips:
        clip.make()
    return len(clips)


def make_clip_set(
    folder: Path, preset: str, seed: int, counts: Sequence[int], num_workers: int, overwrite: bool = False
) -> int:
    """Makes what is missing of a clip set, and its metadata last; returns its size in bytes."""
    settings = {"generator_version": GENERATOR_VERSION, "preset": preset, "seed": seed, "counts": list(counts)}
    plans = [plan_split(PRESETS[preset], split, count, seed) for split, count in zip(SPLITS, counts, strict=True)]
    open_folder(folder, settings, overwrite)
    splits = [
        [Clip(folder, preset, seed, split, index, combination) for index, combination in enumerate(plan)]
        for split, plan in zip(SPLITS, plans, strict=True)
    ]
    clips = [clip for split in splits for clip in split]
    missing = [clip for clip in clips if not (clip.path.exists() and clip.path.stat().st_size)]
    with tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip", desc=f"{preset} clips") as progress:
        make_clips(missing, min(num_workers, max(1, len(missing))), progress)
    for split in filter(None, splits):
        rows = "".join(json.dumps(clip.row()) + "\n" for clip in split)
        write_atomically(split[0].path.parent / "metadata.jsonl", rows.encode())
    return sum(clip.path.stat().st_size for clip in clips)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (0 or more)")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description="Makes a captioned set of short H.264 clips: coloured shapes that move over textured scenes.\n"
        "The same seed gives the same bytes. Interrupt it at any moment: run the same command again and it goes on.",
        epilog="examples:\n"
        "  python training/make_motion_clips.py --output data/motion                a minute or so on two cores\n"
        "  python training/make_motion_clips.py --output data/full --preset full    two entities and their relations\n"
        "  python training/make_motion_clips.py --output data/tiny --num_train 50 --num_validation 10 --num_test 10\n"
        "\n"
        'read it with:  datasets.load_dataset("videofolder", data_dir="data/motion")',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; made if it is not there"
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="demo",
        help="demo: one entity, even frequencies, 80 to 160 pixels. long_tailed: the same, but a few values are "
        "far more frequent than others. full: two entities with relations, long-tailed "
        "frequencies, 128 to 256 pixels (default: demo)",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="another seed gives another set (default: 0)"
    )
    for number, split in enumerate(SPLITS):
        defaults = ", ".join(f"{preset.counts[number]:,} in {name}" for name, preset in PRESETS.items())
        parser.add_argument(
            f"--num_{split}", type=whole_number, metavar="N", help=f"clips in {split} (default: {defaults})"
        )
    parser.add_argument(
        "--num_workers",
        type=whole_number,
        default=cores,
        metavar="N",
        help=f"processes (default: all cores, here {cores})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the clips of a folder that was made with other settings"
    )
    options = parser.parse_args(arguments)
    if options.num_workers == 0:
        parser.error("argument --num_workers: at least 1 process is needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    options = parse_arguments(arguments)
    asked = [getattr(options, f"num_{split}") for split in SPLITS]
    counts = [
        default if number is None else number
        for number, default in zip(asked, PRESETS[options.preset].counts, strict=True)
    ]
    go_on = "what is finished is kept; run the same command again to go on"
    begin = time.monotonic()
    try:
        if not any(counts):
            raise UserError("no clips to make: --num_train, --num_validation and --num_test are all 0")
        if "libx264" not in av.codecs_available:
            raise UserError(
                "this PyAV has no libx264 encoder: install the official wheel with `pip install --force-reinstall av`"
            )
        size = make_clip_set(
            options.output, options.preset, options.seed, counts, options.num_workers, options.overwrite
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {go_on}", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print(f"error: a process was killed (out of memory? try a smaller --num_workers): {go_on}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {options.output}: {error.strerror or error}: {go_on}", file=sys.stderr)
        return 1
    print(f"{sum(counts):,} clips, {size / 1e6:.0f} MB, in {options.output} after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is answered like Ctrl-C
    raise SystemExit(main())
