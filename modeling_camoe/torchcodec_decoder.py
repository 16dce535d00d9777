# SPDX-License-Identifier: Apache-2.0
"""
The optional back end: torchcodec decodes the frames at given times, in place of `decoding.py`.

Which frames those are is read from the time stamps of packets, as for PyAV. Where torchcodec takes others, reports an
error, or meets a kind of file that it does not read exactly (whatever is not MP4 or Matroska), PyAV decodes instead.
torchcodec does not report pictures that FFmpeg patched up after damage: for files that may be damaged, use PyAV.
"""

import itertools
import logging
import os

import torch

from .decoding import find_shown
from .pictures import display_matrix
from .video_source import pyav


logger = logging.getLogger(__name__)
fallbacks = itertools.count(1)


def decode_with_torchcodec(video, targets, make_picture):
    """The frames shown at the targets: {pts: (3, H, W) uint8 RGB}, or None where PyAV is to decode."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it is installed, but finds no FFmpeg
        raise ImportError('backend="torchcodec" needs FFmpeg and torchcodec: pip install torchcodec') from error
    images, cause = None, "it is not exact in this kind of file"
    if video.can_jump and video.is_trusted:
        wanted = find_shown(video, targets)
        if wanted is None:
            return None
        try:
            if _is_mirrored(video):
                raise ValueError("it turns pictures, but does not mirror them")
            source = os.fspath(video.source) if isinstance(video.source, str | os.PathLike) else video.source
            source = source.reader() if hasattr(source, "reader") else source
            decoder = VideoDecoder(source, stream_index=video.stream.index, num_ffmpeg_threads=video.threads)
            make_picture.get_pixel_aspect = lambda: float(decoder.metadata.pixel_aspect_ratio or 1)
            is_turned = round(decoder.metadata.rotation or 0) % 180 == 90
            batch = decoder.get_frames_played_at([(pts + 0.5) * video.time_base for pts in wanted])
            if [round(seconds / video.time_base) for seconds in batch.pts_seconds.tolist()] == wanted:
                images = dict(zip(wanted, _shaped(batch.data, make_picture, is_turned).numpy(), strict=True))
            else:
                cause = "it takes other frames"
        except (IndexError, RuntimeError, ValueError, pyav().FFmpegError) as error:
            cause = str(error)
    if images is None:
        logger.warning("%s: decoded by PyAV, not torchcodec: %s (%d so far)", video.name, cause, next(fallbacks))
    return images


def _is_mirrored(video):
    """Whether the file asks players to mirror its pictures. PyAV tells by a decoded frame only."""
    video.reopen()
    frame = next(video.container.decode(video.stream), None)
    matrix = frame and display_matrix(frame)
    return matrix is not None and matrix[0][0] * matrix[1][1] < matrix[0][1] * matrix[1][0]  # the determinant


def _shaped(frames, make_picture, is_turned):
    """(T, 3, H, W) as stored, but turned upright -> at their final size."""
    if is_turned:  # the shape of pixels is that before the turn
        frames = frames.swapaxes(-1, -2)
    width, height = make_picture.scaled_size(frames.shape[-1], frames.shape[-2])
    if (height, width) != tuple(frames.shape[-2:]):
        frames = torch.nn.functional.interpolate(frames, (height, width), mode="bicubic", antialias=True)
    rows, columns = make_picture.crop(width, height)
    frames = frames[:, :, rows, columns]
    return frames.swapaxes(-1, -2) if is_turned else frames
