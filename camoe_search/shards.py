# SPDX-License-Identifier: Apache-2.0
"""Finished batches of a run, kept on disk so that an interrupted run can resume.

The windows to encode are split into shards of BATCHES_PER_SHARD batches. The name of a shard's file is a hash of what
it holds (files, their sizes and times, windows, settings), so that a later run finds exactly the work that is still
valid. Shards are encoded in the same batches again, so that the vectors are the same to the bit.
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


BATCHES_PER_SHARD = 16  # what a kill can lose: with batches of 16, 256 windows
READERS = 8  # threads that read files; they mostly wait for the disk


@dataclass(frozen=True)
class Window:
    """What becomes one row: a whole file or a part of it."""

    video: VideoFile
    start: float  # seconds
    end: float
    is_whole: bool

    @property
    def clip(self) -> Clip:
        return Clip(self.video.path) if self.is_whole else Clip(self.video.path, self.start, self.end)


class Shards:
    """The windows to encode and the finished part of them.

    Args:
        folder: of the index.
        description: of the index: what the vectors depend on.
        windows: all windows to encode.
        batch_size: windows per forward pass.
    """

    def __init__(self, folder: Path, description: Description, windows: list[Window], batch_size: int):
        self.batch_size = batch_size
        size = batch_size * BATCHES_PER_SHARD
        settings = (description.weights, description.num_frames, description.sampling, batch_size)
        self.parts: dict[Path, list[Window]] = {}  # file -> its windows
        for first in range(0, len(windows), size):
            part = windows[first : first + size]
            key = [settings, *((w.video.path, w.video.size, w.video.mtime_ns, w.start, w.end) for w in part)]
            name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
            self.parts[folder / "shards" / f"{name}.safetensors"] = part

    def encode(self, encoder: Encoder, num_workers: int, progress: bool, process: int = 0, num_processes: int = 1):
        """Encode every `num_processes`-th shard, starting at shard `process`, if it is not on disk yet."""
        pending = [path for path in list(self.parts)[process::num_processes] if not path.exists()]
        if not pending:
            return
        pending[0].parent.mkdir(parents=True, exist_ok=True)
        todo = [window for path in pending for window in self.parts[path]]
        batches = iter_encoded_videos(
            encoder.model,
            encoder.processor,
            [window.clip for window in todo],
            batch_size=self.batch_size,
            num_workers=num_workers,
            on_bad_video="skip",
        )
        first, collected, files = 0, [], set()
        with tqdm(total=len(todo), desc="index", unit="moment", disable=not progress) as bar:
            for batch in batches:
                collected.append(batch)
                done = todo[bar.n : bar.n + self.batch_size] if progress else []
                files.update(window.video.path for window in done)
                bar.update(len(done))
                if done:
                    bar.set_postfix_str(_throughput(files, todo[: bar.n], bar.format_dict["elapsed"]))
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


def _throughput(files: set, done: list[Window], seconds: float) -> str:
    hours = sum(window.end - window.start for window in done) / 3600
    return f"{len(files)} files, {hours / max(seconds, 1e-9):.3g} h of video/s"


def _write_shard(path: Path, todo: list[Window], batches: list[VideoBatch]):
    good = [todo[index] for batch in batches for index in batch.indices]
    hashes = _hashes({window.video.path for window in good})
    rows = {
        "path": [window.video.path for window in good],
        "start": [window.start for window in good],
        "end": [window.end for window in good],
        "size": [window.video.size for window in good],
        "mtime_ns": [window.video.mtime_ns for window in good],
        "content_hash": [hashes[window.video.path] for window in good],
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


def _hashes(paths: set[str]) -> dict[str, str | None]:
    """Content hashes, taken while the files are in the system's cache. The merge drops files that just disappeared."""
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(paths, readers.map(content_hash, paths), strict=True))
