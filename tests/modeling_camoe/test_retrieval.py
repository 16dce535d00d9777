# SPDX-License-Identifier: Apache-2.0
"""Folding, corrections and losses against naive loops, and the losses over two real processes against one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling_camoe import retrieval
from modeling_camoe.retrieval import (
    contrastive_loss,
    dual_softmax,
    dynamic_query_bank,
    expert_contrastive_loss,
    expert_scores,
    fold_bias,
    fold_for_cosine,
    fold_text,
    fold_video,
    hubs_of_bank,
    query_bank_bias,
    similarity,
)


def random_embeds(texts=5, videos=4, experts=3, dim=8):
    torch.manual_seed(0)
    text_embeds = F.normalize(torch.randn(texts, experts, dim, dtype=torch.float64), dim=-1)
    video_embeds = F.normalize(torch.randn(videos, experts, dim, dtype=torch.float64), dim=-1)
    return text_embeds, video_embeds, torch.randn(videos, experts, dtype=torch.float64).softmax(dim=-1)


def test_folding_equals_the_double_sum():
    text_embeds, video_embeds, gate = random_embeds()
    scores = similarity(fold_text(text_embeds), fold_video(video_embeds, gate))
    for n in range(5):
        for b in range(4):
            expected = sum(gate[b, e] * (text_embeds[n, e] @ video_embeds[b, e]) for e in range(3))
            assert scores[n, b].item() == pytest.approx(expected.item(), abs=1e-12)


def test_expert_scores_sum_to_the_score():
    text_embeds, video_embeds, gate = random_embeds()
    contributions = expert_scores(text_embeds, video_embeds, gate)
    assert contributions.shape == (5, 4, 3)
    expected = gate[2, 1] * (text_embeds[3, 1] @ video_embeds[2, 1])
    torch.testing.assert_close(contributions[3, 2, 1], expected)
    torch.testing.assert_close(
        contributions.sum(-1), similarity(fold_text(text_embeds), fold_video(video_embeds, gate))
    )


def test_the_cosine_form_of_the_fold_is_exact():
    text_embeds, video_embeds, gate = random_embeds()
    texts, videos = fold_text(text_embeds), fold_video(video_embeds, gate)
    unit_texts, unit_videos = fold_for_cosine(texts, videos, num_experts=3)
    torch.testing.assert_close(unit_texts.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(unit_videos.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(unit_texts @ unit_videos.T, similarity(texts, videos) / math.sqrt(3))


def test_a_folded_bias_is_the_corrected_score_and_strength_zero_switches_it_off():
    text_embeds, video_embeds, gate = random_embeds()
    texts, videos = fold_text(text_embeds), fold_video(video_embeds, gate)
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


def test_the_query_bank_takes_a_hub_down():
    # Video 0 is near to everything: it takes the second query from its own video 1.
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


def authors_dual_softmax_loss(logits, temp):
    """What the authors' one released file computes, from its formula: called on S and on S.T, then averaged."""
    weighted = logits * F.softmax(logits / temp, dim=0) * len(logits)
    return -torch.diag(F.log_softmax(weighted, dim=-1)).mean()


@pytest.mark.parametrize("temp", [1.0, 10.0, 1000.0])
def test_dual_softmax_loss_equals_the_authors_formula_in_both_directions(temp):
    torch.manual_seed(0)
    texts, videos = (F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=-1) for _ in range(2))
    logits = 20.0 * texts @ videos.T
    expected = (authors_dual_softmax_loss(logits, temp) + authors_dual_softmax_loss(logits.T, temp)) / 2
    torch.testing.assert_close(contrastive_loss(texts, videos, 20.0, dual_softmax_temp=temp), expected)


def test_without_dual_softmax_the_loss_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    texts, videos = (torch.randn(6, 16, dtype=torch.float64) for _ in range(2))
    logits = 3.0 * texts @ videos.T
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(contrastive_loss(texts, videos, 3.0), expected)


@pytest.mark.parametrize("temp", [None, 10.0])
def test_pairs_of_the_same_video_are_not_negatives(temp):
    torch.manual_seed(0)
    texts, videos = (torch.randn(4, 16, dtype=torch.float64) for _ in range(2))
    videos[1] = videos[0]
    ids = torch.tensor([7, 7, 8, 9])
    loss = contrastive_loss(texts, videos, 1.0, ids, temp)
    # The naive way: for each row, softmax over the columns that are not another pair of its video.
    total = 0.0
    for logits in (texts @ videos.T, (texts @ videos.T).T):
        if temp is not None:
            allowed = (ids[:, None] != ids[None, :]) | torch.eye(4, dtype=torch.bool)
            exponents = torch.where(allowed, (logits / temp).exp(), 0.0)
            logits = logits * exponents / exponents.sum(dim=0) * 4
        for n in range(4):
            columns = [m for m in range(4) if m == n or ids[m] != ids[n]]
            total -= (logits[n, n] - torch.logsumexp(logits[n, columns], dim=0)) / 8
    torch.testing.assert_close(loss, total)


def test_expert_loss_is_the_mean_of_each_experts_own_loss():
    text_embeds, _, _ = random_embeds(texts=4)
    video_embeds = text_embeds.flip(0)
    expected = sum(contrastive_loss(text_embeds[:, e], video_embeds[:, e], 5.0) for e in range(3)) / 3
    torch.testing.assert_close(expert_contrastive_loss(text_embeds, video_embeds, 5.0), expected)


def test_unpaired_rows_are_an_error():
    with pytest.raises(ValueError, match="takes pairs, got 3 texts and 2 videos"):
        contrastive_loss(torch.zeros(3, 4), torch.zeros(2, 4), 1.0)


# Both losses in one pair of processes: starting them takes longer than what they do.
TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from modeling_camoe.retrieval import contrastive_loss
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
data = torch.load(f"{path}/data.pt")
mine = slice(4 * rank, 4 * rank + 4)
gradients = []
for temp in (None, 10.0):
    weight, scale = data["weight"].clone().requires_grad_(), data["scale"].clone().requires_grad_()
    texts, videos, ids = data["texts"][mine] @ weight, data["videos"][mine] @ weight, data["ids"][mine]
    contrastive_loss(texts, videos, scale.exp(), ids, temp).backward()
    for gradient in (weight.grad, scale.grad):  # what DDP does
        dist.all_reduce(gradient)
        gradient /= 2
    gradients.append((weight.grad, scale.grad))
torch.save(gradients, f"{path}/gradients_{rank}.pt")
"""


def test_two_processes_have_the_gradient_of_the_one_global_batch(tmp_path):
    torch.manual_seed(0)
    data = {"texts": torch.randn(8, 6), "videos": torch.randn(8, 6), "weight": torch.randn(6, 5)}
    data |= {"scale": torch.tensor(0.3), "ids": torch.tensor([0, 1, 2, 3, 4, 1, 5, 6])}  # video 1 is on both ranks
    torch.save(data, tmp_path / "data.pt")
    env = {**os.environ, "PYTHONPATH": str(Path(retrieval.__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)], env=env) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    of_ranks = [torch.load(tmp_path / f"gradients_{rank}.pt") for rank in range(2)]
    for i, temp in enumerate((None, 10.0)):
        weight, scale = data["weight"].clone().requires_grad_(), data["scale"].clone().requires_grad_()
        contrastive_loss(data["texts"] @ weight, data["videos"] @ weight, scale.exp(), data["ids"], temp).backward()
        for gradients in of_ranks:
            torch.testing.assert_close(gradients[i], (weight.grad, scale.grad), rtol=1e-5, atol=1e-6)
