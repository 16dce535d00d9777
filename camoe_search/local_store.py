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
from .database import PATH, connect, read_description, select_in, snapshot
from .exact import best_rows
from .filters import filter_sql
from .local_moments import MomentSearch
from .results import Filters, Grouping, Hit, single_window, sort_hits
from .rows import Rows


JOINED = """
FROM windows JOIN contents ON contents.id = windows.content JOIN files ON files.content = contents.id
     JOIN roots ON roots.id = files.root
"""
# The windows of rows, one line per file that holds them.
PLACES = f"""
SELECT windows.row, {PATH} AS path, windows.start, windows.end, contents.hash || '.' || windows.number
{JOINED} WHERE """
NUMBER_AT = """
SELECT number FROM windows JOIN contents ON contents.id = content
WHERE hash = ? AND start <= ? AND end >= ? AND row IS NOT NULL ORDER BY number != ?, number LIMIT 1"""
PLACES_OF_KEY = PLACES + "contents.hash = ? AND windows.number = ? AND windows.row IS NOT NULL ORDER BY files.id"


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
        self._owners: np.ndarray | None = None  # (B,2) rows and contents, once they were asked for
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
            self._filtered, self._owners = (), None
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
        """The k best windows for each of (N,K) queries, best first; see `VectorStore`."""
        with self.state() as rows:
            scores, found = self.best(rows, queries, k, filters, corrected)
            if dynamic and found.shape[1]:
                again = np.flatnonzero(np.isin(found[:, 0], list(self.hubs(rows))))
                if len(again):
                    scores[again], found[again] = self.best(
                        rows, queries[again], k, filters, np.ones(len(again), bool)
                    )
            return self._hits(scores, found, k, filters)

    def search_moments(
        self,
        queries: np.ndarray,
        k: int,
        filters: Filters,
        corrected: np.ndarray,
        dynamic: bool,
        grouping: Grouping,
    ) -> list[list[Hit]]:
        """Moments, or the best one of each file, for each of (N,K) queries, best first; see `VectorStore`."""
        if not (grouping.merge or grouping.by_file):
            lists = self.search(queries, k, filters, corrected, dynamic)
            if grouping.min_score is None:
                return lists
            return [[hit for hit in hits if hit.score >= grouping.min_score] for hits in lists]
        with self.state() as rows:
            corrected = self._with_dynamic(rows, queries, filters, corrected, dynamic)
            return MomentSearch(self, rows, filters, grouping).search(queries, k, corrected)

    def in_order(
        self, queries: np.ndarray, k: int, filters: Filters, corrected: np.ndarray, dynamic: bool, grouping: Grouping
    ) -> list[Hit]:
        """Files in which what the first of (2,K) queries asks for is followed by what the second does; best first."""
        with self.state() as rows:
            corrected = self._with_dynamic(rows, queries, filters, corrected, dynamic)
            return MomentSearch(self, rows, filters, grouping).in_order(queries, k, corrected)

    def fused(
        self,
        query: np.ndarray,
        text: str,
        k: int,
        filters: Filters,
        corrected: np.ndarray,
        dynamic: bool,
        grouping: Grouping,
    ) -> list[Hit]:
        """Moments by the vector (1,K) and by the words of a text, fused by reciprocal rank."""
        with self.state() as rows:
            corrected = self._with_dynamic(rows, query, filters, corrected, dynamic)
            return MomentSearch(self, rows, filters, grouping).fused(query[0], text, k, bool(corrected[0]))

    def _with_dynamic(self, rows: Rows, queries, filters: Filters, corrected, dynamic: bool) -> np.ndarray:
        """(N,) which queries are corrected, where those whose best uncorrected window is a hub are, too."""
        if not dynamic:
            return corrected
        _, found = self.best(rows, queries, 1, filters, np.zeros(len(queries), bool))
        return np.isin(found[:, 0], list(self.hubs(rows))) if found.shape[1] else corrected

    def best(self, rows: Rows, queries, k: int, filters: Filters, corrected) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows (N,k), best first; -inf and -1 where there are fewer. In a state."""
        k = min(k, len(rows))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        allowed = self.allowed(filters)
        if self._cache is not None and self._cache.is_worthwhile(allowed):
            return self._cache.search(rows, queries, k, corrected, allowed)
        return best_rows(rows.parts if allowed is None else rows.only(allowed), queries, k, corrected)

    def allowed(self, filters: Filters) -> np.ndarray | None:
        """The rows that pass the filters, ascending; None for all. In a state."""
        if not filters:
            return None
        if self._filtered[:1] != (filters,):
            condition, values = filter_sql(self.connection, filters)
            only_windows = set(filters.names) <= {"min_seconds", "max_seconds"}
            statement = f"SELECT DISTINCT row {'FROM windows' if only_windows else JOINED} WHERE {condition}"
            found = self.connection.execute(f"{statement} ORDER BY row", values)
            self._filtered = (filters, np.fromiter((row for (row,) in found), np.int64))
        return self._filtered[1]

    def owners(self, rows: np.ndarray) -> np.ndarray:
        """The contents of rows that are in use, (b,). In a state."""
        if self._owners is None:
            found = self.connection.execute("SELECT row, content FROM windows WHERE row IS NOT NULL ORDER BY row")
            self._owners = np.array(found.fetchall(), np.int64).reshape(-1, 2)
        return self._owners[np.searchsorted(self._owners[:, 0], rows), 1]

    def _hits(self, scores: np.ndarray, found: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        places: dict[int, list[tuple]] = {}
        wanted = sorted({row for rows in found.tolist() for row in rows if row >= 0})
        condition, parameters = filter_sql(self.connection, filters)
        statement = f"{PLACES} windows.row IN ({{}}) AND {condition}"
        for row, *place in select_in(self.connection, statement, wanted, *parameters):
            places.setdefault(row, []).append(place)
        lists = []
        for values, rows in zip(scores.tolist(), found.tolist(), strict=True):
            hits = [
                single_window(score, *place)
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
        return single_window(0.0, *best[1:])

    def key_at(self, key: str, at: float) -> str:
        """The key itself if its moment has the second `at`, else of the first moment of the same content that has it.

        Raises:
            KeyError: there is none.
        """
        content, number = self._parse(key)
        found = self.select(NUMBER_AT, content, at, at, number)
        if not found:
            raise KeyError(key)
        return f"{content}.{found[0][0]}"

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
