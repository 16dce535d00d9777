# SPDX-License-Identifier: Apache-2.0
"""The report of `--dry_run`."""

import torch

from data.captioned_clips import CaptionedClips
from engine.dry_run import activation_bytes, describe_run
from engine.options import TrainOptions
from modeling_camoe.frames import Clip
from tests.tiny_model import random_inputs, tiny_model


def split(num_clips: int, captions_each: int) -> CaptionedClips:
    captions = [["a dog"] * captions_each for _ in range(num_clips)]
    return CaptionedClips([Clip("a.mp4")] * num_clips, [str(n) for n in range(num_clips)], captions, captions)


def test_estimated_activations_are_what_autograd_keeps():
    model, num_pairs = tiny_model().train(), 4
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**random_inputs(num_videos=num_pairs, num_texts=num_pairs, num_frames=5, length=7))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / num_pairs
    assert output.logits_per_text.requires_grad
    # The attention kernel of `meta` keeps its weights, a fused one does not: the estimate is slightly too high.
    assert real < activation_bytes(model, num_frames=5, num_tokens=7) < 1.15 * real


def test_frozen_layers_keep_less():
    model = tiny_model()
    everything = activation_bytes(model, num_frames=5, num_tokens=7)
    model.clip.requires_grad_(False)
    assert activation_bytes(model, num_frames=5, num_tokens=7) < 0.2 * everything


def test_cached_features_keep_what_the_head_keeps():
    model = tiny_model()
    model.clip.requires_grad_(False)
    head = activation_bytes(model, num_frames=5, num_tokens=7, from_features=True)
    assert 0 < head <= activation_bytes(model, num_frames=5, num_tokens=7)


def test_the_description_counts_clips_pairs_steps_and_parameters():
    options = TrainOptions("data/x", "runs/x", model_name_or_path="clip", batch_size=4, num_frames=5, max_words=7)
    model = tiny_model()
    text = describe_run(options, split(10, 3), split(2, 1), model)
    assert "batch_size: 4" in text and "dataset_name: data/x" in text
    assert "train split 'train': 10 clips, 30 captions; 30 pairs an epoch" in text
    assert "validation split 'validation': 2 clips, 2 captions" in text
    assert "steps of 4 pairs: 35, 7 an epoch" in text
    total = sum(p.numel() for p in model.parameters())
    assert f"parameters: {total:,}, of them" in text and f"{total:,} are trained" in text
    assert "--gradient_cache_chunk" in text and "0.001 for each of 4 pairs" in text


def test_a_gradient_cache_bounds_the_activations():
    options = TrainOptions("data/x", "runs/x", model_name_or_path="clip", batch_size=8, gradient_cache_chunk=2)
    text = describe_run(options, split(10, 3), None, tiny_model())
    assert "for each of 2 pairs of a chunk of the gradient cache" in text and "validation: none" in text
