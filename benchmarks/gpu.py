# SPDX-License-Identifier: Apache-2.0
"""On a GPU: training samples and embedding clips per second on ViT-B/32 shapes, beside bare CLIP and X-CLIP.

    python benchmarks/gpu.py                       batch 128, 12 frames, bfloat16; skipped without a CUDA device

Training runs with sdpa attention, plain and under torch.compile; its share of the card's peak sets the multiply-adds
of all matrix products (torch's FlopCounterMode) against the dense bfloat16 rate that NVIDIA states for the card.
Embedding starts from uint8 frames in pinned memory. Random weights, short captions.
"""

import statistics

import torch
from harness import Line, finish, in_turns, parser
from torch.utils.flop_counter import FlopCounterMode
from training_step import inputs_of, step_of


# Dense bfloat16 operations per second, from the data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def synchronised(call):
    def timed():
        call()
        torch.cuda.synchronize()

    return timed


def measure(options) -> list[Line]:
    inputs = inputs_of(options)
    card = torch.cuda.get_device_name()
    peak = next((rate for name, rate in PEAKS.items() if name in card), None)
    lines, rates, operations = [], {}, {}
    for name in ("camoe", "camoe, compiled", "clip", "xclip"):
        torch.cuda.reset_peak_memory_stats()
        step = step_of(name, options, inputs)
        kind = name.split(",")[0]
        if kind not in operations:  # the counter does not see into a compiled graph
            with FlopCounterMode(display=False) as counter:
                step()
            operations[kind] = counter.get_total_flops()
        seconds = in_turns({name: synchronised(step)}, options.repeats, warm_up=3)[name]
        rates[name] = options.batch / statistics.median(seconds)
        rate = operations[kind] / statistics.median(seconds)
        share = f"{100 * rate / peak:.0f} % of the peak" if peak else ""
        lines.append(
            Line(
                f"GPU training, {name}", "samples/s", rates[name],
                note=f"{card}; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most; {share}",
            )
        )  # fmt: skip
        del step
        torch.cuda.empty_cache()
    lines[0].peer, lines[0].peer_name = rates["clip"], "clip"
    lines[0].ratio, lines[0].ratio_name = rates["clip"] / rates["camoe"], "time, ours / peer"
    lines[0].goal, lines[0].at_least, lines[0].met = 1.10, False, rates["clip"] / rates["camoe"] <= 1.10
    return lines + [embedding(options, card)]


def embedding(options, card: str) -> Line:
    from transformers import CLIPConfig

    from modeling_camoe import CAMoEConfig, CAMoEModel

    model = CAMoEModel(CAMoEConfig(clip_config=CLIPConfig(vision_config={"patch_size": 32}))).cuda().bfloat16().eval()
    frames = torch.zeros(options.batch, options.frames, 3, 224, 224, dtype=torch.uint8).pin_memory()

    @torch.inference_mode()
    def encode():
        model.get_video_features(frames.to("cuda", non_blocking=True)).pooler_output.float().cpu()

    seconds = in_turns({"embedding": encode}, options.repeats, warm_up=3)["embedding"]
    return Line("GPU embedding from uint8 frames", "clips/s", options.batch / statistics.median(seconds), note=card)


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=10, captions="short", precision="bfloat16", image_size=224, device="cuda")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--frames", type=int, default=12)
    options = options.parse_args()
    if torch.cuda.is_available():
        lines = measure(options)
    else:
        lines = [Line("GPU: training and embedding", skipped="no CUDA device")]
    finish("gpu", lines, options)


if __name__ == "__main__":
    main()
