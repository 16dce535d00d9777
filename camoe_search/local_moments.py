# SPDX-License-Identifier: Apache-2.0
"""Moments from the folder of an index: by vectors, by two queries in order, by vectors and words together.

All of it happens in one state of the index. N queries, B rows, K entries a folded vector.
"""

from __future__ import annotations

import re

import numpy as np

from .database import PATH, has_table, select_in
from .errors import SearchError
from .exact import products
from .filters import filter_sql
from .moments import Moment, Timeline, Windows, best_pair, merge_windows, stand_out
from .results import Filters, Grouping, Hit
from .rows import Rows


FIRST = 64  # windows that are looked for first; four times as many while there are too few moments among them
FEW = 2  # of these, so many times the results are looked at before all
BLOCK_ROWS = 1 << 14  # that are scored at a time
# Reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009, who found 60 to be good for all of TREC.
FUSION = 60
FUSED = 200  # windows of each ranking
WINDOWS = """
SELECT content, row, start, end, hash || '.' || number FROM windows JOIN contents ON contents.id = content
WHERE row IS NOT NULL AND content IN ({}) ORDER BY content, start, number
"""
OWNERS = "SELECT row, content FROM windows WHERE row IN ({})"
FILES = f"""
SELECT DISTINCT files.content, {PATH} FROM files JOIN roots ON roots.id = files.root
WHERE files.content IN ({{}}) ORDER BY 2
"""
FILTERED_FILES = f"""
SELECT DISTINCT files.content, {PATH} FROM windows JOIN contents ON contents.id = windows.content
     JOIN files ON files.content = contents.id JOIN roots ON roots.id = files.root
WHERE files.content IN ({{}}) AND {{condition}} ORDER BY 2
"""
MATCHES = """
SELECT files.content, texts.start, texts.end FROM words JOIN texts ON texts.id = words.rowid
     JOIN files ON files.id = texts.file WHERE words MATCH ? AND files.content IS NOT NULL ORDER BY rank LIMIT ?
"""


class MomentSearch:
    """One search.

    Args:
        store: a `LocalStore` in the state of `rows`.
        filters, grouping: which moments, and how windows become results.
    """

    def __init__(self, store, rows: Rows, filters: Filters, grouping: Grouping):
        self.store, self.rows, self.filters, self.grouping = store, rows, filters, grouping
        self.connection = store.connection
        self.allowed = store.allowed(filters)
        self._windows: dict[int, Windows] = {}  # by content
        self._places: dict[int, tuple[Windows, int]] = {}  # row -> windows of its content, and which of them it is

    # --- by vectors --------------------------------------------------------------------------------------------------

    def search(self, queries: np.ndarray, k: int, corrected: np.ndarray) -> list[list[Hit]]:
        """The k best moments for each of (N,K) queries; `corrected` (N,) bool."""
        done: dict[int, list[Moment]] = {}
        waiting, count = np.arange(len(queries)), max(FIRST, 4 * k)
        while len(waiting):
            scores, found = self.store.best(self.rows, queries[waiting], count, self.filters, corrected[waiting])
            # Reading the windows of files takes longer than finding them, and the first few are often enough.
            for width in (min(FEW * k, count), count):
                places = [place for place, query in enumerate(waiting.tolist()) if query not in done]
                self._load(found[places, :width])
                for place in places:
                    query = int(waiting[place])
                    values, rows = scores[place, :width].tolist(), found[place, :width].tolist()
                    score = self._scorer(queries[query], bool(corrected[query]))
                    moments = self._merge(values, rows, values, score, k)
                    is_all = len(rows) < width or (bool(rows) and (rows[-1] < 0 or self._is_below(values[-1])))
                    if len(moments) == k or is_all:
                        done[query] = moments
            waiting = np.array([query for query in waiting.tolist() if query not in done], int)
            count *= 4
        return self._hits([done[query] for query in range(len(queries))])

    def _is_below(self, score: float) -> bool:
        return self.grouping.min_score is not None and score < self.grouping.min_score

    def _merge(self, ranks: list, rows: list, scores: list, score, k: int, fixed=frozenset()) -> list[Moment]:
        """The first k moments among rows that are ranked by `ranks` and have similarities `scores`."""
        timelines, candidates = {}, []
        for rank, row, similarity in zip(ranks, rows, scores, strict=True):
            if row < 0 or row not in self._places or self._is_below(similarity):
                continue
            windows, number = self._places[row]
            timeline = timelines.setdefault(windows.owner, Timeline(windows, lambda n, w=windows: score(w.rows[n])))
            timeline.note(number, similarity)
            if row in fixed:
                timeline.fixed.add(number)
            candidates.append((rank, timeline, number))
        return merge_windows(candidates, k, self.grouping.by_file)

    def _scorer(self, query: np.ndarray, corrected: bool):
        """Rows (b,) -> their scores for a query (K,)."""

        def score(rows: np.ndarray) -> np.ndarray:
            scores = self.rows.vectors(rows.tolist()) @ query
            return scores - np.array([self.rows.bias(row) for row in rows.tolist()]) if corrected else scores

        return score

    # --- two queries in order ----------------------------------------------------------------------------------------

    def in_order(self, queries: np.ndarray, k: int, corrected: np.ndarray) -> list[Hit]:
        """The best pair of moments of each file, the first before the second; (2,K) queries.

        Files are looked at in the order of what they could reach at most: the mean of their two best scores. So few
        are looked at.
        """
        rows, scores = self._all_scores(queries, corrected)
        if not len(rows):
            return []
        owners = self.store.owners(rows)
        order = np.argsort(owners, kind="stable")
        contents, starts = np.unique(owners[order], return_index=True)
        most = np.maximum.reduceat(scores[:, order], starts, axis=1).mean(axis=0)  # by content
        pairs: list[tuple] = []
        ranking = np.argsort(-most, kind="stable")
        for first in range(0, len(ranking), FIRST):
            part = ranking[first : first + FIRST]
            if self._is_below(float(most[part[0]])) or (len(pairs) == k and pairs[-1][0] >= most[part[0]]):
                break
            self._load_contents(contents[part].tolist())
            for content in contents[part].tolist():
                windows = self._windows[content]
                columns = np.searchsorted(rows, windows.rows)
                pair = best_pair(windows, scores[0, columns], scores[1, columns])
                if pair is not None and not self._is_below(pair[0]):
                    pairs.append((*pair, windows, scores[[0, 1], columns[list(pair[1:])]].tolist()))
            pairs = sorted(pairs, key=lambda pair: -pair[0])[:k]
        paths = self._paths([windows.owner for *_, windows, _ in pairs])
        hits = []
        for mean, *numbers, windows, values in pairs:
            steps = tuple(
                self._hit(score, windows, number, paths[windows.owner])
                for score, number in zip(values, numbers, strict=True)
            )
            hits.append(steps[0]._replace(score=mean, end=max(step.end for step in steps), moments=steps))
        return sorted(hits, key=lambda hit: (-hit.score, hit.path))

    def _all_scores(self, queries: np.ndarray, corrected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows that may be found, ascending, (B,), and their scores (N,B)."""
        rows, scores = [np.empty(0, int)], [np.empty((len(queries), 0), np.float32)]
        for part in self.rows.parts if self.allowed is None else self.rows.only(self.allowed):
            for start in range(0, len(part.vectors), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                found = products(part.vectors[block], queries)  # (N,b)
                found[corrected] -= part.bias[block]
                kept = np.arange(found.shape[1]) if part.allowed is None else np.flatnonzero(part.allowed[block])
                rows.append(part.first + start + kept)
                scores.append(found[:, kept])
        return np.concatenate(rows), np.concatenate(scores, axis=1)

    # --- vectors and words -------------------------------------------------------------------------------------------

    def fused(self, query: np.ndarray, text: str, k: int, corrected: bool) -> list[Hit]:
        """The k best moments by both rankings of windows, of a query (K,) and of the words in a text.

        Raises:
            SearchError: the index has no words yet.
        """
        if not has_table(self.connection, "words"):
            raise SearchError(
                "this index has no words yet: `camoe index --index DIR` adds them, and encodes nothing again"
            )
        score = self._scorer(query, corrected)
        count = max(FUSED, 4 * k)
        scores, found = self.store.best(self.rows, query[None], count, self.filters, np.array([corrected]))
        similarity = {row: value for row, value in zip(found[0].tolist(), scores[0].tolist(), strict=True) if row >= 0}
        fused = {row: 1 / (FUSION + rank) for rank, row in enumerate(similarity, start=1)}
        with_words = self._rows_with_words(text, count, score)
        for rank, row in enumerate(with_words, start=1):
            fused[row] = fused.get(row, 0.0) + 1 / (FUSION + rank)
        rows = sorted(fused, key=lambda row: -fused[row])
        missing = np.array([row for row in rows if row not in similarity], int)
        if len(missing):
            similarity.update(zip(missing.tolist(), score(missing).tolist(), strict=True))
        self._load(np.array([rows], int))
        fixed = {row for row, is_timed in with_words.items() if is_timed}
        moments = self._merge([fused[row] for row in rows], rows, [similarity[row] for row in rows], score, k, fixed)
        return self._hits([moments])[0]

    def _rows_with_words(self, text: str, count: int, score) -> dict[int, bool]:
        """Windows whose file name, captions or subtitles have words of the text, best first (BM25): row -> whether
        the text says when.

        A subtitle leads to the most similar window in which it is shown, a name or caption to that of the file.
        """
        words = re.findall(r"\w+", text)
        words = [word for word in words if len(word) > 1 or not word.isascii()] or words
        match = " OR ".join(f'"{word}"' for word in words)
        if not match:
            return {}
        matches = self.connection.execute(MATCHES, (match, count)).fetchall()
        contents = list(dict.fromkeys(content for content, *_ in matches))
        passing = self._paths(contents)
        self._load_contents(contents)
        rows: dict[int, bool] = {}
        for content, start, end in matches:
            windows = self._windows.get(content)
            if windows is None or content not in passing:
                continue
            numbers = np.arange(len(windows.rows))
            if start is not None:
                middle = (start + end) / 2
                numbers = numbers[(windows.starts <= middle) & (middle < windows.ends)]
            if len(numbers):
                row = int(windows.rows[numbers[score(windows.rows[numbers]).argmax()]])
                rows.setdefault(row, start is not None)
        return rows

    # --- results -----------------------------------------------------------------------------------------------------

    def _load(self, found: np.ndarray):
        """Read the windows of all contents to which rows belong."""
        rows = [row for row in np.unique(found).tolist() if row >= 0 and row not in self._places]
        self._load_contents({content for _, content in select_in(self.connection, OWNERS, rows)})

    def _load_contents(self, contents):
        contents = [content for content in contents if content not in self._windows]
        table: dict[int, list[tuple]] = {}
        for content, *window in select_in(self.connection, WINDOWS, contents):
            table.setdefault(content, []).append(window)
        for content, windows in table.items():
            rows = np.array([row for row, *_ in windows])
            kept = np.arange(len(rows)) if self.allowed is None else np.flatnonzero(np.isin(rows, self.allowed))
            if not len(kept):
                continue
            chosen = [windows[n] for n in kept.tolist()]
            _, starts, ends, keys = zip(*chosen, strict=True)
            made = Windows(content, np.array(starts, float), np.array(ends, float), list(keys), rows[kept])
            self._windows[content] = made
            self._places.update((row, (made, number)) for number, row in enumerate(made.rows.tolist()))

    def _paths(self, contents) -> dict[int, tuple[str, ...]]:
        """The files of each content that pass the filters."""
        paths: dict[int, list[str]] = {}
        statement, parameters = FILES, []
        if self.filters:
            condition, parameters = filter_sql(self.connection, self.filters)
            statement = FILTERED_FILES.replace("{condition}", condition)
        for content, path in select_in(self.connection, statement, list(dict.fromkeys(contents)), *parameters):
            paths.setdefault(content, []).append(path)
        return {content: tuple(found) for content, found in paths.items()}

    def _hits(self, lists: list[list[Moment]]) -> list[list[Hit]]:
        paths = self._paths([moment.timeline.windows.owner for moments in lists for moment in moments])
        hits = []
        for moments in lists:
            made = [self._hit_of(moment, paths) for moment in moments]
            if self.grouping.by_file:
                made = [
                    hit._replace(moments=tuple(self._hit_of(each, paths) for each in stand_out(moment.timeline)))
                    for hit, moment in zip(made, moments, strict=True)
                ]
            hits.append(sorted(made, key=lambda hit: (-hit.score, hit.path, hit.start)))
        return hits

    def _hit_of(self, moment: Moment, paths: dict[int, tuple[str, ...]]) -> Hit:
        windows = moment.timeline.windows
        hit = self._hit(moment.score, windows, moment.number, paths[windows.owner])
        return hit._replace(start=moment.start, end=moment.end)

    @staticmethod
    def _hit(score: float, windows: Windows, number: int, paths: tuple[str, ...]) -> Hit:
        start, end = float(windows.starts[number]), float(windows.ends[number])
        return Hit(score, paths[0], start, end, windows.keys[number], (start, end), paths)
