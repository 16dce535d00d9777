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
            source = video.source if isinstance(video.source, bytes) else os.fspath(video.source)
            decoder = VideoDecoder(source, stream_index=video.stream.index, num_ffmpeg_threads=video.threads)
            batch = decoder.get_frames_played_at([(pts + 0.5) * video.time_base for pts in wanted])
            if [round(seconds / video.time_base) for seconds in batch.pts_seconds.tolist()] == wanted:
                images = dict(zip(wanted, _shaped(batch.data, make_picture, video).numpy(), strict=True))
            else:
                cause = "it takes other frames"
        except (IndexError, RuntimeError, ValueError) as error:
            cause = str(error)
    if images is None:
        logger.warning("%s: decoded by PyAV, not torchcodec: %s (%d so far)", video.name, cause, next(fallbacks))
    return images


def _shaped(frames, make_picture, video):
    """(T, 3, H, W) as stored -> upright, at their final size."""
    width, height = make_picture.scaled_size(frames.shape[-1], frames.shape[-2])
    if (height, width) != tuple(frames.shape[-2:]):
        frames = torch.nn.functional.interpolate(frames, (height, width), mode="bicubic", antialias=True)
    rows, columns = make_picture.crop(width, height)
    return frames[:, :, rows, columns]
