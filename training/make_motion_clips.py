# SPDX-License-Identifier: Apache-2.0
"""Generate a set of captioned clips: coloured shapes that move over textured scenes, as real H.264 files.

The output is a `datasets` VideoFolder:

    OUTPUT/settings.json               the settings of the set
    OUTPUT/train/train_00000.mp4 ...
    OUTPUT/train/metadata.jsonl        file_name, video_id, captions (five) and the truth: color, shape, action, scene
                                       (full: also second_color, second_shape, second_action, relation)
    OUTPUT/validation, OUTPUT/test     the same

Fresh tests of a model that was trained on the set of seed 0: `--seed 1 --split_seed 0 --num_train 0`, also with
`--twins` (each clip and itself played backwards) or `--other_captions` (another grammar).

Notable features:
- to find a clip by its caption, a model needs its entities (colour and shape), what they do, and where. Some actions
  differ only in the order of their frames (motion/paths.py): a model that averages frames cannot tell them apart;
- validation and test show combinations that training never shows (motion/plan.py);
- the same seed gives the same bytes with any number of processes (and the same versions of PyAV and numpy);
- the program can be killed at any moment: run the same command again and it continues.
"""

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import av
from tqdm import tqdm

from data.errors import UserError
from data.files import write_json, write_whole
from motion.clips import MotionClip
from motion.plan import PRESETS, SPLITS, plan_split


# Raise this when the same seed would give other clips or captions: older folders are then not continued.
GENERATOR_VERSION = 2


def open_folder(folder: Path, settings: dict, overwrite: bool) -> None:
    """Prepare the folder for the clips of `settings`: create it, check that it can be continued, or empty it.

    Only files that this program wrote are ever deleted, and finished clips only with `overwrite`.

    Raises:
        UserError: the folder has clips of other settings, or other files.
    """
    settings_file = folder / "settings.json"
    split_folders = [folder / split for split in SPLITS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            settings_file.unlink(missing_ok=True)  # first, so that a half-emptied folder is not continued
            ours = re.compile(rf"(?:{'|'.join(SPLITS)})_\d{{5,}}\.mp4|metadata\.jsonl")
            for file in [file for split in split_folders if split.is_dir() for file in split.iterdir()]:
                if ours.fullmatch(file.name):
                    file.unlink()
        if settings_file.exists():
            check_settings(settings_file, settings)
        elif any(split.is_dir() and any(split.iterdir()) for split in split_folders):
            remedy = "choose another folder" if overwrite else "add --overwrite, or choose another folder"
            raise UserError(f"{folder} holds files that this program did not finish writing: {remedy}")
        for split, count in zip(SPLITS, settings["counts"], strict=True):
            if count:
                (folder / split).mkdir(exist_ok=True)
        for part in folder.glob("*/.*.part"):  # left by a run that was killed
            part.unlink()
        write_json(settings_file, settings)
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


def make_clips(clips: list[MotionClip], num_workers: int, progress: tqdm) -> None:
    """Make the clips in `num_workers` processes. On Ctrl-C the current clips are finished and the processes end."""
    if num_workers == 1:
        for clip in clips:
            clip.make()
            progress.update()
        return
    size = max(1, min(8, len(clips) // (4 * num_workers)))  # clips per task: Ctrl-C waits for the current tasks
    tasks = [clips[start : start + size] for start in range(0, len(clips), size)]
    # The workers inherit that Ctrl-C is ignored: the terminal sends it to them too, but only this process handles it.
    # "spawn" because forking a process that has threads can deadlock.
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
    """In a worker: end when the parent process is killed."""

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_task(clips: list[MotionClip]) -> int:
    for clip in clips:
        clip.make()
    return len(clips)


def make_clip_set(
    folder: Path,
    preset: str,
    seed: int,
    counts: Sequence[int],
    num_workers: int,
    overwrite: bool = False,
    *,
    split_seed: int | None = None,
    twins: bool = False,
    other_captions: bool = False,
) -> int:
    """Make the missing clips of a set, and last its metadata; returns the set's size in bytes.

    Raises:
        UserError: twins or other captions of clips with two entities, an odd number of twins; as `plan_split` and
            `open_folder`.
    """
    if twins and (PRESETS[preset].two_entities or any(count % 2 for count in counts)):
        raise UserError("--twins needs a preset of one entity and even numbers of clips: each has its twin")
    if other_captions and PRESETS[preset].two_entities:
        raise UserError("--other_captions are of clips with one entity: choose another preset")
    settings = {"generator_version": GENERATOR_VERSION, "preset": preset, "seed": seed, "counts": list(counts)}
    settings |= {} if split_seed is None else {"split_seed": split_seed}
    settings |= {name: True for name, wanted in (("twins", twins), ("other_captions", other_captions)) if wanted}
    plans = [
        plan_split(PRESETS[preset], split, count, seed, split_seed, twins)
        for split, count in zip(SPLITS, counts, strict=True)
    ]
    open_folder(folder, settings, overwrite)
    splits = [
        [
            MotionClip(folder, preset, seed, split, index, combination, twins and index % 2 == 1, other_captions)
            for index, combination in enumerate(plan)
        ]
        for split, plan in zip(SPLITS, plans, strict=True)
    ]
    clips = [clip for split in splits for clip in split]
    missing = [clip for clip in clips if not (clip.path.exists() and clip.path.stat().st_size)]
    with tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip", desc=f"{preset} clips") as progress:
        make_clips(missing, min(num_workers, max(1, len(missing))), progress)
    for split in filter(None, splits):
        rows = "".join(json.dumps(clip.row()) + "\n" for clip in split)
        write_whole(split[0].path.parent / "metadata.jsonl", rows.encode())
    return sum(clip.path.stat().st_size for clip in clips)


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (0 or more)")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description="Generates a captioned set of short H.264 clips: coloured shapes that move over textured scenes.\n"
        "The same seed gives the same bytes. After an interruption, run the same command again to continue.",
        epilog="examples:\n"
        "  python training/make_motion_clips.py --output data/motion                about a minute on two cores\n"
        "  python training/make_motion_clips.py --output data/full --preset full    two entities and their relations\n"
        "  python training/make_motion_clips.py --output data/tiny --num_train 50 --num_validation 10 --num_test 10\n"
        "\n"
        'read it with:  datasets.load_dataset("videofolder", data_dir="data/motion")',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; created if it does not exist"
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="demo",
        help="demo: one entity, even frequencies, 80 to 160 pixels. long_tailed: the same, but a few values are far "
        "more frequent than the others. full: two entities with relations, long-tailed frequencies, 128 to 256 "
        "pixels (default: demo)",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="another seed gives a different set (default: 0)"
    )
    parser.add_argument(
        "--split_seed",
        type=whole_number,
        metavar="N",
        help="validation and test show nothing that the training clips of this seed's set show (default: --seed)",
    )
    parser.add_argument(
        "--twins",
        action="store_true",
        help="every second clip is the one before it played backwards, with the caption that is right for it: the two "
        "differ only in the order of their frames",
    )
    parser.add_argument(
        "--other_captions",
        action="store_true",
        help="write captions in another grammar: relative clauses, passives, lists, typos, lower case",
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
        help=f"processes that draw (default: all cores, here {cores})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the clips of a folder that was made with other settings"
    )
    options = parser.parse_args(arguments)
    if options.num_workers == 0:
        parser.error("argument --num_workers: at least 1 process is needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 user error, 130 interrupted."""
    options = parse_arguments(arguments)
    given = [getattr(options, f"num_{split}") for split in SPLITS]
    defaults = PRESETS[options.preset].counts
    counts = [default if number is None else number for number, default in zip(given, defaults, strict=True)]
    remedy = "finished clips are kept; run the same command again to continue"
    begin = time.monotonic()
    try:
        if not any(counts):
            raise UserError("no clips to make: --num_train, --num_validation and --num_test are all 0")
        if "libx264" not in av.codecs_available:
            raise UserError(
                "this PyAV has no libx264 encoder: install the official wheel with `pip install --force-reinstall av`"
            )
        size = make_clip_set(
            options.output,
            options.preset,
            options.seed,
            counts,
            options.num_workers,
            options.overwrite,
            split_seed=options.split_seed,
            twins=options.twins,
            other_captions=options.other_captions,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {remedy}", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print(f"error: a process was killed (out of memory? try a smaller --num_workers): {remedy}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {options.output}: {error.strerror or error}: {remedy}", file=sys.stderr)
        return 1
    print(f"{sum(counts):,} clips, {size / 1e6:.0f} MB, in {options.output} after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends the program as Ctrl-C does
    raise SystemExit(main())
