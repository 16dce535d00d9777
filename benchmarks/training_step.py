# SPDX-License-Identifier: Apache-2.0
"""A training step on ViT-B/32 shapes: forward, backward and AdamW, with random weights; time and peak memory.

    python benchmarks/training_step.py                             about two minutes where the CPU multiplies bfloat16
    python benchmarks/training_step.py --precision float32         as slow as it sounds on a CPU

CAMoE reads four texts per caption and has four experts; the peers read one text:

- clip: transformers' CLIPModel, frames averaged, the loss of CLIP4Clip's meanP;
- seqtransf: the same with CLIP4Clip's temporal transformer (4 layers) between frames and mean;
- xclip: transformers' XCLIPModel with its own loss.

All take turns in one process and thread, on the same frames and captions, in bfloat16 autocast, and are measured in
processor seconds: a step takes seconds, in which other programs would come in between. The memory of each is measured
in a process of its own, as the peak beyond what was held before the model was made. Token numbers are words + 2, which
CLIP's vocabulary comes near to. "Short" captions are up to 32 tokens long and every model gets them trimmed to the
longest of its batch; "long" ones are paragraphs, cut at 77. Batches that one trains with are out of a CPU's reach, but
their texts alone are not: those of 128 captions are compared as well, in CAMoE's groups of texts of like length
(modeling_camoe/text_groups.py), in one rectangle, and one text per caption.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import make_captions, paragraph
from harness import Line, compare, finish, in_turns, parser
from torch import nn
from transformers import CLIPConfig, CLIPModel, XCLIPConfig, XCLIPModel

from modeling_camoe import CAMoEConfig, CAMoEModel, text_groups
from modeling_camoe.captions import caption_streams


# Captions -> peer -> how much more CAMoE may take at most, of time and of memory.
PEERS = {
    "short": {
        "clip": (1.05, 1.05),
        "seqtransf": (None, None),
        "xclip": (None, None),
    },
    "long": {"clip": (1.10, 1.05)},
}
EXPERTS = ["fusion", "entity", "action", "scene"]
BOS, EOS = 49406, 49407
MIN_TEXTS = text_groups.MIN_TEXTS


class MeanPooledClip(nn.Module):
    """CLIP4Clip's similarity heads on transformers' CLIP: meanP, and seqTransf with `num_layers` above 0."""

    def __init__(self, config: CLIPConfig, num_layers: int = 0):
        super().__init__()
        self.clip = CLIPModel(config)
        self.temporal = None
        if num_layers:
            dim = config.projection_dim
            self.positions = nn.Embedding(config.text_config.max_position_embeddings, dim)
            layer = nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            self.temporal = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, frames = pixels.shape[:2]
        images = self.clip.get_image_features(pixels.flatten(0, 1)).pooler_output.unflatten(0, (batch, frames))
        if self.temporal is not None:
            images = images + self.temporal(images + self.positions.weight[:frames])
        videos = F.normalize(F.normalize(images, dim=-1).mean(dim=1), dim=-1)  # (B,D)
        texts = self.clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
        logits = self.clip.logit_scale.exp() * F.normalize(texts, dim=-1) @ videos.T
        target = torch.arange(batch, device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def token_ids(texts: list[str], longest: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the words by chance (the same word, the same id), padded to the longest text: (M,L) and their mask."""
    rows = [[BOS, *(hash(word) % BOS for word in text.split())][: longest - 1] + [EOS] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def inputs_of(options) -> dict:
    captions = paragraph(options.batch) if options.captions == "long" else make_captions(options.batch)
    streams = [text for row in caption_streams(captions, EXPERTS) for text in row]
    one, one_mask = token_ids(captions)
    four, four_mask = token_ids(streams)
    generator = torch.Generator().manual_seed(0)
    size = options.image_size
    return {
        "pixels": torch.randn(options.batch, options.frames, 3, size, size, generator=generator),
        "one": (one, one_mask),
        "four": (four.unflatten(0, (-1, 4)), four_mask.unflatten(0, (-1, 4))),
    }


def step_of(name: str, options, inputs: dict):
    """() -> one training step of a new model."""
    torch.manual_seed(0)
    small = {} if options.image_size == 224 else {"num_hidden_layers": 2}  # for a test of this program
    clip_config = CLIPConfig(
        text_config={"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, **small},
        vision_config={"image_size": options.image_size, "patch_size": 32, **small},
    )
    device = torch.device(options.device)
    pixels = inputs["pixels"].to(device)
    ids, mask, four, four_mask = (tensor.to(device) for tensor in (*inputs["one"], *inputs["four"]))
    if name.startswith("camoe"):
        model = CAMoEModel(CAMoEConfig(clip_config=clip_config, max_frames=max(64, options.frames)))
        if "checkpointing" in name:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if "gradient cache" in name:
            return cached_step(model.to(device).train(), options, pixels, four, four_mask)

        def loss():
            return model(four, pixels, four_mask, return_loss=True).loss

    elif name == "xclip":
        config = XCLIPConfig(
            text_config=clip_config.text_config.to_dict(),
            vision_config={
                **clip_config.vision_config.to_dict(), "num_frames": options.frames, "mit_hidden_size": 512,
                "mit_intermediate_size": 2048, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 8,
            },
        )  # fmt: skip
        model = XCLIPModel(config)

        def loss():
            return model(ids, pixels, attention_mask=mask, return_loss=True).loss

    else:
        model = MeanPooledClip(clip_config, num_layers=4 if name == "seqtransf" else 0)

        def loss():
            return model(pixels, ids, mask)

    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    if "compiled" in name:
        loss = torch.compile(loss)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def cached_step(model, options, pixels, ids, mask):
    """() -> one step whose batch goes through the trainer's gradient cache in four chunks."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from accelerate import Accelerator

    from engine.gradient_cache import cached_backward

    bf16 = options.precision == "bfloat16"
    accelerator = Accelerator(cpu=pixels.device.type == "cpu", mixed_precision="bf16" if bf16 else "no")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
    video_ids = torch.arange(len(ids))

    def step():
        optimizer.zero_grad()
        cached_backward(accelerator, model, batch, video_ids, max(1, len(ids) // 4))
        optimizer.step()

    return step


def text_calls(options, inputs: dict) -> dict:
    """Forward and backward of the texts alone, in the batches that one trains with."""
    torch.manual_seed(0)
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    clip_config = CLIPConfig(text_config=ends, vision_config={"num_hidden_layers": 1, "patch_size": 32})
    model = CAMoEModel(CAMoEConfig(clip_config=clip_config))

    def call(ids, mask, read, min_texts):
        text_groups.MIN_TEXTS = min_texts
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            vectors = read(ids, mask).pooler_output
        vectors.sum().backward()

    def one_text(ids, mask):
        return model.clip.get_text_features(ids, attention_mask=mask)

    return {
        "camoe": lambda: call(*inputs["four"], model.get_text_features, MIN_TEXTS),
        "camoe, one rectangle": lambda: call(*inputs["four"], model.get_text_features, 10**9),
        "clip": lambda: call(*inputs["one"], one_text, MIN_TEXTS),
    }


def peak_bytes() -> int:
    """The most memory that this process has held; Linux only (resource.getrusage counts a parent's)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def run_part(options):
    """In a process of its own: the seconds of a pair, or the peak of one model, as JSON."""
    inputs = inputs_of(options)
    if options.part != "memory":
        torch.set_num_threads(1)
    if options.part == "memory":
        before = peak_bytes()
        step = step_of(options.models[0], options, inputs)
        step()
        step()
        print(json.dumps(peak_bytes() - before))
    elif options.part == "texts":
        print(json.dumps(in_turns(text_calls(options, inputs), options.repeats, clock=time.process_time)))
    else:
        steps = {name: step_of(name, options, inputs) for name in options.models}
        print(json.dumps(in_turns(steps, options.repeats, clock=time.process_time)))


def part(options, kind: str, models: list[str], captions: str):
    """What a process of its own prints."""
    command = [sys.executable, __file__, "--part", kind, "--captions", captions, "--models", *models]
    for name in ("frames", "repeats", "image_size", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--batch", str(options.texts if kind == "texts" else options.batch)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # a word has the same id in every process
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def token_counts(options, captions: str) -> dict:
    """Tokens, padding among them, that the text tower reads in a step."""
    options.captions = captions
    inputs = inputs_of(options)
    ids, mask = (tensor.flatten(0, 1) for tensor in inputs["four"])
    lengths = mask.sum(dim=1).tolist()
    groups, _ = text_groups.group_texts([tuple(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)])
    grouped = sum(len(group) * max(lengths[m] for m in group) for group in groups)
    return {"one text": inputs["one"][0].numel(), "four, one rectangle": ids.numel(), "four, in groups": grouped}


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=2, device="cpu")
    options.add_argument("--batch", type=int, default=3, help="pairs a step (default: %(default)s)")
    options.add_argument(
        "--texts", type=int, default=128, help="captions a step, of the texts alone (default: %(default)s)"
    )
    options.add_argument("--frames", type=int, default=12, help="per clip (default: %(default)s)")
    options.add_argument(
        "--image_size", type=int, default=224, help="below 224 with two layers: a test of this program"
    )
    options.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument(
        "--part", choices=("time", "memory", "texts"), help="for the processes that this program starts"
    )
    options.add_argument("--models", nargs="+", help="for the processes that this program starts")
    options.add_argument("--captions", choices=("short", "long"), default="short", help="likewise")
    options = options.parse_args()
    if options.part:
        run_part(options)
        return

    lines = []
    for captions, peers in PEERS.items():
        title = f"training step, {captions} captions"
        seconds = part(options, "time", ["camoe", *peers], captions)
        memory = {name: part(options, "memory", [name], captions) / 1e9 for name in ("camoe", *peers)}
        for peer, (time_goal, memory_goal) in peers.items():
            lines.append(
                compare(f"{title}: time", seconds["camoe"], seconds[peer], peer, speedup=False, goal=time_goal)
            )
            ratio = memory["camoe"] / memory[peer]
            lines.append(
                Line(
                    f"{title}: memory", "GB", memory["camoe"], memory[peer], peer, ratio=ratio,
                    ratio_name="ours / peer", goal=memory_goal, at_least=False,
                )
            )  # fmt: skip
    seconds = part(options, "texts", ["camoe"], "short")
    for peer in ("clip", "camoe, one rectangle"):
        title = f"texts of {options.texts} short captions, forward and backward"
        lines.append(compare(title, seconds["camoe"], seconds[peer], peer, speedup=False))
    options.batch = options.texts
    tokens = {captions: token_counts(options, captions) for captions in ("short", "long")}
    finish("training_step", lines, options, {"text tokens a step": tokens})


if __name__ == "__main__":
    main()
