# SPDX-License-Identifier: Apache-2.0
"""Vectors on disk: append-only files of raw rows, memory-mapped.

Row r of an index is row r % SEGMENT_ROWS of segment r // SEGMENT_ROWS. Rows are synced to the disk before the
transaction that names them commits; what lies beyond the committed rows of a segment is the rest of an interrupted
run, and the next one writes over it. Numbers of segments are never used again. B rows, K entries a vector.
"""

import contextlib
import os
from pathlib import Path

import numpy as np


SEGMENT_ROWS = 1 << 16  # a full segment of K = 2,048 float32 is 512 MB: what a compaction handles at a time


def segment_path(folder: Path, segment: int) -> Path:
    return folder / f"segment-{segment:06}.vectors"


def map_segment(folder: Path, segment: int, rows: int, width: int, dtype: str) -> np.ndarray:
    """The first `rows` vectors of a segment, (rows,K); reading them reads the file."""
    if not rows:
        return np.empty((0, width), dtype)
    return np.memmap(segment_path(folder, segment), dtype, mode="r", shape=(rows, width)).view(np.ndarray)


def append_rows(folder: Path, segment: int, rows: int, vectors: np.ndarray):
    """Write (b,K) after the first `rows` of a segment, and wait until they are on the disk."""
    content = memoryview(np.ascontiguousarray(vectors)).cast("B")
    path = segment_path(folder, segment)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        position = rows * vectors.shape[1] * vectors.itemsize
        while content:
            written = os.pwrite(descriptor, content, position)
            content, position = content[written:], position + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        _sync_folder(folder)  # the name of the file


def _sync_folder(folder: Path):
    with contextlib.suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def delete_segments(folder: Path, keep: set[int]):
    """Remove the files of other segments. A process that has one mapped keeps its content."""
    for path in folder.glob("segment-*.vectors"):
        if int(path.stem.split("-")[1]) not in keep:
            with contextlib.suppress(OSError):  # where an open file cannot be removed, a later run does it
                path.unlink()


def dead_rows(bits: bytes, rows: int) -> np.ndarray | None:
    """The bits of a segment -> bool (rows,), True for dead rows; None if none is dead."""
    if not any(bits):
        return None
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows, bitorder="little").astype(bool)


def with_dead(bits: bytes, rows: int, dead: np.ndarray) -> bytes:
    """The bits of a segment of `rows` rows, after the rows `dead` (numbers in the segment) died."""
    flags = dead_rows(bits, rows)
    flags = np.zeros(rows, bool) if flags is None else flags
    flags[dead] = True
    return np.packbits(flags, bitorder="little").tobytes()
