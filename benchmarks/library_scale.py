# SPDX-License-Identifier: Apache-2.0
"""What each stage between a manifest and a search costs at several sizes, and how that grows.

    python benchmarks/library_scale.py                                    1,000 and 4,000 rows, under a minute
    python benchmarks/library_scale.py --rows 10000 100000 1000000        the growth table of docs/scale.md
    python benchmarks/library_scale.py --rows 1000000 --kinds ivf hnsw    and approximate indexes

Rows are clips of one moment with made-up vectors around --clusters centres, so no video is encoded: encoding grows
with the hours of video, and `camoe encode` prints its rate. Times are this process's own (CPU), in one thread where
OMP_NUM_THREADS=1. The exponent is the slope of log(time) over log(rows): 1 is proportional.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from harness import Line, finish, parser

from camoe_search.columns import as_lists, gates
from camoe_search.database import Description
from camoe_search.index import VideoIndex
from camoe_search.load import load_into_index
from camoe_search.manifest import read_manifest
from camoe_search.parts import PartFolder, plan_parts, with_description


EXPERTS = ["fusion", "entity", "action", "scene"]
QUERIES, K = 20, 10
STAGES = {
    "plan": "read the manifest and name its parts",
    "skip": "the same where all parts are there",
    "load": "put the parts into an index",
    "load again": "the same where all rows are there",
    "open": "open the index",
    "search": "an exact search, median",
}


def vectors_around(centres: np.ndarray, count: int, seed: int, spread: float = 0.5) -> np.ndarray:
    """(count, K) float32: unit vectors per expert, times a uniform gate."""
    generator = np.random.default_rng(seed)
    found = centres[generator.integers(0, len(centres), count)]
    found = found + spread * generator.standard_normal(found.shape, np.float32) / np.sqrt(found.shape[2])
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    return (found / len(EXPERTS)).reshape(count, -1)


def write_parts(folder: PartFolder, parts, description: Description, centres: np.ndarray):
    """Parts as `camoe encode` leaves them."""
    for number, part in enumerate(parts):
        count = len(part.rows)
        vectors = vectors_around(centres, count, seed=number + 3)
        first = int(Path(part.rows["path"][0].as_py()).stem)
        rows = part.rows
        columns = {
            "start": pa.array(np.zeros(count)),
            "end": pa.array(np.full(count, 10.0)),
            "number": pa.array(np.zeros(count, np.int32)),
            "duration": pa.array(np.full(count, 10.0)),
            "size": pa.array(np.arange(first, first + count)),
            "mtime_ns": pa.array(np.arange(first, first + count)),
            "content_hash": pa.array([f"{n:032x}" for n in range(first, first + count)]),
            "vector": as_lists(vectors.astype(description.dtype)),
            "gate_weights": as_lists(gates(vectors, len(EXPERTS))),
            "bias": pa.array(np.zeros(count, np.float32)),
            "damaged": pa.array(np.zeros(count, bool)),
            "error": pa.nulls(count, pa.string()),
        }
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        writer = folder.writer(part.name)
        writer.write(with_description(rows, description))
        writer.close()


def measure(count: int, options, folder: Path) -> dict[str, float]:
    """Seconds of each stage at one size; and megabytes, recalls."""
    found, clock = {}, time.process_time
    description = Description(
        "random", "random", EXPERTS, options.width // len(EXPERTS), 12, "uniform", dtype=options.dtype
    )
    centres = np.random.default_rng(0).standard_normal((options.clusters, 4, options.width // 4), np.float32)
    centres /= np.linalg.norm(centres, axis=2, keepdims=True)
    manifest = folder / "manifest.parquet"
    paths = [f"/videos/{n % 100:02}/{n:08}.mp4" for n in range(count)]
    pyarrow.parquet.write_table(pa.table({"path": paths}), manifest)
    out = PartFolder(str(folder / "parts"))

    def plan():
        return plan_parts(read_manifest(str(manifest)), description, out, options.files_per_part)

    begin = clock()
    parts, _ = plan()
    found["plan"] = clock() - begin
    write_parts(out, parts, description, centres)
    begin = clock()
    assert_equal(plan(), ([], count))
    found["skip"] = clock() - begin
    found["bytes"] = sum(path.stat().st_size for path in (folder / "parts").iterdir())
    for name, added in (("load", count), ("load again", 0)):
        begin = clock()
        report = load_into_index(str(folder / "parts"), folder / "index", text_tower=False)
        found[name] = clock() - begin
        assert_equal(report.added, added)
    begin = clock()
    index = VideoIndex.load(folder / "index")
    found["open"] = clock() - begin
    queries = vectors_around(centres, QUERIES, seed=1) * len(EXPERTS)
    found["search"], exact = search(index, queries)
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for kind in options.kinds:
        begin = clock()
        index.optimize(kind)
        found[f"build {kind}"] = clock() - begin
        found[f"search {kind}"], hits = search(index, queries)
        shared = [len({hit.key for hit in a} & {hit.key for hit in b}) for a, b in zip(exact, hits, strict=True)]
        found[f"recall {kind}"] = sum(shared) / (QUERIES * K)
        index.optimize(None)
    index.close()
    return found


def search(index: VideoIndex, queries: np.ndarray) -> tuple[float, list]:
    """Median seconds of a query, and the hits of all."""
    seconds, hits = [], []
    index.search_vectors(queries[:1], K, merge=False)  # pages come into memory
    for query in queries:
        begin = time.process_time()
        hits += index.search_vectors(query[None], K, merge=False)
        seconds.append(time.process_time() - begin)
    return float(np.median(seconds)), hits


def assert_equal(found, expected):
    """What is measured has to be right, or its time would mean nothing."""
    if found != expected:
        raise SystemExit(f"expected {expected}, found {found}")


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """The slope of log(seconds) over log(sizes)."""
    if len(sizes) < 2 or min(seconds) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def lines_of(sizes: list[int], found: list[dict[str, float]]) -> list[Line]:
    lines = []
    names = dict.fromkeys(name for each in found for name in each if name not in ("memory", "bytes"))
    for name in names:
        if name.startswith("recall"):
            lines += [
                Line(f"{name}, {size:,} rows", "share", each[name]) for size, each in zip(sizes, found, strict=True)
            ]
            continue
        slope = exponent(sizes, [each[name] for each in found])
        for size, each in zip(sizes, found, strict=True):
            lines.append(
                Line(f"{name}, {size:,} rows", "ms", 1000 * each[name], ratio=slope, ratio_name="exponent",
                     note=STAGES.get(name, ""))
            )  # fmt: skip
    for size, each in zip(sizes, found, strict=True):
        lines.append(Line(f"largest memory, {size:,} rows", "MB", each["memory"]))
        lines.append(Line(f"parts, {size:,} rows", "MB", each["bytes"] / 1e6))
    return lines


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=[1000, 4000])
    arguments.add_argument("--width", type=int, default=512, help="entries of a folded vector; the bias is one more")
    arguments.add_argument("--dtype", default="float16", choices=("float32", "float16"))
    arguments.add_argument("--clusters", type=int, default=1000)
    arguments.add_argument("--files-per-part", type=int, default=4096)
    arguments.add_argument("--kinds", nargs="*", default=[], choices=("ivf", "hnsw"), help="approximate indexes")
    arguments.add_argument("--name", default="library_scale", help="of the file of results")
    options = arguments.parse_args()
    found = []
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(count, options, Path(folder)))
    details = {str(count): each for count, each in zip(options.rows, found, strict=True)}
    name = options.name
    del options.name
    finish(name, lines_of(options.rows, found), options, details)


if __name__ == "__main__":
    main()
