# SPDX-License-Identifier: Apache-2.0
"""Retrieval results from vectors or scores: metrics with intervals, chosen temperatures, tables, files, a paired test.

The ranks come from retrieval_ranks.py, in tiles. Here they become what eval_results.json holds: R@K in percent
with 95 % bootstrap intervals over queries, median and mean rank, under every correction, each with what it uses in
words.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .protocol import RECALL_AT, RetrievalRanks, recall_intervals, recalls
from .ranks import rank_retrieval


logger = logging.getLogger(__name__)

# What each correction uses, in words.
NOTES = {
    "none": "uncorrected: each query is ranked on its own",
    "dual_softmax": "transductive: the prior of each direction is computed from all test queries at once",
    "query_bank": "each query is ranked on its own; the candidates' biases come from a bank of training queries",
    "dynamic_query_bank": "as query_bank, but only for queries whose uncorrected best candidate is a hub of the bank",
    "sinkhorn": "transductive: the biases are computed from all test queries and all candidates at once",
}
COLUMNS = (*(f"R@{k}" for k in RECALL_AT), "MdR", "MnR", "Rsum")


@dataclass
class RetrievalResults(RetrievalRanks):
    """What `score_retrieval` returns: the ranks, for `paired_test`, and what they come to.

    Attributes:
        results: correction -> direction -> metric -> value, as in eval_results.json.
        protocol: what was ranked against what, in words. notes: correction -> what it uses, in words.
        settings: temperatures, sizes of the banks, resamples and seed.
    """

    results: dict[str, dict[str, dict]]
    protocol: str
    notes: dict[str, str]

    def to_dict(self) -> dict:
        """What eval_results.json holds of it; the caller adds the data set, the split and the checkpoint."""
        names = ("num_texts", "num_videos", "protocol", "settings", "notes", "results")
        return {name: getattr(self, name) for name in names}


def score_retrieval(
    text_vectors, video_vectors, video_of_text=None, *, bootstrap: int = 1000, seed: int = 0, **options
) -> RetrievalResults:
    """Retrieval metrics in both directions, under every correction asked for. Uncorrected is always reported.

    Args:
        text_vectors: (N,K), or (N,M) scores with `video_vectors` None. video_vectors: (M,K).
        video_of_text: (N,) index of each text's right video; None pairs by position.
        bootstrap: resamples behind every 95 % interval, 0 for no intervals.
        options: as of `rank_retrieval`: scale, corrections, temperatures, banks, device, processes.

    Raises:
        ValueError: as `rank_retrieval`; a score that is not finite is named.
    """
    ranked = rank_retrieval(text_vectors, video_vectors, video_of_text, **options)
    results = {correction: {} for correction in ranked.ranks}
    for correction, directions in ranked.ranks.items():
        for direction, ranks in directions.items():
            intervals = recall_intervals(ranks, ranked.groups[direction], bootstrap, seed) if bootstrap else {}
            results[correction][direction] = recalls(ranks) | intervals
    return RetrievalResults(
        ranked.ranks,
        ranked.groups,
        ranked.settings | {"bootstrap": bootstrap, "seed": seed},
        ranked.num_texts,
        ranked.num_videos,
        results,
        _protocol(ranked),
        {correction: NOTES[correction] for correction in results},
    )


def _protocol(ranked) -> str:
    num_texts, num_videos, asked = ranked.num_texts, ranked.num_videos, len(ranked.groups["video_to_text"])
    distractors = f" ({num_videos - asked} of them without a text, distractors only)" if asked < num_videos else ""
    to_text = f"video_to_text: each of {asked} videos ranks {num_texts} texts. "
    if "video_to_text_caption_max" in ranked.groups:
        to_text = (
            f"video_to_text, best caption: each of {asked} videos ranks {num_texts} texts, the best of its own "
            "captions counts and the others are no distractors. "
            f"video_to_text_caption_max: each of {asked} videos ranks {asked} groups of captions by their highest "
            "score (CLIP4Clip's protocol). "
        )
    return (
        f"text_to_video: each of {num_texts} texts ranks {num_videos} videos{distractors}. {to_text}"
        "Equal scores are in random order: R@K is the expectation, MdR and MnR use the middle rank."
    )


def choose_temperature(
    text_vectors,
    video_vectors,
    video_of_text=None,
    *,
    candidates: Sequence[float],
    correction: str = "dual_softmax",
    direction: str = "text_to_video",
    **options,
) -> float:
    """The temperature with the best R@1 on VALIDATION data; among equals the larger Rsum, then the earlier candidate.

    Args:
        text_vectors, video_vectors, video_of_text, options: as for `score_retrieval`, of the validation split.
        candidates: temperatures to try, in the units of the correction's own.
        correction: whose temperature: dual_softmax, query_bank, dynamic_query_bank or sinkhorn.
        direction: which R@1. Each direction of a query bank has a bank and a temperature of its own; the other
            corrections have one for both.
    """
    names = {"dual_softmax": "dual_softmax_temp", "sinkhorn": "sinkhorn_temp"}
    name = names.get(correction, "tau" if direction == "text_to_video" else "video_tau")
    if not candidates:
        raise ValueError("No temperature to choose from.")
    tried = {}
    for temp in candidates:
        options |= {"corrections": (correction,), "bootstrap": 0, name: temp}
        metrics = score_retrieval(text_vectors, video_vectors, video_of_text, **options).results[correction][direction]
        tried[temp] = metrics["R@1"], metrics["Rsum"]
    logger.info("%s on validation data, temperature: (R@1, Rsum): %s", correction, tried)
    return max(tried, key=tried.get)


def results_table(results: Mapping) -> str:
    """Plain text, a row per correction and direction; 95 % intervals in brackets.

    Args:
        results: correction -> direction -> metrics, or what eval_results.json holds.
    """
    rows = [("correction", "direction", *COLUMNS)]
    for correction, directions in results.get("results", results).items():
        for direction, metrics in directions.items():
            rows.append((correction, direction.replace("_", " "), *(_cell(metrics, name) for name in COLUMNS)))
    lines = plain_table(rows).splitlines()
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *(f"{correction}: {note}" for correction, note in results.get("notes", {}).items())])


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Plain text with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(metrics: Mapping, name: str) -> str:
    interval = metrics.get(f"{name}_ci95")
    return f"{metrics[name]:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def write_results(path: str | os.PathLike, results: Mapping) -> None:
    """Write JSON, whole or not at all: a full disk or Ctrl-C leaves the file that was there."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: str | os.PathLike, write) -> None:
    """Let `write(file)` write a file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
