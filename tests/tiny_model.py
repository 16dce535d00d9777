# SPDX-License-Identifier: Apache-2.0
"""A CAMoE small enough for tests: two layers a tower, 16 dimensions, frames of 32 pixels."""

import torch
from transformers import CLIPConfig

from modeling_camoe import CAMoEConfig, CAMoEModel


VOCAB, BOS, EOS = 99, 0, 98


def tiny_clip_config(**changes) -> CLIPConfig:
    text = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "hidden_size": 32}
    text |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, **changes)


def tiny_config(**changes) -> CAMoEConfig:
    return CAMoEConfig(clip_config=tiny_clip_config(), **changes)


def tiny_model(seed: int = 0, trained: bool = True, **changes) -> CAMoEModel:
    """A model in eval mode; `trained` moves every parameter away from its start, so that the experts differ."""
    torch.manual_seed(seed)
    model = CAMoEModel(tiny_config(**changes)).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_inputs(num_videos: int = 3, num_texts: int = 3, num_frames: int = 5, num_experts: int = 4, length: int = 7):
    """Inputs of a forward pass: each text ends in EOS, some are shorter, and the last clip has padding frames."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, EOS, (num_texts, num_experts, length), generator=generator)
    input_ids[..., 0] = BOS
    attention_mask = torch.ones_like(input_ids)
    input_ids[..., -1] = EOS
    input_ids[0, :, 4:] = EOS
    attention_mask[0, :, 5:] = 0
    frame_mask = torch.ones(num_videos, num_frames, dtype=torch.bool)
    frame_mask[-1, 3:] = False
    pixels = torch.randn(num_videos, num_frames, 3, 32, 32, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values_videos": pixels,
        "frame_mask": frame_mask,
    }
