# SPDX-License-Identifier: Apache-2.0
"""ONNX export: onnxruntime gives the model's vectors, and what is written explains itself."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from modeling_camoe import CAMoEModel, export_onnx
from tests.tiny_processor import tiny_model_and_processor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_and_processor():
    model, processor = tiny_model_and_processor(num_frames=4, experts=["fusion", "action", "scene"])
    processor.video_processor.do_rescale = processor.video_processor.do_normalize = False
    return model, processor


@pytest.fixture(scope="module")
def exported(model_and_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    model, processor = model_and_processor
    model.train()
    export_onnx.export_onnx(model, processor, folder)
    assert model.training  # a copy was exported
    model.eval()
    return folder


@torch.inference_mode()
def test_onnxruntime_gives_the_models_vectors_for_what_the_processor_makes(model_and_processor, exported):
    model, processor = model_and_processor
    generator = torch.Generator().manual_seed(0)
    clips = [
        torch.randint(0, 256, (frames, 3, 40, 48), dtype=torch.uint8, generator=generator) for frames in (9, 2, 4)
    ]
    inputs = processor(text=["a red star spins on the beach", "kids"], videos=clips, return_tensors="pt")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}

    session = onnxruntime.InferenceSession(exported / "video_encoder.onnx")
    (vectors,) = session.run(None, {name: arrays[name] for name in ("pixel_values_videos", "frame_mask")})
    expected = model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).pooler_output
    assert vectors.shape == (3, 3 * 16) and np.abs(vectors - expected.numpy()).max() < 1e-4

    session = onnxruntime.InferenceSession(exported / "text_encoder.onnx")
    (vectors,) = session.run(None, {name: arrays[name] for name in ("input_ids", "attention_mask")})
    expected = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    assert vectors.shape == (2, 3 * 16) and np.abs(vectors - expected.numpy()).max() < 1e-4


@torch.inference_mode()
def test_the_code_in_the_readme_runs_without_pytorch_and_scores_as_the_model_does(model_and_processor, exported):
    model, processor = model_and_processor
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    alone = "import sys\nsys.modules.update(torch=None, transformers=None, modeling_camoe=None)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone + code + "print(json.dumps(scores.tolist()))"],
        cwd=exported, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = {"fusion": "a red star spins on the beach", "action": "spins", "scene": "on the beach"}
    videos = list(torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8))  # as the README's
    output = model(**processor(text=text, videos=videos, return_tensors="pt"))
    expected = output.logits_per_text / model.clip.logit_scale.exp()
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-4, rtol=0)


def test_the_config_tells_what_a_program_must_know(model_and_processor, exported):
    model, processor = model_and_processor
    config = json.loads((exported / "onnx_config.json").read_text())
    assert (config["experts"], config["vector_size"]) == (["fusion", "action", "scene"], 48)
    assert (config["num_frames"], config["image_size"], config["max_length"]) == (4, 32, 32)
    assert config["pad_token_id"] == processor.tokenizer.pad_token_id and config["tagger"] == "en_core_web_sm"
    assert config["logit_scale"] == pytest.approx(model.clip.logit_scale.exp().item())
    assert max(config["max_difference_from_pytorch"].values()) < 1e-4
    assert {path.name for path in exported.iterdir()} == {
        "video_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "onnx_config.json", "README.md",
    }  # fmt: skip


def test_a_graph_that_gives_other_vectors_is_an_error(model_and_processor, exported):
    model, _ = model_and_processor
    other = CAMoEModel(model.config).eval()
    pixels = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    inputs = {"pixel_values_videos": pixels, "frame_mask": torch.ones(1, 2, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="vectors of video_encoder.onnx differ from PyTorch's by"):
        export_onnx._difference(export_onnx._VideoEncoder(other), exported / "video_encoder.onnx", inputs)


def test_what_fails_leaves_nothing_behind(model_and_processor, tmp_path, monkeypatch):
    def fail(model, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space")

    monkeypatch.setattr(export_onnx, "_export_video_encoder", fail)
    with pytest.raises(RuntimeError, match="no space"):
        export_onnx.export_onnx(*model_and_processor, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named_before_any_work(model_and_processor, exported, monkeypatch, capsys, tmp_path):
    with pytest.raises(FileExistsError, match="holds something already; name a new folder"):
        export_onnx.export_onnx(*model_and_processor, exported)
    monkeypatch.setattr(sys, "argv", ["export_onnx", str(tmp_path / "missing"), str(tmp_path / "onnx")])
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main()
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="ONNX export needs onnxscript: run `pip install"):
        export_onnx.export_onnx(*model_and_processor, tmp_path / "onnx")
