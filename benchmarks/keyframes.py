# SPDX-License-Identifier: Apache-2.0
"""What `keyframe` sampling costs in accuracy: how far embeddings move, and R@1, on the clips of `make demo`.

    python benchmarks/keyframes.py                                          runs/demo on data/motion_demo
    python benchmarks/keyframes.py --checkpoint DIR --split DIR/test        another model and folder of clips

Both samplings encode the same clips with the same model; the captions are the first of each clip. Skipped without a
checkpoint: random weights would say nothing.
"""

import json
from pathlib import Path

import numpy as np
import torch
from harness import Line, finish, parser
from transformers import AutoModel, AutoProcessor

import modeling_camoe  # noqa: F401 — registers the Auto classes
from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.retrieval import similarity


def recall_at_1(texts: torch.Tensor, videos: torch.Tensor) -> float:
    """Percent of texts whose own video comes first; pair n in row n of both."""
    return 100 * (similarity(texts, videos).argmax(dim=1) == torch.arange(len(texts))).float().mean().item()


def main():
    options = parser(__doc__)
    options.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    options.add_argument("--split", type=Path, default=Path("data/motion_demo/test"), help="with a metadata.jsonl")
    options.add_argument("--clips", type=int, default=500)
    options = options.parse_args()
    name = "keyframe sampling: cosine to uniform"
    if not (options.checkpoint / "config.json").is_file() or not (options.split / "metadata.jsonl").is_file():
        missing = options.split if (options.checkpoint / "config.json").is_file() else options.checkpoint
        finish("keyframes", [Line(name, skipped=f"no {missing}; `make demo` makes it")], options)
        return

    model = AutoModel.from_pretrained(options.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    rows = [json.loads(line) for line in (options.split / "metadata.jsonl").read_text().splitlines()][: options.clips]
    paths = [str(options.split / row["file_name"]) for row in rows]
    texts = encode_texts(model, processor, [row["captions"][0] for row in rows])
    videos, frames = {}, {}
    for sampling in ("uniform", "keyframe"):
        processor.video_processor.sampling = sampling
        videos[sampling] = encode_videos(model, processor, paths, num_workers=1).vectors
        frames[sampling] = np.mean([len(processor.video_processor.decode(path).times) for path in paths[:50]])
    cosines = torch.cosine_similarity(videos["uniform"], videos["keyframe"])
    recalls = {sampling: recall_at_1(texts, of) for sampling, of in videos.items()}
    note = f"{frames['keyframe']:.1f} key frames a clip instead of {frames['uniform']:.1f} frames"
    lines = [
        Line(
            name, ours=cosines.mean().item(), ratio=cosines.mean().item(), ratio_name="cosine", note=note,
            spread=(cosines.min().item(), cosines.max().item()),
        ),
        Line(
            "keyframe sampling: R@1", "%", recalls["keyframe"], recalls["uniform"], "uniform",
            ratio=recalls["keyframe"] / max(recalls["uniform"], 1e-9), ratio_name="ours / peer", note=note,
        ),
    ]  # fmt: skip
    finish("keyframes", lines, options)


if __name__ == "__main__":
    main()
