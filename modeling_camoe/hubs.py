# SPDX-License-Identifier: Apache-2.0
"""Corrections for hubs: videos (or texts) that are close to everything and so rank first for too many queries.

Plain functions on scores. Each direction has its own correction: pass the scores with queries as rows and candidates
as columns, s of retrieval.py or logits, exp(logit_scale) * s. Dual softmax sees all test queries at once. The query
bank needs none of them: it is one number per candidate, which also folds into the vectors of an index.
"""

import math

import torch


def dual_softmax(logits: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    """Dual softmax at test time: `S * softmax(S / temp, dim=0)`. Transductive: it sees all queries at once.

    Pass S (`logits_per_text`) to rank videos for texts and S.T to rank texts for videos: each direction has its own
    prior.

    Args:
        logits: (queries, candidates), scaled by exp(logit_scale).
        temp: the authors of CAMoE say 1 at test time.
    """
    return logits * (logits / temp).softmax(dim=0)


def query_bank_bias(bank_scores: torch.Tensor, tau: float) -> torch.Tensor:
    """How strongly each candidate is a hub: `b_v = tau * logmeanexp_q(s(q,v) / tau)`. Rank by `s - b_v`.

    The inverted softmax of QB-Norm (arXiv 2112.12777) written as an additive bias, so that it folds into an index. The
    bank is training captions (for video to text: training videos), never the queries of a test set.

    Args:
        bank_scores: (Q, candidates) scores s of the bank's queries.
        tau: temperature in units of s. Large: b_v is the candidate's mean score. Small: its best score.

    Returns:
        (candidates,), to be subtracted from every query's scores.
    """
    return tau * (torch.logsumexp(bank_scores / tau, dim=0) - math.log(bank_scores.shape[0]))


def hubs_of_bank(bank_scores: torch.Tensor) -> torch.Tensor:
    """The candidates that rank first for at least one query of the bank: (Q, candidates) -> bool (candidates,)."""
    is_hub = torch.zeros(bank_scores.shape[1], dtype=torch.bool, device=bank_scores.device)
    is_hub[bank_scores.argmax(dim=1)] = True
    return is_hub


def dynamic_query_bank(scores: torch.Tensor, bias: torch.Tensor, is_hub: torch.Tensor) -> torch.Tensor:
    """Scores corrected only for queries whose uncorrected best candidate is a hub (QB-Norm's dynamic form).

    Args:
        scores: (queries, candidates) s. bias: (candidates,), from `query_bank_bias`. is_hub: (candidates,), from
            `hubs_of_bank`.
    """
    corrected = is_hub[scores.argmax(dim=1)]  # (queries,)
    return torch.where(corrected[:, None], scores - bias, scores)


def fold_bias(text_vectors: torch.Tensor, video_vectors: torch.Tensor, bias: torch.Tensor, strength: float = 1.0):
    """Fold the bank's correction into the vectors: their inner product is `s - strength * b_v`.

    Args:
        text_vectors: (N,K). video_vectors: (B,K). bias: (B,). strength: 1 corrects, 0 does not; it is in the
            text vectors, so the index need not change.

    Returns:
        (N,K+1) and (B,K+1).
    """
    strengths = torch.full_like(text_vectors[:, :1], strength)
    return torch.cat([text_vectors, strengths], dim=1), torch.cat([video_vectors, -bias[:, None]], dim=1)


__all__ = ["dual_softmax", "dynamic_query_bank", "fold_bias", "hubs_of_bank", "query_bank_bias"]
