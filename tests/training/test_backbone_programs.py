# SPDX-License-Identifier: Apache-2.0
"""Every kind of dual encoder through the programs: train, save, load, score and search, with no option of its own."""

import json

import pytest
import torch
from transformers import AutoModel, AutoProcessor, logging

from camoe_search.cli import main as camoe
from engine.lora import add_lora
from modeling_camoe import CAMoEModel, CAMoEProcessor, export_onnx
from modeling_camoe.encode import encode_texts, encode_videos
from tests.programs import run_program
from tests.tiny_backbones import KINDS, LAYOUTS, tiny_backbone
from tests.video_files import natural_picture, write_video


pytestmark = pytest.mark.slow
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sizes = ("--num_train", 16, "--num_validation", 4, "--num_test", 4, "--num_workers", 1)
    made = run_program("make_motion_clips.py", "--output", folder, *sizes)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module", params=[(kind, layout) for kind in KINDS for layout in LAYOUTS], ids="-".join)
def backbone(request, tmp_path_factory):
    kind, layout = request.param
    return kind, layout, tiny_backbone(tmp_path_factory.mktemp(kind), kind, layout)


@pytest.fixture(scope="module", params=KINDS)
def one_layout(request, tmp_path_factory):
    """Each kind once, in turns of the two layouts."""
    layout = LAYOUTS[KINDS.index(request.param) % 2]
    return request.param, tiny_backbone(tmp_path_factory.mktemp(request.param), request.param, layout)


def test_twenty_steps_train_and_the_result_loads(one_layout, clips, tmp_path):
    kind, folder = one_layout
    done = run_program(
        "run_retrieval.py", "--dataset_name", clips, "--output_dir", tmp_path, "--model_name_or_path", folder,
        "--max_words", 20, "--num_frames", 2, "--batch_size", 8, "--max_train_steps", 20, "--num_workers", 0,
        "--clip_learning_rate", 1e-3, "--learning_rate", 1e-3, "--captions_per_video", "one", "--logging_steps", 1,
        "--gradient_cache_chunk", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "has no processor yet" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4])
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert model.config.experts == processor.experts == ["fusion", "entity", "action", "scene"]
    assert (processor.max_length, processor.video_processor.num_frames) == (20, 2)
    video = str(next((clips / "test").glob("*.mp4")))
    assert encode_videos(model, processor, [video]).vectors.shape == (1, 4 * model.config.projection_dim)
    start = AutoModel.from_pretrained(folder)
    name = next(name for name, _ in start.named_parameters() if "text_model" in name and "0." in name)
    assert not torch.equal(start.get_parameter(name), model.clip.get_parameter(name))


def test_a_plain_model_is_scored_as_it_is(one_layout, clips):
    kind, folder = one_layout
    done = run_program("evaluate_retrieval.py", "--checkpoint", folder, "--dataset_name", clips, "--num_workers", 0)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "eval_results.json").read_text())
    assert list(results["results"]) == ["none", "dual_softmax"] and results["num_videos"] == 4


def test_a_plain_model_indexes_and_searches_with_no_other_option(backbone, tmp_path, capsys):
    kind, layout, folder = backbone
    (tmp_path / "videos").mkdir()
    pictures = [natural_picture(48, 64, seed) for seed in range(4)]
    # Two seconds: one window a file.
    files = [write_video(tmp_path / "videos" / f"{i}.mp4", 24, pictures=[pictures[i]] * 24) for i in range(4)]
    # An export takes seconds, and below all kinds are exported: here two, the second with another end of a text.
    options = [] if (kind, layout) in (("clip", LAYOUTS[0]), ("metaclip_2", LAYOUTS[1])) else ["--no-text-tower"]
    camoe(["index", str(tmp_path / "videos"), "--model", str(folder), "--index", str(tmp_path / "index"), *options])
    capsys.readouterr()
    assert (tmp_path / "index" / "text").is_dir() == (not options)
    camoe(["search", "a red star spins", "--index", str(tmp_path / "index"), "--json", "-k", "4"])
    rows = json.loads(capsys.readouterr().out)
    model, processor = (cls.from_pretrained(folder, zero_shot=True) for cls in (CAMoEModel, CAMoEProcessor))
    text = encode_texts(model, processor, ["a red star spins"])
    scores = (text @ encode_videos(model, processor, list(map(str, files))).vectors.T)[0]
    assert [row["score"] for row in rows] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-4)


def test_frozen_features_train_the_head(one_layout, clips, tmp_path):
    kind, folder = one_layout
    done = run_program(
        "run_retrieval.py", "--dataset_name", clips, "--output_dir", tmp_path / "run", "--model_name_or_path", folder,
        "--max_words", 20, "--num_frames", 2, "--batch_size", 8, "--max_train_steps", 2, "--num_workers", 0,
        "--clip_learning_rate", 0, "--feature_cache", tmp_path / "features", "--captions_per_video", "one",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, model = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(tmp_path / "run")
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, model.clip.state_dict()[name]), name


def test_lora_trains_the_attention_of_both_towers_and_the_head_alone(one_layout):
    kind, folder = one_layout
    model, processor = CAMoEModel.from_pretrained(folder), CAMoEProcessor.from_pretrained(folder, tagger="none")
    lora = add_lora(model, {})
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    matrices = {name for name in trained if "lora_" in name}
    assert len(matrices) == 2 * 2 * 2 * 4  # A and B, towers, layers, query to output
    assert all(name.startswith("base_model.model.head.") for name in trained - matrices)
    videos = [torch.randint(0, 255, (2, 3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    inputs = processor(text=["two kids", "a red star"], videos=videos, return_tensors="pt")
    lora(**inputs, return_loss=True).loss.backward()
    assert all(lora.get_parameter(name).grad is not None for name in matrices)


def test_onnx_gives_the_same_vectors_or_says_in_a_line_why_not(one_layout, tmp_path):
    kind, folder = one_layout
    model, processor = (cls.from_pretrained(folder, zero_shot=True) for cls in (CAMoEModel, CAMoEProcessor))
    if kind == "siglip":
        with pytest.raises(ValueError, match="SiglipTokenizer has no tokenizer.json"):
            export_onnx.export_onnx(model, processor, tmp_path / "onnx")
        return
    export_onnx.export_onnx(model, processor, tmp_path / "onnx")
    code = (tmp_path / "onnx" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"onnx_config.json"', repr(str(tmp_path / "onnx" / "onnx_config.json")))
    for name in ("video_encoder.onnx", "text_encoder.onnx", "tokenizer.json"):
        code = code.replace(f'"{name}"', repr(str(tmp_path / "onnx" / name)))
    variables = {}
    exec(code, variables)
    texts = encode_texts(model, processor, [texts[0] for texts in variables["captions"]])
    assert abs(texts.numpy() - variables["text_vectors"]).max() < 1e-4
