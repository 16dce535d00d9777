# SPDX-License-Identifier: Apache-2.0
"""Clips per second from files to vectors, against decoding alone and the model alone: do the two overlap?

    python benchmarks/embedding.py                    ViT-B/32 shapes with few layers, as balances the two on a CPU
    python benchmarks/embedding.py --layers 12        the whole ViT-B/32; the model is then nearly all of the time

`encode_videos` decodes in a worker process while the model runs in this one. With a core for each, the slower of the
two sets the pace; where both want all cores, they share them, and their times add up. So the model has one thread
here, and one worker decodes. Random weights; clips of 10 s at 240p, the size of MSR-VTT's.
"""

import tempfile
from pathlib import Path

import torch
from clips import write_clip
from harness import compare, finish, in_turns, parser
from torch.utils.data import DataLoader
from transformers import CLIPConfig

from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEVideoProcessor
from modeling_camoe.encode import ClipFrames, encode_videos


class VideosOnly:
    """A processor without a tokenizer: this program encodes no captions."""

    def __init__(self, video_processor):
        self.video_processor = video_processor


def decode_alone(paths: list[str], video_processor, num_workers: int):
    loader = DataLoader(ClipFrames(paths, video_processor), batch_size=None, num_workers=num_workers)
    for _ in loader:
        pass


@torch.inference_mode()
def model_alone(model, batches: list[dict]):
    for batch in batches:
        model.get_video_features(**batch)


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--clips", type=int, default=32)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--workers", type=int, default=1, help="processes that decode (default: %(default)s)")
    options.add_argument("--threads", type=int, default=1, help="of the model, on a CPU (default: %(default)s)")
    options.add_argument("--layers", type=int, default=2, help="of the vision tower (default: %(default)s)")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vision = {"num_hidden_layers": options.layers, "patch_size": 32}
    model = CAMoEModel(CAMoEConfig(clip_config=CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1})))
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    processor = VideosOnly(CAMoEVideoProcessor())

    with tempfile.TemporaryDirectory() as folder:
        different = [str(write_clip(Path(folder) / f"{i}.mp4", 10, (320, 240), 250, seed=i)) for i in range(4)]
        paths = (different * options.clips)[: options.clips]
        decoded = [processor.video_processor.decode(path) for path in different]
        batch = (decoded * options.batch)[: options.batch]
        inputs = processor.video_processor(videos=batch, do_rescale=False, do_normalize=False, return_tensors="pt")
        batches = [inputs.to(model.device)] * -(-options.clips // options.batch)
        seconds = in_turns(
            {
                "whole": lambda: encode_videos(
                    model, processor, paths, batch_size=options.batch, num_workers=options.workers
                ),
                "decode": lambda: decode_alone(paths, processor.video_processor, options.workers),
                "model": lambda: model_alone(model, batches),
            },
            options.repeats,
        )
    slower = [max(pair) for pair in zip(seconds["decode"], seconds["model"], strict=True)]
    per_clip = 1000 / options.clips
    line = compare(
        "embedding from files", seconds["whole"], slower, "the slower of decoding and model", scale=per_clip,
        unit="ms a clip", goal=0.9,
    )  # fmt: skip
    alone = {name: per_clip * min(of) for name, of in seconds.items()}
    finish("embedding", [line], options, {"milliseconds a clip, best turn": alone})


if __name__ == "__main__":
    main()
