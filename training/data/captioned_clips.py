# SPDX-License-Identifier: Apache-2.0
"""Captioned clips for training and evaluation: a `datasets` split -> clips and their tagged captions.

A split has a video column (a path, or `Video(decode=False)`) and a caption column (one caption or a list per clip).
It may have `video_id`, and `start` and `end` in seconds for a clip that is a window of a file. Every row is a clip of
its own: other windows of its file are negatives for it, and candidates beside it. A split comes from a folder of clips
with `metadata.jsonl` (a VideoFolder), a folder of tables (`train.parquet`, ...), or the Hub.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from modeling_camoe.captions import caption_streams
from modeling_camoe.frames import Clip, VideoDecodingError

from .errors import UserError


TABLE_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_split(name: str, split: str, config: str | None = None, limit: int | None = None) -> datasets.Dataset:
    """Load one split of a folder or Hub data set; videos stay undecoded.

    Args:
        name: a folder (VideoFolder, or tables named after splits) or a Hub id. split: its split.
        config: configuration of a Hub data set. limit: keep only the first clips.

    Raises:
        UserError: the data set or the split does not exist or is empty.
    """
    try:
        if os.path.isdir(name):
            data = _load_folder(Path(name), split)
        elif name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"the data set folder {name} does not exist")
        else:
            data = datasets.load_dataset(name, config, split=split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types; the user needs its message, not a traceback
        raise UserError(f"cannot load split {split!r} of {name}: {error}") from error
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise UserError(f"split {split!r} of {name} is empty")
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Video):
            data = data.cast_column(column, datasets.Video(decode=False))
    return data


def _load_folder(folder: Path, split: str) -> datasets.Dataset:
    for suffix, builder in TABLE_SUFFIXES.items():
        table = folder / f"{split}{suffix}"
        if table.is_file():
            return datasets.load_dataset(builder, data_files={split: str(table)}, split=split)
    if not (folder / split).is_dir():
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise UserError(
            f"{folder} has no split {split!r}: neither a folder nor a table of that name; folders: {found}"
        )
    # One split at a time: `data_dir` of the whole data set would list the files of every split.
    return datasets.load_dataset("videofolder", data_files={split: [f"{folder / split}/**"]}, split=split)


@dataclass
class CaptionedClips:
    """One split, as lists of equal length V.

    Args:
        clips: what to decode. video_ids: distinct names. captions: a list per clip.
        streams: the E texts of each caption of each clip, in the order of the experts.
    """

    clips: list[Clip]
    video_ids: list[str]
    captions: list[list[str]]
    streams: list[list[list[str]]]

    def flat(self, protocol: str) -> tuple[list[str], list[list[str]], list[int]]:
        """Captions, their streams and the indices of their clips, for the "first" or "all" captions of each clip."""
        rows = [(v, c) for v, texts in enumerate(self.captions) for c in range(len(texts) if protocol == "all" else 1)]
        return (
            [self.captions[v][c] for v, c in rows],
            [self.streams[v][c] for v, c in rows],
            [v for v, _ in rows],
        )


def read_captioned_clips(
    data: datasets.Dataset,
    experts: Sequence[str],
    tagger,
    streams: dict[str, str] | None = None,
    video_column: str = "video",
    caption_column: str | None = None,
    root: str | None = None,
) -> CaptionedClips:
    """Check a split and tag its captions, once (`datasets` caches the result).

    Args:
        data: from `load_split`. experts, tagger, streams: as the processor has them.
        video_column: paths or undecoded videos. caption_column: defaults to `captions` or `caption`.
        root: base folder of relative paths.

    Raises:
        UserError: a column is missing, a caption is empty, a time is no number, or a video id is not unique.
    """
    caption_column = find_caption_column(data, caption_column)
    if video_column not in data.column_names:
        raise UserError(f"the data set has no column {video_column!r}, only {data.column_names}; set --video_column")

    captions = [[texts] if isinstance(texts, str) else list(texts or []) for texts in data[caption_column]]
    for row, texts in enumerate(captions):
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"row {row} of the data set has an empty caption in column {caption_column!r}: remove it")

    sources = [_source_of(value, root, row, video_column) for row, value in enumerate(data[video_column])]
    starts, ends = _seconds(data, "start"), _seconds(data, "end")
    clips = [Clip(source, start, end) for source, start, end in zip(sources, starts, ends, strict=True)]
    if "video_id" in data.column_names:
        video_ids = [str(name) for name in data["video_id"]]
    else:
        video_ids = [_name_of(row, clip) for row, clip in enumerate(clips)]
    if len(set(video_ids)) < len(video_ids):
        twice = next(name for name in video_ids if video_ids.count(name) > 1)
        raise UserError(
            f"video id {twice!r} appears twice in the data set: give each video, or each window of one, one row "
            "with its captions in a list (training/prepare_benchmark.py groups them)"
        )

    flat = [text for texts in captions for text in texts]
    tagged = iter(tag_captions(flat, experts, tagger, streams))
    return CaptionedClips(clips, video_ids, captions, [[next(tagged) for _ in texts] for texts in captions])


def _seconds(data: datasets.Dataset, column: str) -> list[float | None]:
    """A column of times; None: from the beginning or to the end."""
    if column not in data.column_names:
        return [None] * len(data)
    values = data[column][:]
    for row, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise UserError(
                f"row {row} of the data set has {value!r} as {column!r}: give seconds from 0 on, or nothing"
            )
    return values


def _name_of(row: int, clip: Clip) -> str:
    """The id of a clip that has none: the file's name, and the window if it is one."""
    if isinstance(clip.source, bytes):
        return f"{row:06d}"
    if clip.start is None and clip.end is None:
        return Path(clip.source).stem
    return f"{Path(clip.source).stem}@{clip.start or 0:g}-{'' if clip.end is None else f'{clip.end:g}'}"


def check_decodable(split: CaptionedClips, decoder, name: str):
    """Decode one clip of a split, the first that can be.

    Raises:
        UserError: none can.
    """
    first = None
    for clip in split.clips:
        try:
            decoder.decode(clip)
            return
        except VideoDecodingError as error:
            first = first or error
    raise UserError(f"no clip of split {name!r} can be decoded; the first: {first}")


def find_caption_column(data: datasets.Dataset, given: str | None) -> str:
    """The column of captions: the one given, else `captions` or `caption`."""
    column = given or next((name for name in ("captions", "caption") if name in data.column_names), "captions")
    if column not in data.column_names:
        raise UserError(f"the data set has no column {column!r}, only {data.column_names}; set --caption_column")
    return column


def _source_of(value, root: str | None, row: int, column: str) -> str | bytes:
    if isinstance(value, dict):  # Video(decode=False)
        value = value["path"] if value.get("path") and os.path.exists(value["path"]) else value.get("bytes")
    if not value:
        raise UserError(f"row {row} of the data set has no video in column {column!r}")
    if isinstance(value, bytes):
        return value
    return os.path.join(root, value) if root and not os.path.isabs(value) else value


def tag_captions(captions: list[str], experts, tagger, streams: dict[str, str] | None = None) -> list[list[str]]:
    """(N,E) texts of N captions; `Dataset.map` caches them on disk, so a data set is tagged once."""
    table = datasets.Dataset.from_dict({"caption": captions})
    table = table.map(
        _tag_batch,
        batched=True,
        batch_size=2000,
        fn_kwargs={"experts": list(experts), "tagger": tagger, "streams": streams},
        desc="tagging captions",
    )
    return table["streams"][:]


def _tag_batch(batch, experts, tagger, streams):
    return {"streams": caption_streams(batch["caption"], experts, tagger, streams)}
