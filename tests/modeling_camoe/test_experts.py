# SPDX-License-Identifier: Apache-2.0
"""Experts and gate: what each sees of a clip, and that a fresh one is the mean-pooled frame embedding."""

import pytest
import torch
import torch.nn.functional as F

from modeling_camoe.experts import SingleGate, VideoExpert, frame_changes, masked_mean
from tests.tiny_model import tiny_model


def make_expert(aggregation, fresh=False, dim=16):
    torch.manual_seed(0)
    expert = VideoExpert(dim, aggregation, num_layers=2, num_heads=4, max_frames=8, reduction=4)
    if not fresh:
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return expert.eval()


def frames_and_mask(batch=3, frames=6, dim=16):
    torch.manual_seed(1)
    mask = torch.ones(batch, frames, dtype=torch.bool)
    mask[0, 4:] = False
    return F.normalize(torch.randn(batch, frames, dim), dim=-1), mask


def test_masked_mean_equals_a_loop_over_real_frames():
    frames, mask = frames_and_mask()
    expected = torch.stack([frames[b][mask[b]].mean(dim=0) for b in range(3)])
    torch.testing.assert_close(masked_mean(frames, mask), expected)


def test_frame_changes_equal_a_loop_over_neighbours_that_are_both_real():
    frames, mask = frames_and_mask()
    mask[2, 3] = False  # a hole: no change into it, none out of it
    changes = frame_changes(frames, mask)
    for b in range(3):
        for t in range(6):
            real = t > 0 and bool(mask[b, t] and mask[b, t - 1])
            expected = frames[b, t] - frames[b, t - 1] if real else torch.zeros(16)
            torch.testing.assert_close(changes[b, t], expected)


@pytest.mark.parametrize("aggregation", ["mean", "excitation", "transformer", "motion"])
def test_padding_frames_do_not_change_an_expert(aggregation):
    expert = make_expert(aggregation)
    frames, mask = frames_and_mask()
    embeds, weights = expert(frames, mask)
    noisy = torch.where(mask[..., None], frames, torch.full_like(frames, 7.0))
    noisy_embeds, noisy_weights = expert(noisy, mask)
    torch.testing.assert_close(noisy_embeds, embeds)
    torch.testing.assert_close(noisy_weights, weights)
    short_embeds, _ = expert(frames[:1, :4], mask[:1, :4])
    torch.testing.assert_close(short_embeds, embeds[:1])


@pytest.mark.parametrize("aggregation", ["mean", "excitation"])
def test_order_free_experts_ignore_frame_order(aggregation):
    expert = make_expert(aggregation)
    frames, _ = frames_and_mask()
    mask = torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(expert(frames.flip(1), mask)[0], expert(frames, mask)[0])


@pytest.mark.parametrize("aggregation", ["transformer", "motion"])
def test_the_temporal_experts_see_frame_order(aggregation):
    expert = make_expert(aggregation)
    frames, _ = frames_and_mask()
    mask = torch.ones(3, 6, dtype=torch.bool)
    difference = (expert(frames.flip(1), mask)[0] - expert(frames, mask)[0]).abs().max()
    assert difference > 0.01  # order-free experts: 1e-7


def test_the_residual_of_the_motion_expert_is_blind_to_what_stays_the_same():
    frames, mask = frames_and_mask()
    scenery = torch.randn(3, 1, 16)
    residual, other = (
        make_expert("motion").residual(frames, mask),
        make_expert("motion").residual(frames + scenery, mask),
    )
    torch.testing.assert_close(other[mask], residual[mask])
    transformer = make_expert("transformer").residual
    assert (transformer(frames + scenery, mask) - transformer(frames, mask))[mask].abs().max() > 0.01


def test_a_clip_of_one_still_is_no_motion():
    expert = make_expert("motion")
    still = F.normalize(torch.randn(2, 1, 16), dim=-1)
    residual = expert.residual(still.expand(2, 6, 16), torch.ones(2, 6))
    torch.testing.assert_close(residual[0], residual[1])  # whatever the still shows


def test_excitation_weights_say_how_much_each_frame_counts():
    expert = make_expert("excitation")
    frames, mask = frames_and_mask()
    embeds, weights = expert(frames, mask)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert (weights[0, 4:] == 0).all()
    pooled = (frames * weights[..., None]).sum(dim=1)
    torch.testing.assert_close(embeds, F.normalize(expert.projection(pooled), dim=-1))


def test_too_many_frames_are_an_error_that_says_what_to_do():
    frames = torch.randn(1, 9, 16)
    with pytest.raises(ValueError, match="9 frames, this model takes at most 8"):
        make_expert("transformer")(frames, torch.ones(1, 9))


def test_a_fresh_gate_is_its_prior_and_a_trained_one_depends_on_the_video():
    fresh = tiny_model(trained=False, gate_prior={"fusion": 5, "entity": 2, "action": 2, "scene": 1}).head.gate
    frames, mask = frames_and_mask()
    torch.testing.assert_close(fresh(frames, mask), torch.tensor([[0.5, 0.2, 0.2, 0.1]] * 3))
    gate = SingleGate(16, [0.0] * 3)
    torch.nn.init.normal_(gate.projection.weight)
    weights = gate(frames, mask)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert weights.std(dim=0).min() > 0.01
