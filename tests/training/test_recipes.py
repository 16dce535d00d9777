# SPDX-License-Identifier: Apache-2.0
"""The recipes: each one parses, and baselines and methods combine with every benchmark."""

import re
from pathlib import Path

import pytest

from data.errors import UserError
from engine.options import TrainOptions
from engine.recipe import parse_options
from tests.tiny_model import tiny_config


RECIPES = Path(__file__).parents[2] / "training" / "recipes"
BENCHMARKS = ("msrvtt_9k", "msrvtt_7k", "msrvtt_full", "msvd", "lsmdc", "didemo", "activitynet")
DATA = ("dataset_name", "train_split", "validation_split", "validation_captions")
BASELINES = ("zero_shot_clip", "clip4clip_meanp", "clip4clip_seqtransf")


def resolve(*names):
    argv = [word for name in names for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    return parse_options(TrainOptions, [*argv, "--output_dir", "somewhere"])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_recipe_is_the_common_baseline(benchmark):
    options = resolve(benchmark)
    assert options.model_name_or_path == "openai/clip-vit-base-patch32"
    assert (options.batch_size, options.num_train_epochs, options.learning_rate) == (128, 5, 1e-4)
    assert options.clip_learning_rate == 1e-7
    long = benchmark in ("didemo", "activitynet")
    assert (options.num_frames, options.max_words) == ((64, 64) if long else (12, 32))
    assert "test" not in options.train_split and "test" not in (options.validation_split or "")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_goes_on_top_of_a_benchmark(benchmark, baseline):
    plain, options = resolve(benchmark), resolve(benchmark, "vit_b16", baseline)
    assert options.model_name_or_path == "openai/clip-vit-base-patch16"
    assert (options.dataset_name, options.train_split) == (plain.dataset_name, plain.train_split)
    assert (options.num_frames, options.batch_size) == (plain.num_frames, plain.batch_size)
    config = tiny_config(**options.model)
    assert (config.experts, config.gate, options.tagger) == (["fusion"], "uniform", None)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_method_goes_on_top_of_a_benchmark(benchmark):
    frozen, lora = resolve(benchmark, "frozen_clip"), resolve(benchmark, "vit_b16", "lora")
    assert (frozen.clip_learning_rate, frozen.frame_cache) == (0, None) and frozen.feature_cache
    assert lora.lora["r"] == 16 and lora.clip_learning_rate == 1e-4
    assert frozen.batch_size == lora.batch_size == resolve(benchmark).batch_size


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("gradient_cache_chunk", 0, "'gradient_cache_chunk' must be at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "'gradient_accumulation_steps' must be at least 1"),
        ("num_workers", -1, "'num_workers' must not be negative"),
        ("warmup_ratio", 1.5, "'warmup_ratio' must be from 0 to 1"),
        ("batch_size", 1, "a contrastive loss needs a negative"),
        ("max_words", 2, "'max_words' must be at least 3"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_the_option(option, value, message):
    arguments = ["--dataset_name", "x", "--output_dir", "y", "--model_name_or_path", "z", f"--{option}", str(value)]
    with pytest.raises(UserError, match=message):
        parse_options(TrainOptions, arguments)


def test_zero_shot_takes_no_step():
    assert resolve("msrvtt_9k", "zero_shot_clip").max_train_steps == 0


def test_meanp_has_nothing_new_to_train_and_seqtransf_four_layers():
    assert resolve("msvd", "clip4clip_meanp").learning_rate == 0
    assert resolve("msvd", "clip4clip_seqtransf").model["temporal_num_layers"] == 4


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_hyper_parameter_names_its_source(benchmark):
    lines = (RECIPES / f"{benchmark}.yaml").read_text().splitlines()
    settings = [line for line in lines if line[:1].isalpha() and line.partition(":")[0] not in DATA]
    assert settings and all("# " in line for line in settings)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_keeps_its_frames_and_its_head_says_how_much_they_take(benchmark):
    options, head = resolve(benchmark), (RECIPES / f"{benchmark}.yaml").read_text().replace("\n#", "")
    said, clips, minutes = re.search(r"cache takes (\d+) GB for ([\d,]+) clips.*?(\d+) core-minutes", head).groups()
    clips = int(clips.replace(",", ""))
    assert options.frame_cache
    assert int(said) == pytest.approx(clips * options.num_frames * 3 * 224 * 224 / 1e9, abs=0.6)
    assert int(minutes) == pytest.approx(clips * options.num_frames / 12 * 0.05 / 60, rel=0.1, abs=1)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_what_is_not_as_in_clip4clip_is_named(benchmark):
    text = (RECIPES / f"{benchmark}.yaml").read_text()
    assert "BertAdam does not correct the bias" in text and "also decays CLIP's LayerNorms, we do not" in text
    seqtransf = (RECIPES / "clip4clip_seqtransf.yaml").read_text()
    assert "reads CLIP's frame embeddings as they are" in seqtransf
