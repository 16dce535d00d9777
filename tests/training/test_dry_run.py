# SPDX-License-Identifier: Apache-2.0
"""The report of `--dry_run`."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_retrieval
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.captioned_clips import CaptionedClips
from data.errors import UserError
from engine.dry_run import activation_bytes, choose_prefetch, describe_run, pair_cost
from engine.optimizer import parameter_groups
from engine.options import TrainOptions
from engine.recipe import parse_options
from engine.start import build_model
from modeling_camoe import CAMoEVideoProcessor
from modeling_camoe.frames import Clip
from tests.tiny_model import random_inputs, tiny_model
from tests.tiny_processor import tiny_model_and_processor


RECIPES = Path(__file__).parents[2] / "training" / "recipes"


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


def describe(splits, processes=1, **changes) -> str:
    given = {"dataset_name": "data/x", "output_dir": "runs/x", "model_name_or_path": "clip"}
    options = TrainOptions(**given, **changes)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    processor = SimpleNamespace(video_processor=CAMoEVideoProcessor(num_frames=options.num_frames, **size))
    return describe_run(options, splits, tiny_model(), processor, processes)


def test_the_description_counts_clips_pairs_steps_and_parameters():
    model = tiny_model()
    splits = {"train": split(10, 3), "validation": split(2, 1)}
    text = describe(splits, batch_size=4, num_frames=5, max_words=7, samples_per_second=0.01)
    assert "batch_size: 4" in text and "dataset_name: data/x" in text
    assert "train split 'train': 10 clips, 30 captions; 30 pairs an epoch" in text
    assert "validation split 'validation': 2 clips, 2 captions" in text
    assert "steps of 4 pairs: 35, 7 an epoch; 3.9 hours at 0.01 pairs a second" in text
    total = sum(p.numel() for p in model.parameters())
    assert f"parameters: {total:,}, of them" in text and f"{total:,} are trained" in text
    assert "--gradient_cache_chunk" in text and "0.001 for each of 4 pairs" in text


def test_a_gradient_cache_bounds_the_activations():
    text = describe({"train": split(10, 3)}, batch_size=8, gradient_cache_chunk=2)
    assert "for each of 2 pairs of a chunk of the gradient cache" in text and "validation: none" in text


def test_disk_host_and_shared_memory_follow_from_clips_frames_workers_and_processes():
    splits = {"train": split(1000, 1), "validation": split(500, 1)}
    clip = 12 * 3 * 224 * 224
    text = describe(splits, batch_size=64, frame_cache="cache", num_workers=2, prefetch_factor=1)
    assert f"cache: {1500 * clip / 1e9:.1f} GB; frames of 1,500 clips in cache, filled in" in text
    assert f"shared memory: {2 * 2 * 64 * clip / 1e9:.1f} GB; a process: 2 workers x 1 batches ahead" in text
    jitter = describe(splits, batch_size=64, frame_cache="cache", train_sampling="jitter", frame_cache_jpeg=95)
    assert f"cache: {0.22 * 2500 * clip / 1e9:.1f} GB" in jitter
    two = describe(splits, processes=2, batch_size=64, num_workers=2, prefetch_factor=1)
    assert f"shared memory: {2 * 2 * 64 * clip / 1e9:.1f} GB" in two and "for 2 processes" in two
    assert "every clip is decoded in every epoch" in two


def test_workers_prepare_fewer_batches_where_memory_is_short_and_too_many_are_refused():
    shape, pairs = (12, 3, 224, 224), 128
    batch = pairs * 12 * 3 * 224 * 224
    assert choose_prefetch(None, pairs, shape, 8, 1, free=1000 * batch) == 4
    assert choose_prefetch(None, pairs, shape, 8, 1, free=4 * 8 * 3 * batch) == 2
    assert choose_prefetch(6, pairs, shape, 8, 1, free=2 * 8 * 7 * batch) == 6
    assert choose_prefetch(None, pairs, shape, 0, 1, free=0) == 1
    with pytest.raises(UserError, match="8 workers with prefetch_factor 1 need 7.4 GB .* for 2 processes, and 9.2 GB"):
        choose_prefetch(None, pairs, shape, 8, 2, free=40 * batch)
    with pytest.raises(UserError, match="lower --num_workers, --prefetch_factor or --batch_size"):
        choose_prefetch(6, pairs, shape, 8, 1, free=2 * 8 * 7 * batch - 2)


def test_operations_of_a_pair_are_those_that_run():
    model = tiny_model().train()
    cost = pair_cost(model, num_frames=5)
    inputs = random_inputs(num_videos=2, num_texts=2, num_frames=5, length=12)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits_per_text.sum().backward()
    assert cost.fixed + 4 * 12 * cost.token == pytest.approx(counter.get_total_flops() / 2, rel=0.03)
    model.clip.requires_grad_(False)
    assert pair_cost(model, num_frames=5).fixed < 0.5 * cost.fixed


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    model, processor = tiny_model_and_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


TABLES = ("ablations", "ablations_full", "reproduce_msrvtt")


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in TABLES])
def test_every_recipe_says_what_its_run_takes(name, start, tmp_path):
    given = ["--config", str(RECIPES / f"{name}.yaml"), "--dataset_name", str(tmp_path), "--output_dir", "runs/x"]
    if name != "motion_demo":
        given += ["--model_name_or_path", str(start)]
    options = parse_options(TrainOptions, given)
    for split in filter(None, (options.train_split, options.validation_split)):
        rows = [json.dumps({"video": f"{split}{n}.mp4", "captions": ["a dog runs"] * 3}) for n in range(200)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    splits, processor = run_retrieval.load_data(options)
    model = build_model(options, processor)
    parameter_groups(model, options)
    text = describe_run(options, splits, model, processor, processes=8)
    lines = text.splitlines()
    for word in ("steps of ", "disk: ", "host memory: ", "shared memory: ", "device memory, estimated"):
        assert len([line for line in lines if line.startswith(word)]) == 1, text
    assert re.search(r"steps of \d+ pairs: \d+, \d+ an epoch; [\d.]+ hours at 100 pairs a second", text)
    assert ("cache: 0.0 GB; none" in text) == (options.frame_cache is None and options.feature_cache is None)
