# SPDX-License-Identifier: Apache-2.0
"""A tiny CAMoE with its processor, for real captions and real clips."""

import torch

from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEProcessor, CAMoEVideoProcessor
from tests.tiny_model import tiny_clip_config
from tests.tokenizer_files import tiny_tokenizer


def tiny_model_and_processor(num_frames: int = 3, **changes) -> tuple[CAMoEModel, CAMoEProcessor]:
    """`changes` are of the configuration; the head is moved away from its start, so that the experts differ."""
    tokenizer, clip = tiny_tokenizer(), tiny_clip_config()
    clip.text_config.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(clip.text_config, token, getattr(tokenizer, token))
    torch.manual_seed(0)
    model = CAMoEModel(CAMoEConfig(clip_config=clip, **changes)).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    video_processor = CAMoEVideoProcessor(num_frames=num_frames, **size)
    return model, CAMoEProcessor(video_processor, tokenizer, model.config)
