# SPDX-License-Identifier: Apache-2.0
"""A moment of a file as MP4 that every browser plays: H.264 and AAC, at most 720 lines."""

import os
import tempfile
import threading
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from modeling_camoe.frames import VideoDecodingError


MAX_SECONDS = 120.0
MAX_LINES = 720
SEEK_MARGIN = 10.0  # seconds
VIDEO = {"preset": "veryfast", "crf": "23"}
MOVFLAGS = {"movflags": "faststart"}


class ClipCache:
    """The last clips that were asked for, in a temporary folder.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int = 32):
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="camoe-clips-")
        self._lock = threading.Lock()  # encoding takes all cores as it is

    def clip(self, key: str, path: str, start: float, end: float) -> Path:
        """A file with the moment.

        Raises:
            VideoDecodingError: the moment cannot be read.
        """
        output = Path(self._folder.name) / f"{key}-{start:.3f}-{end:.3f}.mp4"
        with self._lock:
            if not output.exists():
                for old in sorted(output.parent.iterdir(), key=os.path.getmtime)[: -self.count + 1]:
                    old.unlink()
                partial = output.with_suffix(".part.mp4")
                write_clip(path, start, end, partial)
                partial.replace(output)
        return output


def write_clip(path: str, start: float, end: float, output: Path):
    """The file from `start` to `end` (seconds, at most MAX_SECONDS of it), encoded again.

    Raises:
        VideoDecodingError: it cannot be read.
    """
    end = min(end, start + MAX_SECONDS)
    try:
        with av.open(path) as source, av.open(str(output), "w", options=MOVFLAGS) as target:
            _transcode(source, target, start, end)
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise VideoDecodingError(f"{os.path.basename(path)}: no clip can be made of it: {error}") from error


def _transcode(source, target, start: float, end: float):
    video, sounds = source.streams.video[0], source.streams.audio
    video.thread_type = "AUTO"
    rate = video.average_rate or Fraction(25)
    zero = (source.start_time or 0) / av.time_base
    # Earlier than needed: in a transport stream, a search for a key frame may end behind the time asked for.
    if start > SEEK_MARGIN:
        source.seek(int((zero + start - SEEK_MARGIN) * av.time_base), backward=True)
    picture = target.add_stream("libx264", rate=rate, options=VIDEO)
    picture.time_base = picture.codec_context.time_base = Fraction(1, 90_000)
    picture.pix_fmt = "yuv420p"
    sound = target.add_stream("aac", rate=48_000, layout="stereo") if sounds else None
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=48_000)
    reformatter, is_first, samples, waiting = VideoReformatter(), True, 0, []
    for frame in source.decode(*[video, *sounds[:1]]):
        if frame.time is None or frame.time - zero < start - 1e-3:
            continue
        time = frame.time - zero - start
        if isinstance(frame, av.VideoFrame):
            if frame.time - zero >= end:
                break
            if is_first:
                picture.width, picture.height = _size(frame, video)
                if frame.rotation:
                    picture.set_display_rotation(frame.rotation)
                is_first = False
            shown = reformatter.reformat(frame, picture.width, picture.height, "yuv420p")
            shown.pts, shown.time_base = round(time * 90_000), Fraction(1, 90_000)
            shown.pict_type = av.video.frame.PictureType.NONE
            target.mux(picture.encode(shown))
        elif frame.time - zero < end:
            for part in resampler.resample(frame):
                part.pts, part.time_base = samples, Fraction(1, 48_000)
                samples += part.samples
                waiting.append(part)
        while waiting and not is_first:  # the first packet closes the header, which the first picture is part of
            target.mux(sound.encode(waiting.pop(0)))
    if is_first:
        raise ValueError("there is no picture at that time")
    for stream in filter(None, (picture, sound)):
        target.mux(stream.encode(None))


def _size(frame, stream) -> tuple[int, int]:
    """Width and height with square pixels, even, at most MAX_LINES high."""
    width = frame.width * float(stream.sample_aspect_ratio or 1)
    scale = min(1.0, MAX_LINES / min(width, frame.height))
    return max(2, round(width * scale / 2) * 2), max(2, round(frame.height * scale / 2) * 2)
