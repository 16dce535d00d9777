# SPDX-License-Identifier: Apache-2.0
"""H.264 clips to measure with: a camera pans over a textured scene, a thing moves in it, the sensor has some noise.

    write_clip(path, seconds=10, size=(640, 360), gop=250)

Encoded by x264 as it does without further wishes, B-frames included; that gives the bit rates of web video: 0.3 Mb/s
at 240p, 0.8 at 360p, 3 at 720p. Decoding takes its time for coded bits, so a noisier clip shows smaller differences. A
long clip repeats the coded pictures of a shorter one: no decoder can tell, and it is written in a moment.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


FPS = 25
SLOPE = 1.3  # of the spectrum: 1 is a sharp photograph, and video has been through a lens and a codec before
REPEATED_SECONDS = 20  # what is encoded of a longer clip; then its packets come again


def scene(width: int, height: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 with detail of all sizes, as photographs have (amplitude 1/f)."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(generator.standard_normal((height, width))) / (1 + frequency) ** SLOPE
        channel = np.fft.ifft2(spectrum).real
        channels.append(128 + 50 * channel / channel.std())
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def pictures(count: int, width: int, height: int, seed: int):
    """Yields (H, W, 3) uint8 frames."""
    generator = np.random.default_rng(seed)
    background = scene(3 * width // 2, 3 * height // 2, seed)
    thing = scene(width // 4, height // 4, seed + 1)
    noise = generator.integers(-3, 4, (height + 16, width + 16, 1), dtype=np.int16)
    for i in range(count):
        angle = 2 * np.pi * i / (FPS * REPEATED_SECONDS)
        x, y = (
            int(width / 4 * (1 + np.cos(angle))),
            int(height / 4 * (1 + np.sin(2 * angle))),
        )  # at most 2 or 3 pixels a frame
        frame = background[y : y + height, x : x + width].astype(np.int16)
        left, top = int(0.37 * width * (1 + np.sin(5 * angle))), int(0.37 * height * (1 + np.cos(3 * angle)))
        frame[top : top + thing.shape[0], left : left + thing.shape[1]] = thing
        down, right = generator.integers(0, 16, 2)
        yield np.clip(frame + noise[down : down + height, right : right + width], 0, 255).astype(np.uint8)


def write_clip(path: Path, seconds: float, size: tuple[int, int], gop: int, seed: int = 0) -> Path:
    """A key frame at least every `gop` pictures. An MP4 that is there already is kept."""
    if path.exists():
        return path
    encoded = int(min(seconds, REPEATED_SECONDS) * FPS)
    times = max(1, round(seconds / REPEATED_SECONDS))
    temporary = path.with_suffix(".part.mp4")
    with av.open(str(temporary), "w") as container:
        options = {"g": str(gop), "preset": "medium", "crf": "23", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, FPS)
        packets = []
        for i, picture in enumerate(pictures(encoded, *size, seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        coded = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        for again in range(times):
            for content, pts, dts, is_key in coded:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, FPS), is_key
                packet.pts, packet.dts, packet.duration = pts + again * encoded, dts + again * encoded, 1
                container.mux(packet)
    temporary.rename(path)
    return path
