# SPDX-License-Identifier: Apache-2.0
"""Rows of a manifest -> parts: files are examined and cut into windows, the kernel encodes them, parts are written.

This is what a worker does, whichever engine runs it. Windows of several parts go through the kernel as one stream, so
that decoding does not wait at the end of each part; a part appears when its last window has come.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import addresses
from .addresses import is_address
from .bank import QueryBank
from .columns import as_lists, as_matrix
from .contents import Content, examine
from .database import Description
from .encoder import Encoder
from .files import content_hash
from .kernel import iter_encode
from .parts import Part, PartFolder, with_description


READERS = 16  # threads that read headers; they mostly wait for the disk or the network
FILES_PER_STREAM = 1024  # files whose windows the kernel is given together
EXAMPLES = 3  # of each cause


@dataclass
class EncodeReport:
    """What was encoded. Reports add up."""

    files: int = 0
    moments: int = 0
    hours: float = 0.0  # of the encoded moments
    damaged: int = 0  # moments whose frames were taken around damage
    failed: int = 0  # rows without a vector
    causes: dict[str, int] = field(default_factory=dict)  # of failures, without the names of files
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first errors of each cause
    parts: int = 0
    repeated: int = 0  # rows of the manifest that name the same window as an earlier one
    seconds: float = 0.0  # of the device
    device: str = ""

    def __add__(self, other: "EncodeReport") -> "EncodeReport":
        causes = dict((Counter(self.causes) + Counter(other.causes)).most_common())
        examples = {
            cause: [*self.examples.get(cause, ()), *other.examples.get(cause, ())][:EXAMPLES] for cause in causes
        }
        numbers = "files moments hours damaged failed parts repeated seconds".split()
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return EncodeReport(**sums, causes=causes, examples=examples, device=self.device or other.device)


def encode_parts(
    parts: Iterable[Part],
    out: PartFolder,
    encoder: Encoder,
    description: Description,
    *,
    bank: QueryBank | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
) -> Iterator[EncodeReport]:
    """Encode parts, and write each of them when it is complete.

    Args:
        parts: what to encode.
        out: where they are written.
        encoder: the model of the description.
        description: how; its `dtype` is that of the vectors.
        bank, batch_size, num_workers: as for `kernel.iter_encode`.

    Yields:
        a report of each part.

    Raises:
        SearchError: a part cannot be written.
    """
    encoder.on_damage = description.on_damage
    parts = iter(parts)
    with ThreadPoolExecutor(1) as ahead:
        next_group = ahead.submit(_examine_group, parts, description)
        while (group := next_group.result()) is not None:
            next_group = ahead.submit(_examine_group, parts, description)  # while this one is encoded
            names, windows = group
            batches = iter_encode(windows, encoder, bank=bank, batch_size=batch_size, num_workers=num_workers)
            yield from _write(batches, names, windows["part"].to_numpy(), out, description, str(device_of(encoder)))


def device_of(encoder: Encoder) -> str:
    return str(getattr(getattr(encoder, "model", None), "device", "cpu"))


# --- windows ---------------------------------------------------------------------------------------------------------


def _examine_group(parts: Iterator[Part], description: Description) -> tuple[list[Part], pa.Table] | None:
    """The next parts, and the windows of all of them, whose column `part` has the number of their part."""
    group, files = [], 0
    for part in parts:
        group.append(part)
        files += len(part.rows)
        if files >= FILES_PER_STREAM:
            break
    if not group:
        return None
    with ThreadPoolExecutor(READERS) as readers:
        tables = [_cut(part.rows, description, readers) for part in group]
    tables = [
        table.append_column("part", pa.array(np.full(len(table), number, np.int32)))
        for number, table in enumerate(tables)
    ]
    return group, pa.concat_tables(tables)


@dataclass(frozen=True)
class _File:
    """What is known of a file before its frames are decoded."""

    content: Content
    size: int | None = None
    mtime_ns: int | None = None


def _examine(path: str, description: Description, is_cut: bool) -> _File:
    """Of a file whose windows are given, the header is not read."""
    try:
        size, mtime_ns = addresses.stat(path) if is_address(path) else _stat(path)
        content = examine(path, description.windows) if is_cut else Content(content_hash(path))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        cause = "no such file" if missing else f"cannot be read ({error.strerror or error})"
        return _File(Content(None, cause=f"{path}: {cause}"))
    except Exception as error:  # a storage's own, or a path that is none: the error of this row
        return _File(Content(None, cause=f"{path}: cannot be read ({type(error).__name__}: {error})"))
    return _File(content, size, mtime_ns)


def _stat(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _cut(rows: pa.Table, description: Description, readers: ThreadPoolExecutor) -> pa.Table:
    """Rows of a manifest -> their windows, with what is known of the files. A file that cannot be read is one row."""
    paths = rows["path"].to_pylist()
    times = [rows[name].to_pylist() if name in rows.column_names else [None] * len(rows) for name in ("start", "end")]
    is_given = [start is not None or end is not None for start, end in zip(*times, strict=True)]
    cut_paths = {path for path, given in zip(paths, is_given, strict=True) if path and not given}
    distinct = list(dict.fromkeys(path for path in paths if path))
    examined = readers.map(lambda path: _examine(path, description, path in cut_paths), distinct)
    files = dict(zip(distinct, examined, strict=True))
    rows_of, columns = [], {name: [] for name in WINDOW_TYPES}

    def add(row, start, end, number, file, duration=None):
        rows_of.append(row)
        content = file.content
        values = (start, end, number, duration, file.size, file.mtime_ns, content.hash, content.cause)
        for name, value in zip(WINDOW_TYPES, values, strict=True):
            columns[name].append(value)

    unnamed = _File(Content(None, cause="the row names no file"))
    for row, (path, start, end, given) in enumerate(zip(paths, *times, is_given, strict=True)):
        file = files.get(path, unnamed)
        if given or file.content.cause:
            add(row, start, end, None if given else 0, file, file.content.duration)
            continue
        windows = file.content.windows(description.window, description.stride)
        for number, (start, end) in enumerate(windows):
            whole = len(windows) == 1
            add(row, None if whole else start, None if whole else end, number, file, file.content.duration)
    kept = [name for name in rows.column_names if name not in WINDOW_TYPES]
    table = rows.select(kept).take(pa.array(rows_of, pa.int64()))
    for name, kind in WINDOW_TYPES.items():
        table = table.append_column(name, pa.array(columns[name], kind))
    return table


WINDOW_TYPES = {
    "start": pa.float64(),
    "end": pa.float64(),
    "number": pa.int32(),
    "duration": pa.float64(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
    "content_hash": pa.string(),
    "error": pa.string(),
}


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    batches: Iterator[pa.Table], group: list[Part], numbers: np.ndarray, out: PartFolder, description, device: str
) -> Iterator[EncodeReport]:
    """Write batches into the parts whose windows they have, in order; `numbers` are those of the parts of all rows."""
    left = Counter(numbers.tolist())
    begin, writer, report = time.perf_counter(), None, EncodeReport(device=device)
    paths: set[str | None] = set()
    try:
        for batch in batches:
            for number in dict.fromkeys(batch["part"].to_pylist()):
                rows = batch.filter(pc.equal(batch["part"], number)).drop_columns("part")
                writer = writer or out.writer(group[number].name, group[number].kept)
                writer.write(with_description(_as_stored(rows, description.dtype), description))
                report += _report_of(rows)
                paths.update(rows["path"].to_pylist())
                left[number] -= len(rows)
                if not left[number]:
                    writer.close()
                    report.files, report.parts = len(paths), 1
                    report.seconds, begin = time.perf_counter() - begin, time.perf_counter()
                    yield report
                    writer, report, paths = None, EncodeReport(device=device), set()
    finally:
        if writer is not None:
            writer.abort()


def _as_stored(rows: pa.Table, dtype: str) -> pa.Table:
    """With the times of windows that are whole files, and vectors of the wanted type."""
    is_whole = pc.and_(pc.and_(pc.is_valid(rows["number"]), pc.is_null(rows["start"])), pc.is_valid(rows["duration"]))
    for name, value in (("start", 0.0), ("end", rows["duration"])):
        position = rows.column_names.index(name)
        rows = rows.set_column(position, name, pc.if_else(is_whole, value, rows[name]))
    if dtype != "float32":
        position = rows.column_names.index("vector")
        good = pc.is_valid(rows["vector"])
        matrix = np.zeros((len(rows), rows["vector"].type.list_size), dtype)
        matrix[good.to_numpy()] = as_matrix(rows["vector"].filter(good))
        rows = rows.set_column(position, "vector", as_lists(matrix, good.to_numpy()))
    return rows


def _report_of(rows: pa.Table) -> EncodeReport:
    good = rows.filter(pc.is_null(rows["error"]))
    bad = rows.filter(pc.is_valid(rows["error"]))
    starts = pc.fill_null(good["start"], 0.0)
    seconds = pc.sum(pc.subtract(pc.coalesce(good["end"], good["duration"], starts), starts)).as_py() or 0.0
    report = EncodeReport(
        moments=len(good), hours=seconds / 3600, failed=len(bad), damaged=pc.sum(good["damaged"]).as_py() or 0
    )
    for path, error in zip(bad["path"].to_pylist(), bad["error"].to_pylist(), strict=True):
        cause = error.replace(path, "").lstrip(": ") if path else error
        cause = cause.split(" (")[0].split(";")[0].split(", but")[0]
        report.causes[cause] = report.causes.get(cause, 0) + 1
        examples = report.examples.setdefault(cause, [])
        if len(examples) < EXAMPLES:
            examples.append(error)
    return report
