# SPDX-License-Identifier: Apache-2.0
"""From the ranks of ranks.py to what eval_results.json holds: metrics, intervals, and in words what was done."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .protocol import RECALL_AT, RetrievalRanks, recall_intervals, recalls
from .ranks import rank_retrieval


logger = logging.getLogger(__name__)

NOTES = {  # what each correction uses, in words
    "none": "uncorrected: each query is ranked on its own",
    "dual_softmax": "transductive: the prior of each direction is computed from all test queries at once",
    "query_bank": "each query is ranked on its own; the candidates' biases come from a bank of training queries",
    "dynamic_query_bank": "as query_bank, but only for queries whose uncorrected best candidate is a hub of the bank",
    "sinkhorn": "transductive: the biases are computed from all test queries and all candidates at once",
}
COLUMNS = (*(f"R@{k}" for k in RECALL_AT), "MdR", "MnR", "Rsum")


@dataclass
class RetrievalResults(RetrievalRanks):
    """The ranks, and what they come to."""

    results: dict[str, dict[str, dict]]  # correction -> direction -> metric -> value, as in eval_results.json
    protocol: str  # what was ranked against what, in words
    notes: dict[str, str]  # correction -> what it uses, in words

    def to_dict(self) -> dict:
        """What eval_results.json holds of it; the caller adds the data set, the split and the checkpoint."""
        names = ("num_texts", "num_videos", "protocol", "settings", "notes", "results")
        return {name: getattr(self, name) for name in names}


def score_retrieval(
    text_vectors, video_vectors, video_of_text=None, *, bootstrap: int = 1000, seed: int = 0, **options
) -> RetrievalResults:
    """Retrieval metrics in both directions, under every correction asked for. Uncorrected is always reported.

    Args:
        text_vectors, video_vectors, video_of_text, options: as of `rank_retrieval`, which also says what is raised.
        bootstrap: resamples behind every 95 % interval, 0 for no intervals.
    """
    ranked = rank_retrieval(text_vectors, video_vectors, video_of_text, **options)
    results = {correction: {} for correction in ranked.ranks}
    for correction, directions in ranked.ranks.items():
        for direction, ranks in directions.items():
            intervals = recall_intervals(ranks, ranked.groups[direction], bootstrap, seed) if bootstrap else {}
            results[correction][direction] = recalls(ranks) | intervals
    ranked.settings |= {"bootstrap": bootstrap, "seed": seed}
    notes = {correction: NOTES[correction] for correction in results}
    return RetrievalResults(**vars(ranked), results=results, protocol=_protocol(ranked), notes=notes)


def _protocol(ranked) -> str:
    num_texts, num_videos, asked = ranked.num_texts, ranked.num_videos, len(ranked.groups["video_to_text"])
    distractors = f" ({num_videos - asked} of them without a text, distractors only)" if asked < num_videos else ""
    to_text = f"video_to_text: each of {asked} videos ranks {num_texts} texts. "
    if "video_to_text_caption_max" in ranked.groups:
        to_text = (
            f"video_to_text, best caption: each of {asked} videos ranks {num_texts} texts, the best of its own "
            f"captions counts and the others are no distractors. video_to_text_caption_max: each of {asked} videos "
            f"ranks {asked} groups of captions by their highest score (CLIP4Clip's protocol). "
        )
    return (
        f"text_to_video: each of {num_texts} texts ranks {num_videos} videos{distractors}. {to_text}"
        "Equal scores are in random order: R@K is the expectation, MdR and MnR use the middle rank."
    )


def choose_temperature(
    *data, candidates: Sequence[float], correction: str = "dual_softmax", direction: str = "text_to_video", **options
) -> float:
    """The temperature with the best R@1 on VALIDATION data; among equals the larger Rsum, then the earlier candidate.

    Args:
        data, options: as for `score_retrieval`, of the validation split. candidates: temperatures to try.
        correction: whose temperature. direction: which R@1. Each direction of a query bank has a bank and a
            temperature of its own; the other corrections have one for both.
    """
    names = {"dual_softmax": "dual_softmax_temp", "sinkhorn": "sinkhorn_temp"}
    name = names.get(correction, "tau" if direction == "text_to_video" else "video_tau")
    if not candidates:
        raise ValueError("No temperature to choose from.")
    tried = {}
    for temp in candidates:
        options |= {"corrections": (correction,), "bootstrap": 0, name: temp}
        metrics = score_retrieval(*data, **options).results[correction][direction]
        tried[temp] = metrics["R@1"], metrics["Rsum"]
    logger.info("%s on validation data, temperature: (R@1, Rsum): %s", correction, tried)
    return max(tried, key=tried.get)


def results_table(results: Mapping) -> str:
    """Plain text of what eval_results.json holds, a row per correction and direction; 95 % intervals in brackets."""
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
