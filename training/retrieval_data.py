# SPDX-License-Identifier: Apache-2.0
"""Captioned clips for training and evaluation: a `datasets` split -> tagged captions, and pairs decoded in workers.

A split has a video column (a path, or `Video(decode=False)`), a caption column (one caption or a list a clip), and may
have `video_id`, `start` and `end` (seconds: the clip is a window of the file). It comes from a folder of clips with
`metadata.jsonl` (a VideoFolder), a folder of tables (`train.parquet`, ...), or the Hub.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from recipe import UserError
from torch.utils.data import Dataset, Sampler

from modeling_camoe.captions import caption_streams
from modeling_camoe.encode import BadVideo
from modeling_camoe.frames import Clip, VideoDecodingError, describe_source


TABLE_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_split(name: str, split: str, config: str | None = None, limit: int | None = None) -> datasets.Dataset:
    """Load one split of a folder or Hub data set; videos stay undecoded.

    Args:
        name: a folder (VideoFolder, or tables named after splits) or a Hub id. split: its split.
        config: configuration of a Hub data set. limit: keep only the first clips.

    Raises:
        UserError: the data set or the split is not there, or is empty.
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
    except Exception as error:  # whatever datasets raises, the user needs its words and the name, not the stack
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
    # One split at a time: `data_dir` of the whole set would list the files of every split.
    return datasets.load_dataset("videofolder", data_files={split: [f"{folder / split}/**"]}, split=split)


@dataclass
class CaptionedClips:
    """One split, as lists of equal length V.

    Args:
        clips: what to decode. video_ids: names, distinct. captions: one list a clip.
        streams: for each clip and caption the E texts, in the order of the experts.
    """

    clips: list[Clip]
    video_ids: list[str]
    captions: list[list[str]]
    streams: list[list[list[str]]]

    def flat(self, protocol: str) -> tuple[list[str], list[list[str]], list[int]]:
        """Captions, their streams and the index of each one's clip: the "first" of every clip, or "all"."""
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
    """Check a split, tag its captions once (cached by `datasets`) and lay it out.

    Args:
        data: from `load_split`. experts, tagger, streams: as the processor has them.
        video_column: paths or undecoded videos. caption_column: defaults to `captions` or `caption`.
        root: folder that relative paths are relative to.

    Raises:
        UserError: a column is missing, a caption is empty, a video id stands twice.
    """
    caption_column = find_caption_column(data, caption_column)
    if video_column not in data.column_names:
        raise UserError(f"the data set has no column {video_column!r}, only {data.column_names}; set --video_column")

    captions = [[texts] if isinstance(texts, str) else list(texts or []) for texts in data[caption_column]]
    for row, texts in enumerate(captions):
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"row {row} of the data set has an empty caption in column {caption_column!r}: remove it")

    sources = [_source_of(value, root, row, video_column) for row, value in enumerate(data[video_column])]
    starts = data["start"] if "start" in data.column_names else [None] * len(data)
    ends = data["end"] if "end" in data.column_names else [None] * len(data)
    clips = [Clip(source, start, end) for source, start, end in zip(sources, starts, ends, strict=True)]
    if "video_id" in data.column_names:
        video_ids = [str(name) for name in data["video_id"]]
    else:
        video_ids = [f"{row:06d}" if isinstance(s, bytes) else Path(s).stem for row, s in enumerate(sources)]
    if len(set(video_ids)) < len(video_ids):
        twice = next(name for name in video_ids if video_ids.count(name) > 1)
        raise UserError(
            f"video id {twice!r} stands twice in the data set: one row a video, its captions in a list "
            "(training/prepare_benchmark.py groups them)"
        )

    flat = [text for texts in captions for text in texts]
    tagged = iter(tag_captions(flat, experts, tagger, streams))
    return CaptionedClips(clips, video_ids, captions, [[next(tagged) for _ in texts] for texts in captions])


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
    """(N,E) texts of N captions; `Dataset.map` keeps them on disk, so that a set is tagged once."""
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


class RunBatches(Sampler):
    """What each step of a run sees on one process: lists of (epoch, position) keys, shuffled by (seed, epoch).

    A step has `accumulate` contrastive batches of `batch_size` pairs over all processes; rank r of W takes the r-th
    W-th of each, so that what a step sees does not depend on W. Incomplete steps at an epoch's end are dropped. They
    go on from epoch to epoch up to the run's end: workers fetch the next epoch's while the last one's are trained on.

    Args:
        length: pairs. seed: of the run. rank, world: of this process.

    Raises:
        UserError: the batch cannot be shared out, or is larger than the data.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1):
        if batch_size % world != 0:
            raise UserError(f"option 'batch_size' {batch_size} must be a multiple of the {world} processes")
        if length < batch_size * accumulate:
            what = f"option 'batch_size' {batch_size}"
            what += f" times 'gradient_accumulation_steps' {accumulate}" if accumulate > 1 else ""
            raise UserError(f"{what} is more than the {length} training pairs")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.go_from(epoch=0, done=0, steps=len(self))

    @property
    def order(self) -> dict:
        """What the order of the pairs follows from."""
        return {
            "training pairs": self.length,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "seed": self.seed,
        }

    @property
    def pairs_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulate

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.length // self.pairs_per_step

    def go_from(self, epoch: int, done: int, steps: int):
        """The next iteration starts after `done` steps of `epoch`, and ends `steps` steps later."""
        self.start = (epoch, done, steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done, left = self.start
        share = self.batch_size // self.world
        while left > 0:
            order = self._shuffled(epoch)
            for step in range(done, min(len(self), done + left)):
                starts = [
                    step * self.pairs_per_step + batch * self.batch_size + self.rank * share
                    for batch in range(self.accumulate)
                ]
                yield [(epoch, position) for start in starts for position in order[start : start + share]]
            left -= len(self) - done
            epoch, done = epoch + 1, 0

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        return torch.randperm(self.length, generator=generator).tolist()


class TrainPairs(Dataset):
    """Video-caption pairs; frames are decoded on access. What key (epoch, position) gives depends on the key and seed
    only.

    Args:
        split: the captioned clips. decoder: a video processor or a frame cache.
        sampling: "jitter", "uniform" or "keyframe".
        captions_per_video: "one": a random caption of each clip an epoch; "all": every caption is a pair.
        on_bad_video: "raise", or "skip": the next clip that can be decoded takes the place of a bad one.
    """

    def __init__(
        self,
        split: CaptionedClips,
        decoder,
        seed: int,
        sampling: str = "jitter",
        captions_per_video: str = "one",
        on_bad_video: str = "raise",
    ):
        self.split = split
        self.decoder = decoder
        self.seed = seed
        self.sampling = sampling
        self.on_bad_video = on_bad_video
        if captions_per_video == "all":
            self.pairs = [(v, c) for v, texts in enumerate(split.captions) for c in range(len(texts))]
        else:
            self.pairs = [(v, None) for v in range(len(split.captions))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        bad = []
        for attempt in range(len(self.pairs)):
            video, caption = self.pairs[(position + attempt) % len(self.pairs)]
            # One stream of random numbers per (seed, epoch, position): workers and resumes cannot change it.
            generator = torch.Generator().manual_seed(hash((self.seed, epoch, position, attempt)) % 2**63)
            if caption is None:
                caption = int(torch.randint(len(self.split.captions[video]), (1,), generator=generator))
            frame_seed = int(torch.randint(2**31, (1,), generator=generator))
            try:
                return {**self._load(video, caption, frame_seed), "video": video, "bad": bad}
            except VideoDecodingError as error:
                bad.append(BadVideo(video, describe_source(self.split.clips[video]), str(error)))
                if self.on_bad_video == "raise":
                    break
            except OSError as error:  # a cache that cannot be written; an exception of a worker is a page of traceback
                return {"video": None, "bad": bad, "error": str(error)}
        return {"video": None, "bad": bad}

    def _load(self, video: int, caption: int, seed: int) -> dict:
        clip = self.decoder.decode(self.split.clips[video], sampling=self.sampling, seed=seed)
        return {"clip": clip, "texts": self.split.streams[video][caption]}


@dataclass
class PairCollator:
    """Pairs -> `input_ids`, `attention_mask` (N,E,L), uint8 pixels (N,T,3,H,W), `frame_mask`, `video_ids`."""

    processor: object
    experts: list[str]

    def __call__(self, items: list[dict]) -> dict:
        items, notes = part_items(items)
        if not items:
            return notes
        batch = self.processor(
            text=[dict(zip(self.experts, item["texts"], strict=True)) for item in items],
            videos=[item["clip"] for item in items],
            videos_kwargs={"do_rescale": False, "do_normalize": False},
            return_tensors="pt",
        )
        return {**batch, "video_ids": torch.tensor([item["video"] for item in items]), **notes}


def part_items(items: list[dict]) -> tuple[list[dict], dict]:
    """What `TrainPairs` gave -> the pairs, and `bad` (clips that could not be decoded) and `error` (a full disk)."""
    bad = [bad for item in items for bad in item["bad"]]
    errors = [item["error"] for item in items if "error" in item]
    return [item for item in items if item["video"] is not None], {"bad": bad, "error": errors[0] if errors else None}
