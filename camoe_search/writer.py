# SPDX-License-Identifier: Apache-2.0
"""Changing an index: every method is one transaction (or several, each a state of its own), and costs what it changes.

Vectors reach the disk before the transaction that names them. The caller holds the write lock; other processes of the
same run append to segments of their own.
"""

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .bank import QueryBank, read_bank
from .database import (
    connect,
    insert_many,
    read_description,
    select_in,
    snapshot,
    transaction,
    write_description,
)
from .errors import SearchError
from .exact import Part, best_rows
from .files import is_inside, relative
from .rows import Rows
from .segments import SEGMENT_ROWS, append_rows, delete_segments, with_dead
from .thumbnails import thumbnail_path


# How rows are named: the new windows of files that were encoded elsewhere, or windows that are waiting for a vector.
INSERT = "INSERT INTO windows(row, id, content, number, start, end, whole) VALUES {}"
UPDATE = "UPDATE windows SET row = ?, cause = NULL WHERE id = ?"
KEY = "hash || '.' || number FROM windows JOIN contents ON contents.id = content"
BLOCK_ROWS = 4096  # rows scored or moved at a time: (1000, 4096) scores of a query bank are 16 MB
# A segment with more dead rows than this share is written again: it wastes memory bandwidth in every search.
MAX_DEAD = 0.25


class Place(NamedTuple):
    """Where vectors are written."""

    segment: int
    rows: int  # of the segment before them
    vectors: np.ndarray  # (b,K) as they are stored


class StoredWindow(NamedTuple):
    """A window of a file, as `IndexWriter.add_moments` takes it."""

    path: str  # relative to the root
    start: float  # seconds
    end: float
    size: int  # of the file, bytes
    mtime_ns: int
    hash: str  # of its content, `files.content_hash`


class LoadedWindow(NamedTuple):
    """A row of a part, as `IndexWriter.load` takes it: a window that has a vector, or the cause why it has none."""

    path: str  # whole
    start: float  # seconds
    end: float
    number: int | None  # of the window within its file; None: the manifest gave the window
    duration: float | None  # of the file, where its header was read
    size: int | None
    mtime_ns: int | None
    content_hash: str
    error: str | None


class IndexWriter:
    """A connection that changes an index.

    Args:
        folder: of the index.
        process: number of this process in its run; only process 0 continues segments that are not full.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.folder = folder
        self.connection = connect(folder, write=True)
        self.description = read_description(self.connection)
        self.bank = read_bank(self.connection, self.description.tau)
        self._best = self._best_scores()
        self._segment: tuple[int, int] | None = None  # number and rows of the one that is written now
        if process == 0:
            self._segment = self.connection.execute(
                "SELECT id, rows FROM segments WHERE rows < ? ORDER BY id LIMIT 1", (SEGMENT_ROWS,)
            ).fetchone()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *error):
        self.connection.close()

    def describe(self, **changes):
        """Change settings."""
        self.description = dataclasses.replace(self.description, **changes)
        with transaction(self.connection) as connection:
            write_description(connection, self.description)

    # --- adding rows -------------------------------------------------------------------------------------------------

    def append(self, windows: list[int], vectors: np.ndarray, failed: dict[int, str] | None = None):
        """Give windows their vectors.

        Args:
            windows: their ids.
            vectors: (b,K).
            failed: windows that could not be decoded: id -> cause.
        """
        with transaction(self.connection) as connection:
            self._append(connection, [(window,) for window in windows], vectors, UPDATE)
            connection.executemany(
                "UPDATE windows SET cause = ? WHERE id = ?", [(cause, id) for id, cause in (failed or {}).items()]
            )

    def _append(self, connection, windows: list[tuple], vectors: np.ndarray, statement: str):
        """Write vectors and name them by a statement, whose parameters are a row and a window's; in a transaction."""
        with self._writing(connection, vectors) as places:
            self._name_rows(connection, places, windows, statement)

    @contextlib.contextmanager
    def _writing(self, connection, vectors: np.ndarray) -> Iterator[list[Place]]:
        """Write vectors to places, given at once: the block works on the database while the disk writes.

        When the block has ended they are synced, and only then may the transaction commit.
        """
        vectors, before = self._rounded(vectors), self._segment
        with ThreadPoolExecutor(1) as disk:
            places, writes, written = [], [], 0
            try:
                while written < len(vectors):
                    number, rows = self._open_segment(connection)
                    piece = vectors[written : written + SEGMENT_ROWS - rows]
                    places.append(Place(number, rows, piece))
                    writes.append(disk.submit(self._write, *places[-1]))
                    self._segment = (number, rows + len(piece))
                    written += len(piece)
                yield places
                for write in writes:
                    write.result()
            except BaseException:
                self._segment = before  # what was written after its rows is not part of the index
                raise

    def _open_segment(self, connection) -> tuple[int, int]:
        """Number and rows of a segment that has room."""
        if self._segment is None or self._segment[1] >= SEGMENT_ROWS:
            number = connection.execute("INSERT INTO segments(rows, dead) VALUES(0, x'')").lastrowid
            self._segment = (number, 0)
        return self._segment

    def _write(self, segment: int, rows: int, vectors: np.ndarray):
        try:
            append_rows(self.folder, segment, rows, vectors)
        except OSError as error:
            raise SearchError(f"the index was left as it was: {self.folder}: {error.strerror}") from error

    def _name_rows(self, connection, places: list[Place], windows: list[tuple], statement: str):
        """Give windows their rows, and those their biases."""
        windows = iter(windows)
        for segment, rows, vectors in places:
            first = segment * SEGMENT_ROWS + rows
            last = first + len(vectors)
            connection.execute("UPDATE segments SET rows = ? WHERE id = ?", (rows + len(vectors), segment))
            run = insert_many if statement == INSERT else sqlite3.Connection.executemany
            run(connection, statement, [(row, *next(windows)) for row in range(first, last)])
            named = connection.execute("SELECT row FROM windows WHERE row >= ? AND row < ?", (first, last)).fetchall()
            if len(named) < len(vectors):  # another process has removed windows, because their file had changed
                self._kill(connection, sorted(set(range(first, last)) - {row for (row,) in named}))
            if self.bank is not None:
                bias, scores = self.bank.bias(vectors)
                connection.execute("INSERT OR REPLACE INTO bias VALUES(?, ?)", (first, bias.tobytes()))
                self._note_best(connection, scores, np.arange(first, last))

    def add_moments(self, root: str, moments: Sequence[StoredWindow], vectors: np.ndarray):
        """Add files whose vectors were made elsewhere, in one transaction.

        Args:
            root: folder of the files.
            moments: the windows, those of one file one after the other.
            vectors: (B,K), theirs.
        """
        with transaction(self.connection) as connection, self._writing(connection, vectors) as places:
            connection.execute("INSERT OR IGNORE INTO roots(path) VALUES(?)", (root,))
            ((root_id,),) = connection.execute("SELECT id FROM roots WHERE path = ?", (root,))
            ((content,),) = connection.execute(
                "SELECT COALESCE(max(seq), 0) FROM sqlite_sequence WHERE name = 'contents'"
            )
            ((window,),) = connection.execute(
                "SELECT COALESCE(max(seq), 0) FROM sqlite_sequence WHERE name = 'windows'"
            )
            contents, files, windows, path, number = [], [], [], None, 0
            for moment in moments:
                if moment.path != path:
                    path, number, content = moment.path, 0, content + 1
                    contents.append((content, moment.hash, moment.end))
                    files.append((root_id, path, moment.size, moment.mtime_ns, content))
                window += 1
                windows.append((window, content, number, moment.start, moment.end, 0))
                number += 1
            insert_many(connection, "INSERT INTO contents(id, hash, duration) VALUES {}", contents)
            files.sort()  # by path, as they go into an index: a page of it is looked for once
            insert_many(connection, "INSERT INTO files(root, path, size, mtime_ns, content) VALUES {}", files)
            self._name_rows(connection, places, windows, INSERT)

    def load(self, roots: Sequence[str], rows: Sequence[LoadedWindow], vectors: np.ndarray) -> int:
        """Add windows that were encoded elsewhere, in one transaction; those that are there stay as they are.

        Args:
            roots: folders; each file is in one of them.
            rows: windows, those without a vector among them.
            vectors: (b,K) of the others, in order.

        Returns:
            The number of windows that got a vector.
        """
        with transaction(self.connection) as connection:
            contents = self._contents_of(connection, rows)
            self._load_files(connection, roots, rows, contents)
            known: dict[int, dict] = {}  # content -> its windows: (start, end) -> (id, whether it has a vector)
            statement = "SELECT content, id, start, end, row FROM windows WHERE content IN ({})"
            for content, id, *times, row in select_in(connection, statement, sorted(set(contents.values()))):
                known.setdefault(content, {})[tuple(times)] = (id, row is not None)
            ((last,),) = connection.execute("SELECT COALESCE(max(seq), 0) FROM sqlite_sequence WHERE name = 'windows'")
            new, failed, kept, position = [], [], [], -1
            for row in rows:
                position += row.error is None
                content, times = contents[row.content_hash], (row.start, row.end)
                windows = known.setdefault(content, {})
                id, has_vector = windows.get(times, (None, False))
                if has_vector or (row.error is not None and (id is not None or row.start == row.end)):
                    continue  # a file that failed as a whole has the cause itself
                if id is not None:  # it failed before
                    connection.execute("DELETE FROM windows WHERE id = ?", (id,))
                last += 1
                number = len(windows) if row.number is None else row.number
                windows[times] = (last, row.error is None)
                if row.error is None:
                    new.append((last, content, number, *times, int(row.start == 0 and row.end == row.duration)))
                    kept.append(position)
                else:
                    failed.append((last, content, number, *times, 0, row.error))
            self._append(connection, new, vectors[kept], INSERT)
            insert_many(
                connection, "INSERT INTO windows(id, content, number, start, end, whole, cause) VALUES {}", failed
            )
        return len(new)

    def _load_files(self, connection, roots: Sequence[str], rows: Sequence[LoadedWindow], contents: dict[str, int]):
        """Add the files of windows, or give those that are there their present content."""
        connection.executemany("INSERT OR IGNORE INTO roots(path) VALUES(?)", [(root,) for root in roots])
        ids = dict(connection.execute("SELECT path, id FROM roots").fetchall())
        files = {row.path: row for row in rows}
        for root in roots:
            inside = {relative(path, root): row for path, row in files.items() if is_inside(path, root)}
            statement = "SELECT path, content FROM files WHERE path IN ({}) AND root = ?"
            before = dict(select_in(connection, statement, list(inside), ids[root]))
            insert_many(
                connection,
                "INSERT INTO files(root, path, size, mtime_ns, content) VALUES {} ON CONFLICT(root, path) "
                "DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, content = excluded.content, "
                "cause = NULL",
                [
                    (ids[root], path, row.size or 0, row.mtime_ns or 0, contents[row.content_hash])
                    for path, row in inside.items()
                    if before.get(path) != contents[row.content_hash]
                ],
            )
            self._remove_orphans(connection, sorted(set(before.values()) - {None} - set(contents.values())))

    def _contents_of(self, connection, rows: Sequence[LoadedWindow]) -> dict[str, int]:
        """The ids of contents by hash; new ones, and their causes, are added."""
        first = {}
        for row in rows:
            if row.content_hash not in first or row.error is None:
                first[row.content_hash] = row
        insert_many(
            connection,
            "INSERT INTO contents(hash, duration, cause) VALUES {} "
            "ON CONFLICT(hash) DO UPDATE SET cause = excluded.cause, duration = excluded.duration "
            "WHERE contents.cause IS NOT NULL AND excluded.cause IS NULL",
            [
                (digest, row.duration or row.end or None, row.error if row.start == row.end else None)
                for digest, row in first.items()
            ],
        )
        statement = "SELECT hash, id FROM contents WHERE hash IN ({})"
        return dict(select_in(connection, statement, list(first)))

    def _rounded(self, vectors: np.ndarray) -> np.ndarray:
        """As they are stored. A float16 has its largest value at 65,504; a vector's entries are within 1."""
        return np.ascontiguousarray(vectors, self.description.dtype)

    # --- hubs --------------------------------------------------------------------------------------------------------

    def _best_scores(self) -> np.ndarray:
        """The score of each query's best row so far; +inf where it has to be looked up again."""
        scores = [score for (score,) in self.connection.execute("SELECT score FROM bank ORDER BY query")]
        return np.array([np.inf if score is None else score for score in scores], np.float64)

    def _note_best(self, connection, scores: np.ndarray, rows: np.ndarray):
        """Keep the best row of each query: scores (Q,b) of rows (b,)."""
        found = scores.max(axis=1)
        better = np.flatnonzero(found > self._best)
        columns = scores[better].argmax(axis=1)
        connection.executemany(
            "UPDATE bank SET best = ?, score = ? WHERE query = ? AND score < ?",
            [
                (int(rows[column]), float(found[query]), int(query), float(found[query]))
                for query, column in zip(better, columns, strict=True)
            ],
        )
        self._best[better] = found[better]

    def refresh_hubs(self):
        """Look up the best rows of queries that lost theirs."""
        unknown = [query for (query,) in self.connection.execute("SELECT query FROM bank WHERE score IS NULL")]
        if not unknown:
            return
        with snapshot(self.connection):
            rows = Rows(self.folder, self.connection, self.description, {})
        scores, best = best_rows(rows.parts, self.bank.vectors[unknown], 1, np.zeros(len(unknown), bool))
        values = zip(best[:, 0].tolist(), scores[:, 0].astype(float).tolist(), unknown, strict=True)
        with transaction(self.connection) as connection:
            connection.executemany("UPDATE bank SET best = ?, score = ? WHERE query = ?", values)
        self._best = self._best_scores()

    def set_bank(self, bank: QueryBank | None):
        """Replace the query bank: all biases change, in one transaction; no vector does."""
        self.bank = bank
        self._best = np.full(0 if bank is None else len(bank.texts), -np.inf)
        with transaction(self.connection) as connection:
            connection.execute("DELETE FROM bank")
            connection.execute("DELETE FROM bias")
            self.description = dataclasses.replace(
                self.description, tau=bank and bank.tau, bank=bank.hash if bank else "", cache=None
            )
            write_description(connection, self.description)
            if bank is None:
                return
            connection.executemany(
                "INSERT INTO bank VALUES(?, ?, ?, -1, ?)",
                [(n, bank.texts[n], bank.vectors[n].tobytes(), -np.inf) for n in range(len(bank.texts))],
            )
            for part in Rows(self.folder, connection, self.description, {}).parts:
                for start in range(0, len(part.vectors), BLOCK_ROWS):
                    self._rescore(connection, part, slice(start, start + BLOCK_ROWS))

    def _rescore(self, connection, part: Part, block: slice):
        bias, scores = self.bank.bias(part.vectors[block])
        if part.allowed is not None:
            scores[:, ~part.allowed[block]] = -np.inf
        first = part.first + block.start
        connection.execute("INSERT INTO bias VALUES(?, ?)", (first, bias.tobytes()))
        self._note_best(connection, scores, np.arange(first, first + len(bias)))

    # --- removing ----------------------------------------------------------------------------------------------------

    def remove_files(self, files: list[int]) -> int:
        """Remove files by id, and what no other file holds, pictures too. Returns the number of windows that went."""
        with transaction(self.connection) as connection:
            contents = {
                content
                for (content,) in select_in(connection, "SELECT DISTINCT content FROM files WHERE id IN ({})", files)
            }
            select_in(connection, "DELETE FROM files WHERE id IN ({})", files)
            removed = self._remove_orphans(connection, sorted(contents - {None}))
        with contextlib.suppress(OSError):  # a picture that is left is deleted by the next `camoe index`
            for key in removed:
                thumbnail_path(self.folder, key).unlink(missing_ok=True)
        return len(removed)

    def change_content(
        self,
        file: int,
        content: int | None,
        size: int,
        mtime_ns: int,
        cause: str | None = None,
        keep_old: bool = False,
    ):
        """Give a file another content, or none and the cause; inside a transaction.

        With `keep_old` a content that no file holds now stays until `remove_unheld`: another file may come to hold it.
        """
        ((old,),) = self.connection.execute("SELECT content FROM files WHERE id = ?", (file,))
        self.connection.execute(
            "UPDATE files SET content = ?, size = ?, mtime_ns = ?, cause = ? WHERE id = ?",
            (content, size, mtime_ns, cause, file),
        )
        if old is not None and old != content and not keep_old:
            self._remove_orphans(self.connection, [old])

    def release_lost_rows(self):
        """Windows whose segment is gone, by a mistake of an earlier version, wait for a vector again."""
        segments = "SELECT id FROM segments"
        with transaction(self.connection) as connection:
            connection.execute(
                f"UPDATE windows SET row = NULL WHERE row IS NOT NULL AND row / ? NOT IN ({segments})", (SEGMENT_ROWS,)
            )

    def remove_unheld(self):
        """Remove the contents that no file holds."""
        with transaction(self.connection) as connection:
            statement = "SELECT id FROM contents EXCEPT SELECT content FROM files"
            self._remove_orphans(connection, [content for (content,) in connection.execute(statement)])

    def _remove_orphans(self, connection: sqlite3.Connection, contents: list[int]) -> list[str]:
        """Remove contents that no file holds, with their windows. Returns the keys of these."""
        held = select_in(connection, "SELECT DISTINCT content FROM files WHERE content IN ({})", contents)
        orphans = sorted(set(contents) - {content for (content,) in held})
        windows = select_in(connection, f"SELECT row, {KEY} WHERE content IN ({{}})", orphans)
        self._kill(connection, [row for row, _ in windows if row is not None])
        select_in(connection, "DELETE FROM windows WHERE content IN ({})", orphans)
        select_in(connection, "DELETE FROM contents WHERE id IN ({})", orphans)
        return [key for _, key in windows]

    def _kill(self, connection: sqlite3.Connection, rows: list[int]):
        """Mark rows as dead."""
        if not rows:
            return
        segments, numbers = np.divmod(np.array(rows), SEGMENT_ROWS)
        for segment in sorted(set(segments.tolist())):  # np.unique imports masked arrays
            ((count, dead),) = connection.execute("SELECT rows, dead FROM segments WHERE id = ?", (segment,))
            bits = with_dead(dead, count, numbers[segments == segment])
            connection.execute("UPDATE segments SET dead = ? WHERE id = ?", (bits, segment))
        select_in(connection, "UPDATE bank SET best = NULL, score = NULL WHERE best IN ({})", rows)
        self._best = self._best_scores()

    # --- keeping it small --------------------------------------------------------------------------------------------

    def tidy(self):
        """What is worth doing at the end of a run: compact segments, merge biases, copy the log into the database."""
        self._compact()
        self._merge_biases()
        keep = {segment for (segment,) in self.connection.execute("SELECT id FROM segments")}
        # Commits are not synced one by one: those that no longer name a segment have to be before its file goes.
        try:
            ((is_blocked, *_),) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError:  # a full disk
            is_blocked = True
        if not is_blocked:  # else by a reader: the next run deletes them
            delete_segments(self.folder, keep)

    def keys(self) -> set[str]:
        """Of all moments."""
        return {key for (key,) in self.connection.execute(f"SELECT {KEY} WHERE row IS NOT NULL")}

    def _compact(self):
        """Write the living rows of segments with many dead ones to the end, a segment at a time."""
        with snapshot(self.connection):
            parts = Rows(self.folder, self.connection, self.description, {}).parts
        parts = [
            part for part in parts if part.allowed is not None and (~part.allowed).sum() > MAX_DEAD * len(part.vectors)
        ]
        if self._segment is not None and self._segment[0] in {part.first // SEGMENT_ROWS for part in parts}:
            self._segment = None  # what moves there now would go with it when its turn comes
        for part in parts:
            segment = part.first // SEGMENT_ROWS
            for start in range(0, len(part.vectors), BLOCK_ROWS):
                self._move(part, start + np.flatnonzero(part.allowed[start : start + BLOCK_ROWS]))
            with transaction(self.connection) as connection:
                connection.execute("DELETE FROM segments WHERE id = ?", (segment,))
                connection.execute(
                    "DELETE FROM bias WHERE row >= ? AND row < ?", (part.first, part.first + SEGMENT_ROWS)
                )

    def _move(self, part: Part, numbers: np.ndarray):
        """Move some rows of a part to the end of the index: each is dead in its old place when it is in the new."""
        written = 0
        while written < len(numbers):
            with transaction(self.connection) as connection:
                segment, rows = self._open_segment(connection)
                piece = numbers[written : written + SEGMENT_ROWS - rows]
                self._write(segment, rows, part.vectors[piece])
                self._segment = (segment, rows + len(piece))
                first = segment * SEGMENT_ROWS + rows
                moves = list(zip(range(first, first + len(piece)), (part.first + piece).tolist(), strict=True))
                connection.execute("UPDATE segments SET rows = ? WHERE id = ?", (rows + len(piece), segment))
                connection.executemany("UPDATE windows SET row = ? WHERE row = ?", moves)
                connection.executemany("UPDATE bank SET best = ? WHERE best = ?", moves)
                if self.bank is not None:
                    connection.execute("INSERT INTO bias VALUES(?, ?)", (first, part.bias[piece].tobytes()))
                self._kill(connection, (part.first + piece).tolist())
            written += len(piece)

    def _merge_biases(self):
        """One blob of biases per segment, so that opening the index reads few."""
        counts = self.connection.execute(
            "SELECT row / ? AS segment, count(*) AS blobs FROM bias GROUP BY segment HAVING blobs > 1", (SEGMENT_ROWS,)
        ).fetchall()
        if not counts:
            return
        with transaction(self.connection) as connection:
            parts = {part.first: part for part in Rows(self.folder, connection, self.description, {}).parts}
            for segment, _ in counts:
                first = segment * SEGMENT_ROWS
                connection.execute("DELETE FROM bias WHERE row >= ? AND row < ?", (first, first + SEGMENT_ROWS))
                connection.execute("INSERT INTO bias VALUES(?, ?)", (first, parts[first].bias.tobytes()))
