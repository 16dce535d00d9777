# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation leave behind, small enough for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from evaluation.scoring import score_retrieval
from modeling_camoe import CAMoEProcessor, CAMoEVideoProcessor
from tests.tiny_model import tiny_model
from tests.tokenizer_files import CAPTIONS, tiny_tokenizer


def tiny_results() -> dict:
    """eval_results.json of random vectors, as training/evaluate_retrieval.py writes it."""
    generator = torch.Generator().manual_seed(0)
    texts, videos, bank = (torch.randn(12, 8, generator=generator) for _ in range(3))
    corrections = ("none", "dual_softmax", "query_bank")
    scored = score_retrieval(texts, videos, corrections=corrections, text_bank=bank, bootstrap=20)
    return {
        "dataset": "motion_demo",
        "split": "test",
        "captions": "first",
        "checkpoint": "runs/tiny",
        **scored.to_dict(),
        "temperatures_from": {"tau": "best R@1 on split 'validation'"},
        "bad_videos": [],
    }


def write_run(folder: Path, seed: int) -> Path:
    """What training and evaluation leave behind, with a model of 16 dimensions."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed)
    text = model.config.clip_config.text_config
    text.vocab_size, text.bos_token_id = len(tokenizer), tokenizer.bos_token_id
    text.eos_token_id = text.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = type(model)(model.config).eval()
    model.save_pretrained(folder)
    video_processor = CAMoEVideoProcessor(
        num_frames=3, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CAMoEProcessor(video_processor, tokenizer).save_pretrained(folder)
    (folder / "query_bank.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    (folder / "eval_results.json").write_text(json.dumps(tiny_results(), indent=2))
    save_file({"none/text_to_video": torch.ones(4)}, folder / "eval_ranks.safetensors")
    (folder / "all_results.json").write_text(json.dumps({"steps": 6, "train_pairs": 24, "seconds": 3.2}))
    (folder / "recipe.yaml").write_text("model_name_or_path: openai/clip-vit-base-patch32\nbatch_size: 8\nseed: 42\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"stays at home")
    return folder
