# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint with a query bank, and a folder of small real videos."""

import shutil

import pytest
import torch
from transformers import CLIPConfig

from camoe_search.encoder import CAMoEEncoder
from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEProcessor, CAMoEVideoProcessor
from tests.tokenizer_files import CAPTIONS, tiny_tokenizer
from tests.video_files import write_video


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a CAMoE whose experts differ, two frames of 32 pixels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip_config = CLIPConfig(
        text_config=small | special | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CAMoEModel(CAMoEConfig(clip_config=clip_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    video_processor = CAMoEVideoProcessor(
        num_frames=2, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CAMoEProcessor(video_processor, tokenizer, tagger="none").save_pretrained(folder)
    (folder / "query_bank.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def encoder(checkpoint):
    return CAMoEEncoder.from_pretrained(str(checkpoint), device="cpu")


@pytest.fixture(scope="session")
def some_videos(tmp_path_factory):
    """Six clips with different grey levels; the last one is twice as long."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        levels = [(40 * i + 20 * t) % 250 for t in range(12 + 12 * (i == 5))]
        write_video(folder / f"clip_{i}.mp4", len(levels), pictures=[_picture(i, level) for level in levels])
    return folder


def _picture(i: int, level: int):
    picture = torch.full((48, 64, 3), level, dtype=torch.uint8)
    picture[8 * i : 8 * i + 8, 10 * i : 10 * i + 10, i % 3] = 255 - level
    return picture.numpy()


@pytest.fixture
def videos(some_videos, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(some_videos, tmp_path / "videos")
