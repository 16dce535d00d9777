# SPDX-License-Identifier: Apache-2.0
"""Turn a benchmark's public annotations into one table per split, and find its videos.

    python training/prepare_benchmark.py msrvtt --annotations msrvtt_data --videos MSRVTT_Videos --output data/msrvtt

The first argument is msrvtt, msvd, lsmdc, didemo or activitynet. Annotations are the files that CLIP4Clip's releases
established, or a Hub repository (its id, or a clone of it). Writes `<split>.parquet` into `output`, with the columns
video_id, video (path), captions (list), start and end (seconds; empty: the whole file). run_retrieval.py and
evaluate_retrieval.py read these with `--dataset_name <output> --train_split <split>`.

Videos that are missing or, with --check_videos, cannot be opened are listed in missing_videos.jsonl and left out. Too
many of them (--allow_missing) are an error, because a smaller gallery is an easier one.
"""

import hashlib
import json
import math
import os
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

    annotations: str = option(help="folder of the published annotation files, or a Hub repository (id or clone)")
    videos: str = option(help="folder of the videos; subfolders are searched")
    output: str = option(help="folder for the tables")
    check_videos: bool = option(False, "open every video, and treat those that cannot be opened as missing")
    allow_missing: float = option(0.05, "share of a split's videos that may be missing, from 0 to 1")
    hold_out: int = option(
        0, "training videos to hold out for validation, for training splits without a validation split"
    )
    windows: bool = option(False, "one clip per timed sentence, not one paragraph per video (didemo, activitynet)")
    num_workers: int = option(8, "videos that --check_videos opens at the same time")

    def __post_init__(self):
        if not 0 <= self.allow_missing <= 1:
            raise UserError(f"option 'allow_missing' must be from 0 to 1, got {self.allow_missing}")
        if self.hold_out < 0:
            raise UserError(f"option 'hold_out' must be 0 or more, got {self.hold_out}")


def index_videos(folder: Path) -> dict[str, Path]:
    """Every video under a folder, by file name and by file name without extension."""
    if not folder.is_dir():
        raise UserError(f"the video folder {folder} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file():
            found.setdefault(path.stem, path)
            found[path.name] = path
    if not found:
        raise UserError(f"there is no video under {folder}: --videos is the folder of the video files, unpacked")
    return found


def find_video(file_name: str, found: dict[str, Path]) -> Path | None:
    """The file of a video: by its name as annotated, or by the same name with another extension."""
    name = Path(file_name)
    stem = name.stem if name.suffix.lower() in VIDEO_EXTENSIONS else file_name
    return found.get(file_name) or found.get(stem)


def unreadable_videos(paths: list[Path], num_workers: int) -> dict[Path, str]:
    """The cause for each video whose header cannot be read."""

    def cause(path: Path) -> str | None:
        try:
            probe_video(path)
        except VideoDecodingError as error:
            return str(error)

    with ThreadPoolExecutor(num_workers) as pool:  # FFmpeg releases the interpreter lock while it opens a file
        causes = list(tqdm(pool.map(cause, paths), total=len(paths), desc="checking videos", unit="video"))
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


def make_rows(splits: Splits, options: PrepareOptions) -> tuple[dict[str, list[dict]], list[dict]]:
    """The rows of each split's table, and the missing clips as {split, video_id, cause}."""
    found = index_videos(Path(options.videos))
    paths = {clip.file_name: find_video(clip.file_name, found) for clips in splits.values() for clip in clips}
    unreadable = {}
    if options.check_videos:
        unreadable = unreadable_videos(sorted({path for path in paths.values() if path}), options.num_workers)

    rows: dict[str, list[dict]] = {name: [] for name in splits}
    missing = []
    for name, clips in splits.items():
        for clip in clips:
            path = paths[clip.file_name]
            if path is None:
                missing.append({"split": name, "video_id": clip.video_id, "cause": "no such file"})
            elif path in unreadable:
                missing.append({"split": name, "video_id": clip.video_id, "cause": unreadable[path]})
            else:
                rows[name].append(
                    {
                        "video_id": clip.video_id,
                        "video": os.path.abspath(path),
                        "captions": clip.captions,
                        "start": clip.start,
                        "end": clip.end,
                    }
                )
    return rows, missing


def check_missing(splits: Splits, missing: list[dict], options: PrepareOptions, listed_in: Path):
    """Raise UserError if a split is empty or lacks more than the allowed share of its clips."""
    for name, clips in splits.items():
        if not clips:
            raise UserError(f"split {name!r} of {options.annotations} is empty: download the annotations again")
        lost = [entry for entry in missing if entry["split"] == name]
        share = len(lost) / len(clips)
        if share > options.allow_missing:
            remedy = f"--allow_missing {math.ceil(share * 100) / 100:g} continues without them"
            raise UserError(
                f"split {name!r}: {len(lost)} of {len(clips)} clips have no readable video in {options.videos} "
                f"({100 * share:.0f} %, allowed {100 * options.allow_missing:g} %), the first is "
                f"{lost[0]['video_id']!r}: {lost[0]['cause']}; all are listed in {listed_in}; {remedy}"
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
    rows, missing = make_rows(splits, options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    listed_in = output / "missing_videos.jsonl"
    listed_in.write_text("".join(json.dumps(entry) + "\n" for entry in missing), encoding="utf-8")
    check_missing(splits, missing, options, listed_in)

    datasets.disable_progress_bars()  # writing takes no time
    print(f"{'split':<16} {'clips':>7} {'captions':>9} {'left out':>9}")
    for name, clips in rows.items():
        partial = output / f"{name}.parquet.part"
        datasets.Dataset.from_list(clips, features=FEATURES).to_parquet(partial)
        partial.rename(output / f"{name}.parquet")
        captions = sum(len(clip["captions"]) for clip in clips)
        print(f"{name:<16} {len(clips):>7} {captions:>9} {len(splits[name]) - len(clips):>9}")
    print(f"wrote {len(rows)} tables to {output}" + (f"; left out: {listed_in}" if missing else ""))


if __name__ == "__main__":
    exit_on_user_error(main)
