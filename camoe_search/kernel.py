# SPDX-License-Identifier: Apache-2.0
"""Rows of clips -> the same rows with vectors: the stateless kernel of `camoe index`, `camoe encode` and Ray.

    encode(table, encoder): pyarrow.Table -> pyarrow.Table

| column in | |
|---|---|
| `path` | a file, or an address that fsspec opens |
| `start`, `end` | seconds of the window; null, or no such column: the whole video |
| anything else | passes through |

| column out | |
|---|---|
| `vector` | (K) the folded vector; null where there is an error |
| `gate_weights` | (E) of the experts |
| `bias` | the query bank's correction, 0 without a bank |
| `content_hash` | of the file; passes through where it is given |
| `damaged` | whether frames were taken around damage |
| `error` | why there is no vector, naming the file; null where there is one. What is given is not tried again |
| `thumbnail` | on request: the middle frame, uncropped, as JPEG; null where there is none |

It keeps no state and writes no file. What is wrong with a row is that row's `error`; only what concerns all rows (the
model, memory) is raised. Rows keep their order. K entries a folded vector, E experts, b rows of a batch.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from modeling_camoe.frames import Clip

from .columns import as_lists, gates
from .files import content_hash


if TYPE_CHECKING:
    from .bank import QueryBank
    from .encoder import ClipBatch, Encoder

READERS = 8  # threads that hash files; they mostly wait for the disk or the network


def encode(table: pa.Table, encoder: "Encoder", **options) -> pa.Table:
    """Encode all rows; the options are those of `iter_encode`."""
    parts = list(iter_encode(table, encoder, **options))
    return pa.concat_tables(parts) if parts else _with_vectors(_with_hashes(table, None), [], {}, {}, encoder, None)


def iter_encode(
    table: pa.Table,
    encoder: "Encoder",
    *,
    bank: "QueryBank | None" = None,
    batch_size: int = 16,
    num_workers: int = 0,
    thumbnails: bool = False,
) -> Iterator[pa.Table]:
    """Encode rows batch by batch, while workers decode the next ones.

    Args:
        table: see above.
        encoder: the model.
        bank: gives the biases.
        batch_size: rows per forward pass.
        num_workers: processes that decode; 0 decodes in this one.
        thumbnails: with the column of pictures.
    """
    paths = table["path"].to_pylist()
    starts, ends = (table[name].to_pylist() if name in table.column_names else [None] * len(table) for name in TIMES)
    given = table["error"].to_pylist() if "error" in table.column_names else [None] * len(table)
    errors = {row: given[row] or _mistake(paths[row], starts[row], ends[row]) for row in range(len(table))}
    errors = {row: error for row, error in errors.items() if error}
    rows = [row for row in range(len(table)) if row not in errors]
    clips = [Clip(paths[row], starts[row], ends[row]) for row in rows]
    first = 0
    with ThreadPoolExecutor(READERS) as readers:
        for batch in encoder.encode_clips(clips, batch_size, num_workers, thumbnails) if clips else ():
            last = rows[max([*batch.indices, *batch.bad])] + 1
            piece = _encoded(table, slice(first, last), rows, batch, errors, encoder, bank, readers)
            yield _with_thumbnails(piece, first, rows, batch) if thumbnails else piece
            first = last
        if first < len(table):
            piece = _encoded(table, slice(first, len(table)), rows, None, errors, encoder, bank, readers)
            yield _with_thumbnails(piece, first, rows, None) if thumbnails else piece


TIMES = ("start", "end")


def _mistake(path: str | None, start: float | None, end: float | None) -> str | None:
    """What is wrong with a row before its file is opened."""
    if not isinstance(path, str) or not path.strip():
        return "the row names no file"
    for name, seconds in zip(TIMES, (start, end), strict=True):
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
            return f"{path}: {name} is {seconds}, which is no number of seconds from 0 on"
    return None


def _encoded(table, part: slice, rows, batch: "ClipBatch | None", errors, encoder, bank, readers) -> pa.Table:
    """Some consecutive rows with what a batch says of them."""
    errors = {row: error for row, error in errors.items() if part.start <= row < part.stop}
    vectors, damaged = {}, set()
    if batch is not None:
        errors |= {rows[index]: cause for index, cause in batch.bad.items()}
        vectors = {rows[index]: vector for index, vector in zip(batch.indices, batch.vectors, strict=True)}
        damaged = {rows[index] for index in batch.damaged}
    piece = table.slice(part.start, part.stop - part.start)
    numbers = range(part.start, part.stop)
    return _with_vectors(
        _with_hashes(piece, readers),
        [n in damaged for n in numbers],
        {n - part.start: vector for n, vector in vectors.items()},
        {n - part.start: error for n, error in errors.items()},
        encoder,
        bank,
    )


def _with_hashes(piece: pa.Table, readers: ThreadPoolExecutor | None) -> pa.Table:
    """With the hashes of files, each read once; null where that is not possible."""
    if "content_hash" in piece.column_names:
        return piece

    def read(path: str) -> str | None:
        try:
            return content_hash(path)
        except (OSError, ValueError):  # decoding has said why
            return None

    paths = piece["path"].to_pylist()
    distinct = list(dict.fromkeys(path for path in paths if path))
    found = dict(zip(distinct, readers.map(read, distinct), strict=True)) if distinct else {}
    return piece.append_column("content_hash", pa.array([found.get(path) for path in paths], pa.string()))


def _with_vectors(
    piece: pa.Table, damaged: list[bool], vectors: dict, errors: dict, encoder: "Encoder", bank: "QueryBank | None"
) -> pa.Table:
    """The columns out, beside those of some rows. `vectors` and `errors` are by the number of a row."""
    width = len(encoder.experts) * encoder.dim
    matrix, present = np.zeros((len(piece), width), np.float32), np.zeros(len(piece), bool)
    for row, vector in vectors.items():
        matrix[row], present[row] = vector, True
    bias = np.zeros(len(piece), np.float32)
    if bank is not None and present.any():
        bias[present] = bank.bias(matrix[present])[0]
    columns = {
        "vector": as_lists(matrix, present),
        "gate_weights": as_lists(gates(matrix, len(encoder.experts)), present),
        "bias": pa.array(bias, mask=~present),
        "damaged": pa.array(damaged, pa.bool_()),
        "error": pa.array([errors.get(row) for row in range(len(piece))], pa.string()),
    }
    for name, column in columns.items():
        piece = _replace_column(piece, name, column)
    return piece


def _with_thumbnails(piece: pa.Table, first: int, rows, batch: "ClipBatch | None") -> pa.Table:
    """Rows from `first` on, with the pictures that came with their batch."""
    made = {} if batch is None else dict(zip((rows[i] for i in batch.indices), batch.thumbnails, strict=True))
    return _replace_column(piece, "thumbnail", pa.array([made.get(first + n) for n in range(len(piece))], pa.binary()))


def _replace_column(piece: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in piece.column_names:  # of an earlier encoding of the same rows
        piece = piece.drop_columns(name)
    return piece.append_column(name, column)
