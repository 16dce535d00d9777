# SPDX-License-Identifier: Apache-2.0
"""What CAMoE costs beside its CLIP: parameters and multiply-adds of every expert and of the gate.

    python benchmarks/heads_cost.py

Counted, not timed, so it is the same on every machine: the model is built on the meta device, without memory, and
torch's FlopCounterMode counts the multiply-adds of all matrix products, convolutions and attentions that a clip of 12
frames and a caption cause, CLIP's and the heads' alike (norms, activations and softmaxes are left out of both).

The table goes to the terminal and into docs/model.md, the figures into results/heads_cost.json.
"""

import argparse
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_camoe import CAMoEConfig, CAMoEModel


NUM_FRAMES = 12  # CLIP4Clip's recipe
MAX_TOKENS = 32  # the same: the most that a text may have
CLIP_TOKENS = 77  # what CLIP pads every text to
LIMIT = 0.1  # of CLIP's own


@dataclass
class Cost:
    """What a part of the model costs.

    Args:
        name: of the part.
        parameters: how many it has.
        multiply_adds: how many it takes for one clip, or one caption.
        share_of_parameters, share_of_multiply_adds: as parts of CLIP's; None where the comparison makes no sense.
    """

    name: str
    parameters: int
    multiply_adds: int
    share_of_parameters: float | None = None
    share_of_multiply_adds: float | None = None


def multiply_adds(model: CAMoEModel, function, **inputs: torch.Tensor) -> int:
    """Multiply-adds of one call on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(**inputs)
    return counter.get_total_flops() // 2


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def heads_cost(config: CAMoEConfig, num_frames: int = NUM_FRAMES) -> list[Cost]:
    """Costs for one clip: CLIP, each expert, the gate, all of the heads; then for one caption.

    Args:
        config: of the model; `CAMoEConfig()` is ViT-B/32 with four experts.
        num_frames: T.
    """
    size = config.clip_config.vision_config.image_size
    with torch.device("meta"):
        model = CAMoEModel(config).eval()
        pixels = torch.empty(num_frames, 3, size, size)
        frames, mask = torch.empty(1, num_frames, config.projection_dim), torch.ones(1, num_frames, dtype=torch.bool)

    clip = Cost(
        f"CLIP: {num_frames} frames of {size} pixels",
        count_parameters(model.clip),
        multiply_adds(model, model.clip.get_image_features, pixel_values=pixels),
    )
    parts = {f"{name}: {kind}": model.head.experts[name] for name, kind in config.frame_aggregation.items()}
    if model.head.gate is not None:
        parts["gate"] = model.head.gate
    heads = [
        Cost(name, count_parameters(part), multiply_adds(model, part, frames=frames, mask=mask))
        for name, part in parts.items()
    ]
    everything = multiply_adds(model, model.head, frame_embeds=frames, frame_mask=mask)
    heads.append(Cost("all heads", count_parameters(model.head), everything))
    for head in heads:
        head.share_of_parameters = head.parameters / clip.parameters
        head.share_of_multiply_adds = head.multiply_adds / clip.multiply_adds
    return [clip, *heads, *_texts_cost(model)]


def _texts_cost(model: CAMoEModel) -> list[Cost]:
    """A caption costs CLIP's text tower once per expert: no head, and yet not free."""
    parameters = count_parameters(model.clip.text_model) + count_parameters(model.clip.text_projection)

    def cost(name: str, texts: int, tokens: int) -> Cost:
        ids = torch.ones(texts, tokens, dtype=torch.long, device="meta")
        return Cost(name, parameters, multiply_adds(model, model.clip.get_text_features, input_ids=ids))

    num_experts = len(model.config.experts)
    plain = cost(f"caption in CLIP: 1 text of {CLIP_TOKENS} tokens", 1, CLIP_TOKENS)
    ours = [
        cost(f"caption in CAMoE: {num_experts} texts of {tokens} tokens", num_experts, tokens)
        for tokens in (MAX_TOKENS, MAX_TOKENS // 2)
    ]
    for line in ours:
        line.share_of_multiply_adds = line.multiply_adds / plain.multiply_adds
    return [plain, *ours]


def markdown(costs: list[Cost]) -> str:
    """The table of docs/model.md."""
    lines = ["| part | parameters | of CLIP's | multiply-adds | of CLIP's |", "|---|---|---|---|---|"]
    for cost in costs:
        cells = [cost.name, _figure(cost.parameters), _percent(cost.share_of_parameters)]
        cells += [_figure(cost.multiply_adds), _percent(cost.share_of_multiply_adds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %" if share >= 1e-5 else "< 0.001 %"


def main():
    import harness  # a sibling: this program's folder is on the path when it is run

    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    costs = heads_cost(CAMoEConfig())
    clip, heads = costs[0], next(cost for cost in costs if cost.name == "all heads")
    lines = [
        harness.Line(
            f"{field.replace('_', '-')} of all heads",
            unit="M",
            ours=getattr(heads, field) / 1e6,
            peer=getattr(clip, field) / 1e6,
            peer_name="CLIP ViT-B/32",
            ratio=getattr(heads, f"share_of_{field}"),
            ratio_name="ours / peer",
            goal=LIMIT,
            at_least=False,
        )
        for field in ("parameters", "multiply_adds")
    ]
    print(markdown(costs), harness.table(lines), sep="\n\n")
    harness.write("heads_cost", lines, {"num_frames": NUM_FRAMES}, {"parts": [vars(cost) for cost in costs]})


if __name__ == "__main__":
    main()
