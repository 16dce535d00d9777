# SPDX-License-Identifier: Apache-2.0
"""Training pairs from a stream: data that does not fit a disk, read as they come by all workers of all processes.

A reader is one worker of one process. With shards (files of the data set) in a number that the readers divide, each
reads shards of its own, in another order in every pass; otherwise each reads all shards and keeps its part of the rows
(`datasets.distributed.split_dataset_by_node`). Either way every row is seen once in a pass, and a reader begins its
next pass when its rows are over, so that no process ever waits for one that has more.

What a reader yields depends on the seed, its number and its place alone. A place is the state of the stream before the
block of rows that is being read, and the number of pairs that were taken from the block. Places travel with the
batches and are saved with a checkpoint, so a resumed run goes on with the next pair.

What a stream cannot do: rows are shuffled within a block of a shard, not over the whole; its length is unknown, so the
steps of an epoch are an option; the query bank is its beginning, not a sample; and another number of processes or
workers is another order.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch
from accelerate.utils import gather_object
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from modeling_camoe.captions import caption_streams
from modeling_camoe.encode import BadVideo, note_damage
from modeling_camoe.frames import Clip, VideoDecodingError

from .batches import PairCollator
from .captioned_clips import captions_of, check_second, check_video_column, clip_of, find_caption_column, name_of
from .errors import UserError


class StreamedClips:
    """A split that is read as it comes.

    Args:
        data: from `load_split(..., streaming=True)`. video_column, caption_column, root: as in `read_captioned_clips`.

    Raises:
        UserError: a column is missing.
    """

    def __init__(self, data: datasets.IterableDataset, video_column="video", caption_column=None, root=None):
        self.data = data
        columns = list(next(iter(data)))
        check_video_column(columns, video_column)
        self.caption_column = find_caption_column(columns, caption_column)
        window = [name for name in ("start", "end") if name in columns]
        self.places = {"root": root, "column": video_column, "window": window}

    @property
    def num_shards(self) -> int:
        return self.data.num_shards

    def first_captions(self, limit: int) -> list[str]:
        """The captions at the beginning of the stream, at most `limit`."""
        texts = []
        for number, row in enumerate(self.data):
            if len(texts) >= limit:
                break
            texts += captions_of(row[self.caption_column], number, self.caption_column)
        return texts[:limit]

    def part(self, shard: int, reader: int, readers: int) -> datasets.IterableDataset:
        """The rows of one shard that are a reader's."""
        data = self.data.shard(self.num_shards, shard)
        if self.num_shards % readers == 0:
            return data
        # Shifted from shard to shard: the first readers would get the odd rows of all of them.
        return split_dataset_by_node(data, (reader + shard) % readers, readers)

    def clip(self, row: dict, number: int) -> Clip:
        """The clip of a row. A video at an address (`hf://`, `s3://`, ...) is read, by ranges, when it is decoded.

        Raises:
            UserError: the row has no video.
        """
        times = (row[name] for name in self.places["window"])
        return clip_of(number, row[self.places["column"]], *times, **self.places)

    def name(self, row: dict, number: str) -> str:
        """The id of a row."""
        if row.get("video_id") is not None:
            return str(row["video_id"])
        path = _path_of(row[self.places["column"]])
        if path is None:
            return number
        return name_of(Clip(path, **{name: row[name] for name in self.places["window"]}), number)


def _path_of(value) -> str | None:
    """The path or address of a video column's value; None for a video in the table."""
    if isinstance(value, dict):  # Video(decode=False)
        return value.get("path") if value.get("bytes") is None else None
    return value if isinstance(value, str) and value else None


@dataclass
class Place:
    """Where a reader is: `taken` pairs of a block of a shard in a pass; `state` is the stream's before that block."""

    epoch: int = 0
    shard: int = 0  # position in the pass's order
    block: int = 0
    state: dict | None = None
    taken: int = 0


class StreamBatches:
    """The steps of a run on a stream, instead of a [`RunBatchSampler`], and the places of this process's readers.

    Args:
        steps_per_epoch: what an epoch is. shards: of the stream. block: rows that are shuffled together.
        workers: of this process, at least 1. Others as of `RunBatchSampler`.
    """

    def __init__(self, steps_per_epoch, batch_size, seed, rank, world, accumulate, workers, shards, block):
        if batch_size % world != 0:
            raise UserError(f"option 'batch_size' {batch_size} must be a multiple of the number of processes, {world}")
        self.steps_per_epoch, self.batch_size, self.seed = steps_per_epoch, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.workers, self.shards, self.block = max(1, workers), shards, block
        self.places = [Place() for _ in range(self.workers)]
        self.start_from(0, 0, steps_per_epoch)

    def __len__(self) -> int:
        return self.steps_per_epoch

    @property
    def length(self) -> None:
        """Pairs of an epoch: not known."""

    @property
    def order(self) -> dict:
        """What determines the order of the pairs."""
        return {
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "seed": self.seed,
            "processes": self.world,
            "num_workers": self.workers,
            "shards": self.shards,
            "stream_shuffle": self.block,
        }

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one step over all processes."""
        return self.batch_size * self.accumulate

    def start_from(self, epoch: int, done: int, steps: int):
        """The next iteration starts after `done` steps of `epoch`, and ends `steps` steps later."""
        self.start, self.steps = epoch * self.steps_per_epoch + done, steps

    def advance(self, reader: int, place: Place):
        """A step on a batch of this reader is done."""
        self.places[reader] = place

    def state_dict(self) -> dict:
        """The places of the readers of all processes, which all must call this."""
        return {"places": gather_object([[vars(place) for place in self.places]])}

    def load_state_dict(self, state: dict):
        if len(state["places"]) == self.world:  # else `Progress` says what is wrong
            self.places = [Place(**place) for place in state["places"][self.rank]]


class StreamPairs(IterableDataset):
    """Batches of items like those of `TrainPairs`, with the place of their reader. Endless but for `batches.steps`.

    Args:
        clips: the stream. batches: its steps. decoder: a video processor or a frame cache.
        experts, tagger, streams: as the processor has them; captions are tagged by the workers.
        sampling, captions_per_video, on_bad_video: as in `TrainPairs`; the next pair replaces one of a bad clip.
    """

    def __init__(
        self,
        clips: StreamedClips,
        batches: StreamBatches,
        decoder,
        experts: list[str],
        tagger,
        streams: dict | None,
        sampling: str,
        captions_per_video: str,
        on_bad_video: str,
    ):
        self.clips, self.batches, self.decoder = clips, batches, decoder
        self.tag = (experts, tagger, streams)
        self.sampling, self.captions_per_video, self.on_bad_video = sampling, captions_per_video, on_bad_video

    def __iter__(self) -> Iterator[tuple[int, Place, list[dict]]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        # The loader begins with its first worker; the reader whose turn it is may be another.
        reader = (number + self.batches.start) % self.batches.workers
        batches = self._batches(reader, self.batches.places[reader])
        for _ in range(number, self.batches.steps, self.batches.workers):
            yield next(batches)

    def _batches(self, reader: int, place: Place) -> Iterator[tuple[int, Place, list[dict]]]:
        pairs = self._pairs(reader, place)
        count = self.batches.pairs_per_step // self.batches.world
        while True:
            items, good = [], 0
            while good < count:
                place, item = next(pairs)
                items.append(item)
                good += item["video"] is not None
                if item["video"] is None and (item.get("end") or self.on_bad_video == "raise"):
                    break  # the trainer stops here
            yield reader, place, items

    def _pairs(self, reader: int, place: Place) -> Iterator[tuple[Place, dict]]:
        """Pair after pair, pass after pass, each with the place behind it."""
        batches, bad = self.batches, {}
        number, readers = batches.rank * batches.workers + reader, batches.world * batches.workers
        epoch, first, block, state, taken = place.epoch, place.shard, place.block, place.state, place.taken
        whole = place == Place()  # whether this pass is seen from its beginning
        while True:
            found, empty = not whole, whole
            order = self._order(number, readers, epoch)
            for position in range(first, len(order)):
                data = self.clips.part(order[position], number, readers)
                if state is not None:
                    data.load_state_dict(state)
                rows = data.iter(batches.block)
                try:
                    while (columns := _next_block(rows)) is not None:
                        empty = False
                        # Seeds, not a generator that goes on: a resumed reader draws the same.
                        seed = hash((batches.seed, number, epoch, position, block)) % 2**63
                        where = f"{order[position]:05d}-{number:03d}-{block:06d}"
                        for pair in self._shuffled(columns, seed, where, taken):
                            taken += 1
                            item = self._load(*pair, bad)
                            found = found or item["video"] is not None
                            yield Place(epoch, position, block, state, taken), item
                        state, block, taken = data.state_dict(), block + 1, 0
                except UserError as error:
                    yield place, _failure(f"shard {order[position]} of the stream: {error}")
                block, state = 0, None
            if empty:
                yield place, _failure(f"{self._part(number, readers)} has no row: lower --num_workers")
            if not found:
                yield place, _failure(f"no clip of {self._part(number, readers)} can be decoded; see bad_videos.jsonl")
            epoch, first, whole = epoch + 1, 0, True

    def _part(self, number: int, readers: int) -> str:
        """What a reader reads, for messages."""
        files = sorted(self._order(number, readers, 0))
        if readers == 1:
            return "the stream"
        part = f"files {files}, counted from 0" if len(files) < self.clips.num_shards else f"1 row in {readers}"
        return f"the part of the stream of worker {number + 1} of {readers} ({part})"

    def _order(self, number: int, readers: int, epoch: int) -> list[int]:
        """The shards that a reader reads in a pass."""
        shards = self.clips.num_shards
        mine = range(number, shards, readers) if shards % readers == 0 else range(shards)
        generator = torch.Generator().manual_seed(hash((self.batches.seed, epoch)) % 2**63)
        return [mine[n] for n in torch.randperm(len(mine), generator=generator)]

    def _shuffled(self, columns: dict, seed: int, where: str, taken: int) -> list[tuple]:
        """The pairs of a block in random order, without the first `taken`: row, its number and name, caption, texts,
        seed."""
        generator = torch.Generator().manual_seed(seed)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        column, pairs = self.clips.caption_column, []
        for n, row in enumerate(rows):
            for name in self.clips.places["window"]:
                check_second(row[name], n, name)
            captions = captions_of(row[column], n, column)
            if self.captions_per_video == "one":
                captions = [captions[int(torch.randint(len(captions), (1,), generator=generator))]]
            pairs += [(row, n, self.clips.name(row, f"{where}-{n:04d}"), caption) for caption in captions]
        order = torch.randperm(len(pairs), generator=generator).tolist()
        seeds = torch.randint(2**31, (len(pairs),), generator=generator).tolist()
        pairs = [(*pairs[n], seeds[n]) for n in order[taken:]]
        texts = caption_streams([caption for _, _, _, caption, _ in pairs], *self.tag) if pairs else []
        return [(*pair, streams) for pair, streams in zip(pairs, texts, strict=True)]

    def _load(self, row: dict, n: int, name: str, caption: str, seed: int, texts: list[str], bad: dict) -> dict:
        """An item as `TrainPairs` has it; `bad` remembers the names of clips that could not be decoded."""
        if name in bad:
            return {"video": None, "bad": []}
        source = _path_of(row[self.clips.places["column"]]) or name
        try:
            clip = self.clips.clip(row, n)
            frames = getattr(self.decoder, "open", self.decoder.decode)(clip, sampling=self.sampling, seed=seed)
        except VideoDecodingError as error:
            bad[name] = True
            return {"video": None, "bad": [BadVideo(0, source, str(error))]}
        except OSError as error:  # a cache cannot be written
            return _failure(str(error))
        damage = note_damage(frames, 0, source)
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        return {"clip": frames, "texts": texts, "text": caption, "video": number, "name": name, "bad": damage}


def _next_block(rows: Iterator[dict]) -> dict | None:
    """The next rows; None after the last. Raises UserError if they cannot be read."""
    try:
        return next(rows, None)
    except Exception as error:  # of a format, a network, a disk: the user needs its message, not a worker's traceback
        raise UserError(f"{type(error).__name__}: {error}") from error


def _failure(message: str) -> dict:
    return {"video": None, "bad": [], "error": message, "end": True}


@dataclass
class StreamCollator:
    """What `StreamPairs` yields -> a batch as of [`PairCollator`], with `names` and `reader`: its number and place."""

    pairs: PairCollator

    def __call__(self, step: tuple[int, Place, list[dict]]) -> dict:
        reader, place, items = step
        names = [item["name"] for item in items if item["video"] is not None]
        return {**self.pairs(items), "names": names, "reader": (reader, place)}
