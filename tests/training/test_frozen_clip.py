# SPDX-License-Identifier: Apache-2.0
"""Recipes that keep CLIP's weights: the head on cached features, and LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.errors import UserError
from data.feature_cache import FeatureCache
from engine.options import TrainOptions
from engine.recipe import parse_options
from modeling_camoe.frames import Clip
from tests.programs import run_processes, run_program
from tests.tiny_processor import tiny_model_and_processor


RECIPES = Path(__file__).parents[2] / "training" / "recipes"

# The CLIP to start from: an untrained CAMoE checkpoint with its own tokenizer.
START = """
clip_config:
  projection_dim: 16
  vision_config: {image_size: 32, patch_size: 16, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
                  num_attention_heads: 2}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}
tokenizer_vocab_size: 600
num_frames: 3
max_train_steps: 0
batch_size: 8
num_workers: 0
"""
RUN = """
num_frames: 3
captions_per_video: one
batch_size: 8
num_train_epochs: 3
learning_rate: 1.0e-2
num_workers: 0
logging_steps: 1
"""
# Decoding is counted in a file.
COUNT = """
import modeling_camoe.video_processing_camoe as v
original = v.CAMoEVideoProcessor.decode
def decode(self, *args, **kwargs):
    with open({file!r}, "a") as file:
        file.write("x")
    return original(self, *args, **kwargs)
v.CAMoEVideoProcessor.decode = decode
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sizes = ("--num_train", 24, "--num_validation", 5, "--num_test", 2, "--num_workers", 1)
    made = run_program("make_motion_clips.py", "--output", folder, *sizes)
    assert made.returncode == 0, made.stderr
    (folder / "start.yaml").write_text(START + f"dataset_name: {folder}\noutput_dir: {folder / 'start'}\n")
    (folder / "run.yaml").write_text(RUN + f"dataset_name: {folder}\nmodel_name_or_path: {folder / 'start'}\n")
    started = run_program("run_retrieval.py", "--config", folder / "start.yaml")
    assert started.returncode == 0, started.stderr
    return folder


def train(clips, output_dir, recipe, *options, code=None, world=1):
    arguments = ("--config", clips / "run.yaml", "--config", RECIPES / f"{recipe}.yaml", "--output_dir", output_dir)
    if world == 1:
        done = [run_program("run_retrieval.py", *arguments, *options, code=code)]
    else:
        done = run_processes(world, "run_retrieval.py", *arguments, *options, code=code)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    return output_dir


def column(folder, name) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "jitter"])
def test_cached_features_train_as_the_frozen_clip_itself(clips, features, tmp_path, sampling):
    frames = ("--train_sampling", sampling)
    # With jitter, both draw from the frames that a frame cache stores.
    plain = train(clips, tmp_path / "plain", "frozen_clip", *frames, "--feature_cache", "null",
                  "--frame_cache", tmp_path / "frames")  # fmt: skip
    cached = train(clips, tmp_path / "cached", "frozen_clip", *frames, "--feature_cache", features)
    for name in ("loss", "grad_norm", "gate_action", "validation_Rsum"):
        assert len(column(plain, name)) == (3 if name == "validation_Rsum" else 9)
        torch.testing.assert_close(column(cached, name), column(plain, name), rtol=1e-4, atol=1e-6)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (cached, plain))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    start = load_file(clips / "start" / "model.safetensors")
    same = {name for name in weights if torch.equal(weights[name], start[name])}
    assert all((name in same) == name.startswith("clip.") for name in weights)


def test_each_clip_is_decoded_once_and_a_second_run_decodes_nothing(clips, tmp_path):
    count = COUNT.format(file=str(tmp_path / "decoded"))
    features = ("--feature_cache", tmp_path / "features", "--train_sampling", "uniform")
    first = train(clips, tmp_path / "first", "frozen_clip", *features, code=count)
    assert (tmp_path / "decoded").read_text() == "x" * (24 + 5)  # three epochs and three validations
    stored = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")}
    second = train(clips, tmp_path / "second", "frozen_clip", *features, code=count)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")} == stored
    assert (tmp_path / "decoded").read_text() == "x" * (24 + 5)
    assert torch.equal(column(first, "loss"), column(second, "loss"))


def test_two_processes_share_the_embedding_and_train_alike(clips, features, tmp_path):
    frames = ("--train_sampling", "uniform")
    alone = train(clips, tmp_path / "alone", "frozen_clip", *frames, "--feature_cache", features)
    both = train(clips, tmp_path / "both", "frozen_clip", *frames, "--feature_cache", tmp_path / "new", world=2)
    torch.testing.assert_close(column(both, "loss"), column(alone, "loss"), rtol=1e-3, atol=0)
    names = [sorted(path.name for path in folder.rglob("*.npy")) for folder in (tmp_path / "new", features)]
    assert names[0] and set(names[0]) <= set(names[1])


def test_a_clip_that_cannot_be_embedded_is_skipped_and_listed(clips, tmp_path):
    broken = clips / "train" / "train_00003.mp4"
    content = broken.read_bytes()
    try:
        broken.write_bytes(content[:200])
        train(clips, tmp_path, "frozen_clip", "--feature_cache", tmp_path / "features", "--on_bad_video", "skip")
    finally:
        broken.write_bytes(content)
    (line,) = (tmp_path / "bad_videos.jsonl").read_text().splitlines()
    assert json.loads(line)["video_id"] == "train_00003" and "train_00003.mp4" in json.loads(line)["cause"]
    assert json.loads((tmp_path / "all_results.json").read_text())["bad_videos"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip_learning_rate", "1e-7"], "set --clip_learning_rate 0"),
        (["--frame_cache", "x"], "cannot be used together"),
        (["--lora.r", "4"], "no --lora"),
    ],
)
def test_a_feature_cache_of_a_clip_that_is_trained_is_refused(options, message):
    recipe = ["--config", str(RECIPES / "frozen_clip.yaml"), "--model_name_or_path", "clip", "--dataset_name", "x"]
    with pytest.raises(UserError, match=message):
        parse_options(TrainOptions, [*recipe, "--output_dir", "x", *options])


@pytest.fixture(scope="module")
def adapted(clips, tmp_path_factory):
    return train(clips, tmp_path_factory.mktemp("lora"), "lora", "--clip_learning_rate", 1e-2)


def test_lora_trains_its_matrices_and_the_head_only(clips, adapted):
    results = json.loads((adapted / "all_results.json").read_text())
    # 4 projections of 2 layers of 2 towers, each with 16 x 16 + 16 x 16 in its two matrices of rank 16.
    assert results["trained_parameters"] == results["head_parameters"] + 4 * 2 * 2 * 2 * 16 * 16
    assert column(adapted, "loss")[-1] < column(adapted, "loss")[0] - 0.05
    weights = load_file(adapted / "model.safetensors")
    start = load_file(clips / "start" / "model.safetensors")
    assert weights.keys() == start.keys()
    changed = {name for name in weights if not torch.equal(weights[name], start[name])}
    clip = {name for name in changed if name.startswith("clip.")}
    assert clip and all(name.endswith("_proj.weight") for name in clip) and len(clip) == 4 * 2 * 2


def test_a_lora_checkpoint_loads_without_peft_and_its_adapter_with_it(clips, adapted):
    from peft import PeftModel
    from transformers import AutoModel

    from modeling_camoe import CAMoEModel

    merged = AutoModel.from_pretrained(adapted).eval()
    assert type(merged) is CAMoEModel
    base = CAMoEModel.from_pretrained(clips / "start")
    model = PeftModel.from_pretrained(base, adapted / "adapter").eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 500, (2, 4, 6), generator=generator)
    with torch.no_grad():
        expected = merged(input_ids=ids, pixel_values_videos=pixels)
        output = model(input_ids=ids, pixel_values_videos=pixels)
        start = CAMoEModel.from_pretrained(clips / "start").eval()(input_ids=ids, pixel_values_videos=pixels)
    torch.testing.assert_close(output.logits_per_text, expected.logits_per_text, rtol=1e-4, atol=1e-4)
    assert (output.logits_per_text - start.logits_per_text).abs().max() > 0.01


def test_lora_resumes(clips, adapted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(adapted, folder)
    (folder / "model.safetensors").unlink()
    last = sorted((folder / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    train(clips, folder, "lora", "--clip_learning_rate", 1e-2, "--resume_from_checkpoint", "latest")
    torch.testing.assert_close(column(folder, "loss"), column(adapted, "loss"))


def test_a_field_that_lora_does_not_have_is_one_line(clips, tmp_path):
    arguments = ("--config", clips / "run.yaml", "--lora.rank", 4, "--output_dir", tmp_path)
    done = run_program("run_retrieval.py", *arguments)
    assert done.returncode == 2 and "option 'lora' is wrong" in done.stderr.strip().splitlines()[-1]


def test_features_of_another_number_format_or_clip_are_other_entries(tmp_path):
    model, processor = tiny_model_and_processor()

    def path(precision: str):
        return FeatureCache(tmp_path, model, processor, precision)._frames_path(Clip("a.mp4"), "uniform")

    exact, again, half = path("no"), path("no"), path("bf16")
    with torch.no_grad():
        model.clip.visual_projection.weight.add_(1e-3)
    assert exact == again and len({exact, half, path("no")}) == 3
