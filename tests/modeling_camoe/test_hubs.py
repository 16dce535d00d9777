# SPDX-License-Identifier: Apache-2.0
"""The corrections for hubs against naive loops."""

import math

import pytest
import torch

from modeling_camoe.hubs import dual_softmax, dynamic_query_bank, fold_bias, hubs_of_bank, query_bank_bias
from modeling_camoe.retrieval import similarity


def test_a_folded_bias_is_the_corrected_score_and_strength_zero_switches_it_off():
    torch.manual_seed(0)
    texts, videos = torch.randn(5, 24, dtype=torch.float64), torch.randn(4, 24, dtype=torch.float64)
    scores = similarity(texts, videos)
    bias = query_bank_bias(scores, tau=0.1)
    torch.testing.assert_close(similarity(*fold_bias(texts, videos, bias)), scores - bias)
    torch.testing.assert_close(similarity(*fold_bias(texts, videos, bias, strength=0.0)), scores)


def test_query_bank_bias_is_log_mean_exp_and_lies_between_mean_and_maximum():
    torch.manual_seed(0)
    bank = torch.randn(50, 6, dtype=torch.float64)
    for tau in (0.05, 0.5):
        expected = [tau * math.log(sum(math.exp(s / tau) for s in bank[:, v].tolist()) / 50) for v in range(6)]
        torch.testing.assert_close(query_bank_bias(bank, tau), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(query_bank_bias(bank, 1e6), bank.mean(dim=0), atol=1e-5, rtol=0)
    assert (query_bank_bias(bank, 1e-3) - bank.amax(dim=0)).abs().max() < 0.005


def test_the_query_bank_demotes_a_hub():
    # Video 0 is close to every text, and outranks video 1 for the second query, whose video that is.
    scores = torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.7, 0.1], [0.7, 0.1, 0.8]])
    bank = torch.tensor([[0.8, 0.2, 0.2], [0.8, 0.3, 0.1], [0.7, 0.1, 0.3]])
    assert scores.argmax(dim=1).tolist() == [0, 0, 2]
    assert (scores - query_bank_bias(bank, 0.1)).argmax(dim=1).tolist() == [0, 1, 2]


def test_the_dynamic_form_corrects_only_queries_whose_best_candidate_is_a_hub():
    bank = torch.tensor([[0.8, 0.2, 0.2], [0.8, 0.3, 0.1]])
    assert hubs_of_bank(bank).tolist() == [True, False, False]
    scores = torch.tensor([[0.8, 0.7, 0.1], [0.2, 0.5, 0.6]])
    corrected = dynamic_query_bank(scores, torch.tensor([0.5, 0.0, 0.3]), hubs_of_bank(bank))
    torch.testing.assert_close(corrected, torch.tensor([[0.3, 0.7, -0.2], [0.2, 0.5, 0.6]]))


def test_dual_softmax_multiplies_by_a_softmax_over_queries():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64)
    corrected = dual_softmax(logits, temp=2.0)
    for n in range(4):
        for v in range(3):
            prior = math.exp(logits[n, v] / 2) / sum(math.exp(logits[m, v] / 2) for m in range(4))
            assert corrected[n, v].item() == pytest.approx(logits[n, v].item() * prior, abs=1e-12)
