# SPDX-License-Identifier: Apache-2.0
"""Bring an index up to date with folders of videos: scan, register, encode.

Notable features:
- everything that is done is committed batch by batch, and can be searched from then on; a kill loses the batch in
  flight, and the next run goes on, whatever else was added, removed or set differently;
- what a file holds is encoded once: a renamed, moved or copied file, or a moved library, costs its hash;
- batches are consecutive windows in the order in which they were registered, so that a resumed run forms the same ones
  and makes the same vectors, to the bit;
- several processes (`accelerate launch -m camoe_search index …`) share the encoding; the main process does the rest;
- a file that cannot be read is listed with the cause, and tried again when it changes or on demand.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from modeling_camoe.frames import ON_DAMAGE, Clip, VideoDecodingError, probe_video

from .approximate import delete_caches
from .bank import QueryBank, load_model_bank, subsample
from .database import (
    Description,
    connect,
    create,
    exists,
    read_description,
    transaction,
    write_description,
    write_lock,
)
from .encoder import Encoder, process_group
from .errors import SearchError
from .files import Scan, VideoFile, absolute, content_hash, cut_windows, find_videos, is_inside, is_unchanged
from .remove import KNOWN, open_copy, skipped_files
from .shots import check_shots, cut_at_shots, find_shots
from .sidecars import refresh_pictures, refresh_sidecars
from .text_encoder import export_text_encoder, exported_weights
from .writer import IndexWriter


READERS = 8  # threads that read files; they mostly wait for the disk
REGISTER_BATCH = 64  # files whose hashes are committed together


@dataclass(frozen=True)
class IndexOptions:
    """How to index. None keeps what an existing index has; the comments give the default of a new one."""

    windows: str | None = None  # what cuts a video: "time" (default) or "shots", which needs the extra `shots`
    window: float | None = None  # seconds; 0: whole files; default: depends on the duration, see `files.cut_windows`
    stride: float | None = None  # seconds from one start to the next; default: half a window
    dtype: str | None = None  # of the stored vectors: "float32" (default) or "float16"
    exclude: Sequence[str] | None = None  # patterns of files and folders to leave out; default: none
    on_damage: str | None = None  # "error" (default), or "around": frames of damaged files from around the damage
    queries: list[str] | None = None  # texts of the query bank; default: the training captions saved with the model
    tau: float | None = None  # temperature of the bank; default: the one that the model's evaluation chose
    milvus: dict | None = None  # settings of a collection that holds a copy, see milvus_store.py; default: none
    batch_size: int = 16  # moments per forward pass
    num_workers: int = 2  # processes that decode
    prune: bool = False  # remove files that are no longer there
    retry: bool = False  # read files again that could not be read
    rebuild: bool = False  # empty the index first
    text_encoder: bool = True  # export the text tower, for searches that need no torch
    progress: bool = False  # show progress bars


@dataclass
class UpdateReport:
    """What a run did, in files except where noted. With several processes, only the main one's is complete."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    dropped: int = 0
    encoded: int = 0  # moments
    damaged: int = 0  # moments whose frames were taken around damage
    moments: int = 0  # of the index now
    skipped: list[dict] = field(default_factory=list)  # {"path", "cause"}
    not_videos: dict[str, int] = field(default_factory=dict)  # extension -> number of other files
    written: int = 0  # rows sent to Milvus
    deleted: int = 0  # rows deleted from Milvus
    text_encoder: str = ""  # why the text tower could not be exported
    seconds: float = 0.0


def update_index(paths, folder: str | os.PathLike, encoder: Encoder, options: IndexOptions) -> UpdateReport:
    """Index the videos under `paths`, or bring an existing index up to date with them.

    Args:
        paths: files and folders; none: all folders that the index knows.
        folder: of the index.
        encoder: the model.
        options: see [`IndexOptions`].

    Raises:
        SearchError: a path does not exist, the index was made with another model or other settings, or Milvus does
            not answer.
    """
    folder, begin, group = Path(folder), time.perf_counter(), process_group()
    report, progress = UpdateReport(), options.progress and group.is_main_process
    with write_lock(folder) if group.is_main_process else contextlib.nullcontext():
        if group.is_main_process:
            _prepare(folder, encoder, options)
            with IndexWriter(folder) as writer:
                with open_copy(writer) as store:
                    if store is not None:
                        store.prepare(writer.description)  # what does not fit is said before anything is encoded
                scan = _scan(writer, paths, options)
                registered = _register(writer, scan, options, report, progress)
                refresh_pictures(writer)
                refresh_sidecars(writer, scan.paths)
        group.wait_for_everyone()
        with IndexWriter(folder, group.process_index) as writer:
            _encode(writer, encoder, options, report, progress, group.process_index, group.num_processes)
        group.wait_for_everyone()
        if group.is_main_process:
            with IndexWriter(folder) as writer:
                # Anything still missing: another process may have been killed.
                _encode(writer, encoder, options, report, progress)
                _finish(writer, encoder, options, scan, registered, report)
    group.wait_for_everyone()  # the other processes open what the main one wrote
    report.seconds = time.perf_counter() - begin
    return report


def replace_bank(folder: str | os.PathLike, encoder: Encoder, queries: list[str], tau: float | None = None):
    """Give an index another query bank. No video is encoded again."""
    folder = Path(folder)
    with write_lock(folder), IndexWriter(folder) as writer, open_copy(writer) as store:
        writer.set_bank(choose_bank(encoder, writer.bank, queries, tau))
        writer.tidy()
        if store is not None:
            store.update(writer)


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


# --- the index itself ------------------------------------------------------------------------------------------------


def _prepare(folder: Path, encoder: Encoder, options: IndexOptions):
    """Make the index if there is none, or check that the settings are its own."""
    if options.milvus is not None:
        from .milvus_store import MilvusStore

        MilvusStore(options.milvus["uri"], options.milvus["collection"]).close()  # it answers
    if exists(folder) and not options.rebuild:
        with contextlib.closing(connect(folder, write=True)) as connection:
            old = read_description(connection)
            description = _settings(encoder, old, options)
            if description != old:
                with transaction(connection):
                    write_description(connection, description)
                    if old.milvus is not None and description.milvus["id"] != old.milvus["id"]:
                        connection.execute("DELETE FROM sent")  # another collection, or another name in it
        if options.queries is not None or options.tau is not None:
            with IndexWriter(folder) as writer:
                writer.set_bank(choose_bank(encoder, writer.bank, options.queries, options.tau))
        return
    if not exists(folder) and not options.rebuild and (folder / "index.json").is_file():
        connect(folder)  # of an earlier version: says what to do
    bank = choose_bank(encoder, None, options.queries, options.tau)
    description = _settings(encoder, None, options)
    if exists(folder):
        with contextlib.closing(connect(folder)) as connection:
            old = read_description(connection)  # its rows in Milvus stay its own
        description = dataclasses.replace(description, milvus=_copy_settings(options, old))
        _empty(folder, description)
    else:
        create(folder, description)
        _delete_earlier_version(folder)
    with IndexWriter(folder) as writer:
        writer.set_bank(bank)


def _settings(encoder: Encoder, old: Description | None, options: IndexOptions) -> Description:
    """How vectors are made. An existing index keeps its settings, or its rows would not be comparable."""
    wanted = Description(
        model=encoder.name,
        weights=encoder.weights,
        experts=list(encoder.experts),
        dim=encoder.dim,
        num_frames=encoder.num_frames,
        sampling=encoder.sampling,
        windows=options.windows or "time",
        on_damage=options.on_damage or "error",
        window=options.window,
        stride=options.stride,
        dtype=options.dtype or "float32",
        exclude=list(options.exclude or ()),
        milvus=_copy_settings(options, old),
    )
    if wanted.dtype not in ("float32", "float16"):
        raise SearchError(f"dtype is {wanted.dtype!r}: choose float32 or float16")
    if wanted.windows not in ("time", "shots"):
        raise SearchError(f"windows is {wanted.windows!r}: choose time or shots")
    if "shots" in (wanted.windows, old and old.windows):
        check_shots()
    if wanted.on_damage not in ON_DAMAGE:
        raise SearchError(f"on_damage is {wanted.on_damage!r}: choose {' or '.join(ON_DAMAGE)}")
    if old is None:
        return wanted
    check_model(encoder, old)
    for name in ("num_frames", "sampling", "windows", "window", "stride", "dtype"):
        before, now = getattr(old, name), getattr(wanted, name)
        is_default = name in ("windows", "dtype") and getattr(options, name) is None
        if now is not None and now != before and not is_default:
            raise SearchError(
                f"the index was made with {name} {before}, not {now}: leave it out, or index again with --rebuild"
            )
    return dataclasses.replace(
        old,
        model=encoder.name,
        on_damage=options.on_damage or old.on_damage,
        exclude=old.exclude if options.exclude is None else list(options.exclude),
        milvus=wanted.milvus,
    )


def _copy_settings(options: IndexOptions, old: Description | None) -> dict | None:
    """Where Milvus holds a copy, None if nowhere."""
    if options.milvus is None:
        return None if old is None else old.milvus
    from .milvus_collection import with_id

    return with_id(options.milvus, None if old is None else old.milvus)


def _empty(folder: Path, description: Description):
    """Remove everything from an index, and give it new settings. Numbers of segments are not used again."""
    with contextlib.closing(connect(folder, write=True)) as connection, transaction(connection):
        # `sent` stays: the next synchronisation deletes in Milvus what the index no longer has.
        for table in ("bias", "bank", "windows", "files", "contents", "roots", "segments"):
            connection.execute(f"DELETE FROM {table}")
        write_description(connection, description)


def _delete_earlier_version(folder: Path):
    for path in [*folder.glob("generation-*"), folder / "shards"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("index.json", "skipped.jsonl"):
        (folder / name).unlink(missing_ok=True)


def choose_bank(encoder: Encoder, old: QueryBank | None, queries, tau: float | None) -> QueryBank | None:
    """The requested query bank, or the index's with another temperature, or the model's; None if there is none."""
    if queries is None and old is not None:
        return dataclasses.replace(old, tau=tau or old.tau)
    tau = tau or (None if old is None else old.tau)
    if queries is None or tau is None:  # otherwise there is no need to look beside the model, perhaps on the Hub
        texts, model_tau = load_model_bank(encoder.name)
        tau = tau or model_tau
    if queries is not None:
        texts = subsample([text for text in queries if text.strip()])
        if not texts:
            raise SearchError("the query bank is empty: give one query per line")
    return QueryBank(texts, encoder.encode_texts(texts), tau) if texts else None


# --- files -----------------------------------------------------------------------------------------------------------


class _Registered(NamedTuple):
    """Ids of files that this run added or that have changed."""

    added: list[int]
    changed: list[int]


def _scan(writer: IndexWriter, paths, options: IndexOptions) -> Scan:
    """The videos under the paths; the folders among them become roots of the index."""
    roots = [path for (path,) in writer.connection.execute("SELECT path FROM roots ORDER BY id")]
    paths = [absolute(path) for path in paths] or roots
    if not paths:
        raise SearchError("give folders or files of videos: the index knows none yet")
    scan = find_videos(paths, writer.description.exclude)
    folders = [path for path in paths if os.path.isdir(path)]
    alone = [v.path for v in scan.videos if not any(is_inside(v.path, root) for root in [*folders, *roots])]
    if alone:
        folders.append(os.path.dirname(alone[0]) if len(alone) == 1 else os.path.commonpath(alone))
    with transaction(writer.connection) as connection:
        connection.executemany("INSERT OR IGNORE INTO roots(path) VALUES(?)", [(path,) for path in folders])
    if options.prune:
        _check_mounted(writer, paths, scan)
    return dataclasses.replace(scan, paths=paths)


def _check_mounted(writer: IndexWriter, paths: list[str], scan: Scan):
    """
    Raises:
        SearchError: a folder that had videos has none at all.
    """
    known = [path for path, *_ in writer.connection.execute(KNOWN)]
    for folder in paths:
        had = sum(is_inside(path, folder) for path in known)
        if had and not any(is_inside(video.path, folder) for video in scan.videos):
            raise SearchError(
                f"{folder} has no video now, and had {had}: is it mounted? To remove them all: `camoe remove {folder}`"
            )


def _register(
    writer: IndexWriter, scan: Scan, options: IndexOptions, report: UpdateReport, progress: bool
) -> _Registered:
    """Note all files, and the windows of those whose content is new."""
    known = {path: rest for path, *rest in writer.connection.execute(KNOWN)}
    registered = _Registered([], [])
    if options.retry:
        with transaction(writer.connection) as connection:
            connection.execute("UPDATE windows SET cause = NULL WHERE cause IS NOT NULL")

    def is_known(video: VideoFile) -> bool:
        if video.path not in known:
            return False
        _, size, mtime_ns, _, cause = known[video.path]
        return (size, mtime_ns) == (video.size, video.mtime_ns) and not (cause and options.retry)

    pending = [video for video in scan.videos if not is_known(video)]
    pending = _follow_moved_roots(writer, pending, known, report)
    followed = report.moved
    examined = _examine(writer, pending, options.retry)
    with tqdm(total=len(pending), desc="read", unit="file", disable=not progress or not pending) as bar:
        for first in range(0, len(pending), REGISTER_BATCH):
            part = [(video, next(examined)) for video in pending[first : first + REGISTER_BATCH]]
            with transaction(writer.connection) as connection:
                roots = dict(connection.execute("SELECT path, id FROM roots").fetchall())
                for video, content in part:
                    _note(writer, roots, video, content, known.get(video.path), registered, report)
            bar.update(len(part))
    report.unchanged += len(scan.videos) - len(pending) - followed
    report.not_videos = dict(scan.other_extensions)
    if options.prune:
        found = {video.path for video in scan.videos}
        here = writer.connection.execute(KNOWN).fetchall()
        gone = [
            file
            for path, file, *_ in here
            if path not in found and any(is_inside(path, folder) for folder in scan.paths)
        ]
        report.dropped = len(gone)
        writer.remove_files(gone)
    return registered


def _follow_moved_roots(writer: IndexWriter, pending: list[VideoFile], known: dict, report: UpdateReport):
    """Files that have their old relative path, size and time under another root, whose folder has gone, are the same.

    Returns the others. So a moved library costs nothing but this look.
    """
    roots = dict(writer.connection.execute("SELECT path, id FROM roots").fetchall())
    gone = {id: path for path, id in roots.items() if not os.path.isdir(path)}
    if not gone:
        return pending
    lost = {}
    for file, root, path, size, mtime_ns in writer.connection.execute(
        "SELECT id, root, path, size, mtime_ns FROM files WHERE cause IS NULL"
    ):
        if root in gone:
            lost[path, size, mtime_ns] = file
    rest = []
    with transaction(writer.connection) as connection:
        for video in pending:
            root, path = _relative_to_root(roots, video.path)
            file = lost.pop((path, video.size, video.mtime_ns), None) if video.path not in known else None
            if file is None:
                rest.append(video)
                continue
            connection.execute("UPDATE files SET root = ?, path = ? WHERE id = ?", (root, path, file))
            report.moved += 1
        connection.executemany(
            "DELETE FROM roots WHERE id = ? AND id NOT IN (SELECT root FROM files)", [(id,) for id in gone]
        )
    return rest


def _relative_to_root(roots: dict[str, int], path: str) -> tuple[int, str]:
    """The root of a file, the innermost one, and its path from there."""
    root = max((root for root in roots if is_inside(path, root)), key=len)
    return roots[root], os.path.relpath(path, root)


class _Content(NamedTuple):
    """What is in a file: its hash and duration, or the cause why it cannot be read."""

    hash: str | None
    duration: float | None
    cause: str | None
    picture: tuple[int, int] | None = None  # width, height
    shots: list[float] | None = None  # seconds at which shots begin, if windows are cut there


def _examine(writer: IndexWriter, videos: list[VideoFile], retry: bool) -> Iterator[_Content]:
    """Hash files, and probe those whose content is new, in order; threads read ahead."""
    condition = " WHERE cause IS NULL" if retry else ""
    hashes = {hash for (hash,) in writer.connection.execute("SELECT hash FROM contents" + condition)}

    def examine(video: VideoFile) -> _Content:
        try:
            digest = content_hash(video.path)
        except OSError as error:
            return _Content(None, None, f"{video.path}: {error.strerror}")
        return _Content(digest, None, None) if digest in hashes else _probe(video, digest, writer.description)

    with ThreadPoolExecutor(READERS) as readers:
        for first in range(0, len(videos), REGISTER_BATCH):  # a few at a time: an error must not wait for all
            yield from readers.map(examine, videos[first : first + REGISTER_BATCH])


def _probe(video: VideoFile, digest: str, description: Description) -> _Content:
    try:
        info = probe_video(video.path)
        shots = find_shots(video.path) if description.windows == "shots" else None
    except VideoDecodingError as error:
        return _Content(digest, None, str(error))
    return _Content(digest, info.duration, None, (info.width, info.height), shots)


def _note(
    writer: IndexWriter, roots: dict[str, int], video: VideoFile, found: _Content, known: list | None,
    registered: _Registered, report: UpdateReport,
):  # fmt: skip
    """Write down what is in a new or changed file; inside a transaction."""
    connection = writer.connection
    if found.hash is not None and found.duration is None and found.cause is None:
        if not connection.execute("SELECT 1 FROM contents WHERE hash = ?", (found.hash,)).fetchone():
            # The index knew this content by another file, which this run has found to hold something else now.
            found = _probe(video, found.hash, writer.description)
    content = None if found.hash is None else _content_id(connection, found, writer.description)
    cause = found.cause if content is None else None
    if known is not None:
        file, _, _, old, _ = known
        writer.change_content(file, content, video.size, video.mtime_ns, cause)
        if old == content:
            report.unchanged += 1
        else:
            registered.changed.append(file)
        return
    values = (*_relative_to_root(roots, video.path), video.size, video.mtime_ns, content, cause)
    moved = _moved_file(connection, content)
    if moved is None:
        file = connection.execute(
            "INSERT INTO files(root, path, size, mtime_ns, content, cause) VALUES(?, ?, ?, ?, ?, ?)", values
        ).lastrowid
        registered.added.append(file)
    else:
        connection.execute(
            "UPDATE files SET root = ?, path = ?, size = ?, mtime_ns = ?, content = ?, cause = ? WHERE id = ?",
            (*values, moved),
        )
        report.moved += 1


def _content_id(connection, found: _Content, description: Description) -> int:
    """The content with a hash; a new one with its windows."""
    row = connection.execute("SELECT id, cause FROM contents WHERE hash = ?", (found.hash,)).fetchone()
    if row is not None and not (row[1] and found.duration is not None):
        return row[0]
    if row is not None:  # it could not be read before
        content = row[0]
        connection.execute("UPDATE contents SET duration = ?, cause = NULL WHERE id = ?", (found.duration, content))
    else:
        content = connection.execute(
            "INSERT INTO contents(hash, duration, cause) VALUES(?, ?, ?)", (found.hash, found.duration, found.cause)
        ).lastrowid
    if found.picture is not None:
        connection.execute("INSERT OR REPLACE INTO pictures VALUES(?, ?, ?)", (content, *found.picture))
    if found.duration is not None:
        if found.shots is None:
            times = cut_windows(found.duration, description.window, description.stride)
        else:
            times = cut_at_shots(found.duration, found.shots, description.window, description.stride)
        connection.executemany(
            "INSERT INTO windows(content, number, start, end, whole) VALUES(?, ?, ?, ?, ?)",
            [(content, number, start, end, len(times) == 1) for number, (start, end) in enumerate(times)],
        )
    return content


def _moved_file(connection, content: int | None) -> int | None:
    """A file that held this content and is no longer where it was."""
    if content is None:
        return None
    files = connection.execute(
        "SELECT files.id, roots.path, files.path FROM files JOIN roots ON roots.id = root WHERE content = ?",
        (content,),
    )
    return next((file for file, root, path in files if not os.path.exists(os.path.join(root, path))), None)


# --- encoding --------------------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """A window to encode, in one of the files that hold it."""

    id: int
    start: float  # seconds
    end: float
    whole: bool
    content: int
    file: int
    video: VideoFile

    @property
    def clip(self) -> Clip:
        return Clip(self.video.path) if self.whole else Clip(self.video.path, self.start, self.end)


def _pending(writer: IndexWriter) -> list[_Window]:
    """All windows without a vector whose file is there, in order."""
    rows = writer.connection.execute(
        "SELECT windows.id, start, end, whole, windows.content, files.id, roots.path, files.path, size, mtime_ns "
        "FROM windows JOIN files ON files.content = windows.content JOIN roots ON roots.id = files.root "
        "WHERE row IS NULL AND windows.cause IS NULL ORDER BY windows.id, files.id"
    )
    there, windows = {}, {}
    for id, start, end, whole, content, file, root, path, size, mtime_ns in rows:
        if id in windows:
            continue
        path = os.path.join(root, path)
        if path not in there:
            there[path] = os.path.exists(path)
        if there[path]:
            video = VideoFile(path, size, mtime_ns)
            windows[id] = _Window(id, start, end, bool(whole), content, file, video)
    return list(windows.values())


def _encode(
    writer: IndexWriter,
    encoder: Encoder,
    options: IndexOptions,
    report: UpdateReport,
    progress: bool,
    process: int = 0,
    processes: int = 1,
):
    """Encode every `processes`-th batch of what is pending, starting at batch `process`. The report counts moments."""
    encoder.on_damage = writer.description.on_damage
    pending, size = _pending(writer), options.batch_size
    todo = [w for i in range(process * size, len(pending), processes * size) for w in pending[i : i + size]]
    if not todo:
        return
    gone, files, hours = set(), set(), 0.0
    clips = [window.clip for window in todo]
    with tqdm(total=len(todo), desc="index", unit="moment", disable=not progress) as bar:
        for batch in encoder.encode_clips(clips, size, options.num_workers):
            done = [todo[index] for index in sorted([*batch.indices, *batch.bad])]
            for window in {window.file: window for window in done if window.content not in gone}.values():
                if not is_unchanged(window.video):
                    cause = f"{window.video.path}: it changed while it was being read; index again"
                    with transaction(writer.connection):
                        writer.change_content(window.file, None, window.video.size, -1, cause)
                    gone.add(window.content)
            kept = [(n, todo[index].id) for n, index in enumerate(batch.indices) if todo[index].content not in gone]
            failed = {todo[i].id: cause for i, cause in batch.bad.items() if todo[i].content not in gone}
            writer.append([id for _, id in kept], batch.vectors[[n for n, _ in kept]], failed)
            report.encoded += len(kept)
            report.damaged += sum(todo[index].content not in gone for index in batch.damaged)
            files.update(window.file for window in done)
            hours += sum(window.end - window.start for window in done) / 3600
            bar.update(len(done))
            speed = hours / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{len(files)} files, {speed:.3g} h of video/s")


def _finish(
    writer: IndexWriter,
    encoder: Encoder,
    options: IndexOptions,
    scan: Scan,
    registered: _Registered,
    report: UpdateReport,
):
    writer.refresh_hubs()
    writer.tidy()
    delete_caches(writer.folder, writer.description.cache and writer.description.cache["file"])
    if options.text_encoder:
        report.text_encoder = _export_text(writer, encoder)
    readable = {
        file
        for (file,) in writer.connection.execute(
            "SELECT files.id FROM files JOIN windows USING (content) WHERE row IS NOT NULL"
        )
    }
    report.added = len(readable.intersection(registered.added))
    report.changed = len(readable.intersection(registered.changed))
    ((report.moments,),) = writer.connection.execute(
        "SELECT count(*) FROM windows JOIN files USING (content) WHERE row IS NOT NULL"
    )
    found = {video.path for video in scan.videos}
    report.skipped = scan.skipped + [each for each in skipped_files(writer.connection) if each["path"] in found]
    with open_copy(writer) as store:
        if store is not None:
            report.written, report.deleted = store.update(writer)


def _export_text(writer: IndexWriter, encoder: Encoder) -> str:
    """Put the text tower beside the vectors, once per model. Returns why that failed, "" if it did not."""
    if writer.description.text_encoder or exported_weights(writer.folder) == writer.description.weights:
        return ""  # said at an earlier run, or done
    reason = export_text_encoder(encoder, writer.folder)
    if reason:
        writer.describe(text_encoder=reason)
    return reason
