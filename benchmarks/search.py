# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a search in an index costs over a bare FAISS call on the same vectors, and how long opening takes.

    python benchmarks/search.py                              200,000 moments of 2,048 entries: 4 GB of disk
    python benchmarks/search.py --moments 20000 --width 512  a quick look

Both run in this process on the same random folded vectors, in turns, so that a busy machine slows both: the ratio of
the medians is the result. The peer is faiss.IndexFlatIP without the entry of the correction; ours subtracts the bias
and looks up path and times. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from camoe_search.bank import QueryBank
from camoe_search.index import VideoIndex
from camoe_search.store import Description, moments_table, write_index


EXPERTS = ["fusion", "entity", "action", "scene"]


def random_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) float32: unit vectors per expert, as a folded text has; a quarter of that for a uniform gate."""
    vectors = np.random.default_rng(seed).standard_normal((count, len(EXPERTS), width // len(EXPERTS)), np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors.reshape(count, width)


def write_random_index(folder: Path, vectors: np.ndarray):
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


def timed(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2048, help="entries of a folded vector, a multiple of 4")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="queries a call")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--folder", help="where the index goes for the time of the run (default: the system's)")
    options = parser.parse_args()

    vectors = random_vectors(options.moments, options.width, seed=0) / len(EXPERTS)
    peer = faiss.IndexFlatIP(options.width)
    peer.add(vectors)
    results = {
        "moments": options.moments,
        "width": options.width,
        "k": options.k,
        "threads": faiss.omp_get_max_threads(),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_random_index(Path(folder), vectors)
        del vectors
        results["open_seconds"] = timed(lambda: VideoIndex.load(folder))
        index = VideoIndex.load(folder)
        for size in options.batches:
            queries = random_vectors(size, options.width, seed=2)
            calls = {
                "faiss": lambda queries=queries: peer.search(queries, options.k),
                "camoe": lambda queries=queries: index.search_vectors(queries, options.k, correction="query_bank"),
            }
            seconds = {name: [] for name in calls}
            for call in calls.values():
                call()  # pages come into memory
            for _ in range(options.repeats):
                for name, call in calls.items():
                    seconds[name].append(timed(call))
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            results[f"batch_{size}"] = {f"{name}_ms": 1000 * median for name, median in medians.items()} | {
                "ratio": medians["camoe"] / medians["faiss"]
            }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
