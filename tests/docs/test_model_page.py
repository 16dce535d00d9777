# SPDX-License-Identifier: Apache-2.0
"""The code in docs/model.md runs, block after block, as a reader would run it."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

from modeling_camoe import export_onnx
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


PAGE = Path(__file__).parents[2] / "docs" / "model.md"
EXPORT = inspect.signature(export_onnx.export_onnx)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the checkpoint and the clips that the page names; what other tests run in full is cut short."""
    for part in tiny_model_and_processor():
        part.save_pretrained(tmp_path / "runs" / "demo")
    for name in ("clip.mp4", "other.mp4"):
        write_video(tmp_path / name, num_frames=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *args: exports.append(args))
    exports = []
    return exports


def test_every_block_runs(workplace):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 10
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    with torch.inference_mode():
        expected = names["output"].video_model_output.pooler_output
        torch.testing.assert_close(names["video_vectors"], expected)
        torch.testing.assert_close(names["text_vectors"], names["output"].text_model_output.pooler_output)
    assert names["scores"].shape == (2, 2) and names["loss"] > 0
    assert names["program"].module() is not None
    (arguments,) = workplace
    assert EXPORT.bind(*arguments).arguments["folder"] == "onnx"
    assert type(names["merged"]).__name__ == "CAMoEModel"
    assert Path("trained/model.safetensors").is_file() and Path("trained/processor_config.json").is_file()
    assert names["model"].dtype == torch.bfloat16
