# SPDX-License-Identifier: Apache-2.0
"""Bring an index up to date with folders of videos: walk, plan, encode, merge.

Notable features:
- incremental: unchanged files keep their rows, changed ones are encoded again;
- an interrupted run continues (shards.py), and until the last rename the index is the one before;
- several processes (`accelerate launch -m camoe_search index …`) encode shards in turn, the first one merges them;
- a file that cannot be read is skipped and listed, whatever the reason.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from modeling_camoe.frames import VideoDecodingError, probe_video

from .bank import QueryBank, bank_of_model, spread
from .encoder import Encoder, process_group
from .errors import SearchError
from .files import VideoFile, content_hash, find_videos, is_unchanged, moments
from .shards import READERS, Moment, Shards
from .store import (
    Description,
    moments_schema,
    read_bank,
    read_description,
    read_moments,
    write_atomically,
    write_index,
    writing,
)


CHANGED = "it changed while it was being read; index again"


@dataclass
class BuildReport:
    """What a build did: numbers of files, except `moments`. Of several processes, the first one's is complete."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    dropped: int = 0
    moments: int = 0  # rows of the index now
    skipped: list[dict] = field(default_factory=list)  # {"path", "cause"}
    not_videos: dict[str, int] = field(default_factory=dict)  # extension -> files passed over
    written: int = 0  # rows sent to Milvus, where the index is there
    deleted: int = 0  # rows taken out of it
    seconds: float = 0.0

    def count(self, encoded: set[str], known: set[str]):
        """Files that were to be encoded and could be, and which of them the index had."""
        self.added, self.changed = len(encoded - known), len(encoded & known)


def update_index(
    paths,
    folder: str | os.PathLike,
    encoder: Encoder,
    *,
    window: float | None = None,
    stride: float | None = None,
    faiss: str | None = None,
    store: str | None = None,
    uri: str | None = None,
    collection: str | None = None,
    queries: list[str] | None = None,
    tau: float | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    prune: bool = False,
    rebuild: bool = False,
    progress: bool = False,
) -> BuildReport:
    """Index the videos under `paths`; an index that is there already is brought up to date.

    Args:
        paths: files and folders.
        folder: of the index.
        encoder: the model.
        window, stride: seconds, see `files.moments`. None: as the index has it, else by length.
        faiss: "flat", "hnsw" or "ivf": kind of the index of vectors. None: as the index has it, else flat.
        store: "faiss", in the folder, or "milvus", at `uri` in `collection`. None: as the index has it, else faiss.
        queries: texts of the query bank. None: as the index has it, else the training captions beside the model.
        tau: temperature of the bank. None: as the index has it, else as the model's evaluation chose.
        batch_size: moments a forward pass. num_workers: processes that decode.
        prune: drop files that no longer exist. rebuild: forget what the index holds. progress: show a bar.

    Raises:
        SearchError: a path does not exist, or the index was made with another model or other settings, or Milvus
            does not answer.
    """
    folder, begin, group = Path(folder), time.perf_counter(), process_group()
    is_first = group.is_main_process
    with writing(folder) if is_first else contextlib.nullcontext():
        before = read_description(folder) if (folder / "index.json").exists() else None
        old = None if rebuild else before
        description = _settings(encoder, old, window, stride, faiss)
        description = dataclasses.replace(description, **_place(old, before, store, uri, collection))
        walk = find_videos(paths)
        rows = _rows_of(folder, old, description)
        new, report = _sort_out(walk.videos, rows)
        report.skipped, report.not_videos = list(walk.skipped), dict(walk.others)
        plan, unreadable = _plan(new, description)
        shards = Shards(folder, description, plan, batch_size)
        shards.encode(encoder, num_workers, progress and is_first, group.process_index, group.num_processes)
        group.wait_for_everyone()
        if is_first:
            shards.encode(encoder, num_workers, progress)  # what another process saw differently
            encoded, undecodable = shards.read(description)
            moving = [video.path for video in new if not is_unchanged(video)]
            changed = [{"path": path, "cause": f"{path}: {CHANGED}"} for path in moving]
            report.skipped += unreadable + undecodable + changed
            gone = [path for path in set(rows["path"].to_pylist()) if prune and not os.path.exists(path)]
            report.dropped = len(gone)

            kept = _without(rows, [video.path for video in new] + gone)
            encoded = _without(encoded, moving)
            merged = pa.concat_tables([kept, encoded])
            report.count(set(encoded["path"].to_pylist()), set(rows["path"].to_pylist()))
            if new or gone or description != old or queries is not None or tau is not None:
                bank = choose_bank(encoder, folder, old, queries, tau)
                description = write_index(folder, description, merged, bank)
            report.written, report.deleted = _publish(folder, description)
            _write_skipped(folder, report.skipped, {video.path for video in walk.videos})
            shutil.rmtree(folder / "shards", ignore_errors=True)
            report.moments = merged.num_rows
    group.wait_for_everyone()  # the others open what the first one wrote
    report.seconds = time.perf_counter() - begin
    return report


def remove_files(folder: str | os.PathLike, paths) -> int:
    """Take files, and all files under folders, out of an index. Returns how many rows went."""
    folder = Path(folder)
    roots = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    with writing(folder):
        description = read_description(folder)
        rows = _rows_of(folder, description, description)
        gone = [
            path
            for path in set(rows["path"].to_pylist())
            if any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
        ]
        kept = _without(rows, gone)
        _publish(folder, write_index(folder, description, kept, read_bank(folder, description)))
    return rows.num_rows - kept.num_rows


def replace_bank(folder: str | os.PathLike, encoder: Encoder, queries: list[str], tau: float | None = None):
    """Give an index another query bank. No video is encoded again."""
    folder = Path(folder)
    with writing(folder):
        description = read_description(folder)
        bank = choose_bank(encoder, folder, description, queries, tau)
        rows = _rows_of(folder, description, description)
        _publish(folder, write_index(folder, description, rows, bank))


def _publish(folder: Path, description: Description) -> tuple[int, int]:
    """Bring Milvus up to date with the folder, if the index is searched there: rows written and deleted.

    Also after a run that changed nothing: an earlier one may have been killed before it came here.
    """
    if description.store != "milvus":
        return 0, 0
    from .milvus_store import MilvusStore

    with contextlib.closing(MilvusStore(description.uri, description.collection)) as store:
        return store.update(description, read_moments(folder, description).data.table)


def choose_bank(encoder, folder, old: Description | None, queries, tau) -> QueryBank | None:
    """The bank that is asked for, else the index's, else the model's; None if there is none."""
    bank = None if old is None else read_bank(folder, old)
    if queries is None and bank is not None:
        return bank if tau is None else dataclasses.replace(bank, tau=tau)
    tau = tau or (None if bank is None else bank.tau)
    if queries is None or tau is None:  # else the model's folder, or the Hub, need not be asked
        texts, model_tau = bank_of_model(encoder.name)
        tau = tau or model_tau
    if queries is not None:
        texts = spread([text for text in queries if text.strip()])
        if not texts:
            raise SearchError("the query bank is empty: give one query per line")
    return QueryBank(texts, encoder.texts(texts), tau) if texts else None


def _settings(encoder: Encoder, old: Description | None, window, stride, faiss) -> Description:
    """What the index is to be. What an old one was made with must stay, or its rows would not compare."""
    video_processor, config = encoder.processor.video_processor, encoder.model.config
    asked = Description(
        model=encoder.name,
        weights=encoder.weights,
        experts=list(config.experts),
        dim=config.projection_dim,
        num_frames=video_processor.num_frames,
        sampling=video_processor.sampling,
        window=window,
        stride=stride,
        faiss=faiss or "flat",
    )
    if old is None:
        return asked
    check_model(encoder, old)
    for name in ("num_frames", "sampling", "window", "stride"):
        before, now = getattr(old, name), getattr(asked, name)
        if now is not None and now != before:
            raise SearchError(
                f"the index was made with {name} {before}, not {now}: leave it out, or index again with --rebuild"
            )
    return dataclasses.replace(old, model=encoder.name, faiss=faiss or old.faiss)


def _place(old: Description | None, before: Description | None, store, uri, collection) -> dict:
    """Where the vectors are searched: what is asked for, else where the index has them.

    `before` is what the folder holds, even if it is forgotten (`old` None): its rows in Milvus stay its own.
    """
    if store is None and old is not None:
        store, uri, collection = old.store, uri or old.uri, collection or old.collection
    if (store or "faiss") == "faiss":
        if uri or collection:
            raise SearchError("a uri and a collection are Milvus's: give --store milvus with them")
        return {"store": "faiss", "uri": None, "collection": None}
    from .milvus_store import COLLECTION

    if uri is None:
        raise SearchError("--store milvus needs --uri: a server's address, or a file name ending in .db")
    uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    source = (before.source if before else "") or uuid.uuid4().hex
    return {"store": store, "uri": uri, "collection": collection or COLLECTION, "source": source}


def check_model(encoder: Encoder, description: Description):
    """
    Raises:
        SearchError: the vectors of the index are another model's.
    """
    if encoder.weights != description.weights:
        raise SearchError(
            f"the index was made with {description.model} (weights {description.weights[:8]}), but {encoder.name} has "
            f"weights {encoder.weights[:8]}: use that model, or index again with --rebuild"
        )


def _rows_of(folder: Path, old: Description | None, description: Description) -> pa.Table:
    schema = moments_schema(description.width, len(description.experts))
    if old is None:
        return schema.empty_table()
    return read_moments(folder, old).data.table.replace_schema_metadata(None).cast(schema)


def _sort_out(videos: list[VideoFile], rows: pa.Table) -> tuple[list[VideoFile], BuildReport]:
    """Files that have to be encoded, and how many are new, changed and unchanged."""
    columns = (rows[name].to_pylist() for name in ("path", "size", "mtime_ns", "content_hash"))
    known = {path: rest for path, *rest in zip(*columns, strict=True)}
    new, report = [], BuildReport()
    for video in videos:
        if video.path not in known:
            report.added += 1
        else:
            size, mtime_ns, digest = known[video.path]
            is_same = size == video.size and (mtime_ns == video.mtime_ns or digest == _hash_or_none(video.path))
            report.unchanged += is_same
            report.changed += not is_same
            if is_same:
                continue
        new.append(video)
    return new, report


def _hash_or_none(path: str) -> str | None:
    try:
        return content_hash(path)
    except OSError:
        return None


def _plan(videos: list[VideoFile], description: Description) -> tuple[list[Moment], list[dict]]:
    """The moments of files, in order, and the files whose header cannot be read."""

    def probe(video):
        try:
            return probe_video(video.path).duration
        except VideoDecodingError as error:
            return error

    plan, unreadable = [], []
    with ThreadPoolExecutor(READERS) as readers:
        for video, duration in zip(videos, readers.map(probe, videos), strict=True):
            if isinstance(duration, VideoDecodingError):
                unreadable.append({"path": video.path, "cause": str(duration)})
                continue
            windows = moments(duration, description.window, description.stride)
            plan += [Moment(video, start, end, is_whole=len(windows) == 1) for start, end in windows]
    return plan, unreadable


def _without(rows: pa.Table, paths: list[str]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["path"], pa.array(paths, pa.string()))))


def _write_skipped(folder: Path, skipped: list[dict], walked: set[str]):
    """skipped.jsonl: this run's, and those of earlier runs about files that this one did not meet."""
    path = folder / "skipped.jsonl"
    earlier = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    about = walked | {entry["path"] for entry in skipped}
    skipped = [entry for entry in earlier if entry["path"] not in about] + skipped
    write_atomically(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
