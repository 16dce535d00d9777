# SPDX-License-Identifier: Apache-2.0
"""Bring an index up to date with folders of videos: plan -> encode -> merge -> publish.

    plan      look at the folders, register files and windows (plan.py)
    encode    windows -> vectors, batch by batch (kernel.py)
    merge     a batch of vectors into the index: one transaction (writer.py)
    publish   hubs, caches, the text tower, the copy in Milvus, the report

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
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .approximate import delete_caches
from .columns import as_matrix
from .database import transaction, write_lock
from .encoder import Encoder, process_group
from .files import is_unchanged
from .kernel import iter_encode
from .plan import Plan, Window, pending_windows, plan_update
from .prepare import IndexOptions, check_model, choose_bank, prepare_index
from .remove import open_copy, skipped_files
from .sidecars import refresh_pictures, refresh_sidecars
from .text_encoder import export_text_encoder, exported_weights
from .thumbnails import delete_thumbnails, keep_thumbnail
from .writer import IndexWriter


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
            prepare_index(folder, encoder, options)
            with IndexWriter(folder) as writer:
                with open_copy(writer) as store:
                    if store is not None:
                        store.prepare(writer.description)  # what does not fit is said before anything is encoded
                plan = plan_update(writer, paths, options, progress)
                refresh_pictures(writer)
                refresh_sidecars(writer, plan.scan.paths)
        group.wait_for_everyone()
        with IndexWriter(folder, group.process_index) as writer:
            _encode_pending(writer, encoder, options, report, progress, group.process_index, group.num_processes)
        group.wait_for_everyone()
        if group.is_main_process:
            with IndexWriter(folder) as writer:
                # Anything still missing: another process may have been killed.
                _encode_pending(writer, encoder, options, report, progress)
                _publish(writer, encoder, options, plan, report)
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


# --- encode, merge ---------------------------------------------------------------------------------------------------


def _encode_pending(
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
    pending, size = pending_windows(writer), options.batch_size
    todo = [w for i in range(process * size, len(pending), processes * size) for w in pending[i : i + size]]
    if not todo:
        return
    gone, files, hours, first = set(), set(), 0.0, 0
    batches = iter_encode(
        _as_rows(todo), encoder, batch_size=size, num_workers=options.num_workers, thumbnails=options.thumbnails
    )
    with tqdm(total=len(todo), desc="index", unit="moment", disable=not progress) as bar:
        for batch in batches:
            done = todo[first : first + len(batch)]
            first += len(batch)
            _drop_changed_files(writer, done, gone)
            _merge(writer, done, batch, gone, report)
            files.update(window.file for window in done)
            hours += sum(window.end - window.start for window in done) / 3600
            bar.update(len(done))
            speed = hours / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{len(files)} files, {speed:.3g} h of video/s")


def _as_rows(windows: list[Window]) -> pa.Table:
    """Windows as the kernel takes them."""
    return pa.table(
        {
            "path": pa.array([window.video.path for window in windows], pa.string()),
            "start": pa.array([None if window.whole else window.start for window in windows], pa.float64()),
            "end": pa.array([None if window.whole else window.end for window in windows], pa.float64()),
            "content_hash": pa.array([window.hash for window in windows], pa.string()),
            "number": pa.array([window.number for window in windows], pa.int64()),
            "window": pa.array([window.id for window in windows], pa.int64()),
            "content": pa.array([window.content for window in windows], pa.int64()),
        }
    )


def _drop_changed_files(writer: IndexWriter, done: list[Window], gone: set[int]):
    """Files that changed while they were read have no vectors; `gone` are their contents."""
    for window in {window.file: window for window in done if window.content not in gone}.values():
        if not is_unchanged(window.video):
            cause = f"{window.video.path}: it changed while it was being read; index again"
            with transaction(writer.connection):
                writer.change_content(window.file, None, window.video.size, -1, cause)
            gone.add(window.content)


def _merge(writer: IndexWriter, done: list[Window], batch: pa.Table, gone: set[int], report: UpdateReport):
    """Write a batch of vectors, and the causes of windows without one."""
    if any(window.content in gone for window in done):
        batch = batch.filter(pa.array([window.content not in gone for window in done]))
    good = batch.filter(pc.is_null(batch["error"]))
    bad = batch.filter(pc.is_valid(batch["error"]))
    failed = dict(zip(bad["window"].to_pylist(), bad["error"].to_pylist(), strict=True))
    if "thumbnail" in good.column_names:
        for row in good.select(["content_hash", "number", "thumbnail"]).to_pylist():
            if row["thumbnail"] is not None:
                keep_thumbnail(writer.folder, f"{row['content_hash']}.{row['number']}", row["thumbnail"])
    writer.append(good["window"].to_pylist(), as_matrix(good["vector"]), failed)
    report.encoded += len(good)
    report.damaged += pc.sum(good["damaged"]).as_py() or 0


# --- publish ---------------------------------------------------------------------------------------------------------


def _publish(writer: IndexWriter, encoder: Encoder, options: IndexOptions, plan: Plan, report: UpdateReport):
    """What comes after the last vector."""
    writer.refresh_hubs()
    writer.tidy()
    delete_thumbnails(writer.folder, keep=writer.keys())
    delete_caches(writer.folder, writer.description.cache and writer.description.cache["file"])
    if options.text_encoder:
        report.text_encoder = export_text_tower(writer, encoder)
    _complete_report(writer, plan, report)
    with open_copy(writer) as store:
        if store is not None:
            report.written, report.deleted = store.update(writer)


def _complete_report(writer: IndexWriter, plan: Plan, report: UpdateReport):
    readable = {
        file
        for (file,) in writer.connection.execute(
            "SELECT files.id FROM files JOIN windows USING (content) WHERE row IS NOT NULL"
        )
    }
    report.added = len(readable.intersection(plan.added))
    report.changed = len(readable.intersection(plan.changed))
    report.moved, report.unchanged, report.dropped = plan.moved, plan.unchanged, plan.dropped
    ((report.moments,),) = writer.connection.execute(
        "SELECT count(*) FROM windows JOIN files USING (content) WHERE row IS NOT NULL"
    )
    found = {video.path for video in plan.scan.videos}
    report.skipped = plan.scan.skipped + [each for each in skipped_files(writer.connection) if each["path"] in found]
    report.not_videos = dict(plan.scan.other_extensions)


def export_text_tower(writer: IndexWriter, encoder: Encoder) -> str:
    """Put the text tower beside the vectors, once per model. Returns why that failed, "" if it did not."""
    if writer.description.text_encoder or exported_weights(writer.folder) == writer.description.weights:
        return ""  # said at an earlier run, or done
    reason = export_text_encoder(encoder, writer.folder)
    if reason:
        writer.describe(text_encoder=reason)
    return reason


__all__ = ["IndexOptions", "UpdateReport", "check_model", "replace_bank", "update_index"]
