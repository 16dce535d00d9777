# SPDX-License-Identifier: Apache-2.0
"""What the pictures of moments cost `camoe index`: the same clips with and without them, and their bytes.

    python benchmarks/index_thumbnails.py            60 clips of 10 s, 640 x 360

The model is small, so that nearly all of the time is decoding: with a larger one, the share of the pictures is less.
"""

import shutil
import tempfile
import time
from pathlib import Path

from clips import write_clip
from harness import Line, compare, finish, in_turns, parser
from transformers import CLIPConfig

from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEVideoProcessor


SIZE, SECONDS, DISTINCT = (640, 360), 10, 4


def main():
    options = parser(__doc__)
    options.add_argument("--clips", type=int, default=60)
    options.set_defaults(repeats=3)
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        videos = Path(temporary) / "videos"
        write_clips(videos, options.clips)
        encoder = small_encoder()
        folders = {"with": Path(temporary) / "with", "without": Path(temporary) / "without"}
        cost = in_turns(
            {name: lambda name=name: index(videos, folders[name], encoder, name == "with") for name in folders},
            options.repeats,
            clock=time.process_time,  # decoding, the model and the index all work in this process
        )
        pictures = [path.stat().st_size for path in (folders["with"] / "thumbnails").iterdir()]
        if len(pictures) != options.clips:
            raise SystemExit(f"there are {len(pictures)} pictures of {options.clips} clips")
    note = f"{options.clips} clips of {SECONDS} s, {SIZE[0]} x {SIZE[1]}, a small model"
    lines = [
        compare(
            "index with pictures of moments",
            cost["with"],
            cost["without"],
            "without",
            speedup=False,
            goal=1.1,
            note=note,
        ),
        Line("a picture of 320 x 180", "kB", ours=sum(pictures) / len(pictures) / 1000),
    ]
    finish("index_thumbnails", lines, options)


def write_clips(folder: Path, count: int):
    """Files of different content; the pictures of every fourth are the same."""
    folder.mkdir()
    for i in range(count):
        path = folder / f"{i:03}.mp4"
        if i < DISTINCT:
            write_clip(path, SECONDS, SIZE, 250, seed=i)
        else:
            shutil.copy(folder / f"{i % DISTINCT:03}.mp4", path)
            with path.open("ab") as file:  # an MP4 box that players skip
                file.write((12).to_bytes(4, "big") + b"free" + i.to_bytes(4, "big"))


def small_encoder():
    from camoe_search.encoder import CAMoEEncoder

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(vision_config=small | {"patch_size": 32}, text_config=small, projection_dim=16)
    model = CAMoEModel(CAMoEConfig(clip_config=config))
    return CAMoEEncoder("none", model, Processor(CAMoEVideoProcessor()))


class Processor:
    """What encoding videos asks of a processor; texts are not encoded here."""

    def __init__(self, video_processor):
        self.video_processor = video_processor

    def check(self, config):
        pass


def index(videos: Path, folder: Path, encoder, thumbnails: bool):
    from camoe_search.index import VideoIndex

    shutil.rmtree(folder, ignore_errors=True)
    options = {"num_workers": 0, "text_encoder": False, "thumbnails": thumbnails}
    VideoIndex.create_or_update([videos], folder, encoder, **options)


if __name__ == "__main__":
    main()
