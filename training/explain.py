# SPDX-License-Identifier: Apache-2.0
"""Why does this clip get this score for this query? A picture of what each expert and each frame contributed.

    python training/explain.py --checkpoint runs/demo --query "a red star spins" --video clip.mp4 --out explain.png

The score is a sum over experts, s = sum_e g_e <t_e, v_e>, so an expert's contribution is exact: gate times cosine.

A frame's contribution is not, because an expert reads all frames together. It is measured by leaving the frame out:
its effect is the expert's contribution with all frames minus the contribution without this one. Attention weights
would not measure that: they show what a layer read, not how it changed the score. An effect near zero may also mean
that other frames show the same.
"""

import argparse
import json
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from matplotlib.colors import LinearSegmentedColormap, Normalize

from data.errors import UserError
from engine.recipe import exit_on_user_error
from engine.start import load_checkpoint
from modeling_camoe.retrieval import expert_scores
from modeling_camoe.video_inputs import describe_video


FOR, AGAINST, GREY = "#0f766e", "#be123c", "#6b7280"
EFFECTS = LinearSegmentedColormap.from_list("effects", [AGAINST, "#ffffff", FOR])

# Leaving out any frame changes the score a little. A frame whose effect is below this share of the score is not called
# important, and its colour stays pale.
NOTABLE = 0.01

# The picture's columns and rows, in inches.
MARGIN, TEXT_WIDTH, BAR_WIDTH = 0.15, 2.1, 2.5
FRAMES_WIDTH, NARROWEST_STRIP, LARGEST_FRAME = 5.4, 4.0, 1.3
HEAD_HEIGHT, TIMES_HEIGHT, ROW_HEIGHT, FOOT_HEIGHT = 0.55, 0.32, 0.62, 0.75


@dataclass
class ExpertContribution:
    """What one expert contributes to the score.

    Args:
        name: of the expert. text: the part of the query that it read.
        reads_all: whether that is the whole query, because its stream is the whole caption or found no words.
        gate, cosine, contribution: the last is the product of the others; contributions sum to the score.
        frame_effects: (T,), contribution minus that without the frame; None for a clip of one frame.
        frame_weights: (T,), the weights of an excitation's frames, sum 1; None for other experts.
    """

    name: str
    text: str
    reads_all: bool
    gate: float
    cosine: float
    contribution: float
    frame_effects: list[float] | None
    frame_weights: list[float] | None


@dataclass
class Explanation:
    """A score and its parts.

    Args:
        times: (T,) seconds; empty for frames that came without their rate.
        frame_effects: (T,), summed over the experts; None for a clip of one frame.
    """

    query: str
    video: str
    score: float
    times: list[float]
    frame_effects: list[float] | None
    experts: list[ExpertContribution]

    def strongest_frame(self) -> int | None:
        """The frame with the largest positive effect; None if no frame's effect is notable."""
        if self.frame_effects is None:
            return None
        strongest = max(range(len(self.frame_effects)), key=self.frame_effects.__getitem__)
        return strongest if self.frame_effects[strongest] >= NOTABLE * abs(self.score) else None

    def place(self, frame: int) -> str:
        """Where a frame is: its time, or its number where times are not known."""
        return f"{self.times[frame]:.1f} s" if self.times else f"frame {frame + 1}"


@torch.inference_mode()
def explain(model, processor, query: str, video) -> tuple[Explanation, torch.Tensor]:
    """Explain the score of one clip for one query.

    Args:
        video: in any form the video processor takes.

    Returns:
        the explanation, and the frames (T,3,H,W) uint8 that the model saw.

    Raises:
        ValueError: the query has no words.
        VideoDecodingError: the clip cannot be decoded.
    """
    names = model.config.experts
    texts = processor.streams_of(query)[0]
    clip = processor.video_processor.decode(video)
    num_frames = len(clip.frames)
    pixels = processor(videos=[clip], do_rescale=False, do_normalize=False, return_tensors="pt").to(model.device)
    tokens = processor(text=dict(zip(names, texts, strict=True)), return_tensors="pt").to(model.device)
    output = model(**pixels, **tokens, output_expert_scores=True)
    contributions = output.expert_scores[0, 0]  # (E,)
    gates = output.gate_weights[0]
    effects = _frame_effects(model, output, num_frames)  # (E,T) or None
    weights = output.video_model_output.frame_weights[0, :, :num_frames]  # (E,T)

    parts = []
    for e, name in enumerate(names):
        is_weighted = model.config.frame_aggregation[name] == "excitation"
        part = ExpertContribution(
            name=name,
            text=texts[e],
            reads_all=texts[e] == " ".join(query.split()),
            gate=gates[e].item(),
            cosine=(contributions[e] / gates[e]).item(),
            contribution=contributions[e].item(),
            frame_effects=None if effects is None else effects[e].tolist(),
            frame_weights=weights[e].tolist() if is_weighted else None,
        )
        parts.append(part)
    explanation = Explanation(
        query=query,
        video=describe_video(video),
        score=contributions.sum().item(),
        times=list(clip.times),
        frame_effects=None if effects is None else effects.sum(dim=0).tolist(),
        experts=parts,
    )
    return explanation, clip.frames


def _frame_effects(model, output, num_frames: int) -> torch.Tensor | None:
    """(E,T): each expert's contribution minus that without the frame; None if there is only one frame.

    CLIP does not run again: it embeds each frame alone, so only the head's output changes.
    """
    if num_frames == 1:
        return None
    frames = output.video_model_output.frame_embeds[:, :num_frames].expand(num_frames, -1, -1)  # (T,T,D)
    mask = ~torch.eye(num_frames, dtype=torch.bool, device=frames.device)  # row t leaves out frame t
    without = model.get_video_features(frame_embeds=frames, frame_mask=mask)
    scores = expert_scores(output.text_embeds, without.video_embeds, without.gate_weights)[0]  # (T,E)
    return (output.expert_scores[0, 0] - scores).T


class Page:
    """A matplotlib figure whose areas are given in inches from the upper left corner."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(width, height), facecolor="white")

    def area(self, left: float, top: float, width: float, height: float):
        """Axes without ticks or a frame."""
        bottom = self.height - top - height
        axis = self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )
        axis.axis("off")
        return axis

    def text(self, left: float, top: float, text: str, **style):
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)


def draw(explanation: Explanation, frames: torch.Tensor, path: Path):
    """Draw the frames as a strip and, below it, one row per expert: text, effects of the frames, contribution.

    Args:
        frames: (T,3,H,W) uint8.
    """
    num_experts, num_frames = len(explanation.experts), len(frames)
    cell = min(LARGEST_FRAME, FRAMES_WIDTH / num_frames)
    strip = cell * num_frames
    rows = num_experts + 1  # the last row is their sum
    right = TEXT_WIDTH + max(strip, NARROWEST_STRIP) + 0.25
    top = HEAD_HEIGHT + cell + TIMES_HEIGHT
    page = Page(right + BAR_WIDTH, top + rows * ROW_HEIGHT + FOOT_HEIGHT)

    title = textwrap.shorten(explanation.query, int(7.5 * right), placeholder=" …")
    page.text(MARGIN, 0.36, f"“{title}”", fontsize=14, fontweight="bold")
    page.text(right, 0.36, f"score {explanation.score:.3f}", fontsize=14, fontweight="bold", color=FOR)
    page.text(right, top - 0.05, "what each expert adds", fontsize=10, color=GREY)
    if explanation.frame_effects is not None:
        page.text(MARGIN, top - 0.05, "what each frame adds, × 1000", fontsize=10, color=GREY)
    _draw_strip(page.area(TEXT_WIDTH, HEAD_HEIGHT, strip, cell), explanation, frames)
    _draw_texts(page.area(MARGIN, top, TEXT_WIDTH - MARGIN, rows * ROW_HEIGHT), explanation)
    if explanation.frame_effects is not None:
        _draw_effects(page.area(TEXT_WIDTH, top, strip, rows * ROW_HEIGHT), explanation, cell)
    _draw_contributions(page.area(right, top, BAR_WIDTH - MARGIN, rows * ROW_HEIGHT), explanation)
    note = "\n".join(textwrap.wrap(_note(explanation), int(10 * page.width)))
    page.text(MARGIN, page.height - MARGIN, note, fontsize=9, color=GREY, va="bottom")
    page.figure.savefig(path, dpi=160)
    plt.close(page.figure)


def _note(explanation: Explanation) -> str:
    """The caption of the picture: how to read it, and its limits."""
    note = "Bars: an expert's gate (from the clip alone) times the cosine of its text and its video embedding. "
    if explanation.frame_effects is None:
        return note + "The clip has a single frame, so none can be left out."
    note += "Cells: how much the score falls, in thousandths (+12.0 is 0.012), when one frame is left out. "
    note += "Green frames count for the query, red ones against it; near zero may mean that others show the same."
    if explanation.strongest_frame() is None:
        note += f" Here no single frame decides: leaving one out costs less than {NOTABLE:.0%} of the score."
    return note


def _draw_strip(axis, explanation: Explanation, frames: torch.Tensor):
    """The frames side by side, their times below, the strongest one framed."""
    num_frames = len(frames)
    gap = max(1, frames.shape[-1] // 40)
    padded = torch.nn.functional.pad(frames, (gap, gap, gap, gap), value=255)
    strip = padded.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H',T*W',3)
    axis.imshow(strip, extent=(0, num_frames, 0, 1), aspect="auto")
    for t in range(num_frames):
        if num_frames <= 20 or t % 4 == 0:
            axis.text(t + 0.5, -0.05, explanation.place(t), ha="center", va="top", fontsize=9, color=GREY)
    strongest = explanation.strongest_frame()
    if strongest is not None:
        axis.add_patch(plt.Rectangle((strongest, 0), 1, 1, fill=False, edgecolor=FOR, linewidth=3, clip_on=False))


def _draw_texts(axis, explanation: Explanation):
    """Each expert's name and the text that it read."""
    axis.set(xlim=(0, 1), ylim=(len(explanation.experts) + 1, 0))
    for row, part in enumerate(explanation.experts):
        axis.text(0, row + 0.34, part.name, fontsize=12, fontweight="bold", va="center")
        text = "the whole query" if part.reads_all else f"“{textwrap.shorten(part.text, 34, placeholder=' …')}”"
        axis.text(0, row + 0.7, text, fontsize=9, color=GREY, va="center")
    axis.text(0, len(explanation.experts) + 0.5, "all experts", fontsize=12, fontweight="bold", va="center")


def _draw_effects(axis, explanation: Explanation, cell: float):
    """One row per expert and one for the sum: the effect of each frame as a colour and, if it fits, a number."""
    rows = [part.frame_effects for part in explanation.experts] + [explanation.frame_effects]
    largest = max(abs(effect) for row in rows for effect in row)
    full = max(largest, NOTABLE * abs(explanation.score), 1e-6)  # the effect that gets the full colour
    axis.imshow(rows, cmap=EFFECTS, norm=Normalize(-full, full), aspect="auto", extent=(0, len(rows[0]), len(rows), 0))
    for y, row in enumerate(rows):
        axis.axhline(y, color="white", linewidth=4 if y < len(rows) - 1 else 10)
        for x, effect in enumerate(row):
            axis.axvline(x, color="white", linewidth=2)
            if cell > 0.5:
                text = f"{round(1000 * effect, 1) + 0.0:+.1f}"  # + 0.0: no minus sign before a zero
                style = {"color": "white"} if abs(effect) > 0.6 * full else {"color": "black"}
                style["fontweight"] = "bold" if y == len(rows) - 1 else "normal"
                axis.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=9, **style)


def _draw_contributions(axis, explanation: Explanation):
    """One horizontal bar per expert with its two factors, and their sum."""
    parts = explanation.experts
    values = [part.contribution for part in parts]
    largest = max(abs(value) for value in values) or 1.0
    left = 1.1 * min(0.0, *values)
    axis.set(ylim=(len(parts) + 1, 0), xlim=(left, left + 1.4 * (largest - left)))
    for row, part in enumerate(parts):
        colour = FOR if part.contribution >= 0 else AGAINST
        axis.barh(row + 0.36, part.contribution, height=0.34, color=colour)
        right = max(part.contribution, 0) + 0.03 * largest
        axis.text(right, row + 0.36, f"{part.contribution:+.3f}", va="center", fontsize=11)
        factors = f"gate {part.gate:.2f} × cosine {part.cosine:.2f}"
        axis.text(0.03 * largest, row + 0.73, factors, va="center", fontsize=9, color=GREY)
    axis.plot((0, 0), (0.1, len(parts) - 0.1), color=GREY, linewidth=0.8)
    total = f"= {explanation.score:.3f}"
    axis.text(0.03 * largest, len(parts) + 0.5, total, va="center", fontsize=12, fontweight="bold")


def as_text(explanation: Explanation) -> str:
    """A summary for the terminal."""
    lines = [f"“{explanation.query}”  {explanation.video}", f"score {explanation.score:.3f}"]
    for part in explanation.experts:
        factors = f"gate {part.gate:.2f} x cosine {part.cosine:+.2f}"
        lines.append(f"  {part.name:<10} {part.contribution:+.3f} = {factors}   {part.text}")
    strongest = explanation.strongest_frame()
    if strongest is not None:
        effect = explanation.frame_effects[strongest]
        lines.append(f"the most important frame is at {explanation.place(strongest)}: {effect:+.4f}")
    elif explanation.frame_effects is not None:
        lines.append(f"no single frame decides: leaving one out costs less than {NOTABLE:.0%} of the score")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="CAMoE checkpoint, a folder or Hub id")
    parser.add_argument("--query", required=True, help="what to look for: a text")
    parser.add_argument("--video", required=True, help="the clip: a video file")
    parser.add_argument("--out", default="explain.png", help="file for the picture (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON instead of a summary")
    options = parser.parse_args()
    path = Path(options.out)
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".jpeg"):
        raise UserError(f"--out {path}: name a .png, .jpg, .pdf or .svg file")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist")

    model, processor = load_checkpoint(options.checkpoint)
    model = model.to(Accelerator().device).eval()
    try:
        explanation, frames = explain(model, processor, options.query, options.video)
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    draw(explanation, frames, path)
    print(json.dumps(asdict(explanation), indent=2) if options.json else as_text(explanation))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
