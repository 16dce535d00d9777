# SPDX-License-Identifier: Apache-2.0
"""FAISS's approximate indexes as a cache beside the vectors: `camoe optimize --kind ivf` or `hnsw`.

A cache holds the rows that there were when it was made, with minus the bias as one more entry of each vector (the last
entry of a query is 1 to subtract it and 0 not to, `hubs.fold_bias`). Rows that came since are searched exactly, and
those that died are left out, so that a cache is never wrong about what is there; a new query bank makes it invalid.
With a filter that leaves few rows, exact search is faster and finds all of them.

N queries, B rows, K entries a vector.
"""

import contextlib
import os
import uuid
from pathlib import Path

import numpy as np

from .database import Description
from .errors import SearchError
from .exact import Part, best_rows
from .rows import Rows
from .segments import SEGMENT_ROWS


KINDS = ("ivf", "hnsw")
# How much of an index a query visits. With FAISS's defaults (1 and 16) recall against exact search is too low.
NPROBE, EF_SEARCH = 16, 64
TRAIN_PER_LIST = 64  # vectors to train a centroid on; FAISS wants 39 or more
# With fewer allowed rows than this share, a filtered search is exact: it reads that share of the vectors, and an
# approximate index would find hardly any of them in the lists that it visits.
FILTER_SHARE = 0.1


class Cache:
    """An open cache.

    Args:
        path: of the FAISS file, which is memory-mapped.
        kind: "ivf" or "hnsw".
        rows: {segment: number of its rows that the cache holds}.
    """

    def __init__(self, path: Path, kind: str, rows: dict[int, int]):
        faiss = import_faiss()
        self.path, self.kind, self.rows = path, kind, rows
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def is_worthwhile(self, allowed: np.ndarray | None) -> bool:
        return allowed is None or len(allowed) >= FILTER_SHARE * self.index.ntotal

    def search(self, rows: Rows, queries: np.ndarray, k: int, corrected: np.ndarray, allowed: np.ndarray | None):
        """As `exact.best_rows`, approximately."""
        parts = rows.parts if allowed is None else rows.only(allowed)
        living = {part.first // SEGMENT_ROWS: part for part in parts}
        folded = np.concatenate([queries, corrected[:, None]], axis=1, dtype=np.float32)  # (N,K+1)
        selected = None
        if allowed is not None or any(part.allowed is not None for part in parts):
            selected = np.concatenate(
                [
                    segment * SEGMENT_ROWS
                    + (
                        np.arange(count)
                        if living[segment].allowed is None
                        else living[segment].allowed[:count].nonzero()[0]
                    )
                    for segment, count in self.rows.items()
                    if segment in living
                ]
                or [np.empty(0, np.int64)]
            )
        scores, found = self.index.search(folded, k, params=self._parameters(selected))
        known = np.isin(found // SEGMENT_ROWS, list(living))  # the others were in segments that have gone
        scores[~known], found[~known] = -np.inf, -1
        new = [
            rest for part in parts if len((rest := _after(part, self.rows.get(part.first // SEGMENT_ROWS, 0))).vectors)
        ]
        if new:
            more = best_rows(new, queries, k, corrected)
            scores, found = np.concatenate([scores, more[0]], axis=1), np.concatenate([found, more[1]], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
        return scores, found

    def _parameters(self, selected: np.ndarray | None):
        faiss = import_faiss()
        selector = None if selected is None else faiss.IDSelectorBatch(selected)
        if self.kind == "ivf":
            return faiss.SearchParametersIVF(sel=selector, nprobe=NPROBE)
        return faiss.SearchParametersHNSW(sel=selector, efSearch=EF_SEARCH)


def _after(part: Part, count: int) -> Part:
    """The rows of a part that came after the first `count`."""
    allowed = None if part.allowed is None else part.allowed[count:]
    return Part(part.first + count, part.vectors[count:], part.bias[count:], allowed)


def import_faiss():
    """
    Raises:
        ImportError: FAISS is not installed (naming the pip command).
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError('approximate search needs FAISS: pip install "camoe[search]"') from error
    return faiss


def open_cache(folder: Path, description: Description, opened: Cache | None) -> Cache | None:
    """The cache that an index names; None where it has none, or it has gone."""
    if description.cache is None:
        return None
    path = folder / description.cache["file"]
    if opened is not None and opened.path == path:
        return opened
    if not path.exists():
        return None
    return Cache(path, description.cache["kind"], {int(s): n for s, n in description.cache["rows"].items()})


def build_cache(folder: Path, rows: Rows, kind: str) -> dict:
    """Make a cache of all living rows. Returns what the description keeps of it.

    Raises:
        SearchError: there are no rows, or the kind is unknown.
    """
    if kind not in KINDS:
        raise SearchError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if not len(rows):
        raise SearchError("the index is empty: there is nothing to optimize")
    faiss = import_faiss()
    width = rows.parts[0].vectors.shape[1] + 1
    if kind == "ivf":
        # sqrt(B) lists balance finding lists against scanning them
        lists = max(1, min(round(len(rows) ** 0.5), len(rows) // TRAIN_PER_LIST))
        index = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(len(rows), min(len(rows), lists * TRAIN_PER_LIST), replace=False)
        index.train(_folded_sample(rows, np.sort(sample)))
    else:
        index = faiss.index_factory(width, "IDMap,HNSW32", faiss.METRIC_INNER_PRODUCT)
    for part in rows.parts:
        for start in range(0, len(part.vectors), SEGMENT_ROWS // 8):
            numbers = _living(part, slice(start, start + SEGMENT_ROWS // 8))
            index.add_with_ids(_folded(part, numbers), part.first + numbers)
    name = f"cache-{uuid.uuid4().hex[:12]}.faiss"
    try:
        faiss.write_index(index, str(folder / name))
    except RuntimeError as error:
        (folder / name).unlink(missing_ok=True)
        raise SearchError(f"cannot write to {folder}: {' '.join(str(error).split())}") from error
    return {"file": name, "kind": kind, "rows": {part.first // SEGMENT_ROWS: len(part.vectors) for part in rows.parts}}


def delete_caches(folder: Path, keep: str | None):
    """Remove the files of other caches."""
    for path in folder.glob("cache-*.faiss"):
        if path.name != keep:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _living(part: Part, block: slice) -> np.ndarray:
    if part.allowed is None:
        return np.arange(block.start, min(block.stop, len(part.vectors)))
    return block.start + part.allowed[block].nonzero()[0]


def _folded(part: Part, numbers: np.ndarray) -> np.ndarray:
    """(b,K+1) of some rows of a part."""
    return np.concatenate([part.vectors[numbers], -part.bias[numbers, None]], axis=1, dtype=np.float32)


def _folded_sample(rows: Rows, sample: np.ndarray) -> np.ndarray:
    """(b,K+1) of the sample-th living rows."""
    folded, first = [], 0
    for part in rows.parts:
        living = _living(part, slice(0, len(part.vectors)))
        chosen = sample[(sample >= first) & (sample < first + len(living))] - first
        folded.append(_folded(part, living[chosen]))
        first += len(living)
    return np.concatenate(folded)


def measure_recall(cache: Cache, rows: Rows, queries: np.ndarray | None, count: int = 200, k: int = 10) -> float:
    """The share of exact search's first k that the cache finds.

    Args:
        queries: (Q,K) vectors of texts, of which `count` are used; None: rows of the index are the queries, which is
            kinder than texts are.
    """
    choose = np.random.default_rng(1).choice
    if queries is None:
        sample = choose(len(rows), min(len(rows), count), replace=False)
        queries = np.ascontiguousarray(_folded_sample(rows, np.sort(sample))[:, :-1])
    else:
        queries = queries[choose(len(queries), min(len(queries), count), replace=False)]
    uncorrected = np.zeros(len(queries), bool)
    _, exact = best_rows(rows.parts, queries, min(k, len(rows)), uncorrected)
    _, found = cache.search(rows, queries, min(k, len(rows)), uncorrected, None)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))
