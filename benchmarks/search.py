# SPDX-License-Identifier: Apache-2.0
"""What a search in an index costs over the bare matrix product of BLAS on the same mapped bytes, and opening it.

    python benchmarks/search.py                             10,000 moments of 2,048 entries, some seconds
    python benchmarks/search.py --moments 100000            0.8 GB of disk
    python benchmarks/search.py --moments 1000000 --width 512

All run in this process, in turns. The limit is numpy's `vectors @ query` (or `queries @ vectors.T`) over the mapped
segments, without looking at the scores; the peer is faiss.IndexFlatIP on a copy of the vectors in memory. Ours also
subtracts the bias, finds the best, and looks up paths and times.
"""

import tempfile
from pathlib import Path

import faiss
import numpy as np
from harness import Line, compare, finish, in_turns, parser
from synthetic_index import EXPERTS, random_vectors, write_index

from camoe_search.index import VideoIndex


DEFAULT_MOMENTS = 10_000
GOALS = {1: 1.1, 64: 1.2}  # times the bare product, by queries per call
OPENING_GOAL = 0.1  # seconds
PEER_BYTES = 1 << 30  # FAISS holds a copy of the vectors in memory: no peer above this


def bare_product(parts: list[np.ndarray], queries: np.ndarray):
    """The scores of all rows, and nothing else."""
    if len(queries) == 1:
        return [vectors @ queries[0] for vectors in parts]
    return [queries @ vectors.T for vectors in parts]


def measure(count: int, options, folder: Path) -> list[Line]:
    """The lines of one size."""
    write_index(folder, count, options.width, dtype=options.dtype)
    opening = in_turns({"open": lambda: VideoIndex.load(folder)}, options.repeats)["open"]
    seconds = float(np.median(opening))
    lines = [
        Line(
            f"open, {count:,} moments", "s", seconds, ratio=seconds, ratio_name="seconds",
            spread=(min(opening), max(opening)), goal=OPENING_GOAL, at_least=False,
        )
    ]  # fmt: skip
    index = VideoIndex.load(folder)
    with index.store.state() as rows:
        parts = [part.vectors for part in rows.parts]
    peer = None
    if 4 * count * options.width <= PEER_BYTES:
        peer = faiss.IndexFlatIP(options.width)
        for vectors in parts:
            peer.add(vectors.astype(np.float32))
    for size in options.batches:
        queries = random_vectors(size, options.width, seed=2)
        assert_same(index, queries, parts, options.k)
        calls = {
            "bare": lambda queries=queries: bare_product(parts, queries),
            "on": lambda queries=queries: index.search_vectors(
                queries, options.k, correction="query_bank", merge=False
            ),
            "off": lambda queries=queries: index.search_vectors(queries, options.k, correction="none", merge=False),
        }
        if peer is not None:
            calls["faiss"] = lambda queries=queries: peer.search(queries, options.k)
        cost = in_turns(calls, options.repeats, warm_up=2)  # pages come into memory
        name, form = f"{count:,} moments of {options.width:,}, batch {size}", {"scale": 1000, "unit": "ms"}
        if options.dtype != "float32":
            name += f", {options.dtype}"
        for correction in ("on", "off"):
            lines.append(
                compare(
                    f"{name}, correction {correction}", cost[correction], cost["bare"], "bare product", speedup=False,
                    goal=GOALS.get(size) if options.dtype == "float32" else None, **form,
                )
            )  # fmt: skip
        if peer is not None:
            lines.append(compare(f"{name}, correction on", cost["on"], cost["faiss"], "FAISS flat", **form))
    return lines


def assert_same(index: VideoIndex, queries: np.ndarray, parts: list[np.ndarray], k: int):
    """Both find the same, or their times would mean nothing."""
    scores = np.concatenate(bare_product(parts, queries), axis=-1).reshape(len(queries), -1)  # (N,B)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    hits = index.search_vectors(queries, k, correction="none", merge=False)
    if [[int(Path(hit.path).stem) for hit in found] for found in hits] != expected.tolist():
        raise SystemExit("the index and the matrix product do not find the same moments")


def main():
    arguments = parser(__doc__)
    arguments.set_defaults(repeats=15)
    arguments.add_argument("--moments", type=int, nargs="+", default=[DEFAULT_MOMENTS])
    arguments.add_argument("--width", type=int, default=2048, help="entries of a folded vector, a multiple of 4")
    arguments.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="of the stored vectors")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="queries a call")
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--folder", help="where the index goes for the time of the run (default: the system's)")
    options = arguments.parse_args()

    lines = []
    for count in options.moments:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            lines += measure(count, options, Path(folder) / "index")
    del options.folder  # a place on this machine
    largest = max(options.moments)  # results of other sizes do not take the place of the default's
    name = "search" if largest == DEFAULT_MOMENTS else f"search_{largest}"
    if options.dtype != "float32":
        name += f"_{options.dtype}"
    finish(name, lines, options, {"experts": len(EXPERTS)})


if __name__ == "__main__":
    main()
