# SPDX-License-Identifier: Apache-2.0
"""The rows of an index as one state of the database has them: mapped vectors, biases, and which are dead."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .database import Description
from .exact import Part
from .segments import SEGMENT_ROWS, dead_rows, map_segment


class Rows:
    """The parts of an index, one per segment.

    Args:
        folder, description: of the index.
        connection: inside a transaction.
        maps: mapped segments by number, from an earlier state of the same index; it is brought up to date.

    Raises:
        FileNotFoundError: a segment has gone, because a later state does not need it: begin again.
    """

    def __init__(
        self, folder: Path, connection: sqlite3.Connection, description: Description, maps: dict[int, np.ndarray]
    ):
        segments = connection.execute("SELECT id, rows, dead FROM segments ORDER BY id").fetchall()
        self.parts: list[Part] = []
        self.dead = 0
        for segment, rows, dead in segments:
            if len(maps.get(segment, ())) != rows:
                maps[segment] = map_segment(folder, segment, rows, description.width, description.dtype)
            is_dead = dead_rows(dead, rows)
            self.dead += 0 if is_dead is None else int(is_dead.sum())
            allowed = None if is_dead is None else ~is_dead
            self.parts.append(
                Part(segment * SEGMENT_ROWS, maps[segment], np.zeros(rows, np.float32), allowed)
            )  # fmt: skip
        for segment in maps.keys() - {segment for segment, *_ in segments}:
            del maps[segment]
        self._by_segment = {part.first // SEGMENT_ROWS: part for part in self.parts}
        for row, values in connection.execute('SELECT row, "values" FROM bias'):
            segment, start = divmod(row, SEGMENT_ROWS)
            values = np.frombuffer(values, np.float32)
            self._by_segment[segment].bias[start : start + len(values)] = values

    def __len__(self) -> int:
        """Rows that are not dead."""
        return sum(len(part.vectors) for part in self.parts) - self.dead

    def vectors(self, rows: Iterable[int]) -> np.ndarray:
        """Vectors of some rows as float32, (b,K)."""
        places = [divmod(row, SEGMENT_ROWS) for row in rows]
        return np.stack([self._by_segment[segment].vectors[number] for segment, number in places]).astype(np.float32)

    def bias(self, row: int) -> float:
        segment, number = divmod(row, SEGMENT_ROWS)
        return float(self._by_segment[segment].bias[number])

    def only(self, rows: np.ndarray) -> list[Part]:
        """The parts, of which only some rows may be found (none of them dead)."""
        segments, numbers = np.divmod(rows, SEGMENT_ROWS)
        parts = []
        for part in self.parts:
            allowed = np.zeros(len(part.vectors), bool)
            allowed[numbers[segments == part.first // SEGMENT_ROWS]] = True
            parts.append(Part(part.first, part.vectors, part.bias, allowed))
        return parts
