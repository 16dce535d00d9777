# SPDX-License-Identifier: Apache-2.0
"""What the heads cost: counted as by hand, small beside CLIP, and as the docs say."""

from pathlib import Path

import pytest

from benchmarks.heads_cost import LIMIT, heads_cost, markdown
from modeling_camoe import CAMoEConfig
from tests.tiny_model import tiny_config


def test_heads_are_counted_as_by_hand():
    dim, frames, hidden = 16, 5, 4
    costs = {cost.name: cost for cost in heads_cost(tiny_config(), num_frames=frames)}
    projection = dim * dim
    excitation = frames * (2 * dim * hidden + hidden)
    layer = frames * 12 * dim * dim + 2 * frames * frames * dim  # qkv, output and MLP; the two products of attention
    assert costs["entity: excitation"].multiply_adds == excitation + projection
    assert costs["fusion: transformer"].multiply_adds == layer + frames * dim * dim + projection
    assert costs["gate"].multiply_adds == dim * 4
    assert costs["gate"].parameters == dim * 4 + 4
    assert costs["entity: excitation"].parameters == (2 * dim * hidden + hidden) + (hidden + 1) + projection
    parts = ("fusion: transformer", "entity: excitation", "action: motion", "scene: excitation", "gate")
    for count in ("parameters", "multiply_adds"):
        assert getattr(costs["all heads"], count) == sum(getattr(costs[name], count) for name in parts)


@pytest.fixture(scope="module")
def vit_b32():
    return heads_cost(CAMoEConfig())


def test_heads_of_vit_b32_cost_at_most_a_tenth_of_clip(vit_b32):
    clip, heads = vit_b32[0], next(cost for cost in vit_b32 if cost.name == "all heads")
    assert clip.parameters == 151_277_313  # OpenAI's checkpoint
    assert 0.01 < heads.share_of_parameters <= LIMIT
    assert 0.0001 < heads.share_of_multiply_adds <= LIMIT


def test_the_docs_have_the_counted_table(vit_b32):
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    assert markdown(vit_b32) in page
