# SPDX-License-Identifier: Apache-2.0
"""The score and its folded forms against the double sum."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_camoe.retrieval import expert_scores, fold_for_cosine, fold_text, fold_video, similarity


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
