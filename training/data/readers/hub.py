# SPDX-License-Identifier: Apache-2.0
"""The benchmarks in the layout of Hub repositories: one table per split, named by configuration and split.

Known: friedrichor/MSR-VTT, /MSVD, /DiDeMo, /ActivityNet_Captions, the same of VLM2Vec, AlexZigma/msr-vtt (one caption
per video), Leyo/ActivityNet_Captions. They are read from the Hub or from a clone. Repositories whose tables
contain the videos (mteb/...) need no preparation: pass them to the programs as `--dataset_name`.
"""

from itertools import zip_longest
from pathlib import Path

import datasets

from ..errors import UserError
from .activitynet import paragraph_or_windows
from .common import AnnotatedClip, Splits, caption_list, check_unique, read_bytes


# Benchmark -> (configuration, split) on the Hub -> our name for the split.
HUB_SPLITS = {
    "msrvtt": {
        ("train_9k", "train"): "train_9k",
        ("train_7k", "train"): "train_7k",
        ("test_1k", "test"): "test_1k",
        ("default", "train"): "train_full",
        ("default", "val"): "validation_full",
    },
    "msvd": {("default", name): name for name in ("train", "validation", "test")},
    "didemo": {("default", name): name for name in ("train", "validation", "test")},
    "activitynet": {  # Leyo calls val_1 and val_2 validation and test
        ("default", "train"): "train",
        ("default", "val1"): "test",
        ("default", "validation"): "test",
        ("default", "val2"): "test_val2",
        ("default", "test"): "test_val2",
    },
}
PARAGRAPHS = ("didemo", "activitynet")  # the captions of one video are sentences of one text
CAPTION_COLUMNS = ("captions", "caption", "sentences", "en_captions")
VIDEO_COLUMNS = ("video", "video_path", "video_id")


def read_hub(benchmark: str, name: str, windows: bool = False) -> Splits:
    """All known splits of a Hub repository, or of a local clone of it.

    Raises:
        UserError: it cannot be read, has no captions, or has none of the benchmark's configurations and splits.
    """
    known = HUB_SPLITS.get(benchmark)
    if known is None:
        raise UserError(f"no Hub layout of {benchmark} is known: give the folder of its annotation files")
    splits: Splits = {}
    found = []
    check_no_pointers(Path(name))
    try:
        for config in datasets.get_dataset_config_names(name):
            for split in datasets.get_dataset_split_names(name, config):
                found.append((config, split))
                if (config, split) in known:
                    table = datasets.load_dataset(name, config, split=split)
                    splits[known[config, split]] = _rows(table, benchmark, f"{name} ({config}, {split})", windows)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types; the user needs its message, not a traceback
        raise UserError(f"cannot read {name} as a Hub data set: {error}") from error
    if not splits:
        raise UserError(
            f"{name} has the configurations and splits {found}, none of {benchmark}'s {list(known)}: "
            "is it another benchmark's?"
        )
    return splits


def _rows(table: datasets.Dataset, benchmark: str, where: str, windows: bool) -> list[AnnotatedClip]:
    video_column = _first(VIDEO_COLUMNS, table, where)
    caption_column = _first(CAPTION_COLUMNS, table, where)
    if isinstance(table.features[video_column], datasets.Video):
        raise UserError(f"{where} holds the videos themselves: pass it to the programs as --dataset_name")

    clips = []
    for row in table:
        file_name = Path(row[video_column]).name
        video_id = str(row.get("video_id") or Path(file_name).stem)
        clips.append(AnnotatedClip(video_id, file_name, caption_list(row[caption_column], where, video_id)))
    check_unique((clip.video_id for clip in clips), where)
    if benchmark not in PARAGRAPHS:
        for clip in clips:
            clip.captions = [text for text in clip.captions if text]
            if not clip.captions:
                raise UserError(f"{where}: video {clip.video_id!r} has no caption: correct or remove it")
        return clips

    timestamps = [None] * len(clips)
    if windows:
        if "timestamps" in table.column_names:
            timestamps = table["timestamps"]
        elif "captions_starts" in table.column_names:
            timestamps = [list(zip_longest(r["captions_starts"], r["captions_ends"])) for r in table]
        else:
            raise UserError(f"{where} has no column of times: leave out --windows")
    return [
        row for clip, times in zip(clips, timestamps, strict=True) for row in paragraph_or_windows(clip, times, where)
    ]


def check_no_pointers(clone: Path):
    """Raise UserError if a table of a clone was not downloaded; `datasets` would say that the file is damaged."""
    for path in sorted(clone.rglob("*")) if clone.is_dir() else ():
        if path.suffix in (".parquet", ".json", ".jsonl", ".csv") and path.is_file() and path.stat().st_size < 1024:
            read_bytes(path)


def _first(names: tuple[str, ...], table: datasets.Dataset, where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UserError(
        f"{where} has no column {' or '.join(names)}, only {table.column_names}; is it the right data set?"
    )
