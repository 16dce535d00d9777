# SPDX-License-Identifier: Apache-2.0
"""Look at a checkpoint: the best clips for some queries as film strips, and its training curves.

    python training/show_retrieval.py --checkpoint runs/demo --dataset_name data/motion_demo --split test

Writes into the checkpoint's folder: retrieval_grid.png, one row per query with its five best clips, their scores and
the right one marked; and, if there is a training_log.jsonl, training_curves.png with loss, validation R@1 and gate
weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator

from data.captioned_clips import load_split, read_captioned_clips
from data.encode_split import encode_split
from engine.recipe import exit_on_user_error, option, parse_options
from engine.start import load_checkpoint
from modeling_camoe.encode import encode_texts
from modeling_camoe.frames import sample_frames
from modeling_camoe.retrieval import similarity


STRIP_FRAMES = 4  # frames of a film strip
TOP_K = 5  # clips per query
RIGHT, WRONG = "#1a7f37", "#8c959f"


@dataclass
class ShowOptions:
    """What to show."""

    checkpoint: str = option(help="CAMoE checkpoint, a folder")
    dataset_name: str = option(help="folder of clips, folder of tables, or Hub id")
    split: str = option("test", "split to search in")
    queries: list | None = option(None, "queries (default: the captions of some clips of the split)")
    num_queries: int = option(5, "number of captions to use when no queries are given")
    seed: int = option(0, "seed that chooses these captions")
    video_column: str = option("video", "column of video paths")
    caption_column: str | None = option(None, "column of captions (default: captions or caption)")
    num_workers: int = option(2, "processes that decode")
    output_dir: str | None = option(None, "folder for the pictures (default: the checkpoint's)")


def draw_grid(queries, best, scores, right, clips, path: Path):
    """One row per query: its best clips as film strips.

    Args:
        queries: Q texts. best: (Q,K) clips. scores: (Q,K). right: the right clip of each query, or None.
    """
    rows, columns = best.shape
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 1.35 * rows + 0.3), squeeze=False)
    for q in range(rows):
        for k in range(columns):
            clip, axis = int(best[q, k]), axes[q][k]
            frames = sample_frames(clips[clip], STRIP_FRAMES, size=96).frames  # (4,3,96,96)
            strip = torch.nn.functional.pad(frames, (0, 3), value=255)  # a white gap between frames
            axis.imshow(strip.permute(2, 0, 3, 1).flatten(1, 2))
            axis.set_xticks([])
            axis.set_yticks([])
            is_right = right[q] is not None and clip == right[q]
            for spine in axis.spines.values():
                spine.set(color=RIGHT if is_right else WRONG, linewidth=3 if is_right else 0.5)
            axis.set_xlabel(
                f"{k + 1}.  {scores[q, k]:.3f}" + ("  ✓" if is_right else ""),
                color=RIGHT if is_right else "black",
                fontsize=9,
                labelpad=2,
            )
        axes[q][0].set_title(f"“{queries[q]}”", loc="left", fontsize=11)
    figure.tight_layout(pad=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(log: list[dict], path: Path):
    """Loss, validation R@1 and gate weights over the steps of a training_log.jsonl."""
    steps = [line for line in log if "loss" in line]
    validations = [line for line in log if "validation_Rsum" in line]
    figure, (loss, recall, gate) = plt.subplots(1, 3, figsize=(13, 3.6))
    loss.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=1)
    loss.set(title="training loss", xlabel="step")
    for direction, label in (("text_to_video", "text to video"), ("video_to_text", "video to text")):
        values = [line[f"validation_{direction}_R@1"] for line in validations]
        recall.plot([line["step"] for line in validations], values, marker="o", markersize=3, label=label)
    recall.set(title="validation R@1, uncorrected (%)", xlabel="step", ylim=(0, None))
    recall.legend(frameon=False)
    for name in (name for name in steps[0] if name.startswith("gate_")):
        gate.plot([line["step"] for line in steps], [line[name] for line in steps], label=name.removeprefix("gate_"))
    gate.set(title="gate weights, mean of the batch", xlabel="step", ylim=(0, 1))
    gate.legend(frameon=False)
    for axis in (loss, recall, gate):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    options = parse_options(ShowOptions, description=__doc__)
    model, processor = load_checkpoint(options.checkpoint)
    accelerator = Accelerator()
    model = model.to(accelerator.device).eval()
    output_dir = Path(options.output_dir or options.checkpoint)
    output_dir.mkdir(parents=True, exist_ok=True)

    split = read_captioned_clips(
        load_split(options.dataset_name, options.split),
        processor.experts,
        processor.tagger,
        processor.streams,
        options.video_column,
        options.caption_column,
    )
    encoded = encode_split(
        accelerator, model, processor, split, num_workers=options.num_workers, progress=f"{options.split} split"
    )
    if options.queries:
        queries, right = [str(query) for query in options.queries], [None] * len(options.queries)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        right = torch.randperm(len(split.clips), generator=generator)[: options.num_queries].tolist()
        queries = [split.captions[clip][0] for clip in right]

    scores = similarity(encode_texts(model, processor, queries), encoded.video_vectors)  # (Q,B)
    top = scores.topk(min(TOP_K, scores.shape[1]), dim=1)
    best = torch.tensor(encoded.video_rows)[top.indices]
    for q, query in enumerate(queries):
        print(f"\n{query}")
        for k in range(best.shape[1]):
            clip = int(best[q, k])
            mark = "  <- the right clip" if clip == right[q] else ""
            print(f"  {k + 1}. {top.values[q, k]:.3f}  {split.video_ids[clip]}  {split.captions[clip][0]}{mark}")

    draw_grid(queries, best, top.values, right, split.clips, output_dir / "retrieval_grid.png")
    print(f"\nwrote {output_dir / 'retrieval_grid.png'}")
    log = Path(options.checkpoint) / "training_log.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        draw_curves(lines, output_dir / "training_curves.png")
        print(f"wrote {output_dir / 'training_curves.png'}")


if __name__ == "__main__":
    exit_on_user_error(main)
