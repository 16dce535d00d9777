# SPDX-License-Identifier: Apache-2.0
"""The optional back end: torchcodec decodes the frames at given times, in place of `decoding.py`."""

import os

import torch

from .video_file import VideoDecodingError


def decode_with_torchcodec(video, targets, size):
    """The frames shown at the targets: {pts: (3, H, W) uint8 RGB}, or None if the video ends before the last one."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it is installed, but finds no FFmpeg
        raise ImportError('backend="torchcodec" needs FFmpeg and torchcodec: pip install torchcodec') from error
    source = video.source if isinstance(video.source, bytes) else os.fspath(video.source)
    try:
        decoder = VideoDecoder(source, stream_index=video.stream.index, num_ffmpeg_threads=video.threads)
        first, last = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        times = [(tick + 0.5) * video.time_base for tick in targets.ticks]
        if times[-1] >= last + 0.5 / video.fps:
            video.correct_end(last - video.zero)
            return None
        times = [min(max(time, first), last - 0.5 * video.time_base) for time in times]
        batch = decoder.get_frames_played_at(times)
    except VideoDecodingError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise VideoDecodingError(f'{video.name}: torchcodec cannot decode it ({error}); use backend="pyav"') from error
    frames = batch.data  # (T, 3, H, W) uint8
    if size is not None:
        short = min(frames.shape[-2:])
        height, width = (int(size * side / short) for side in frames.shape[-2:])
        frames = torch.nn.functional.interpolate(frames, (height, width), mode="bicubic", antialias=True)
        top, left = (height - size) // 2, (width - size) // 2
        frames = frames[:, :, top : top + size, left : left + size]
    ticks = [round(seconds / video.time_base) for seconds in batch.pts_seconds.tolist()]
    return {pts: frame.numpy() for pts, frame in zip(ticks, frames, strict=True)}
