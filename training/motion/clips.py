# SPDX-License-Identifier: Apache-2.0
"""One motion clip as files: its frames as H.264 in an mp4 file, and its line of metadata.jsonl.

Every clip has its own random generators, keyed by seed, split and clip, so the order of clips does not matter.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data.files import write_whole

from .captions import write_captions
from .other_captions import write_other_captions
from .paths import action_path, relation_paths
from .plan import CAPTIONS, FORMAT, PIXELS, PRESETS, SPLITS, Combination, Preset, time_reversal
from .scenes import draw_frames


FRAME_RATES = (8, 10, 12, 15, 20, Fraction(24000, 1001), 25)


@dataclass(frozen=True)
class ClipFormat:
    """Everything that varies between clips of the same content."""

    width: int
    height: int
    frame_rate: Fraction
    num_frames: int
    radii: tuple[float, float]  # of the first and second entity, in units of the frame's short side
    encoder: dict[str, str]  # options of x264

    def size_word(self, preset: Preset, combination: Combination) -> str:
        """The first entity's size where it stands out and is constant, else ""."""
        if combination.action in ("grow", "shrink"):
            return ""
        low, high = preset.radius
        position = (self.radii[0] - low) / (high - low)
        return "small" if position < 0.25 else "large" if position > 0.75 else ""

    def speed_word(self, preset: Preset, combination: Combination) -> str:
        """The speed of what happens where it stands out, else ""; a short clip is a fast one."""
        if "stay still" in (combination.action, combination.second_action):
            return ""
        low, high = preset.seconds
        position = (self.num_frames / self.frame_rate - low) / (high - low)
        return "quickly" if position < 0.25 else "slowly" if position > 0.75 else ""


def draw_format(preset: Preset, rng: np.random.Generator) -> ClipFormat:
    short = 2 * int(rng.integers(preset.short_side[0] // 2, preset.short_side[1] // 2 + 1))  # even: 4:2:0 needs it
    long = 2 * int(rng.integers(short // 2 + 1, preset.long_side // 2 + 1))
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    frame_rate = Fraction(FRAME_RATES[int(rng.integers(len(FRAME_RATES)))])
    encoder = {
        "preset": ("ultrafast", "superfast", "veryfast")[int(rng.integers(3))],  # the last two reorder frames
        "crf": str(int(rng.integers(18, 24))),
        "g": str(int(rng.integers(6, 49))),  # frames from one key frame to the next
        "threads": "1",  # the processes already use all cores, and slices would depend on the number of threads
        "mbtree": "0",  # with it, x264 on AVX-512 is not deterministic for clips narrower than 96 pixels
    }
    num_frames = max(2, round(rng.uniform(*preset.seconds) * frame_rate))
    radii = (rng.uniform(*preset.radius), rng.uniform(*preset.radius))
    return ClipFormat(width, height, frame_rate, num_frames, radii, encoder)


def draw_clip(combination: Combination, fmt: ClipFormat, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the frames of a clip, (H, W, 3) uint8 each."""
    first, second = (combination.color, combination.shape), (combination.second_color, combination.second_shape)
    radius, other = fmt.radii
    if not combination.relation:
        entities = [(*first, action_path(combination.action, fmt.num_frames, radius, rng))]
    elif combination.relation == "while":
        # Side by side, or one above the other if either moves sideways.
        sideways = {"move left", "move right", "sway"} & {combination.action, combination.second_action}
        offset = 0.23 if rng.random() < 0.5 else -0.23
        x, y = (0.0, offset) if sideways else (offset, 0.0)
        actions = (combination.action, combination.second_action)
        paths = [
            action_path(action, fmt.num_frames, size, rng, center, scale=0.7)
            for action, size, center in zip(actions, fmt.radii, ((x, y), (-x, -y)), strict=True)
        ]
        entities = [(*first, paths[0]), (*second, paths[1])]
    else:
        paths = relation_paths(combination.relation, fmt.num_frames, radius, other, rng)
        entities = [(*second, paths[1]), (*first, paths[0])]
    return draw_frames(combination.scene, entities, fmt.height, fmt.width, rng)


def encode_h264(frames: Iterable[np.ndarray], fmt: ClipFormat) -> bytes:
    """The bytes of an mp4 file; the same frames and format give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fmt.frame_rate, options=fmt.encoder)
        stream.width, stream.height, stream.pix_fmt = fmt.width, fmt.height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@dataclass(frozen=True)
class MotionClip:
    """One clip of a set: what it shows, and where its file goes."""

    folder: Path
    preset: str
    seed: int
    split: str
    index: int
    combination: Combination
    is_twin: bool = False  # the clip before it, played backwards
    other_captions: bool = False  # those of other_captions.py

    @property
    def video_id(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def path(self) -> Path:
        return self.folder / self.split / f"{self.video_id}.mp4"

    def rng(self, purpose: int) -> np.random.Generator:
        index = self.index - self.is_twin  # a twin shares everything with the clip before it but the order
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, purpose])

    def format(self) -> ClipFormat:
        return draw_format(PRESETS[self.preset], self.rng(FORMAT))

    def make(self) -> None:
        fmt, shown = self.format(), self.combination
        if self.is_twin:
            frames = reversed(list(draw_clip(time_reversal(shown), fmt, self.rng(PIXELS))))
        else:
            frames = draw_clip(shown, fmt, self.rng(PIXELS))
        write_whole(self.path, encode_h264(frames, fmt))

    def row(self) -> dict:
        """The clip's line in metadata.jsonl."""
        preset, fmt = PRESETS[self.preset], self.format()
        words = fmt.size_word(preset, self.combination), fmt.speed_word(preset, self.combination)
        write = write_other_captions if self.other_captions else write_captions
        captions = write(self.combination, self.rng(CAPTIONS), *words)
        truth = dataclasses.asdict(self.combination)
        if not preset.two_entities:
            truth = {name: truth[name] for name in ("color", "shape", "action", "scene")}
        return {"file_name": self.path.name, "video_id": self.video_id, "captions": captions, **truth}
