# SPDX-License-Identifier: Apache-2.0
"""Bring an index up to date with folders of videos: plan, encode, merge, publish.

Notable features:
- incremental: unchanged files keep their rows, changed files are encoded again;
- an interrupted run resumes (shards.py), and the old index stays in place until the last rename;
- several processes (`accelerate launch -m camoe_search index …`) share the encoding; the main process does the rest;
- a file that cannot be read is skipped and listed, whatever the reason.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from modeling_camoe.frames import VideoDecodingError, probe_video

from .bank import QueryBank, load_model_bank, subsample
from .encoder import Encoder, process_group
from .errors import SearchError
from .files import VideoFile, content_hash, cut_windows, find_videos, is_unchanged
from .shards import READERS, Shards, Window
from .store import (
    Description,
    moments_schema,
    read_bank,
    read_description,
    read_moments,
    write_atomically,
    write_index,
    write_lock,
)


@dataclass(frozen=True)
class IndexOptions:
    """How to index. None keeps what an existing index has; the comments give the default of a new one."""

    window: float | None = None  # seconds; 0: whole files; default: depends on the duration, see `files.cut_windows`
    stride: float | None = None  # seconds from one start to the next; default: half a window
    faiss: str | None = None  # kind of vector index: "flat" (default), "hnsw" or "ivf"
    store: str | None = None  # "faiss", in the folder (default), or "milvus", at `uri` in `collection`
    uri: str | None = None
    collection: str | None = None
    queries: list[str] | None = None  # texts of the query bank; default: the training captions saved with the model
    tau: float | None = None  # temperature of the bank; default: the one that the model's evaluation chose
    batch_size: int = 16  # moments per forward pass
    num_workers: int = 2  # processes that decode
    prune: bool = False  # drop files that no longer exist
    rebuild: bool = False  # ignore what the index holds
    progress: bool = False  # show a progress bar


@dataclass
class UpdateReport:
    """What a run did, in files except where noted. With several processes, only the main one's is complete."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    dropped: int = 0
    moments: int = 0  # rows of the index now
    skipped: list[dict] = field(default_factory=list)  # {"path", "cause"}
    not_videos: dict[str, int] = field(default_factory=dict)  # extension -> number of other files
    written: int = 0  # rows sent to Milvus
    deleted: int = 0  # rows deleted from Milvus
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    old: Description | None  # of the existing index; None if there is none, or it is ignored
    description: Description  # of the index to be
    rows: pa.Table  # the moments of the existing index
    found: list[VideoFile]  # all videos under the paths
    pending: list[VideoFile]  # those that are new or changed
    windows: list[Window]  # of `pending`, to encode
    skipped: list[dict]  # files and folders that cannot be read: {"path", "cause"}
    not_videos: Counter  # extension -> number of files


def update_index(paths, folder: str | os.PathLike, encoder: Encoder, options: IndexOptions) -> UpdateReport:
    """Index the videos under `paths`, or bring an existing index up to date with them.

    Args:
        paths: files and folders.
        folder: of the index.
        encoder: the model.
        options: see [`IndexOptions`].

    Raises:
        SearchError: a path does not exist, the index was made with another model or other settings, or Milvus does
            not answer.
    """
    folder, start, group = Path(folder), time.perf_counter(), process_group()
    with write_lock(folder) if group.is_main_process else contextlib.nullcontext():
        plan = _plan(paths, folder, encoder, options)
        shards = Shards(folder, plan.description, plan.windows, options.batch_size)
        progress = options.progress and group.is_main_process
        shards.encode(encoder, options.num_workers, progress, group.process_index, group.num_processes)
        group.wait_for_everyone()
        report = UpdateReport(unchanged=len(plan.found) - len(plan.pending), not_videos=dict(plan.not_videos))
        if group.is_main_process:
            # Anything still missing: another process may have found other files.
            shards.encode(encoder, options.num_workers, progress)
            rows = _merge(plan, shards, options.prune, report)
            _publish(plan, folder, encoder, options, rows, report)
            shutil.rmtree(folder / "shards", ignore_errors=True)
    group.wait_for_everyone()  # the other processes open what the main one wrote
    report.seconds = time.perf_counter() - start
    return report


def remove_files(folder: str | os.PathLike, paths) -> int:
    """Remove files, and all files under folders, from an index. Returns the number of rows removed."""
    folder = Path(folder)
    roots = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    with write_lock(folder):
        description = read_description(folder)
        rows = _read_rows(folder, description, description)
        removed = [
            path
            for path in set(rows["path"].to_pylist())
            if any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
        ]
        kept = _without(rows, removed)
        _sync_milvus(folder, write_index(folder, description, kept, read_bank(folder, description)))
    return rows.num_rows - kept.num_rows


def replace_bank(folder: str | os.PathLike, encoder: Encoder, queries: list[str], tau: float | None = None):
    """Give an index another query bank. No video is encoded again."""
    folder = Path(folder)
    with write_lock(folder):
        description = read_description(folder)
        bank = _choose_bank(encoder, folder, description, queries, tau)
        rows = _read_rows(folder, description, description)
        _sync_milvus(folder, write_index(folder, description, rows, bank))


def check_model(encoder: Encoder, description: Description):
    """
    Raises:
        SearchError: the model is not the one that made the index.
    """
    if encoder.weights != description.weights:
        raise SearchError(
            f"the index was made with {description.model} (weights {description.weights[:8]}), "
            f"but {encoder.name} has weights {encoder.weights[:8]}: use that model, or index again with --rebuild"
        )


# --- plan ------------------------------------------------------------------------------------------------------------


def _plan(paths, folder: Path, encoder: Encoder, options: IndexOptions) -> Plan:
    """Find the files and decide what has to be encoded."""
    existing = read_description(folder) if (folder / "index.json").exists() else None
    old = None if options.rebuild else existing
    description = _model_settings(encoder, old, options)
    description = dataclasses.replace(description, **_store_settings(options, old, existing))
    scan = find_videos(paths)
    rows = _read_rows(folder, old, description)
    pending = _new_or_changed(scan.videos, rows)
    windows, unreadable = _windows(pending, description)
    return Plan(
        old, description, rows, scan.videos, pending, windows, [*scan.skipped, *unreadable], scan.other_extensions
    )


def _model_settings(encoder: Encoder, old: Description | None, options: IndexOptions) -> Description:
    """How vectors are made. An existing index keeps its settings, or its rows would not be comparable."""
    video_processor, config = encoder.processor.video_processor, encoder.model.config
    wanted = Description(
        model=encoder.name,
        weights=encoder.weights,
        experts=list(config.experts),
        dim=config.projection_dim,
        num_frames=video_processor.num_frames,
        sampling=video_processor.sampling,
        window=options.window,
        stride=options.stride,
        faiss=options.faiss or "flat",
    )
    if old is None:
        return wanted
    check_model(encoder, old)
    for name in ("num_frames", "sampling", "window", "stride"):
        before, now = getattr(old, name), getattr(wanted, name)
        if now is not None and now != before:
            raise SearchError(
                f"the index was made with {name} {before}, not {now}: leave it out, or index again with --rebuild"
            )
    return dataclasses.replace(old, model=encoder.name, faiss=options.faiss or old.faiss)


def _store_settings(options: IndexOptions, old: Description | None, existing: Description | None) -> dict:
    """Where the vectors are searched.

    `existing` is what the folder holds even when it is ignored (`old` None): its rows in Milvus stay its own.
    """
    store, uri, collection = options.store, options.uri, options.collection
    if store is None and old is not None:
        store, uri, collection = old.store, uri or old.uri, collection or old.collection
    if (store or "faiss") == "faiss":
        if uri or collection:
            raise SearchError("a uri and a collection are for Milvus: give --store milvus with them")
        return {"store": "faiss", "uri": None, "collection": None}
    from .milvus_store import DEFAULT_COLLECTION

    if uri is None:
        raise SearchError("--store milvus needs --uri: a server's address, or a file name ending in .db")
    uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    source = (existing.source if existing else "") or uuid.uuid4().hex
    return {"store": store, "uri": uri, "collection": collection or DEFAULT_COLLECTION, "source": source}


def _new_or_changed(videos: list[VideoFile], rows: pa.Table) -> list[VideoFile]:
    """Files without rows of their present content. If only the time differs, the content hash decides."""
    columns = (rows[name].to_pylist() for name in ("path", "size", "mtime_ns", "content_hash"))
    known = {path: rest for path, *rest in zip(*columns, strict=True)}

    def is_known(video: VideoFile) -> bool:
        if video.path not in known:
            return False
        size, mtime_ns, digest = known[video.path]
        return size == video.size and (mtime_ns == video.mtime_ns or digest == content_hash(video.path))

    return [video for video in videos if not is_known(video)]


def _windows(videos: list[VideoFile], description: Description) -> tuple[list[Window], list[dict]]:
    """The windows of files, in order, and the files whose header cannot be read."""

    def probe(video: VideoFile) -> float | VideoDecodingError:
        try:
            return probe_video(video.path).duration
        except VideoDecodingError as error:
            return error

    windows, unreadable = [], []
    with ThreadPoolExecutor(READERS) as readers:
        for video, duration in zip(videos, readers.map(probe, videos), strict=True):
            if isinstance(duration, VideoDecodingError):
                unreadable.append({"path": video.path, "cause": str(duration)})
                continue
            times = cut_windows(duration, description.window, description.stride)
            windows += [Window(video, start, end, is_whole=len(times) == 1) for start, end in times]
    return windows, unreadable


# --- merge -----------------------------------------------------------------------------------------------------------


def _merge(plan: Plan, shards: Shards, prune: bool, report: UpdateReport) -> pa.Table:
    """The moments of the index to be: the rows that stay, and the encoded ones."""
    encoded, undecodable = shards.read(plan.description)
    modified = [video.path for video in plan.pending if not is_unchanged(video)]
    cause = "it changed while it was being read; index again"
    report.skipped = plan.skipped + undecodable + [{"path": path, "cause": f"{path}: {cause}"} for path in modified]
    known = set(plan.rows["path"].to_pylist())
    dropped = [path for path in known if prune and not os.path.exists(path)]
    kept = _without(plan.rows, [video.path for video in plan.pending] + dropped)
    encoded = _without(encoded, modified)
    encoded_paths = set(encoded["path"].to_pylist())
    report.added, report.changed = len(encoded_paths - known), len(encoded_paths & known)
    report.dropped = len(dropped)
    return pa.concat_tables([kept, encoded])


def _read_rows(folder: Path, old: Description | None, description: Description) -> pa.Table:
    schema = moments_schema(description.width, len(description.experts))
    if old is None:
        return schema.empty_table()
    return read_moments(folder, old).data.table.replace_schema_metadata(None).cast(schema)


def _without(rows: pa.Table, paths: list[str]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["path"], pa.array(paths, pa.string()))))


# --- publish ---------------------------------------------------------------------------------------------------------


def _publish(plan: Plan, folder: Path, encoder: Encoder, options: IndexOptions, rows: pa.Table, report: UpdateReport):
    """Replace the index if anything changed, and update Milvus and the list of skipped files."""
    description = plan.description
    has_new_bank = options.queries is not None or options.tau is not None
    if plan.pending or report.dropped or description != plan.old or has_new_bank:
        bank = _choose_bank(encoder, folder, plan.old, options.queries, options.tau)
        description = write_index(folder, description, rows, bank)
    report.moments = rows.num_rows
    report.written, report.deleted = _sync_milvus(folder, description)
    _write_skipped(folder, report.skipped, {video.path for video in plan.found})


def _choose_bank(encoder: Encoder, folder: Path, old: Description | None, queries, tau) -> QueryBank | None:
    """The requested query bank, or the index's, or the model's; None if there is none."""
    bank = None if old is None else read_bank(folder, old)
    if queries is None and bank is not None:
        return bank if tau is None else dataclasses.replace(bank, tau=tau)
    tau = tau or (None if bank is None else bank.tau)
    if queries is None or tau is None:  # otherwise there is no need to look beside the model, perhaps on the Hub
        texts, model_tau = load_model_bank(encoder.name)
        tau = tau or model_tau
    if queries is not None:
        texts = subsample([text for text in queries if text.strip()])
        if not texts:
            raise SearchError("the query bank is empty: give one query per line")
    return QueryBank(texts, encoder.encode_texts(texts), tau) if texts else None


def _sync_milvus(folder: Path, description: Description) -> tuple[int, int]:
    """Make the rows in Milvus equal to the folder's, if the index is searched there: rows written, rows deleted.

    Also after a run that changed nothing: an earlier run may have been killed before it came here.
    """
    if description.store != "milvus":
        return 0, 0
    from .milvus_store import MilvusStore

    with contextlib.closing(MilvusStore(description.uri, description.collection)) as store:
        return store.update(description, read_moments(folder, description).data.table)


def _write_skipped(folder: Path, skipped: list[dict], found: set[str]):
    """skipped.jsonl: the files of this run, and those of earlier runs that this one did not look at."""
    path = folder / "skipped.jsonl"
    earlier = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    seen = found | {entry["path"] for entry in skipped}
    skipped = [entry for entry in earlier if entry["path"] not in seen] + skipped
    write_atomically(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
