# SPDX-License-Identifier: Apache-2.0
"""Searching the FAISS index of an index folder. N queries, B moments (rows), K entries a folded vector."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from .results import Filters, Hit, sort_hits
from .store import Description, read_faiss


MIN_ROWS_TO_SPLIT = 5_000  # with fewer rows, starting threads costs more than it saves
MAX_THREADS = 8  # beyond that, memory bandwidth is the limit


class FaissStore:
    """A `VectorStore` on vectors.faiss and the table beside it, both memory-mapped.

    Args:
        folder, description: of the index.
        table: its moments.
    """

    def __init__(self, folder: Path, description: Description, table: pa.Table):
        self._faiss = read_faiss(folder, description)
        self._kind = description.faiss
        self._table = table
        self._paths = table.column("path")
        self._starts = table.column("start").to_numpy()  # (B,)
        self._ends = table.column("end").to_numpy()
        self._is_hub = table.column("is_hub").to_numpy()

    def __len__(self) -> int:
        return len(self._table)

    def search(self, queries: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        """The k best moments for each of (N,K+1) queries, best first; fewer where fewer pass the filters."""
        k = min(k, len(self))
        if filters:
            selector = faiss.IDSelectorBatch(self._allowed(filters))
            scores, rows = self._faiss.search(queries, k, params=self._search_parameters(selector))
        else:
            scores, rows = self._search_all(queries, k)
        return self._hits(scores, rows)

    def _search_all(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(N,K+1) -> scores (N,k) and rows (N,k), best first; row -1 where there is none.

        FAISS runs every query on one thread. With fewer queries than threads, the rows of a flat index are split
        instead: each thread searches one part, and the results are merged.
        """
        threads = min(faiss.omp_get_max_threads(), MAX_THREADS)
        if self._kind != "flat" or len(queries) >= threads or len(self) < MIN_ROWS_TO_SPLIT:
            return self._faiss.search(queries, k)
        edges = np.linspace(0, len(self), threads + 1).astype(int).tolist()

        def search(part):
            selector = faiss.IDSelectorRange(*part)
            return self._faiss.search(queries, k, params=faiss.SearchParameters(sel=selector))

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(search, itertools.pairwise(edges)))
        scores, rows = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))  # (N, threads*k)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)

    def _search_parameters(self, selector) -> faiss.SearchParameters:
        """The index's own parameters, limited to some rows."""
        if self._kind == "ivf":
            return faiss.SearchParametersIVF(sel=selector, nprobe=faiss.extract_index_ivf(self._faiss).nprobe)
        if self._kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self._faiss.hnsw.efSearch)
        return faiss.SearchParameters(sel=selector)

    def _hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        found = rows >= 0
        counts, scores, rows = found.sum(axis=1).tolist(), scores[found], rows[found]  # flat from here on
        columns = (
            scores.tolist(),
            self._paths.take(pa.array(rows)).to_pylist(),
            self._starts[rows].tolist(),
            self._ends[rows].tolist(),
            rows.tolist(),
        )
        hits = [Hit(*values) for values in zip(*columns, strict=True)]
        stops = np.cumsum(counts).tolist()
        lists = [hits[stop - count : stop] for count, stop in zip(counts, stops, strict=True)]
        if (np.diff(scores) == 0).any():  # rare: the same video twice
            lists = [sort_hits(each) for each in lists]
        return lists

    def _allowed(self, filters: Filters) -> np.ndarray:
        """The rows that pass the filters."""
        allowed = np.ones(len(self), bool)
        if filters.path is not None:
            wanted = filters.path.lower()
            allowed &= np.array([wanted in path.lower() for path in self._paths.to_pylist()], bool)
        seconds = self._ends - self._starts
        if filters.min_seconds is not None:
            allowed &= seconds >= filters.min_seconds
        if filters.max_seconds is not None:
            allowed &= seconds <= filters.max_seconds
        return allowed.nonzero()[0]

    def is_hub(self, row: int) -> bool:
        """Whether a moment is the best one for some query of the bank."""
        return bool(self._is_hub[row])

    def locate(self, row: int) -> Hit:
        """The file and time of a row, with score 0.

        Raises:
            KeyError: there is no such row.
        """
        if not isinstance(row, int) or not 0 <= row < len(self):
            raise KeyError(row)
        return Hit(0.0, self._paths[row].as_py(), float(self._starts[row]), float(self._ends[row]), row)

    def vector(self, row: int) -> np.ndarray:
        """(K,), without the bias."""
        return np.asarray(self._table.column("vector")[row].values, np.float32)

    def close(self):
        """Nothing to release: the files are only mapped."""
