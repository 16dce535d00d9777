# SPDX-License-Identifier: Apache-2.0
"""On a GPU: training, embedding, NVDEC and the loss, in one script that fits ten minutes of one card.

    python benchmarks/gpu.py                       batch 128, 12 frames, bfloat16
    python benchmarks/gpu.py --device cpu --tiny   the same lines on a few small layers, to try the script out

- training, samples a second, share of the card's peak (MFU) and peak memory: bare CLIP, X-CLIP and CAMoE, eager and
  compiled, CAMoE also with gradient checkpointing and with the gradient cache in four chunks;
- embedding, clips a second from uint8 frames in pinned memory;
- decoding by the card (NVDEC) through torchcodec, if that loads, beside one core of the processor;
- the dual softmax loss beside the plain one, at batch 128 and 4096.

Random weights, short captions. A line that fails (a library that does not load, memory that runs out, a backend that
does not compile) says so and the others run; where memory runs out the batch is halved, which the line says. Lines in
the order of their worth: when `--minutes` are over, the rest is skipped.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clips import write_clip
from harness import Line, finish, in_turns, parser, positive
from torch.utils.flop_counter import FlopCounterMode
from training_step import inputs_of, step_of


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from engine.telemetry import peak_rate


MODELS = ("camoe", "clip", "xclip", "camoe, compiled", "clip, compiled", "xclip, compiled")
CLIP_GOAL = 1.10  # a step of CAMoE may take this many times a step of bare CLIP


class Card:
    """The device: its name, its peak, waiting for it, and its memory."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.is_gpu else "CPU"
        self.peak = peak_rate(self.device)

    def wait(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def forget(self):
        """Free what an earlier line left, and count memory from here."""
        gc.collect()
        torch.compiler.reset()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> str:
        return f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if self.is_gpu else ""

    def seconds(self, call: Callable, options) -> float:
        """Median seconds of a call, waiting for the device."""

        def timed():
            call()
            self.wait()

        return statistics.median(in_turns({"call": timed}, options.repeats, warm_up=options.warm_up)["call"])


def with_smaller_batches(measure: Callable[[int], Line], batch: int, smallest: int = 2) -> Line:
    """A line at this batch, or at half of it, a quarter, ... where memory runs out. The line says so."""
    asked = batch
    while True:
        try:
            line = measure(batch)
        except torch.OutOfMemoryError:
            if batch // 2 < smallest:
                raise
            batch //= 2
            continue
        if batch < asked:
            line.note += f"; batch {batch}: memory ran out at {2 * batch}"
        return line


def training(name: str, options, card: Card) -> Line:
    """Samples a second of a training step."""

    def measure(batch: int) -> Line:
        card.forget()
        at = argparse.Namespace(**{**vars(options), "batch": batch})
        inputs = inputs_of(at)
        step = step_of(name, at, inputs)
        seconds = card.seconds(step, options)
        memory = card.memory()
        with FlopCounterMode(display=False) as counter:  # it does not see into a compiled graph: count the plain one
            (step if "compiled" not in name else step_of(name.split(",")[0], at, inputs))()
        # What is computed twice (gradient cache, checkpointing) is no work of the model's.
        operations = counter.get_total_flops() if name in MODELS else None
        mfu = f"; MFU {100 * operations / seconds / card.peak:.0f} %" if operations and card.peak else ""
        return Line(f"GPU training, {name}", "samples/s", batch / seconds, note=f"{card.name}{memory}{mfu}")

    return with_smaller_batches(measure, options.batch)


def embedding(options, card: Card) -> Line:
    """Clips a second from uint8 frames in the host's memory to vectors in the host's memory."""
    from transformers import CLIPConfig

    from modeling_camoe import CAMoEConfig, CAMoEModel

    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = {"patch_size": 32, "image_size": options.image_size, **(small if options.tiny else {})}
    dtype = torch.bfloat16 if card.is_gpu else torch.float32
    model = CAMoEModel(CAMoEConfig(clip_config=CLIPConfig(vision_config=vision))).to(card.device, dtype).eval()

    def measure(batch: int) -> Line:
        card.forget()
        frames = torch.zeros(batch, options.frames, 3, options.image_size, options.image_size, dtype=torch.uint8)
        frames = frames.pin_memory() if card.is_gpu else frames

        @torch.inference_mode()
        def encode():
            model.get_video_features(frames.to(card.device, non_blocking=True)).pooler_output.float().cpu()

        seconds = card.seconds(encode, options)
        note = card.name + card.memory()
        return Line("GPU embedding from uint8 frames", "clips/s", batch / seconds, note=note)

    return with_smaller_batches(measure, options.batch)


def nvdec(options, card: Card) -> Line:
    """Clips a second whose 12 frames are decoded by the card, beside one core of the processor."""
    from torchcodec.decoders import VideoDecoder  # ImportError, or RuntimeError where FFmpeg is missing

    from modeling_camoe.frames import sample_frames

    with tempfile.TemporaryDirectory() as folder:
        size = (64, 48) if options.tiny else (640, 360)
        paths = [write_clip(Path(folder) / f"{n}.mp4", 2 if options.tiny else 10, size, 250, seed=n) for n in range(4)]

        def by_card():
            for path in paths:
                decoder = VideoDecoder(str(path), device=str(card.device))
                count = decoder.metadata.num_frames
                decoder.get_frames_at([int((i + 0.5) * count / options.frames) for i in range(options.frames)])

        def by_core():
            for path in paths:
                sample_frames(path, options.frames, size=options.image_size, threads=1)

        seconds = {name: card.seconds(call, options) for name, call in (("card", by_card), ("core", by_core))}
    rates = {name: len(paths) / value for name, value in seconds.items()}
    return Line(
        "GPU decoding, torchcodec", "clips/s", rates["card"], peer=rates["core"], peer_name="PyAV, one core",
        ratio=rates["card"] / rates["core"], ratio_name="ours / peer",
        note=f"{card.name}; {options.frames} frames of 10 s of 640 x 360; the card's are not resized",
    )  # fmt: skip


def loss_cost(batch: int, options, card: Card) -> Line:
    """Milliseconds of the dual softmax loss, forward and backward, beside the plain loss."""
    from modeling_camoe.losses import contrastive_loss

    def call(temp):
        vectors = [
            torch.nn.functional.normalize(torch.randn(batch, 2048, device=card.device), dim=-1).requires_grad_()
            for _ in range(2)
        ]
        ids = torch.arange(batch, device=card.device)
        return lambda: contrastive_loss(*vectors, 50.0, ids, temp).backward()

    card.forget()
    ours, plain = (1000 * card.seconds(call(temp), options) for temp in (100.0, None))
    return Line(
        f"GPU loss, batch {batch}", "ms", ours, peer=plain, peer_name="plain loss", ratio=ours / plain,
        ratio_name="ours / peer", note=f"{card.name}; dual softmax, forward and backward, in float32",
    )  # fmt: skip


def plan(options, card: Card) -> dict[str, Callable[[], Line]]:
    """Name -> what measures a line, in the order of their worth."""
    lines = {f"GPU training, {name}": lambda name=name: training(name, options, card) for name in MODELS[:4]}
    lines["GPU embedding from uint8 frames"] = lambda: embedding(options, card)
    for name in ("camoe, gradient cache", "camoe, checkpointing", *MODELS[4:]):
        lines[f"GPU training, {name}"] = lambda name=name: training(name, options, card)
    lines["GPU decoding, torchcodec"] = lambda: nvdec(options, card)
    for batch in (16,) if options.tiny else (128, 4096):
        lines[f"GPU loss, batch {batch}"] = lambda batch=batch: loss_cost(batch, options, card)
    return lines


def measure_all(lines: dict[str, Callable[[], Line]], minutes: float) -> list[Line]:
    """All lines; one that fails is skipped with its cause, and so are all once the time is up."""
    measured, end = [], time.monotonic() + 60 * minutes
    for name, measure in lines.items():
        if time.monotonic() > end:
            measured.append(Line(name, skipped=f"the {minutes:g} minutes were over"))
            continue
        try:
            measured.append(measure())
        except Exception as error:  # of a library, a driver, a compiler: one line must not take the others with it
            cause = (str(error).strip().splitlines() or [""])[0][:150]
            measured.append(Line(name, skipped=f"{type(error).__name__}: {cause}"))
        print(f"{name}: {measured[-1].skipped or f'{measured[-1].ours:.4g} {measured[-1].unit}'}", flush=True)
    return measured


def compare_with_clip(lines: list[Line]):
    """Fill in the ratio of CAMoE's step to bare CLIP's, eager and compiled."""
    by_name = {line.name: line for line in lines if not line.skipped}
    for suffix in ("", ", compiled"):
        ours, clip = (by_name.get(f"GPU training, {name}{suffix}") for name in ("camoe", "clip"))
        if ours is None or clip is None:
            continue
        ours.peer, ours.peer_name = clip.ours, "clip"
        ours.ratio, ours.ratio_name = clip.ours / ours.ours, "time, ours / peer"
        ours.goal, ours.at_least, ours.met = CLIP_GOAL, False, ours.ratio <= CLIP_GOAL


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.set_defaults(repeats=10, captions="short", precision="bfloat16", image_size=224)
    options.add_argument("--batch", type=positive, default=128, help="pairs a step (default: %(default)s)")
    options.add_argument("--frames", type=positive, default=12, help="of a clip (default: %(default)s)")
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    options.add_argument("--minutes", type=float, default=8, help="start no line after them (default: %(default)s)")
    options.add_argument("--warm_up", type=int, default=3, help="calls before the timed ones (default: %(default)s)")
    options.add_argument("--tiny", action="store_true", help="two layers, 32 pixels, batch 4: tries the script out")
    options = options.parse_args(arguments)
    if options.tiny:
        options.batch, options.frames, options.image_size = min(options.batch, 4), min(options.frames, 2), 32
        options.repeats, options.warm_up, options.precision = 1, 1, "float32"
    return options


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        finish("gpu", [Line("GPU: training and embedding", skipped="no CUDA device")], options)
        return
    lines = measure_all(plan(options, Card(options.device)), options.minutes)
    compare_with_clip(lines)
    finish("gpu_tried" if options.tiny else "gpu", lines, options)


if __name__ == "__main__":
    main()
