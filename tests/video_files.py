# SPDX-License-Identifier: Apache-2.0
"""Tiny video files whose frames show their own index, so that a test can assert which frame was taken.

The left and right half of frame i have the grey level 16 + 14 * digit, for the two hexadecimal digits of i. That gives
up to 256 frames, which differ by more than coding and scaling errors.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from modeling_camoe.frames import sample_frames


LEVELS, BLACK, STEP = 16, 16, 14

H264 = {"g": "24", "bf": "3", "sc_threshold": "0", "preset": "veryfast", "crf": "10"}

# Arguments of `write_video` for files of all kinds, by file name or extension.
KINDS = {
    "mp4": {},
    "all_key_frames.mp4": {"gop": 1},
    "one_key_frame.mp4": {"gop": 300},
    "no_b_frames.mp4": {"options": H264 | {"bf": "0"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "late_in_file.mp4": {"start": 1.5, "audio": 6.0},
    "late.ts": {"start": 7.0},
    "mkv": {"audio": 6.0},  # longer than the video
    "ts": {},
    "open_gop.ts": {"options": H264 | {"x264-params": "open-gop=1:b-pyramid=strict"}},
    "no_key_frames.ts": {"options": H264 | {"x264-params": "intra-refresh=1"}},
    "flv": {},
    "avi": {},  # reordered frames without time stamps
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "9000000", "qmin": "1", "qmax": "1"}},
    "mpg": {"codec": "mpeg2video", "fps": 25, "options": {"g": "12", "bf": "2", "b": "4000000"}},
    "webm": {"codec": "libvpx", "options": {"g": "24", "b": "1000000", "deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "keyint=24:log-level=none"}},
    "variable_rate.mp4": {"times": np.cumsum(1 + np.arange(60) * 7 % 5) / 25},
    "variable_rate.mkv": {"times": np.cumsum(1 + np.arange(60) * 7 % 5) / 25},
}


def index_picture(index: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 picture of a frame number."""
    picture = np.empty((height, width, 3), np.uint8)
    high, low = divmod(index, LEVELS)
    picture[:, : width // 2] = BLACK + STEP * high
    picture[:, width // 2 :] = BLACK + STEP * low
    return picture


def index_of(frame) -> int:
    """Frame number shown by a (3, H, W) frame."""
    frame = np.asarray(frame, np.float32)
    quarter = frame.shape[-1] // 4
    high, low = (part.mean() for part in (frame[:, :, :quarter], frame[:, :, -quarter:]))
    return round((high - BLACK) / STEP) * LEVELS + round((low - BLACK) / STEP)


def indices_of(frames) -> list[int]:
    """Frame numbers shown by (T, 3, H, W) frames."""
    return [index_of(frame) for frame in frames]


def natural_picture(height, width, seed=0):
    """Noise with the spectrum of photographs (amplitude 1/f): detail of all sizes, so that aliasing would show."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(generator.standard_normal((height, width))) / (1 + frequency)
        channel = np.fft.ifft2(spectrum).real
        channels.append(128 + 50 * channel / channel.std())
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def sample(source, *args, size=32, **kwargs):
    """`sample_frames`, of the size of these files."""
    return sample_frames(source, *args, size=size, **kwargs)


def write_video(
    path,
    num_frames: int = 24,
    fps: int = 12,
    size: tuple[int, int] = (64, 48),
    gop: int = 12,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict | None = None,
    start: float = 0.0,
    times=None,
    pictures=None,
    audio: float = 0.0,
    rotation: int = 0,
    pixel_aspect: int = 1,
    format: str | None = None,
    container_options: dict | None = None,
    title: str | None = None,
) -> Path:
    """Write a video file and return its path.

    Args:
        size: (width, height). gop: frames from one key frame to the next; B-frames in between.
        options: of the encoder, instead of these. start: time of the first frame, in seconds. times: of each frame, in
            seconds (variable frame rate). pictures: (H, W, 3) uint8 instead of `index_picture`s.
        audio: length of a silent audio track in seconds, or 0 for none. rotation: for players, in degrees.
        pixel_aspect: width of a pixel divided by its height.
    """
    if options is None:
        options = {"g": str(gop), "bf": "2", "sc_threshold": "0", "preset": "veryfast", "crf": "10"}
        options = options if codec == "libx264" else {"g": str(gop)}
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        if title is not None:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        time_base = Fraction(1, fps) if times is None and start == 0 else Fraction(1, 1000)
        stream.codec_context.time_base = stream.time_base = time_base
        if pixel_aspect != 1:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for i in range(num_frames):
            picture = index_picture(i, *size) if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round((start + (i / fps if times is None else times[i])) / time_base)
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            _write_silence(container, sound, audio)
    return Path(path)


def write_audio(path, seconds: float = 1.0, cover: bool = False) -> Path:
    """Write a file with an audio track only, or also with a cover picture."""
    with av.open(str(path), "w", format="mp4") as container:  # "m4a" takes no pictures
        stream = container.add_stream("aac", rate=8000, layout="mono")
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "rgb24"
            picture.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(index_picture(0, 64, 48), format="rgb24")
            container.mux(picture.encode(frame) + picture.encode(None))
        _write_silence(container, stream, seconds)
    return Path(path)


def _write_silence(container, stream, seconds):
    silence = np.zeros((1, int(8000 * seconds)), np.int16)
    frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
    frame.sample_rate, frame.pts = 8000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def cut_off(path, share: float = 0.5) -> Path:
    """Keep only the first part of a file, like an interrupted download."""
    path = Path(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def spoil(path, first: int, last: int) -> Path:
    """Overwrite the coded pictures from number `first` up to `last`, in decoding order."""
    path = Path(path)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size][first:last]
    for packet in packets:
        content[packet.pos + 4 : packet.pos + packet.size] = b"\xa5" * (packet.size - 4)
    path.write_bytes(content)
    return path


def stored_times(path) -> list[float]:
    """The time of each frame in seconds from the start of the file, by decoding all of it."""
    with av.open(str(path)) as container:
        zero = (container.start_time or 0) / 1e6
        return [float(frame.pts * frame.time_base) - zero for frame in container.decode(video=0)]
