# SPDX-License-Identifier: Apache-2.0
"""Turn a benchmark's public annotations into one table per split, and find its videos.

    python training/prepare_benchmark.py msrvtt --annotations msrvtt_data --videos MSRVTT_Videos --output data/msrvtt

The first argument is msrvtt, msvd, lsmdc, didemo or activitynet. Annotations are the files that CLIP4Clip's releases
established, or a Hub repository (its id, or a clone of it). Writes `<split>.parquet` into `output`, with the columns
video_id, video (path), captions (list), start and end (seconds; empty: the whole file). run_retrieval.py and
evaluate_retrieval.py read these with `--dataset_name <output> --train_split <split>`.

A video is looked up by its annotated name, then with another suffix, with or without "v_", and within longer file
names; how many were found in which way is printed. Videos that are missing or, with --check_videos, cannot be opened,
and windows that are empty are listed in missing_videos.jsonl and left out. Too many missing videos (--allow_missing)
are an error, because a smaller gallery is an easier one. With only the test videos at hand, give --splits test.
"""

import hashlib
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from data.errors import UserError
from data.readers import BENCHMARKS, Splits, read_annotations
from engine.recipe import exit_on_user_error, option, parse_options
from modeling_camoe.frames import VIDEO_EXTENSIONS, VideoDecodingError, probe_video


WINDOWED = ("didemo", "activitynet")  # the benchmarks whose sentences have times

FEATURES = datasets.Features(
    {
        "video_id": datasets.Value("string"),
        "video": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "start": datasets.Value("float64"),
        "end": datasets.Value("float64"),
    }
)


@dataclass
class PrepareOptions:
    """The options after the benchmark's name."""

    annotations: str = option(help="folder of the published annotation files, or a Hub repository (its id or a clone)")
    videos: str = option(help="folder of the videos; subfolders are searched")
    output: str = option(help="folder for the tables")
    check_videos: bool = option(False, "open every video; those that cannot be opened count as missing")
    allow_missing: float = option(0.05, "share of a split's videos that may be missing, from 0 to 1")
    hold_out: int = option(
        0, "training videos to hold out for validation, of training splits without a validation split"
    )
    windows: bool = option(
        False, "make one clip per timed sentence, not one paragraph per video (didemo, activitynet)"
    )
    splits: list | str = option([], "splits to prepare, for example test, or [train_9k, test_1k] (default: all)")
    num_workers: int = option(8, "videos that --check_videos opens at the same time")

    def __post_init__(self):
        if not 0 <= self.allow_missing <= 1:
            raise UserError(f"option 'allow_missing' must be from 0 to 1, got {self.allow_missing}")
        if self.hold_out < 0:
            raise UserError(f"option 'hold_out' must be 0 or more, got {self.hold_out}")
        if isinstance(self.splits, str):
            self.splits = [self.splits]


PICTURES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff".split())  # thumbnails beside a video open as one

# How a video was found, best first.
RULES = ("by its name", "with another suffix", "with or without v_", "within a longer name")


class VideoFolder:
    """The files under a folder, by name. Linked folders are entered, each folder once.

    Raises:
        UserError: the folder does not exist or has no file.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"the video folder {folder} does not exist")
        self.by_name: dict[str, Path] = {}
        self.by_stem: dict[str, list[Path]] = {}
        for path in _files(folder):
            self.by_name.setdefault(path.name, path)
            self.by_stem.setdefault(_stem(path.name), []).append(path)
        if not self.by_name:
            raise UserError(f"there is no video under {folder}: --videos is the folder of the video files, unpacked")

    def find(self, file_name: str) -> tuple[Path | None, str]:
        """The file of an annotated video and the rule of `RULES` that found it; None and the cause if none did."""
        path = self._named(file_name)
        if path is not None:
            return path, RULES[0 if path.name == file_name else 1]
        # Copies of ActivityNet have its names with "v_" or without.
        path = self._named(file_name[2:] if file_name.startswith("v_") else f"v_{file_name}")
        if path is not None:
            return path, RULES[2]
        # "x.mov.mp4", "title [id].mp4"; but video1 is not within video10.
        stem = _stem(file_name)
        whole = re.compile(rf"(?<![\w-]){re.escape(stem)}(?![\w-])")
        longer = [path for name, path in self.by_name.items() if stem in name and whole.search(name)]
        longer = [path for path in longer if _is_video_name(path)]
        if len(longer) == 1:
            return longer[0], RULES[3]
        if longer:
            return None, f"several files have it in their names: {', '.join(sorted(path.name for path in longer)[:3])}"
        return None, "no such file"

    def _named(self, file_name: str) -> Path | None:
        if file_name in self.by_name:
            return self.by_name[file_name]
        for stem in dict.fromkeys((file_name, _stem(file_name))):
            candidates = self.by_stem.get(stem, ())
            for path in candidates:
                if _is_video_name(path):
                    return path
            for path in candidates:
                if path.suffix.lower() not in PICTURES and not cause_of_failure(path):
                    return path
        return None


def _files(folder: Path) -> list[Path]:
    found, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        identity = os.path.realpath(parent)
        if identity in entered:  # a link to a folder above, or a second link to the same
            folders.clear()
            continue
        entered.add(identity)
        found += [Path(parent, name) for name in names if not name.startswith("._")]  # macOS' notes on a file
    return sorted(path for path in found if path.is_file())


def _stem(name: str) -> str:
    """The name without its suffix, which may be a bare dot; ".166" is the end of an LSMDC name and no suffix."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and len(suffix) <= 5 and not suffix.isdigit() else name


def _is_video_name(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS


def cause_of_failure(path: Path) -> str | None:
    """Why the header of a video cannot be read, or None."""
    try:
        probe_video(path)
    except VideoDecodingError as error:
        return str(error)
    return None


def unreadable_videos(paths: list[Path], num_workers: int) -> dict[Path, str]:
    """The cause for each video whose header cannot be read."""
    with ThreadPoolExecutor(num_workers) as pool:  # FFmpeg releases the interpreter lock while it opens a file
        causes = list(tqdm(pool.map(cause_of_failure, paths), total=len(paths), desc="checking videos", unit="video"))
    return {path: cause for path, cause in zip(paths, causes, strict=True) if cause is not None}


def hold_out(splits: Splits, count: int) -> Splits:
    """Move `count` videos of each training split without a validation split into a new one.

    The choice depends on the videos' names alone, so it is the same on every machine.
    """
    result = dict(splits)
    for name in splits:
        validation = name.replace("train", "validation")
        if not name.startswith("train") or validation in splits:
            continue
        videos = sorted(
            {clip.file_name for clip in splits[name]}, key=lambda name: hashlib.sha256(name.encode()).digest()
        )
        if count >= len(videos):
            raise UserError(f"--hold_out {count} would leave nothing of {name}, which has {len(videos)} videos")
        chosen = set(videos[:count])
        result[name] = [clip for clip in splits[name] if clip.file_name not in chosen]
        result[validation] = [clip for clip in splits[name] if clip.file_name in chosen]
    return result


def choose_splits(splits: Splits, names: list) -> Splits:
    """The splits of these names; "test" also stands for test_1k, test_full and the like.

    Raises:
        UserError: there is no such split.
    """
    for name in names:
        if not any(split == name or split.startswith(f"{name}_") for split in splits):
            raise UserError(f"--splits {name}: the annotations have only {', '.join(splits)}")
    return {
        split: clips
        for split, clips in splits.items()
        if not names or any(split == name or split.startswith(f"{name}_") for name in names)
    }


def without_empty_windows(splits: Splits) -> tuple[Splits, list[dict]]:
    """The clips that last longer than nothing, and the others as {split, video_id, cause}."""
    kept, dropped = {}, []
    for name, clips in splits.items():
        kept[name] = []
        for clip in clips:
            if clip.end is None or clip.end > (clip.start or 0):
                kept[name].append(clip)
            else:
                cause = f"the window is empty: {clip.start:g} to {clip.end:g} s"
                dropped.append({"split": name, "video_id": clip.video_id, "cause": cause})
    return kept, dropped


def make_rows(splits: Splits, options: PrepareOptions) -> tuple[dict[str, list[dict]], list[dict], dict[str, int]]:
    """The rows of each split's table, the missing clips as {split, video_id, cause}, and rule -> videos it found."""
    folder = VideoFolder(Path(options.videos))
    names = dict.fromkeys(clip.file_name for clips in splits.values() for clip in clips)
    paths: dict[str, Path] = {}
    causes: dict[str, str] = {}
    found_by = dict.fromkeys(RULES, 0)
    for name in names:
        path, how = folder.find(name)
        if path is None:
            causes[name] = how
        else:
            paths[name] = path
            found_by[how] += 1
    if options.check_videos:
        unreadable = unreadable_videos(sorted(set(paths.values())), options.num_workers)
        causes |= {name: unreadable[path] for name, path in paths.items() if path in unreadable}

    rows: dict[str, list[dict]] = {name: [] for name in splits}
    missing = []
    for name, clips in splits.items():
        for clip in clips:
            if clip.file_name in causes:
                missing.append({"split": name, "video_id": clip.video_id, "cause": causes[clip.file_name]})
                continue
            rows[name].append(
                {
                    "video_id": clip.video_id,
                    "video": os.path.abspath(paths[clip.file_name]),
                    "captions": clip.captions,
                    "start": clip.start,
                    "end": clip.end,
                }
            )
    return rows, missing, found_by


def check_missing(splits: Splits, missing: list[dict], options: PrepareOptions, listed_in: Path):
    """Raise UserError if a split is empty or lacks more than the allowed share of its clips, or if nothing is left."""
    for name, clips in splits.items():
        if not clips:
            raise UserError(f"split {name!r} of {options.annotations} is empty: download the annotations again")
        lost = [entry for entry in missing if entry["split"] == name]
        share = len(lost) / len(clips)
        if share > options.allow_missing:
            remedy = f"--allow_missing {math.ceil(share * 100) / 100:g} continues without them"
            if len(lost) == len(clips) and len(splits) > 1:
                remedy += ", and --splits leaves out whole splits"
            raise UserError(
                f"split {name!r}: {len(lost)} of {len(clips)} clips have no readable video in {options.videos} "
                f"({100 * share:.0f} %, allowed {100 * options.allow_missing:g} %), the first is "
                f"{lost[0]['video_id']!r}: {lost[0]['cause']}; all are listed in {listed_in}; {remedy}"
            )
    if len(missing) == sum(map(len, splits.values())):
        raise UserError(
            f"none of the {len(missing)} clips has a readable video in {options.videos}, the first is "
            f"{missing[0]['video_id']!r}: {missing[0]['cause']}; all are listed in {listed_in}"
        )


def main():
    argv = sys.argv[1:]
    benchmark = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if benchmark not in BENCHMARKS and not {"-h", "--help"} & set(argv):
        given = f"not {benchmark!r}" if benchmark else "as the first argument"
        raise UserError(f"name the benchmark, one of {', '.join(BENCHMARKS)}, {given}")
    options = parse_options(PrepareOptions, argv, description=__doc__)
    if options.windows and benchmark not in WINDOWED:
        raise UserError(
            f"--windows: the captions of {benchmark} have no times, only those of {' and '.join(WINDOWED)}"
        )

    splits = read_annotations(benchmark, options.annotations, options.windows)
    if options.hold_out:
        splits = hold_out(splits, options.hold_out)
    annotated = choose_splits(splits, options.splits)
    splits, empty_windows = without_empty_windows(annotated)
    rows, missing, found_by = make_rows(splits, options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    listed_in = output / "missing_videos.jsonl"
    left_out = missing + empty_windows
    listed_in.write_text("".join(json.dumps(entry) + "\n" for entry in left_out), encoding="utf-8")
    check_missing(splits, missing, options, listed_in)

    datasets.disable_progress_bars()  # writing takes no time
    print("videos found: " + ", ".join(f"{count} {how}" for how, count in found_by.items()))
    print(f"{'split':<16} {'clips':>7} {'captions':>9} {'left out':>9}")
    for name, clips in rows.items():
        if not clips:
            (output / f"{name}.parquet").unlink(missing_ok=True)  # of an earlier run
            print(f"{name:<16} {0:>7} {0:>9} {len(annotated[name]):>9}  no table")
            continue
        partial = output / f"{name}.parquet.part"
        datasets.Dataset.from_list(clips, features=FEATURES).to_parquet(partial)
        partial.rename(output / f"{name}.parquet")
        captions = sum(len(clip["captions"]) for clip in clips)
        print(f"{name:<16} {len(clips):>7} {captions:>9} {len(annotated[name]) - len(clips):>9}")
    if empty_windows:
        print(f"{len(empty_windows)} of the clips left out have an empty window")
    count = sum(bool(clips) for clips in rows.values())
    print(f"wrote {count} tables to {output}" + (f"; left out: {listed_in}" if left_out else ""))


if __name__ == "__main__":
    exit_on_user_error(main)
