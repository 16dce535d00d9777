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

import bisect
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .decoding import Targets, decode_everything, decode_key_frames, decode_lazily
from .pictures import PictureMaker
from .torchcodec_decoder import decode_with_torchcodec
from .video_file import open_video
from .video_source import Clip, VideoDecodingError, as_clip, describe_source


# What a program that walks over a folder takes for a video.
VIDEO_EXTENSIONS = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)

SAMPLINGS = ("uniform", "jitter", "keyframe")
BACKENDS = ("pyav", "torchcodec")
ON_DAMAGE = ("error", "around")


@dataclass(frozen=True)
class SampledFrames:
    """Frames of one clip, never padded: T' is below the number asked for where the clip has fewer distinct frames."""

    frames: torch.Tensor  # (T', 3, size, size) uint8 RGB
    times: tuple[float, ...]  # (T',) seconds, strictly increasing
    duration: float  # of the window, seconds
    skipped_damage: tuple[tuple[float, float], ...] = ()  # (start, end) of damaged parts that frames were taken around
    preview: torch.Tensor | None = None  # (3, h, w) uint8 RGB: all of the middle frame, where it was asked for


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says."""

    duration: float  # of the video stream, seconds
    width: int  # as stored: before a rotation that the file may ask for
    height: int
    average_fps: float
    num_frames: int  # as stated, else duration * average_fps
    codec: str
    start: float = 0.0  # when the first frame is shown, seconds: the sound may begin earlier


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
    on_damage: str = "error",
    preview_size: int | None = None,
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
            stored. What the file asks a player for is applied: turns, mirroring, and the shape of its pixels.
        start: where the window begins, in seconds. Overrides that of a [`Clip`].
        end: where the window ends, in seconds (or where the video does, if sooner). Overrides that of a [`Clip`].
        fps: take no more frames than this many per second of the window.
        seed: makes `"jitter"` repeatable.
        backend: `"pyav"` or `"torchcodec"` (to be installed, with FFmpeg). Both find the same frames, but torchcodec
            does not report pictures that FFmpeg patched up after damage: use PyAV for files that may be damaged.
        threads: of the decoder; 0: one per core. Default: 1 for small videos and in worker processes (the other cores
            are busy with other videos there), else 0.
        on_damage: what to do if a wanted frame is damaged: `"error"`, or take frames `"around"` the damaged part,
            evenly from the rest of the window; the result names that part.
        preview_size: also return the middle one of the frames uncropped, its long side scaled down to this. PyAV only.

    Returns:
        [`SampledFrames`] with frames (T', 3, size, size), 1 <= T' <= num_frames.

    Raises:
        VideoDecodingError: the file is missing, damaged or no video, or the window is empty or outside of the video.
        ValueError: an argument makes no sense.
    """
    clip = as_clip(source)
    start = clip.start if start is None else start
    end = clip.end if end is None else end
    _check_arguments(num_frames, sampling, size, start, end, fps, backend, on_damage)
    if end is not None and end <= (start or 0):  # of a table's row: an error of that clip, as a damaged file is
        name = describe_source(clip)
        raise VideoDecodingError(f"{name}: the window is empty: it starts at {start or 0} s and ends at {end} s")

    with open_video(clip.source, threads) as video:

        def targets():
            window = _window(video, start, end)
            holes = _holes(video.damage, *window)
            times = _times(video, *window, num_frames, sampling, fps, seed, holes)
            return Targets([video.ticks(time) for time in times], *window, on_damage == "around")

        make_picture = PictureMaker(size, lambda: video.pixel_aspect, preview_size)
        images = None
        for decode in _decoders(video, sampling, backend):
            images = _decode(video, decode, targets, make_picture)
            if images is not None:
                break
        begin, finish = _window(video, start, end)
        holes = _holes(video.damage, begin, finish)

    shown = sorted(images)
    return SampledFrames(
        frames=torch.from_numpy(np.stack([images[pts] for pts in shown])),  # (T', 3, size, size)
        times=tuple(video.seconds(pts) for pts in shown),
        duration=finish - begin,
        skipped_damage=tuple((float(hole_start), float(hole_end)) for hole_start, hole_end in holes),
        preview=_preview(make_picture, shown),
    )


def _preview(make_picture, shown) -> torch.Tensor | None:
    """All of the middle frame (3, h, w), if there are previews; `shown` are the time stamps of a clip's frames."""
    preview = make_picture.previews.get(shown[len(shown) // 2])
    return None if preview is None else torch.from_numpy(preview)


def sample_windows(
    clips: Sequence[Clip], num_frames: int = 12, sampling: str = "uniform", on_damage: str = "error", **options
) -> list[SampledFrames | VideoDecodingError]:
    """
    The frames of several windows of one file, each as [`sample_frames`] gives them, with what they share decoded once.

    Whatever is not straightforward (damage, a wrong header, another sampling than `"uniform"`) is left to
    [`sample_frames`], window by window.

    Args:
        clips: windows of one source, each with its end.
        num_frames, sampling, on_damage, options: as for [`sample_frames`].

    Returns:
        for each window its frames, or the error that [`sample_frames`] raises for it.
    """
    shared = None
    if len(clips) > 1 and sampling == "uniform" and options.keys() <= {"size", "fps", "threads", "preview_size"}:
        try:
            shared = _decode_together(clips, num_frames, **options)
        except VideoDecodingError:
            pass  # of one window, perhaps: each gets its own below
    if shared is not None:
        return shared
    alone = []
    for clip in clips:
        try:
            alone.append(sample_frames(clip, num_frames, sampling, on_damage=on_damage, **options))
        except VideoDecodingError as error:
            alone.append(error)
    return alone


def _decode_together(
    clips, num_frames, size=224, fps=None, threads=None, preview_size=None
) -> list[SampledFrames] | None:
    """The frames of all windows by one lazy decoder; None where it is not certain of them."""
    for clip in clips:
        _check_arguments(num_frames, "uniform", size, clip.start, clip.end, fps, "pyav", "error")
    with open_video(clips[0].source, threads) as video:
        if not video.is_trusted:
            return None
        known = video.findings
        windows = [_window(video, clip.start, clip.end) for clip in clips]
        if any(finish <= begin for begin, finish in windows):
            return None
        ticks = [
            [video.ticks(time) for time in _times(video, *window, num_frames, "uniform", fps, None)]
            for window in windows
        ]
        wanted = sorted({tick for window in ticks for tick in window})
        begin, finish = min(begin for begin, _ in windows), max(finish for _, finish in windows)
        make_picture = PictureMaker(size, lambda: video.pixel_aspect, preview_size)
        images = decode_lazily(video, Targets(wanted, begin, finish), make_picture)
        if images is None or video.findings != known:
            return None
        shown = sorted(images)
        results = []
        for window, (begin, finish) in zip(ticks, windows, strict=True):
            # The frame shown at a time is the newest one that has come by then, or the first one of all.
            taken = sorted({shown[max(0, bisect.bisect_right(shown, tick) - 1)] for tick in window})
            frames = torch.from_numpy(np.stack([images[pts] for pts in taken]))  # (T', 3, size, size)
            times, preview = tuple(video.seconds(pts) for pts in taken), _preview(make_picture, taken)
            results.append(SampledFrames(frames, times, finish - begin, preview=preview))
    return results


def _decoders(video, sampling, backend):
    """Ways to decode, from the cheapest to the one that always answers. What follows damage is left to one thread."""
    if backend == "torchcodec":
        yield decode_with_torchcodec
        video.reopen()
    if sampling == "keyframe":
        yield decode_key_frames
    else:
        if video.is_trusted:
            yield decode_lazily
        elif video.threads != 1:
            yield decode_everything
        if video.threads != 1:
            video.be_careful()
            if video.is_trusted:
                yield decode_lazily
    video.be_careful()
    yield decode_everything


def _decode(video, decode, targets, make_picture):
    """
    The frames at the targets by one of the decoders, or None if it is not certain of them. A decoder that learns more
    about the file (its end, its damage, its clock) returns None and notes it; then the targets are chosen again.
    """
    for _ in range(4):
        known = video.findings
        images = decode(video, targets(), make_picture)
        if images is not None or known == video.findings:
            return images
        video.reopen()
    raise VideoDecodingError(f"{video.name}: its frames and their time stamps do not add up")


def probe_video(source: str | os.PathLike | bytes | Clip) -> VideoInfo:
    """
    Reads what the header of a video says, without decoding it.

    A video whose first frames cannot be decoded (as after a cut before its first key frame), or which ends before its
    stated end, lasts less long than this says. `sample_frames` notices as it decodes, and returns the true duration.

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
            start=first,
        )


# --- which times -----------------------------------------------------------------------------------------------------


def _check_arguments(num_frames, sampling, size, start, end, fps, backend, on_damage):
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if on_damage not in ON_DAMAGE:
        raise ValueError(f"on_damage={on_damage!r} is not one of {', '.join(ON_DAMAGE)}")
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


def _holes(damage, begin, finish):
    """The damaged parts of the window, in seconds."""
    return [(max(begin, start), min(finish, end)) for start, end in damage if start < finish and end > begin]


def _times(video, begin, finish, num_frames, sampling, fps, seed, holes=()):
    """One time per segment, in seconds, ascending. Damaged parts are cut out before the rest is cut into segments."""
    length = finish - begin - sum(end - start for start, end in holes)
    if holes and length <= 0:
        raise VideoDecodingError(f"{video.name}: damaged from {begin:.3f} s to {finish:.3f} s")
    if fps is not None:
        num_frames = min(num_frames, max(1, round(length * fps)))
    width = length / num_frames
    times = [begin + (i + 0.5) * width for i in range(num_frames)]
    if sampling == "jitter":
        # At least a frame interval away from the times of the neighbours, so that no frame is taken twice.
        room = max(0.0, width - 1 / video.fps)
        generator = random.Random(seed)
        times = [centre + (generator.random() - 0.5) * room for centre in times]
    for start, end in holes:
        times = [time + (end - start) if time >= start else time for time in times]
    return times
