# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to the model's input: our video processor against CLIP's and X-CLIP's, on the same frames.

    python benchmarks/preprocess.py --clips 8 --width 640 --height 360

Twelve uint8 frames a clip. "Whole" frames are resized, cropped, rescaled and normalised by everyone. "Small" frames
come at their final size, as ours decodes them: then ours leaves the arithmetic to the model's device and only stacks
bytes (what training, search and evaluation do).
"""

import numpy as np
import torch
from harness import compare, finish, in_turns, parser
from transformers import CLIPImageProcessor, VideoMAEImageProcessor

from modeling_camoe import CAMoEVideoProcessor


def main():
    options = parser(__doc__)
    options.add_argument("--clips", type=int, default=8)
    options.add_argument("--frames", type=int, default=12)
    options.add_argument("--width", type=int, default=640)
    options.add_argument("--height", type=int, default=360)
    options = options.parse_args()

    generator = np.random.default_rng(0)
    shape = (options.frames, options.height, options.width, 3)
    whole = [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(options.clips)]
    small = [
        torch.from_numpy(generator.integers(0, 256, (options.frames, 3, 224, 224), dtype=np.uint8))
        for _ in range(options.clips)
    ]
    whole_tensors = [torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous() for clip in whole]
    ours = CAMoEVideoProcessor(num_frames=options.frames)
    clip = CLIPImageProcessor()
    xclip = VideoMAEImageProcessor()  # what microsoft/xclip-base-patch32 names as its image processor

    def clip_on(videos):
        frames = [frame for video in videos for frame in video]
        return clip(frames, return_tensors="pt")["pixel_values"].unflatten(0, (len(videos), -1))

    seconds = in_turns(
        {
            "ours, whole": lambda: ours(videos=whole_tensors, return_tensors="pt"),
            "CLIPImageProcessor, whole": lambda: clip_on(whole_tensors),
            "X-CLIP's, whole": lambda: xclip([list(video) for video in whole], return_tensors="pt"),
            "ours, small": lambda: ours(videos=small, do_rescale=False, do_normalize=False, return_tensors="pt"),
            "CLIPImageProcessor, small": lambda: clip_on(small),
        },
        options.repeats,
    )
    per_clip = 1000 / options.clips
    lines = [
        compare(
            f"preprocess, {size} frames", seconds[f"ours, {size}"], seconds[f"{peer}, {size}"], peer, scale=per_clip,
            unit="ms a clip", goal=goal, note=note,
        )
        for size, peer, goal, note in (
            ("whole", "CLIPImageProcessor", 0.95, "the same arithmetic, in the same library"),
            ("whole", "X-CLIP's", 0.95, "a torchvision processor that takes a list of frames for each clip"),
            ("small", "CLIPImageProcessor", 1.3, "ours leaves rescaling and normalising to the model"),
        )
    ]  # fmt: skip
    finish("preprocess", lines, options)


if __name__ == "__main__":
    main()
