# SPDX-License-Identifier: Apache-2.0
"""A checkpoint -> two ONNX files that give the same folded vectors without PyTorch.

    python -m modeling_camoe.export_onnx runs/demo onnx

    video_encoder.onnx   pixel_values_videos uint8 (B,T,3,H,W), frame_mask int64 (B,T)   -> video_vectors (B,E*D)
    text_encoder.onnx    input_ids, attention_mask int64 (N,E,L)                         -> text_vectors (N,E*D)
    tokenizer.json       for the `tokenizers` library
    onnx_config.json     sizes, experts, and how far the vectors were from PyTorch's
    README.md            how to run them

Notable features:
- frames go in as uint8 RGB and the graph normalises them, so that it happens exactly once;
- B, T, N and L are dynamic; experts, gate and fold are inside, so the inner product of two outputs is the score;
- before anything is written, onnxruntime runs both graphs at other sizes and must reproduce PyTorch's vectors.

Not part of a Hub repository: no Auto class needs it.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from .modeling_camoe import CAMoEModel
from .processing_camoe import CAMoEProcessor


TOLERANCE = 1e-4  # largest difference of an entry of a vector from PyTorch's; float32 leaves about 1e-6
OPSET = 18  # runs on onnxruntime 1.14 (2023) and later
# A protobuf is limited to 2 GiB: weights of a larger tower go into a file beside it.
MAX_INLINE_BYTES = 1_900_000_000

README = """# {title} as ONNX

Two graphs, no PyTorch: `pip install onnxruntime tokenizers numpy`.

```python
import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

config = json.load(open("onnx_config.json"))
video_encoder = onnxruntime.InferenceSession("video_encoder.onnx")
text_encoder = onnxruntime.InferenceSession("text_encoder.onnx")

# Clips: {num_frames} RGB frames at the centres of equal segments, {resize}.
frames = np.zeros((2, config["num_frames"], 3, config["image_size"], config["image_size"]), np.uint8)
frame_mask = np.ones(frames.shape[:2], np.int64)  # 0 where a short clip was padded
video_vectors = video_encoder.run(None, {{"pixel_values_videos": frames, "frame_mask": frame_mask}})[0]

# Captions: one text per expert, {experts}. Where there is no text for an expert, give it the caption.
captions = [{example}]
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation(config["max_length"])
tokenizer.enable_padding(pad_id=config["pad_token_id"], length=config["padded_length"])
encoded = tokenizer.encode_batch([text for caption in captions for text in caption])
shape = (len(captions), len(config["experts"]), -1)
input_ids = np.array([text.ids for text in encoded], np.int64).reshape(shape)
attention_mask = np.array([text.attention_mask for text in encoded], np.int64).reshape(shape){all_tokens}
text_vectors = text_encoder.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})[0]

scores = text_vectors @ video_vectors.T  # (captions, clips), in [-1, 1]
```

With the package, the processor makes both inputs: `processor(videos=["a.mp4"], do_rescale=False, do_normalize=False,
return_tensors="np")` and `processor(text=["a caption"], return_tensors="np")`, which splits captions as in training
(tagger: {tagger}).

Exported at opset {opset}; at export the vectors differed from PyTorch's by at most {difference:.1e}.
"""


class _VideoEncoder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values_videos: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """(B,T,3,H,W), (B,T) -> (B,E*D)."""
        return self.model.get_video_features(pixel_values_videos, frame_mask).pooler_output


class _TextEncoder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(N,E,L), (N,E,L) -> (N,E*D)."""
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def export_onnx(model, processor, folder: str | os.PathLike) -> dict:
    """Write a model's two towers as ONNX into a new folder, checked against the model.

    Args:
        model: [`CAMoEModel`]; a float32 copy of it on the CPU is exported, in evaluation mode.
        processor: its [`CAMoEProcessor`], for the sizes and the tokenizer.
        folder: a folder that does not exist yet, or is empty.

    Returns:
        What onnx_config.json holds.

    Raises:
        FileExistsError: the folder is not empty.
        ImportError: onnx, onnxscript or onnxruntime is not installed (naming the pip command).
        ValueError: the tokenizer is sentencepiece's own (SigLIP 1).
        RuntimeError: onnxruntime's vectors differ from the model's; nothing is written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already; name a new folder")
    _require_onnx()
    _require_tokenizer_file(processor.tokenizer)
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("sdpa")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".onnx_") as temporary:
        made = Path(temporary) / "onnx"
        made.mkdir()
        differences = {
            "video_encoder": _export_video_encoder(model, made / "video_encoder.onnx"),
            "text_encoder": _export_text_encoder(model, made / "text_encoder.onnx"),
        }
        config = _describe(model, processor) | {"opset": OPSET, "max_difference_from_pytorch": differences}
        (made / "onnx_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        processor.tokenizer.backend_tokenizer.save(str(made / "tokenizer.json"))
        (made / "README.md").write_text(_readme(config), encoding="utf-8")
        os.replace(made, folder)
    return config


def export_text_encoder(model, processor, folder: str | os.PathLike) -> dict:
    """Write the text tower alone into an existing folder: text_encoder.onnx and tokenizer.json, checked as above.

    The weights are a file beside the graph, which onnxruntime maps instead of reading it: a third of the time to load.

    Returns:
        What `onnx_config.json` would hold; it is not written.

    Raises:
        ImportError, ValueError, RuntimeError: as for `export_onnx`.
    """
    _require_onnx()
    _require_tokenizer_file(processor.tokenizer)
    folder = Path(folder)
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("sdpa")
    difference = _export_text_encoder(model, folder / "text_encoder.onnx", external_data=True)
    processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return _describe(model, processor) | {"opset": OPSET, "max_difference_from_pytorch": {"text_encoder": difference}}


def _require_onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f"ONNX export needs {name}: run `pip install onnx onnxscript onnxruntime`.") from error


def _require_tokenizer_file(tokenizer):
    if not tokenizer.is_fast:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no tokenizer.json, without which the graphs cannot be used: "
            "SigLIP 2 and all other dual encoders have one, the first SigLIP has not"
        )


def _export_video_encoder(model, path: Path) -> float:
    """Returns the largest difference from PyTorch, at sizes other than the exported ones."""
    size = model.config.clip_config.vision_config.image_size

    def inputs(videos: int, frames: int) -> dict[str, torch.Tensor]:
        pixels = torch.randint(0, 256, (videos, frames, 3, size, size), dtype=torch.uint8)
        mask = torch.ones(videos, frames, dtype=torch.long)
        mask[-1, frames // 2 + 1 :] = 0  # the last clip is short
        return {"pixel_values_videos": pixels, "frame_mask": mask}

    videos, frames = torch.export.Dim("videos"), torch.export.Dim("frames", max=model.config.max_frames)
    shapes = {"pixel_values_videos": {0: videos, 1: frames}, "frame_mask": {0: videos, 1: frames}}
    encoder = _VideoEncoder(model).eval()
    _export(encoder, inputs(2, 3), shapes, "video_vectors", path)
    return max(_difference(encoder, path, inputs(1, 1)), _difference(encoder, path, inputs(3, 5)))


def _export_text_encoder(model, path: Path, external_data: bool = False) -> float:
    """Returns the largest difference from PyTorch, at sizes other than the exported ones."""
    config, longest = model.config.clip_config.text_config, model.config.max_text_length
    num_experts, is_padded = len(model.config.experts), model.config.text_padding == "max_length"
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    special = sorted(token for token in special if token is not None and token < config.vocab_size)
    plain = next(token for token in range(config.vocab_size) if token not in special)

    def inputs(texts: int, tokens: int) -> dict[str, torch.Tensor]:
        """Texts as the tower reads them: the end token near the end, then padding. SigLIP's have one length."""
        tokens = longest if is_padded else tokens
        ids = torch.randint(0, config.vocab_size, (texts, num_experts, tokens))
        ids[torch.isin(ids, torch.tensor(special))] = plain
        mask = torch.ones_like(ids)
        if not is_padded:
            ids[..., -2] = config.eos_token_id if config.eos_token_id in special else plain
            ids[..., -1] = plain if config.pad_token_id is None else config.pad_token_id
            mask[..., -1] = 0
        return {"input_ids": ids, "attention_mask": mask}

    texts, tokens = torch.export.Dim("texts"), torch.export.Dim("tokens", max=longest)
    shape = {0: texts} if is_padded else {0: texts, 2: tokens}
    shapes = {"input_ids": shape, "attention_mask": shape}
    encoder = _TextEncoder(model).eval()
    _export(encoder, inputs(2, 5), shapes, "text_vectors", path, external_data)
    return max(_difference(encoder, path, inputs(1, 3)), _difference(encoder, path, inputs(3, longest)))


def _export(encoder: nn.Module, inputs: dict, shapes: dict, output: str, path: Path, external_data: bool = False):
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")  # two inputs share it
        torch.onnx.export(
            encoder,
            kwargs=inputs,
            f=path,
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            external_data=external_data or size > MAX_INLINE_BYTES,
            verbose=False,
        )


def _difference(encoder: nn.Module, path: Path, inputs: dict) -> float:
    """Largest difference of onnxruntime's vectors from PyTorch's.

    Raises:
        RuntimeError: it is more than the tolerance.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        difference = (torch.from_numpy(vectors) - encoder(**inputs)).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"onnxruntime's vectors of {path.name} differ from PyTorch's by {difference:.1e}, "
            f"more than {TOLERANCE:.0e}"
        )
    return difference


def _describe(model, processor) -> dict:
    """What a program needs to know to run the graphs."""
    return {
        "name": os.path.basename(os.path.normpath(model.config._name_or_path or "CAMoE")),
        "experts": list(model.config.experts),
        "streams": dict(processor.streams),
        "tagger": processor.to_dict()["tagger"],
        "vector_size": len(model.config.experts) * model.config.projection_dim,
        "logit_scale": model.clip.logit_scale.exp().item(),  # multiplies scores before a softmax
        "image_size": model.config.clip_config.vision_config.image_size,
        "center_crop": bool(processor.video_processor.do_center_crop),
        "num_frames": processor.video_processor.num_frames,
        "max_frames": model.config.max_frames,
        "max_length": processor.max_length,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "padded_length": model.config.max_text_length if model.config.text_padding == "max_length" else None,
        "masks_padding": "attention_mask" in processor.tokenizer.model_input_names,
    }


def _readme(config: dict) -> str:
    streams = {"entity": "a red star", "action": "spins", "scene": "on the beach"}
    texts = [
        streams.get(config["streams"].get(name, name), "a red star spins on the beach") for name in config["experts"]
    ]
    return README.format(
        title=config["name"],
        resize=_resize(config["image_size"], config["center_crop"]),
        all_tokens="" if _masks_padding(config) else "\nattention_mask[:] = 1  # the tower reads padding",
        num_frames=config["num_frames"],
        experts=", ".join(config["experts"]),
        example=json.dumps(texts),
        tagger=config["tagger"],
        opset=config["opset"],
        difference=max(config["max_difference_from_pytorch"].values()),
    )


def _masks_padding(config: dict) -> bool:
    return config["padded_length"] is None or config["masks_padding"]


def _resize(size: int, center_crop: bool) -> str:
    return f"short side scaled to {size}, centre crop" if center_crop else f"scaled to {size} x {size}"


def main():
    """The program. A user's mistake prints one line and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_camoe.export_onnx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="CAMoE checkpoint or plain dual encoder, a folder or Hub id")
    parser.add_argument("folder", help="new folder for the files")
    arguments = parser.parse_args()
    try:
        classes = (CAMoEModel, CAMoEProcessor)
        model, processor = (cls.from_pretrained(arguments.checkpoint, zero_shot=True) for cls in classes)
        config = export_onnx(model, processor, arguments.folder)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for path in sorted(Path(arguments.folder).iterdir()):
        print(f"{path.stat().st_size:>12,}  {path}")
    print("largest difference from PyTorch:", json.dumps(config["max_difference_from_pytorch"]))


if __name__ == "__main__":
    main()


__all__ = ["export_onnx", "export_text_encoder"]
