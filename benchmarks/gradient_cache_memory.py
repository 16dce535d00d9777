# SPDX-License-Identifier: Apache-2.0
"""The gradient cache (training/engine/gradient_cache.py): memory and time of a batch beyond memory, and its gradient.

    python benchmarks/gradient_cache_memory.py         some minutes on a core, 5 GB

Memory: forward and backward passes over 512 pairs, as 16 plain batches of 32 and as one batch in chunks of 32, each in
a process of its own; the peak beyond what it held before it made the model. The model is small, for a CPU, but its
activations stand to its weights and to its pixels as ViT-B/32's do on 12 frames (about 25 and 250 times as large):
what a cached batch holds beside a chunk's activations are all gradients, as large as the weights, and all pixels.
Gradient: a small CAMoE on 512 pairs, plain and in chunks of 32, in float32; the relative difference of the gradient as
a whole, |g - g'| / |g|, and of its worst parameter. Writes a picture of both beside the numbers.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from bars import draw
from harness import RESULTS, Line, finish, parser, positive
from transformers import CLIPConfig


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from engine.gradient_cache import accumulated_backward, cached_backward
from modeling_camoe import CAMoEConfig, CAMoEModel


VOCABULARY = 2000
TOKENS = 12  # of each of the four texts of a caption


def make_model(small: bool) -> CAMoEModel:
    """The model whose memory is measured; or one for 512 plain pairs."""
    width, layers, patch = (64, 2, 16) if small else (192, 4, 8)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    sizes["num_attention_heads"] = 4
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": VOCABULARY - 1}
    clip = CLIPConfig(
        vision_config={**sizes, "image_size": 64, "patch_size": patch},
        text_config={**sizes, **ids, "pad_token_id": VOCABULARY - 1},
        projection_dim=128,
    )
    torch.manual_seed(0)
    return CAMoEModel(CAMoEConfig(clip_config=clip)).train()


def make_batch(model: CAMoEModel, pairs: int, frames: int) -> dict[str, torch.Tensor]:
    size, experts = model.config.clip_config.vision_config.image_size, len(model.config.experts)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY - 1, (pairs, experts, TOKENS), generator=generator)
    ids[..., -1] = VOCABULARY - 1
    pixels = torch.randint(256, (pairs, frames, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "pixel_values_videos": pixels}


def memory(device: torch.device) -> tuple[float, float]:
    """MB that this process holds now, and that it held at most."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(small: bool, pairs: int, step: int, chunk: int, frames: int, gradient: str | None):
    """Forward and backward passes over `pairs` in this process -> JSON on standard output.

    Args:
        step: pairs of a batch. chunk: of the gradient cache, 0 for none. gradient: where to save the last one.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    before, _ = memory(accelerator.device)
    model = make_model(small)
    batch = make_batch(model, step, frames)
    model, ids = accelerator.prepare(model), torch.arange(step)
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time  # a busy CPU does not count
    begin = clock()
    for _ in range(pairs // step):
        model.zero_grad()
        if chunk:
            loss, _ = cached_backward(accelerator, model, batch, ids, chunk)
        else:
            loss, _ = accumulated_backward(accelerator, model, batch, ids, 1)
    seconds = clock() - begin
    if gradient is not None:
        torch.save({name: p.grad.cpu() for name, p in model.named_parameters()}, gradient)
    _, peak = memory(accelerator.device)
    print(json.dumps({"loss": loss.item(), "seconds": seconds, "peak": peak - before, "total": peak}))


def in_own_process(*arguments) -> dict:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def difference(ours: dict, expected: dict) -> tuple[float, str, float]:
    """Of two gradients: |g - g'| / |g| of all parameters together, and the worst parameter with its own."""
    squares = {name: ((ours[name] - g).square().sum().item(), g.square().sum().item()) for name, g in expected.items()}
    whole = (sum(d for d, _ in squares.values()) / sum(n for _, n in squares.values())) ** 0.5
    largest = max(n for _, n in squares.values())
    # A parameter without a gradient to speak of (a key's bias has none but rounding) has no relative difference.
    each = {name: (d / n) ** 0.5 for name, (d, n) in squares.items() if n > 1e-10 * largest}
    worst = max(each, key=each.get)
    return whole, worst, each[worst]


def main():
    if sys.argv[1:2] == ["--measure"]:
        size, *numbers, gradient = sys.argv[2:]
        return measure(size == "small", *map(int, numbers), gradient or None)
    options = parser(__doc__)
    options.add_argument("--frames", type=positive, default=4, help="a clip (default: %(default)s)")
    options = options.parse_args()

    plain = in_own_process("large", 512, 32, 0, options.frames, "")
    cached = in_own_process("large", 512, 512, 32, options.frames, "")
    RESULTS.mkdir(exist_ok=True)
    files = [RESULTS / f".gradient_{kind}.pt" for kind in ("plain", "cached")]
    try:
        losses = [in_own_process("small", 512, 512, c, 2, f) for c, f in zip((0, 32), files, strict=True)]
        whole, worst, worst_difference = difference(torch.load(files[1]), torch.load(files[0]))
    finally:
        for file in files:
            file.unlink(missing_ok=True)

    per_pair = {"plain, 32": 1000 * plain["seconds"] / 512, "cached, 512": 1000 * cached["seconds"] / 512}
    lines = [
        Line(
            "memory: 512 pairs in chunks of 32",
            unit="MB",
            ours=cached["peak"],
            peer=plain["peak"],
            peer_name="32 pairs, plain",
            ratio=cached["peak"] / plain["peak"],
            ratio_name="ours / peer",
            goal=1.25,
            at_least=False,
        ),
        Line(
            "time a pair: 512 pairs in chunks of 32",
            unit="ms",
            ours=per_pair["cached, 512"],
            peer=per_pair["plain, 32"],
            peer_name="32 pairs, plain",
            ratio=per_pair["cached, 512"] / per_pair["plain, 32"],
            ratio_name="ours / peer",
            note="one more forward pass: 4/3 where a backward pass costs two forward passes",
        ),
        Line("gradient of 512 pairs: whole", ratio=whole, ratio_name="|g - g'| / |g|", goal=1e-4, at_least=False),
        Line(
            "gradient of 512 pairs: worst parameter",
            ratio=worst_difference,
            ratio_name="|g - g'| / |g|",
            goal=1e-4,
            at_least=False,
            note=worst,
        ),
    ]
    memory_of = {"32 pairs, plain": plain["peak"], "512 in chunks of 32": cached["peak"]}
    time_of = dict(zip(memory_of, per_pair.values(), strict=True))
    draw("gradient_cache", "Gradient cache", {"peak memory (MB)": memory_of, "time a pair (ms)": time_of})
    finish("gradient_cache", lines, options, {"plain_32": plain, "cached_512": cached, "small_512": losses})


if __name__ == "__main__":
    main()
