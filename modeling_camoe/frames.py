# SPDX-License-Identifier: Apache-2.0
"""
From a video file, or its bytes, to a few small RGB frames and their times. Everything in the project that decodes,
decodes here.

Notable features:
- exact: the frame taken for a time is the one that a player shows then, found by time stamps and not by frame numbers.
  Variable frame rates, late first time stamps and wrong frame counts in the header do no harm. (`"keyframe"` sampling
  alone is approximate.)
- lazy: packets are read ahead of decoding, so that a group of pictures without a wanted frame is never decoded (nor
  read, where the file has an index to jump by), and an H.264 picture that no other refers to only if it is wanted.
- small: only the wanted frames are converted, by swscale, straight to their final size.
- checked: if lazy decoding does not yield every wanted frame undamaged, everything is decoded from the first packet
  on. What cannot be decoded then is an error with the name of the file and the cause: no frame is ever made up.

Units: "seconds" count from the beginning of the file, as in a player; "ticks" are the time stamps of the stream.
"""

import math
import os
import random
from dataclasses import dataclass

import numpy as np
import torch

from .decoding import Targets, decode_everything, decode_key_frames, decode_lazily
from .torchcodec_decoder import decode_with_torchcodec
from .video_file import (
    Clip,
    VideoDecodingError,
    as_clip,
    describe_source,
    open_video,
)


# What a program that walks over a folder takes for a video.
VIDEO_EXTENSIONS = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)

SAMPLINGS = ("uniform", "jitter", "keyframe")
BACKENDS = ("pyav", "torchcodec")


@dataclass(frozen=True)
class SampledFrames:
    """Frames of one clip, never padded: T' is below the number asked for where the clip has fewer distinct frames."""

    frames: torch.Tensor  # (T', 3, size, size) uint8 RGB
    times: tuple[float, ...]  # (T',) seconds, strictly increasing
    duration: float  # of the window, seconds


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says."""

    duration: float  # of the video stream, seconds
    width: int  # as stored: before a rotation that the file may ask for
    height: int
    average_fps: float
    num_frames: int  # as stated, else duration * average_fps
    codec: str


def sample_frames(
    source: str | os.PathLike | bytes | Clip,
    num_frames: int = 12,
    sampling: str = "uniform",
    *,
    size: int | None = 224,
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
    seed: int | None = None,
    backend: str = "pyav",
    threads: int | None = None,
) -> SampledFrames:
    """
    Decodes a few frames that are spread evenly over a video or a window of it.

    The window is cut into `num_frames` equal segments, and each gives one frame. A frame that would be taken for
    several segments (in a very short clip, or a still scene of a video with variable frame rate) is returned once.

    Args:
        source: path, the bytes of a file, or a [`Clip`].
        num_frames: how many frames at most, T.
        sampling: `"uniform"` takes the frame shown at the centre of a segment; `"jitter"` one at a random time in it
            (for training); `"keyframe"` the key frame nearest to the centre. That is much cheaper, but the frame may
            lie seconds away, and a video with few key frames gives few frames.
        size: the short side is scaled to it (bicubic, antialiased), then the central size x size is cut out. None: as
            stored. A rotation that the file asks for is applied; a pixel aspect ratio other than 1 is ignored.
        start: where the window begins, in seconds. Overrides that of a [`Clip`].
        end: where the window ends, in seconds (or where the video does, if sooner). Overrides that of a [`Clip`].
        fps: take no more frames than this many per second of the window.
        seed: makes `"jitter"` repeatable.
        backend: `"pyav"` or `"torchcodec"` (to be installed, with FFmpeg). Both find the same frames.
        threads: of the decoder; 0: one per core. Default: 1 for small videos and in worker processes (the other cores
            are busy with other videos there), else 0.

    Returns:
        [`SampledFrames`] with frames (T', 3, size, size), 1 <= T' <= num_frames.

    Raises:
        VideoDecodingError: the file is missing, damaged or no video, or the window is empty or outside of the video.
        ValueError: an argument makes no sense.
    """
    clip = as_clip(source)
    start = clip.start if start is None else start
    end = clip.end if end is None else end
    _check_arguments(num_frames, sampling, size, start, end, fps, backend)
    if end is not None and end <= (start or 0):  # of a table's row: an error of that clip, as a damaged file is
        name = describe_source(clip)
        raise VideoDecodingError(f"{name}: the window is empty: it starts at {start or 0} s and ends at {end} s")

    with open_video(clip.source, threads) as video:

        def targets():
            window = _window(video, start, end)
            times = _times(video, *window, num_frames, sampling, fps, seed)
            return Targets([video.ticks(time) for time in times], *window)

        if backend == "torchcodec":
            decode = decode_with_torchcodec
        else:
            decode = decode_key_frames if sampling == "keyframe" else decode_lazily
        images = _decode(video, decode, targets, size)
        if images is None:
            video.reopen(quickly=False)
            images = _decode(video, decode_everything, targets, size)
        begin, finish = _window(video, start, end)

    shown = sorted(images)
    return SampledFrames(
        frames=torch.from_numpy(np.stack([images[pts] for pts in shown])),  # (T', 3, size, size)
        times=tuple(video.seconds(pts) for pts in shown),
        duration=finish - begin,
    )


def _decode(video, decode, targets, size):
    """
    The frames at the targets by one of the decoders, or None if it is not certain of them. A decoder that finds the
    end of the video before the last target corrects the end, and the targets are chosen again.
    """
    stated_end = video.true_end
    images = decode(video, targets(), size)
    if images is None and video.true_end != stated_end:
        video.reopen()
        images = decode(video, targets(), size)
    return images


def probe_video(source: str | os.PathLike | bytes | Clip) -> VideoInfo:
    """
    Reads what the header of a video says, without decoding it.

    Raises:
        VideoDecodingError: the file is missing or no video.
    """
    source = as_clip(source).source
    with open_video(source) as video:
        first, last = video.span()
        return VideoInfo(
            duration=last - first,
            width=video.stream.width,
            height=video.stream.height,
            average_fps=video.fps,
            num_frames=video.stream.frames or max(1, round((last - first) * video.fps)),
            codec=video.decoder.name,
        )


# --- which times -----------------------------------------------------------------------------------------------------


def _check_arguments(num_frames, sampling, size, start, end, fps, backend):
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "torchcodec" and sampling == "keyframe":
        raise ValueError('sampling="keyframe" needs backend="pyav"')
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be above 0, got {fps}")
    for argument, seconds in (("start", start), ("end", end)):
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ValueError(f"{argument} must be a number of seconds from 0 on, got {seconds}")


def _window(video, start, end):
    """The part of [start, end) in which there is video, in seconds."""
    first, last = video.span()
    if start is not None and start >= last:
        raise VideoDecodingError(
            f"{video.name}: the window starts at {start} s, but the video lasts {last:.3f} s; give an earlier start"
        )
    if end is not None and end <= first:
        raise VideoDecodingError(
            f"{video.name}: the window ends at {end} s, but the first frame comes at {first:.3f} s; give a later end"
        )
    begin = first if start is None else max(start, first)
    finish = last if end is None else min(end, last)
    return begin, max(finish, begin)


def _times(video, begin, finish, num_frames, sampling, fps, seed):
    """One time per segment, in seconds, ascending."""
    if fps is not None:
        num_frames = min(num_frames, max(1, round((finish - begin) * fps)))
    width = (finish - begin) / num_frames
    centres = [begin + (i + 0.5) * width for i in range(num_frames)]
    if sampling != "jitter":
        return centres
    # At least a frame interval away from the times of the neighbours, so that no frame is taken twice.
    room = max(0.0, width - 1 / video.fps)
    generator = random.Random(seed)
    return [centre + (generator.random() - 0.5) * room for centre in centres]
