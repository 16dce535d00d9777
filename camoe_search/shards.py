# SPDX-License-Identifier: Apache-2.0
"""Finished batches of a build, kept on disk so that an interrupted build continues.

The plan of a build, a list of moments, is cut into shards of BATCHES_A_SHARD batches. A shard's file is named after
what is in it (files, their sizes and times, windows, settings), so that a later run finds exactly the work that is
still good; and whole shards are cut into the same batches again, so that the vectors are the same to the bit.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from modeling_camoe.encode import VideoBatch, iter_encoded_videos
from modeling_camoe.frames import Clip

from .encoder import Encoder
from .files import VideoFile, content_hash
from .store import Description, moments_table


BATCHES_A_SHARD = 16  # what a kill can cost: with batches of 16, 256 moments
READERS = 8  # threads that read files: they wait for the disk


@dataclass(frozen=True)
class Moment:
    """What becomes one row: a whole file or a window of it."""

    video: VideoFile
    start: float  # seconds
    end: float
    is_whole: bool

    @property
    def clip(self) -> Clip:
        return Clip(self.video.path) if self.is_whole else Clip(self.video.path, self.start, self.end)


class Shards:
    """The plan of a build and its finished part.

    Args:
        folder: of the index.
        description: of the index, as far as it decides about the vectors.
        plan: all moments to encode.
        batch_size: moments a forward pass.
    """

    def __init__(self, folder: Path, description: Description, plan: list[Moment], batch_size: int):
        self.batch_size = batch_size
        size = batch_size * BATCHES_A_SHARD
        settings = (description.weights, description.num_frames, description.sampling, batch_size)
        self.parts: dict[Path, list[Moment]] = {}  # file -> its moments
        for first in range(0, len(plan), size):
            part = plan[first : first + size]
            key = [settings, *((m.video.path, m.video.size, m.video.mtime_ns, m.start, m.end) for m in part)]
            name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
            self.parts[folder / "shards" / f"{name}.safetensors"] = part

    def encode(self, encoder: Encoder, num_workers: int, progress: bool, process: int = 0, num_processes: int = 1):
        """Encode what is not on disk yet of every `num_processes`-th shard from `process` on."""
        pending = [path for path in list(self.parts)[process::num_processes] if not path.exists()]
        if not pending:
            return
        pending[0].parent.mkdir(parents=True, exist_ok=True)
        todo = [moment for path in pending for moment in self.parts[path]]
        batches = iter_encoded_videos(
            encoder.model,
            encoder.processor,
            [moment.clip for moment in todo],
            batch_size=self.batch_size,
            num_workers=num_workers,
            on_bad_video="skip",
        )
        first, collected, files = 0, [], set()
        with tqdm(total=len(todo), desc="index", unit="moment", disable=not progress) as bar:
            for batch in batches:
                collected.append(batch)
                done = todo[bar.n : bar.n + self.batch_size] if progress else []
                files.update(moment.video.path for moment in done)
                bar.update(len(done))
                if done:
                    bar.set_postfix_str(_pace(files, todo[: bar.n], bar.format_dict["elapsed"]))
                end = first + len(self.parts[pending[0]])
                if sum(len(b.indices) + len(b.bad) for b in collected) == end - first:
                    _write_shard(pending.pop(0), todo, collected)
                    first, collected = end, []

    def read(self, description: Description) -> tuple[pa.Table, list[dict]]:
        """Rows of all shards, and what could not be decoded as {"path", "start", "end", "cause"}."""
        rows = {name: [] for name in ("path", "start", "end", "size", "mtime_ns", "content_hash")}
        vectors, gates, bad = [torch.empty(0, description.width)], [torch.empty(0, len(description.experts))], []
        for path in self.parts:
            with safe_open(path, "pt") as file:
                vectors.append(file.get_tensor("vector"))
                gates.append(file.get_tensor("gate_weights"))
                metadata = file.metadata()
            bad += json.loads(metadata["bad"])
            for name, values in json.loads(metadata["rows"]).items():
                rows[name] += values
        return moments_table(rows, torch.cat(vectors).numpy(), torch.cat(gates).numpy()), bad


def _pace(files: set, done: list[Moment], seconds: float) -> str:
    hours = sum(moment.end - moment.start for moment in done) / 3600
    return f"{len(files)} files, {hours / max(seconds, 1e-9):.3g} h of video/s"


def _write_shard(path: Path, todo: list[Moment], batches: list[VideoBatch]):
    good = [todo[index] for batch in batches for index in batch.indices]
    hashes = _hashes({moment.video.path for moment in good})
    rows = {
        "path": [moment.video.path for moment in good],
        "start": [moment.start for moment in good],
        "end": [moment.end for moment in good],
        "size": [moment.video.size for moment in good],
        "mtime_ns": [moment.video.mtime_ns for moment in good],
        "content_hash": [hashes[moment.video.path] for moment in good],
    }
    bad = [
        {"path": entry.source, "start": todo[entry.index].start, "end": todo[entry.index].end, "cause": entry.cause}
        for batch in batches
        for entry in batch.bad
    ]
    tensors = {
        "vector": torch.cat([batch.vectors for batch in batches]),
        "gate_weights": torch.cat([batch.gate_weights for batch in batches]),
    }
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, temporary, metadata={"rows": json.dumps(rows), "bad": json.dumps(bad)})
    os.replace(temporary, path)


def _hashes(paths: set[str]) -> dict[str, str]:
    """Now, while the files are in the system's cache. One that has just gone gets none: the build drops it."""

    def hash_or_none(path):
        try:
            return content_hash(path)
        except OSError:
            return ""

    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(paths, readers.map(hash_or_none, paths), strict=True))
