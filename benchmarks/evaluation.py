# SPDX-License-Identifier: Apache-2.0
"""Scoring a large test set in tiles: time and memory, against the bare products and against the full matrix in numpy.

    python benchmarks/evaluation.py                               about a minute
    python benchmarks/evaluation.py --size 50000 --repeats 2      some minutes; its full matrix would be 10 GB

Two questions, each answered by ratios within one run, because machines and their other users differ:

- What do ranks cost beyond the matrix products that they need? Uncorrected ranks of both directions need one product
  of all texts with all videos, dual softmax two (its prior, then its ranks). Products and scoring take turns, and each
  scoring is divided by the products just before and after it.
- What do time and memory become without the full matrix? Each way runs in a process of its own, on a set whose matrix
  fits, and must give the same ranks.

Targets: at 50,000 x 50,000 with 512 dims on two cores, both corrections within 1.8 times their two products, and 2 GB
above the embeddings. JSON goes to results/evaluation.json, that of another size to results/evaluation_SIZE.json.

Embeddings are like those of CLIP: other pairs have cosine 0.20 +- 0.04, right pairs 0.30 +- 0.04 (`--cosines zero`
centres the others on 0, where many right scores are negative under dual softmax and take a slower way).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import harness

from evaluation.ranks import rank_retrieval


SCALE = 100.0  # exp(logit_scale) of every CLIP
DEFAULT_SIZE = 12_000


def embeddings(size: int, dim: int, cosines: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of texts and videos, (N,K) and (N,K), pair n in row n."""
    generator = torch.Generator().manual_seed(0)

    def direction(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)

    shared_by_all = direction(1) * (0.2**0.5 if cosines == "clip" else 0.0)
    texts, videos = torch.empty(size, dim), torch.empty(size, dim)
    for start in range(0, size, 1024):  # in parts, so that what is measured later is not this
        rows = slice(start, min(start + 1024, size))
        shared_by_pair = direction(rows.stop - start)
        for vectors in (texts, videos):
            own = shared_by_pair * 0.35 + direction(rows.stop - start) * 0.94
            vectors[rows] = torch.nn.functional.normalize(shared_by_all + 0.89 * own, dim=1)
    return texts, videos


def bare_products(texts: torch.Tensor, videos: torch.Tensor) -> None:
    """All scores, a strip of rows at a time, into one buffer: as fast as this machine multiplies."""
    strip = 1024
    out = torch.empty(strip, len(videos))
    for start in range(0, len(texts), strip):
        rows = texts[start : start + strip]
        torch.mm(rows, videos.T, out=out[: len(rows)])


def in_tiles(texts: torch.Tensor, videos: torch.Tensor, corrections: tuple[str, ...]) -> dict:
    ranks = rank_retrieval(texts, videos, corrections=corrections, scale=SCALE).ranks
    return {name: {key: by_query.middle() for key, by_query in of.items()} for name, of in ranks.items()}


def full_matrix(texts: torch.Tensor, videos: torch.Tensor, corrections: tuple[str, ...]) -> dict:
    """The usual numpy evaluation: the matrix, its softmax, and comparisons with the diagonal."""
    logits = SCALE * (texts.numpy() @ videos.numpy().T)
    ranks = {}
    for correction in corrections:
        ranks[correction] = {}
        for direction, s in (("text_to_video", logits), ("video_to_text", logits.T)):
            if correction == "dual_softmax":
                prior = np.exp(s - s.max(axis=0))
                prior /= prior.sum(axis=0)
                s = s * prior
            own = np.diagonal(s)[:, None]
            ranks[correction][direction] = 0.5 + ((s > own).sum(axis=1) + (s >= own).sum(axis=1)) / 2
    return ranks


def timed(function, *arguments) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - wall, time.process_time() - processor


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts the parent's memory there, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_overhead(options: argparse.Namespace) -> list[harness.Line]:
    """Scoring against the products that it needs, in turns; and its peak memory."""
    texts, videos = embeddings(options.size, options.dim, options.cosines)
    in_tiles(texts[:500], videos[:500], ("none", "dual_softmax"))  # libraries load their parts on first use
    memory = peak_bytes()
    in_tiles(texts, videos, ("none", "dual_softmax"))
    memory = peak_bytes() - memory  # before the products, which need a strip of the matrix
    cases = ((("none",), 1), (("none", "dual_softmax"), 2))
    measured = {corrections: [] for corrections, _ in cases}
    for _ in range(options.repeats):
        before = seconds_of(bare_products, texts, videos)
        for corrections, num_products in cases:
            scoring = seconds_of(in_tiles, texts, videos, corrections)
            after = seconds_of(bare_products, texts, videos)
            measured[corrections].append((scoring, num_products * (before + after) / 2))
            before = after
    size = f"{options.size:,} x {options.size:,}, {options.dim} dims"
    lines = [
        harness.compare(
            f"ranks of {size}: {' + '.join(corrections)}",
            *zip(*measured[corrections], strict=True),
            peer_name=f"the {num_products} product(s) needed",
            speedup=False,
            goal=1.8 if num_products == 2 and options.size >= 50_000 else None,  # what the target is about
        )
        for corrections, num_products in cases
    ]
    matrix = 4 * options.size**2
    return [
        *lines,
        harness.Line(
            f"memory above the embeddings, {size}",
            unit="GB",
            ours=memory / 1e9,
            peer=matrix / 1e9,
            peer_name="the full matrix",
            ratio=memory / 2e9,
            ratio_name="ours / 2 GB",
            goal=1.0,
            at_least=False,
        ),
    ]


def seconds_of(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure_way(options: argparse.Namespace) -> None:
    """In a process of its own: seconds, bytes and mean ranks of one way, as JSON."""
    texts, videos = embeddings(options.size, options.dim, options.cosines)
    way = {"tiles": in_tiles, "numpy": full_matrix}[options.way]
    corrections = ("none", "dual_softmax")
    way(texts[:500], videos[:500], corrections)
    before, start = peak_bytes(), time.perf_counter()
    ranks = way(texts, videos, corrections)
    seconds, memory = time.perf_counter() - start, peak_bytes() - before
    means = {f"{name} {direction}": float(by.mean()) for name, of in ranks.items() for direction, by in of.items()}
    print(json.dumps({"seconds": seconds, "bytes": memory, "mean ranks": means}))


def compare_ways(options: argparse.Namespace) -> list[harness.Line]:
    """Ours and the usual way, each in a process of its own."""
    size = min(options.size, options.numpy_size)
    found = {}
    for way in ("tiles", "numpy"):
        command = [sys.executable, __file__, "--way", way, "--size", str(size), "--dim", str(options.dim)]
        command += ["--cosines", options.cosines, "--threads", str(torch.get_num_threads())]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tiles, full = found["tiles"], found["numpy"]
    worst = max(abs(mean - full["mean ranks"][name]) / mean for name, mean in tiles["mean ranks"].items())
    note = f"mean ranks agree to {worst:.1e}; numpy rounds in float32"
    return [
        harness.Line(
            f"{what} of none + dual_softmax, {size:,} x {size:,}",
            unit=unit,
            ours=tiles[key] * scale,
            peer=full[key] * scale,
            peer_name="full matrix in numpy",
            ratio=full[key] / tiles[key],
            ratio_name="peer / ours",
            note=note,
        )
        for what, key, unit, scale in (("time", "seconds", "s", 1.0), ("memory", "bytes", "GB", 1e-9))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="texts, and videos")
    parser.add_argument("--dim", type=int, default=512, help="K, length of the vectors")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of products and scoring")
    parser.add_argument(
        "--numpy_size", type=int, default=8_000, help="largest set for the full matrix; 0 leaves it out"
    )
    parser.add_argument("--cosines", choices=("clip", "zero"), default="clip", help="where other pairs' cosines lie")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--way", choices=("tiles", "numpy"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        measure_way(options)
        return
    lines = measure_overhead(options)
    if options.numpy_size:
        lines += compare_ways(options)
    settings = {name: getattr(options, name) for name in ("size", "dim", "repeats", "numpy_size", "cosines")}
    print(harness.table(lines))
    name = "evaluation" if options.size == DEFAULT_SIZE else f"evaluation_{options.size}"
    print(f"wrote {harness.write(name, lines, settings)}")


if __name__ == "__main__":
    main()
