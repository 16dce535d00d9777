# SPDX-License-Identifier: Apache-2.0
"""The protocol: what may be asked for, ranks with ties, R@K, bootstrap intervals, the paired test of two runs.

Candidates with equal scores are in random order, so a query is not right or wrong at K but right with a probability.
"""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


CORRECTIONS = ("none", "dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """How many candidates are `above` each query's right one, (Q,), and how many others are `equal` to it, (Q,).

    The rank, from 1, is one of above + 1 to above + 1 + equal, each as likely as the others.
    """

    above: np.ndarray
    equal: np.ndarray

    def hit_rate(self, k: int) -> np.ndarray:
        """The probability that the rank is at most k, (Q,)."""
        return np.clip((k - self.above) / (self.equal + 1), 0, 1)

    def middle(self) -> np.ndarray:
        """The middle rank, (Q,)."""
        return 1 + self.above + self.equal / 2

    def __getitem__(self, queries) -> "Ranks":
        return Ranks(self.above[queries], self.equal[queries])

    def __len__(self) -> int:
        return len(self.above)


@dataclass
class RetrievalRanks:
    """What `rank_retrieval` returns.

    `text_to_video` has a rank for each text, in the order given. `video_to_text` (best caption) and, where a video has
    several, `video_to_text_caption_max` have one for each video that has a caption, in the order of the videos.
    """

    ranks: dict[str, dict[str, Ranks]]  # correction -> direction -> ranks
    groups: dict[str, np.ndarray]  # direction -> the video of each rank
    settings: dict[str, float | int]  # temperatures, and the sizes of the banks
    num_texts: int
    num_videos: int


def recalls(ranks: Ranks) -> dict[str, float]:
    """Expected R@K in percent, median and mean of the middle ranks, and Rsum, the sum of the R@K."""
    at = {f"R@{k}": round(100 * float(ranks.hit_rate(k).mean()), 8) for k in RECALL_AT}  # 27.4, not 27.400000000000002
    middle = ranks.middle()
    return at | {"MdR": float(np.median(middle)), "MnR": float(middle.mean()), "Rsum": round(sum(at.values()), 8)}


def checked_tensors(left, right, names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,K) and (M,K) vectors or, with `right` None, the (N,M) scores twice. Raises: ValueError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written to it
        given = [torch.as_tensor(x) for x in (left, right) if x is not None]
    if any(x.ndim != 2 or 0 in x.shape for x in given) or given[0].shape[1] != given[-1].shape[1]:
        wanted = "a matrix of scores, (N,M)" if right is None else "vectors, (N,K) and (M,K) with the same K"
        shapes = " and ".join(str(tuple(x.shape)) for x in given)
        raise ValueError(f"{names[0]}s and {names[1]}s need {wanted}, not empty; got {shapes}.")
    return given[0], given[-1]


def not_finite(names: tuple[str, str], row: int, column: int) -> ValueError:
    """The error that names a score."""
    return ValueError(
        f"The score of ({names[0]} {row}, {names[1]} {column}) is not a finite number, and it is the first such. "
        "A rank among such scores means nothing: look for damaged frames or overflow in half precision."
    )


def checked_videos(video_of_text, num_texts: int, num_videos: int) -> torch.Tensor:
    """(N,) the column of each text's video. Raises: ValueError that names what is wrong."""
    if video_of_text is None and num_texts != num_videos:
        raise ValueError(
            f"{num_texts} texts and {num_videos} videos do not pair up by position: pass `video_of_text`."
        )
    right = torch.arange(num_texts) if video_of_text is None else torch.as_tensor(video_of_text)
    if right.shape != (num_texts,) or right.is_floating_point():
        raise ValueError(f"`video_of_text` must be {num_texts} integers; got {right.dtype} {tuple(right.shape)}.")
    for text in ((right < 0) | (right >= num_videos)).nonzero()[:1, 0].tolist():
        video = int(right[text])
        raise ValueError(f"Text {text} belongs to video {video}, but the videos are 0 to {num_videos - 1}.")
    return right.long()


def checked_corrections(corrections: Sequence[str], text_bank, video_bank) -> list[str]:
    """Those asked for and "none", in the order of `CORRECTIONS`. Raises: ValueError."""
    for name in corrections:
        if name not in CORRECTIONS:
            near = difflib.get_close_matches(name, CORRECTIONS, n=1) or CORRECTIONS
            raise ValueError(f"Unknown correction {name!r}. Did you mean {' or '.join(near)}?")
        if "query_bank" in name and text_bank is None and video_bank is None:
            raise ValueError(f"{name} needs a bank of training captions (`text_bank`) or training videos.")
    return [name for name in CORRECTIONS if name == "none" or name in corrections]


def recall_intervals(ranks: Ranks, groups: np.ndarray | None, bootstrap: int = 1000, seed: int = 0) -> dict:
    """95 % bootstrap intervals of R@K over queries, "R@K_ci95": [low, high].

    Args:
        ranks: of Q queries. groups: (Q,) integers, queries of one group are drawn together (40 captions of a video are
            not 40 independent queries); None draws every query alone.
    """
    hits = np.stack([100.0 * ranks.hit_rate(k) for k in RECALL_AT], axis=1)  # (Q,3)
    intervals = np.percentile(_resampled_means(hits, groups, bootstrap, seed), (2.5, 97.5), axis=0).T
    return {f"R@{k}_ci95": interval.tolist() for k, interval in zip(RECALL_AT, intervals, strict=True)}


def paired_test(
    ranks_a: Ranks, ranks_b: Ranks, groups: np.ndarray | None = None, *, at=1, resamples=10_000, seed=0
) -> dict:
    """Is R@`at` of run A different from run B's, on the same queries in the same order?

    Args:
        ranks_a, ranks_b: of one direction and correction. groups: as of `recall_intervals`.

    Returns:
        `difference` A - B in points, its `ci95` (bootstrap), and a two-sided `p_value` (sign-flip test: were the runs
        alike, each group's difference would be as likely to have the other sign).
    """
    if len(ranks_a) != len(ranks_b):
        raise ValueError(f"A paired test needs the same queries: got {len(ranks_a)} and {len(ranks_b)} ranks.")
    gains = 100.0 * (ranks_a.hit_rate(at) - ranks_b.hit_rate(at))
    means = _resampled_means(gains[:, None], groups, resamples, seed)[:, 0]
    return {
        "difference": float(gains.mean()),
        "ci95": np.percentile(means, (2.5, 97.5)).tolist(),
        "p_value": _sign_flip_p_value(gains, groups, resamples, seed),
        "num_queries": len(gains),
    }


def _sign_flip_p_value(gains: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int) -> float:
    if groups is not None:
        gains = np.bincount(np.unique(groups, return_inverse=True)[1], weights=gains)
    # groups that count the same are flipped together: how many keep their sign is binomial
    sizes, counts = np.unique(np.abs(gains).round(9), return_counts=True)
    kept = np.random.default_rng(seed).binomial(counts, 0.5, size=(resamples, len(counts)))
    flipped = np.abs((2 * kept - counts) @ sizes)
    as_extreme = int((flipped >= abs(gains.sum()) - 1e-6).sum())
    return (as_extreme + 1) / (resamples + 1)


def _resampled_means(values: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int) -> np.ndarray:
    """(Q,C) values -> (resamples,C) means over groups of queries drawn with replacement."""
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    sums = np.stack([np.bincount(groups, weights=column) for column in values.T], axis=1)  # (G,C)
    # groups that count the same are drawn together: how often each kind comes up is multinomial
    kinds, inverse = np.unique(np.column_stack([sums, sizes]), axis=0, return_inverse=True)
    shares = np.bincount(inverse.reshape(-1)) / len(sizes)
    drawn = np.random.default_rng(seed).multinomial(len(sizes), shares, size=resamples) @ kinds  # (resamples,C+1)
    return drawn[:, :-1] / drawn[:, -1:]
