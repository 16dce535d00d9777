# SPDX-License-Identifier: Apache-2.0
"""What a search in an index costs over a bare FAISS call, and over a matrix product, on the same vectors.

    python benchmarks/search.py                              10,000 moments of 2,048 entries, some seconds
    python benchmarks/search.py --moments 200000         4 GB of disk and 6 GB of memory, some minutes

All run in this process on the same random folded vectors, in turns. The peers are faiss.IndexFlatIP without the entry
of the correction, and numpy's matrix product with a partial sort; ours also subtracts the bias and looks up paths and
times. Opening: `VideoIndex.load`, everything memory-mapped.
"""

import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from harness import Line, compare, finish, in_turns, parser

from camoe_search.bank import QueryBank
from camoe_search.index import VideoIndex
from camoe_search.store import Description, moments_table, write_index


EXPERTS = ["fusion", "entity", "action", "scene"]
DEFAULT_MOMENTS = 10_000
GOAL = 1.1  # times a bare FAISS call
OPENING_GOAL = 1.0  # seconds


def random_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) float32: unit vectors per expert, as a folded text has; a quarter of that for a uniform gate."""
    vectors = np.random.default_rng(seed).standard_normal((count, len(EXPERTS), width // len(EXPERTS)), np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors.reshape(count, width)


def write_random_index(folder: Path, vectors: np.ndarray):
    """An index of vectors without videos, with a query bank."""
    count, width = vectors.shape
    rows = {
        "path": [f"/videos/{i:07}.mp4" for i in range(count)],
        "start": np.zeros(count),
        "end": np.full(count, 10.0),
        "size": np.zeros(count, np.int64),
        "mtime_ns": np.zeros(count, np.int64),
        "content_hash": [""] * count,
    }
    gates = np.full((count, len(EXPERTS)), 1 / len(EXPERTS), np.float32)
    description = Description("random", "random", EXPERTS, width // len(EXPERTS), 12, "uniform")
    bank = QueryBank([""] * 16, random_vectors(16, width, seed=1), tau=0.05)
    write_index(folder, description, moments_table(rows, vectors, gates), bank)


def matrix_product(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of (N,K) queries among (B,K) vectors, as numpy finds them: (N,k) scores, (N,k) rows."""
    scores = queries @ vectors.T  # (N,B)
    rows = np.argpartition(scores, -k, axis=1)[:, -k:]
    best = np.take_along_axis(scores, rows, axis=1)
    order = np.argsort(-best, axis=1)
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)


def measure(count: int, options, folder: Path) -> list[Line]:
    """The lines of one size."""
    vectors = random_vectors(count, options.width, seed=0) / len(EXPERTS)
    begin = time.perf_counter()
    write_random_index(folder, vectors)
    lines = [Line(f"build, {count:,} moments", "s", time.perf_counter() - begin, note="from vectors in memory")]
    opening = in_turns({"open": lambda: VideoIndex.load(folder)}, options.repeats)["open"]
    seconds = float(np.median(opening))
    lines.append(
        Line(
            f"open, {count:,} moments", "s", seconds, ratio=seconds, ratio_name="seconds",
            spread=(min(opening), max(opening)), goal=OPENING_GOAL, at_least=False,
        )
    )  # fmt: skip
    index = VideoIndex.load(folder)
    peer = faiss.IndexFlatIP(options.width)
    peer.add(vectors)
    for size in options.batches:
        queries = random_vectors(size, options.width, seed=2)
        assert_same(index, queries, vectors, options.k)
        calls = {
            "faiss": lambda queries=queries: peer.search(queries, options.k),
            "on": lambda queries=queries: index.search_vectors(queries, options.k, correction="query_bank"),
            "off": lambda queries=queries: index.search_vectors(queries, options.k, correction="none"),
            "numpy": lambda queries=queries: matrix_product(queries, vectors, options.k),
        }
        cost = in_turns(calls, options.repeats, warm_up=2)  # pages come into memory
        name, form = f"{count:,} moments, batch {size}", {"scale": 1000, "unit": "ms"}
        for correction in ("on", "off"):
            lines.append(
                compare(
                    f"{name}, correction {correction}", cost[correction], cost["faiss"], "FAISS", speedup=False,
                    goal=GOAL, **form,
                )
            )  # fmt: skip
        lines.append(compare(f"{name}, correction on", cost["on"], cost["numpy"], "numpy", **form))
    return lines


def assert_same(index: VideoIndex, queries: np.ndarray, vectors: np.ndarray, k: int):
    """All find the same, or their times would mean nothing."""
    _, rows = matrix_product(queries, vectors, k)
    found = [[hit.row for hit in hits] for hits in index.search_vectors(queries, k, correction="none")]
    if found != rows.tolist():
        raise SystemExit("the index and the matrix product do not find the same moments")


def main():
    arguments = parser(__doc__)
    arguments.set_defaults(repeats=15)
    arguments.add_argument("--moments", type=int, nargs="+", default=[DEFAULT_MOMENTS])
    arguments.add_argument("--width", type=int, default=2048, help="entries of a folded vector, a multiple of 4")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="queries a call")
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--folder", help="where the index goes for the time of the run (default: the system's)")
    options = arguments.parse_args()

    lines = []
    for count in options.moments:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            lines += measure(count, options, Path(folder))
    del options.folder  # a place on this machine
    largest = max(options.moments)  # results of other sizes do not take the place of the default's
    name = "search" if largest == DEFAULT_MOMENTS else f"search_{largest}"
    finish(name, lines, options, {"threads of FAISS": faiss.omp_get_max_threads()})


if __name__ == "__main__":
    main()
