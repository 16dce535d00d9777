# SPDX-License-Identifier: Apache-2.0
"""The initialisation of a vision tower: its class token attends to regions, and positions affect its output."""

import pytest
import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from data.errors import UserError
from engine.options import TrainOptions
from motion.spatial_start import REGIONS, apply_spatial_start


def tower(num_heads=4, start=True, **sizes):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        **{"image_size": 64, "patch_size": 8, "hidden_size": 64, "intermediate_size": 64} | sizes,
        num_hidden_layers=2, num_attention_heads=num_heads, projection_dim=32, attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    if start:
        apply_spatial_start(model.vision_model)
    return model


def test_each_head_of_the_class_token_attends_to_its_region():
    model = tower()
    with torch.no_grad():
        attentions = model(pixel_values=torch.randn(4, 3, 64, 64), output_attentions=True).attentions
    centres = (torch.arange(8) + 0.5) / 8
    for layer, attention in enumerate(attentions):
        weights = attention[:, :, 0, 1:].mean(dim=0).unflatten(1, (8, 8))  # (heads, rows, columns)
        weights = weights / weights.sum(dim=(1, 2), keepdim=True)
        x, y = (weights.sum(dim=1) * centres).sum(dim=1), (weights.sum(dim=2) * centres).sum(dim=1)
        left, right, top, bottom = range(4)
        assert x[left] < 0.4 and x[right] > 0.6, (layer, x)
        assert y[top] < 0.4 and y[bottom] > 0.6, (layer, y)
        assert (x[[top, bottom]] - 0.5).abs().max() < 0.08 and (y[[left, right]] - 0.5).abs().max() < 0.08


def test_a_head_beyond_the_regions_attends_to_the_whole_frame():
    model = tower(num_heads=12, hidden_size=96)
    with torch.no_grad():
        attention = model(pixel_values=torch.randn(2, 3, 64, 64), output_attentions=True).attentions[0]
    weights = attention[:, :, 0, 1:]
    assert weights[:, len(REGIONS)].max() < 1.5 / 64 < weights[:, 0].max()


def position_sensitivity(model):
    """The distance of a red square's embeddings at two positions, over that of two draws at the same position."""
    torch.manual_seed(1)

    def embed(column):
        pixels = 0.3 * torch.randn(16, 3, 64, 64)
        pixels[:, 0, 24:40, column : column + 16] += 2
        with torch.no_grad():
            return torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds, dim=-1).mean(dim=0)

    return ((embed(0) - embed(48)).norm() / (embed(0) - embed(0)).norm()).item()


def test_position_changes_the_embedding_more_than_with_clips_own_initialisation():
    assert position_sensitivity(tower()) > 2 * position_sensitivity(tower(start=False))


def test_heads_that_are_too_narrow_are_named():
    with pytest.raises(UserError, match="at least 8 dimensions, these have 4"):
        tower(num_heads=4, hidden_size=16)


def test_a_checkpoint_keeps_its_own_start():
    with pytest.raises(UserError, match="a checkpoint has its own start"):
        TrainOptions("data", "out", model_name_or_path="clip", spatial_start=True)
