# SPDX-License-Identifier: Apache-2.0
"""Retrieval ranks of N texts against M videos, in both directions and under every correction, in tiles.

A score is s = <text vector, video vector>, or an entry of a given matrix. Every correction orders candidates by

    none, query_bank, sinkhorn    s - bias                                     the candidate's bias, 0 for none
    dual_softmax                  S * softmax(S / temp, over the queries)      S = scale * s

so one pass over the tiles computes the priors (score_priors.py), and a second counts, for all corrections and both
directions at once, how many candidates are above each query's right one (rank_counts.py). Notable features:
- rank = 1 + #greater + #equal / 2 (ties take the middle rank: a constant model scores chance); other captions of the
  same video are never distractors;
- ranks do not depend on the tiles: a float32 product decides only what its rounding cannot have changed; candidates
  closer to the right one than that (few) are compared again in float64. Small sets are float64 throughout. (The prior
  of dual softmax over a large set is itself a sum in float32, good to six digits or so);
- dual softmax is computed as log S + S / temp - logsumexp, so nothing under- or overflows, whatever the temperature;
- its product form orders negative S backwards (a larger prior makes them smaller). That is the published formula, and
  it is kept.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .rank_counts import Order, Ranking, count_in_float32, count_in_float64
from .score_priors import SINKHORN_ITERATIONS, bank_bias, bank_hubs, best_is_hub, log_sum_exp, sinkhorn
from .score_tiles import Work, first_true, tiled_scores


CORRECTIONS = ("none", "dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
RECALL_AT = (1, 5, 10)


@dataclass
class RetrievalRanks:
    """What `rank_retrieval` returns.

    Attributes:
        ranks: correction -> direction -> ranks, float64. `text_to_video`: one per text, in the order given.
            `video_to_text` (best caption) and, where a video has several, `video_to_text_caption_max`: one per video
            that has a caption, in the order of the videos.
        groups: direction -> the video of each rank.
        settings: temperatures, and the sizes of the banks.
    """

    ranks: dict[str, dict[str, np.ndarray]]
    groups: dict[str, np.ndarray]
    settings: dict[str, float | int]
    num_texts: int
    num_videos: int


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """R@K in percent, median rank, mean rank, and Rsum, the sum of the R@K."""
    at = {f"R@{k}": round(100 * float(np.mean(ranks <= k)), 8) for k in RECALL_AT}  # 27.4, not 27.400000000000002
    return at | {"MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks)), "Rsum": round(sum(at.values()), 8)}


@torch.inference_mode()
def rank_retrieval(
    text_vectors,
    video_vectors,
    video_of_text=None,
    *,
    scale: float = 1.0,
    corrections: Sequence[str] = ("none", "dual_softmax"),
    dual_softmax_temp: float = 1.0,
    text_bank=None,
    video_bank=None,
    tau: float = 0.05,
    video_tau: float | None = None,
    sinkhorn_temp: float = 0.01,
    block_size: int | None = None,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None,
) -> RetrievalRanks:
    """Ranks in both directions under every correction asked for, and always uncorrected.

    Args:
        text_vectors: (N,K) folded, used in float32; or, with `video_vectors` None, the (N,M) scores themselves
            (tensor, array or memory map).
        video_vectors: (M,K) folded, or None.
        video_of_text: (N,) index of each text's right video. Several texts may share one; a video without a text is
            a distractor for text to video and no query for video to text. None: text n belongs to video n.
        scale: exp(logit_scale); only dual softmax sees it, as S = scale * s.
        corrections: names from `CORRECTIONS`.
        dual_softmax_temp: in units of S. The other temperatures are in units of s.
        text_bank: (Q,K) vectors of training captions, or (Q,M) scores where scores are given: corrects text to video.
        video_bank: (P,K) vectors of training videos, or (P,N) scores of each with every text: corrects video to text.
            A missing bank leaves its direction out of the query banks' ranks, which need one at least.
        tau: of the bank of captions. video_tau: of the bank of videos; None: as `tau`. sinkhorn_temp: of sinkhorn.
        block_size: rows and columns of a tile (default: by device). Changes memory and speed, not results.
        shard, gather: (index, count) of this process, and a function that returns a tensor of every process
            (accelerate: `lambda tensor: accelerator.gather(tensor[None])`). Every process gets the whole result.

    Raises:
        ValueError: shapes that do not fit, an unknown correction, an index out of range, or a score that is not
            finite (the first is named).
    """
    scores = tiled_scores(text_vectors, video_vectors, device, ("text", "video"))
    num_texts, num_videos = scores.shape
    given_video_of_text = _right_videos(video_of_text, num_texts, num_videos).to(scores.device)
    captions = given_video_of_text.bincount(minlength=num_videos)  # (M,)
    several = int(captions.max()) > 1
    corrections = _checked_corrections(corrections, text_bank, video_bank)

    order = given_video_of_text.argsort(stable=True)  # captions of a video in neighbouring rows
    video_of_text = given_video_of_text[order]
    if not torch.equal(video_of_text, given_video_of_text):
        scores.order = order.cpu()
    work = Work(block_size, shard, gather, device)
    strips = work.strips(num_texts, video_of_text if several else None)

    orders = {("none", True): Order(), ("none", False): Order()}  # (correction, by_text) -> how it orders
    hubs, settings = {}, {"scale": scale}
    if "dual_softmax" in corrections:
        slope = scale / dual_softmax_temp
        of_texts, of_videos = log_sum_exp(scores, strips, work, slope)
        orders["dual_softmax", True] = Order(of_videos, 1.0, slope)
        orders["dual_softmax", False] = Order(of_texts, 1.0, slope)
        settings |= {"dual_softmax_temp": dual_softmax_temp}
    if "sinkhorn" in corrections:
        of_texts, of_videos = sinkhorn(scores, strips, work, sinkhorn_temp)
        orders["sinkhorn", True] = Order(of_videos, sinkhorn_temp)
        orders["sinkhorn", False] = Order(of_texts, sinkhorn_temp)
        settings |= {"sinkhorn_temp": sinkhorn_temp, "sinkhorn_iterations": SINKHORN_ITERATIONS}
    if "query_bank" in corrections or "dynamic_query_bank" in corrections:
        video_tau = tau if video_tau is None else video_tau
        for by_text, name, of, bank, candidates, tau_name, bank_tau in (
            (True, "text", "video", text_bank, video_vectors, "tau", tau),
            (False, "video", "text", video_bank, text_vectors, "video_tau", video_tau),
        ):
            if bank is None:
                continue
            bank_scores = tiled_scores(
                bank, None if video_vectors is None else candidates, device, (f"bank {name}", of)
            )
            if bank_scores.shape[1] != scores.shape[1 if by_text else 0]:
                raise ValueError(f"The {name} bank has scores of {bank_scores.shape[1]} {of}s, not of every {of}.")
            bias = bank_bias(bank_scores, work, bank_tau)
            orders["query_bank", by_text] = Order(bias if by_text else bias[order], bank_tau)
            if "dynamic_query_bank" in corrections:
                hub = bank_hubs(bank_scores, work)
                hubs[by_text] = hub if by_text else hub[order]
            settings |= {tau_name: bank_tau, f"{name}_bank": bank_scores.shape[0]}

    own = scores.pairs(torch.arange(num_texts, device=scores.device), video_of_text)
    rankings = {
        (correction, by_text): Ranking(scores, own, video_of_text, by_text, how, grouped=several and not by_text)
        for (correction, by_text), how in orders.items()
    }
    if scores.dtype == torch.float32:
        count_in_float32(scores, list(rankings.values()), strips, work, video_of_text)
    for ranking in rankings.values():
        count_in_float64(scores, ranking, strips, work, video_of_text)
    found = {key: ranking.ranks(work) for key, ranking in rankings.items()}
    for by_text, hub in hubs.items():
        use_bank = best_is_hub(scores, strips, work, hub, by_text)
        found["dynamic_query_bank", by_text] = torch.where(
            use_bank, found["query_bank", by_text], found["none", by_text]
        )

    asked = captions > 0  # a video without a caption is no query
    ranks = {correction: {} for correction in corrections}
    for (correction, by_text), by_query in found.items():
        if correction not in ranks:
            continue
        by_query = torch.empty_like(by_query).index_copy_(1, order, by_query) if by_text else by_query[:, asked]
        directions = ("text_to_video",) if by_text else ("video_to_text", "video_to_text_caption_max")
        ranks[correction] |= dict(zip(directions, by_query.cpu().numpy(), strict=False))
    video = {"text_to_video": given_video_of_text, "video_to_text": asked.nonzero().flatten()}
    video["video_to_text_caption_max"] = video["video_to_text"]
    groups = {direction: video[direction].cpu().numpy() for direction in ranks["none"]}
    return RetrievalRanks(ranks, groups, settings, num_texts, num_videos)


def _right_videos(video_of_text, num_texts: int, num_videos: int) -> torch.Tensor:
    if video_of_text is None:
        if num_texts != num_videos:
            raise ValueError(
                f"{num_texts} texts and {num_videos} videos do not pair up by position: pass the index of each text's "
                "video."
            )
        return torch.arange(num_texts)
    video_of_text = torch.as_tensor(video_of_text)
    if video_of_text.shape != (num_texts,) or video_of_text.is_floating_point():
        raise ValueError(
            f"One video index per text is needed, {num_texts} integers; got {video_of_text.dtype} of shape "
            f"{tuple(video_of_text.shape)}."
        )
    wrong = first_true((video_of_text < 0) | (video_of_text >= num_videos))
    if wrong is not None:
        raise ValueError(
            f"Text {wrong} belongs to video {int(video_of_text[wrong])}, but the videos are 0 to {num_videos - 1}."
        )
    return video_of_text.long()


def _checked_corrections(corrections: Sequence[str], text_bank, video_bank) -> list[str]:
    for name in corrections:
        if name not in CORRECTIONS:
            near = difflib.get_close_matches(name, CORRECTIONS, n=1) or list(CORRECTIONS)
            raise ValueError(f"Unknown correction {name!r}. Did you mean {' or '.join(near)}?")
        if "query_bank" in name and text_bank is None and video_bank is None:
            raise ValueError(f"{name} needs a bank of training captions (`text_bank`) or training videos.")
    return [name for name in CORRECTIONS if name == "none" or name in corrections]
