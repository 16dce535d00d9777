# SPDX-License-Identifier: Apache-2.0
"""Searching the folder of an index. Every call sees the state of one commit; the next call sees what came since.

N queries, B rows, K entries a folded vector.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .approximate import Cache, open_cache
from .bank import read_bank
from .database import connect, read_description, select_in, snapshot
from .exact import best_rows
from .results import Filters, Hit, sort_hits
from .rows import Rows


# The windows of rows, one line per file that holds them.
PLACES = f"""
SELECT windows.row, roots.path || '{os.sep}' || files.path AS path, windows.start, windows.end,
       contents.hash || '.' || windows.number
FROM windows JOIN contents ON contents.id = windows.content JOIN files ON files.content = contents.id
     JOIN roots ON roots.id = files.root
"""
PLACES_OF_ROWS = PLACES + "WHERE windows.row IN ({})"
PLACES_OF_KEY = PLACES + "WHERE contents.hash = ? AND windows.number = ? AND windows.row IS NOT NULL ORDER BY files.id"


class LocalStore:
    """A `VectorStore` on index.sqlite and the segments beside it. Safe to use from several threads, one at a time.

    Args:
        folder: of the index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.connection = connect(folder)
        self._lock = threading.RLock()
        self._maps: dict[int, np.ndarray] = {}
        self._commit: int | None = None  # of `self._rows`
        self._rows: Rows | None = None
        self._cache: Cache | None = None
        self._filtered: tuple = ()  # the last filter and its rows: pages of one search share it
        with self.state():
            pass  # what is wrong with the folder is said now

    @contextlib.contextmanager
    def state(self) -> Iterator[Rows]:
        """The rows as one commit left them, while nothing else uses this store. May be entered again inside."""
        with self._lock, contextlib.ExitStack() as stack:
            while not self.connection.in_transaction:
                stack.enter_context(snapshot(self.connection))
                try:
                    self._refresh()
                    break
                except FileNotFoundError:  # a compaction removed it just now: look again
                    stack.pop_all().close()
            yield self._rows

    def _refresh(self):
        ((commit,),) = self.connection.execute("SELECT value FROM settings WHERE name = 'commit'")
        if commit != self._commit:
            self.description = read_description(self.connection)
            self._rows = Rows(self.folder, self.connection, self.description, self._maps)
            self._cache = open_cache(self.folder, self.description, self._cache)
            self._filtered = ()
            self._commit = commit

    def refresh(self):
        """Look whether the index has changed."""
        with self.state():
            pass

    def __len__(self) -> int:
        """Moments that can be found: a file that exists twice has its moments twice."""
        with self.state():
            ((count,),) = self.connection.execute(
                "SELECT count(*) FROM windows JOIN files USING (content) WHERE row IS NOT NULL"
            )
            return count

    # --- searching ---------------------------------------------------------------------------------------------------

    def search(
        self, queries: np.ndarray, k: int, filters: Filters, corrected: np.ndarray, dynamic: bool = False
    ) -> list[list[Hit]]:
        """The k best moments for each of (N,K) queries, best first; see `VectorStore`."""
        with self.state() as rows:
            scores, found = self._best(rows, queries, k, filters, corrected)
            if dynamic and found.shape[1]:
                again = np.flatnonzero(np.isin(found[:, 0], list(self.hubs(rows))))
                if len(again):
                    scores[again], found[again] = self._best(
                        rows, queries[again], k, filters, np.ones(len(again), bool)
                    )
            return self._hits(scores, found, k, filters)

    def _best(self, rows: Rows, queries, k: int, filters: Filters, corrected) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, len(rows))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        allowed = self._allowed(filters)
        if self._cache is not None and self._cache.is_worthwhile(allowed):
            return self._cache.search(rows, queries, k, corrected, allowed)
        return best_rows(rows.parts if allowed is None else rows.only(allowed), queries, k, corrected)

    def _allowed(self, filters: Filters) -> np.ndarray | None:
        """The rows that pass the filters, ascending; None for all."""
        if not filters:
            return None
        if self._filtered[:1] != (filters,):
            conditions, values = ["row IS NOT NULL"], []
            if filters.path is not None:
                conditions.append("instr(lower(path), ?)")
                values.append(filters.path.lower())
            if filters.min_seconds is not None:
                conditions.append("end - start >= ?")
                values.append(filters.min_seconds)
            if filters.max_seconds is not None:
                conditions.append("end - start <= ?")
                values.append(filters.max_seconds)
            # `lower` is Python's, see database.py.
            source = "windows" if filters.path is None else f"({PLACES})"
            statement = f"SELECT DISTINCT row FROM {source} WHERE {' AND '.join(conditions)} ORDER BY row"
            found = self.connection.execute(statement, values)
            self._filtered = (filters, np.fromiter((row for (row,) in found), np.int64))
        return self._filtered[1]

    def _hits(self, scores: np.ndarray, found: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        places: dict[int, list[tuple]] = {}
        wanted = sorted({row for rows in found.tolist() for row in rows if row >= 0})
        needle = None if filters.path is None else filters.path.lower()
        for row, *place in select_in(self.connection, PLACES_OF_ROWS, wanted):
            if needle is None or needle in place[0].lower():
                places.setdefault(row, []).append(place)
        lists = []
        for values, rows in zip(scores.tolist(), found.tolist(), strict=True):
            hits = [
                Hit(score, *place)
                for score, row in zip(values, rows, strict=True)
                if row >= 0
                for place in places.get(row, ())
            ]
            if len(hits) > k or len(set(values)) < len(values):  # else they are in order
                hits = sort_hits(hits)[:k]
            lists.append(hits)
        return lists

    def hubs(self, rows: Rows) -> set[int]:
        """The rows that are the best one for some query of the bank. Some may have to be looked up."""
        best = self.connection.execute("SELECT query, best FROM bank ORDER BY query").fetchall()
        hubs = {row for _, row in best if row is not None}
        unknown = [query for query, row in best if row is None]
        if unknown:
            bank = read_bank(self.connection, self.description.tau)
            _, found = best_rows(rows.parts, bank.vectors[unknown], 1, np.zeros(len(unknown), bool))
            hubs.update(found[:, 0].tolist())
        return hubs

    # --- one moment --------------------------------------------------------------------------------------------------

    def locate(self, key: str) -> Hit:
        """The file and time of a moment, with score 0: the first of the files that hold it and exist.

        Raises:
            KeyError: there is no such moment.
        """
        content, number = self._parse(key)
        with self.state():
            places = self.connection.execute(PLACES_OF_KEY, (content, number)).fetchall()
        if not places:
            raise KeyError(key)
        best = next((place for place in places if len(places) > 1 and os.path.isfile(place[1])), places[0])
        return Hit(0.0, *best[1:])

    def _parse(self, key: str) -> tuple[str, int]:
        content, _, number = str(key).partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise KeyError(key)
        return content, int(number)

    def vectors(self, keys: list[str]) -> dict[str, np.ndarray]:
        """(K,) of each key that there is, without the bias."""
        found = {}
        with self.state() as rows:
            for key in keys:
                with contextlib.suppress(KeyError):
                    row = self.connection.execute(
                        "SELECT row FROM windows JOIN contents ON contents.id = content "
                        "WHERE hash = ? AND number = ? AND row IS NOT NULL",
                        self._parse(key),
                    ).fetchone()
                    if row is not None:
                        found[key] = rows.vectors(row)[0]
        return found

    # --- everything --------------------------------------------------------------------------------------------------

    def select(self, statement: str, *values) -> list[tuple]:
        """Rows of a statement, in one state."""
        with self.state():
            return self.connection.execute(statement, values).fetchall()

    def close(self):
        """Close the database; mapped vectors stay valid."""
        with self._lock:
            self.connection.close()
