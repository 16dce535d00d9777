# SPDX-License-Identifier: Apache-2.0
"""
From an open video file and times to pictures, apart from the usual way (`lazy_decoder.py`): key frames only,
everything from the first packet on, or by torchcodec; and the conversion of a decoded frame to RGB at its final size.

Every decoder takes a [`VideoFile`] and ascending targets in ticks, and returns {time stamp: (3, H, W) uint8 RGB}.
"""

import os
from collections import deque

import numpy as np
import torch

from .video_file import STEPS_BACK, TIME_TOLERANCE, EndsEarly, NotExact, VideoDecodingError, pyav


class ImageMaker:
    """Decoded frame -> (3, size, size) uint8 RGB."""

    def __init__(self, size):
        self.size = size
        self.reformatter = pyav().video.reformatter.VideoReformatter()  # keeps swscale's tables from frame to frame

    def __call__(self, frame):
        width, height = frame.width, frame.height
        if self.size is not None:
            short = min(width, height)
            width, height = int(self.size * width / short), int(self.size * height / short)
        # Planar RGB takes swscale half the time of packed "rgb24", has none of its bias of -1 to -2 levels, and the
        # channels come first already. When it scales down, swscale widens the cubic kernel: it is antialiased.
        image = self.reformatter.reformat(frame, width, height, "gbrp", interpolation="BICUBIC", threads=1)
        rows, columns = slice(None), slice(None)
        if self.size is not None:
            top, left = (height - self.size) // 2, (width - self.size) // 2
            rows, columns = slice(top, top + self.size), slice(left, left + self.size)
        green, blue, red = (
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :width][rows, columns]
            for plane in image.planes
        )
        rgb = np.stack([red, green, blue])  # (3, H, W)
        quarter_turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns, axes=(1, 2))) if quarter_turns else rgb


def decode_key_frames(video, targets, size, begin, finish):
    """The key frames nearest to the targets (ticks), if possible within the window (seconds): {pts: image}."""
    make_image = ImageMaker(size)
    video.decoder.thread_count, video.decoder.thread_type = 1, "NONE"  # threads work on successive frames
    index = video.stream.index_entries  # sorted by decoding time
    first = next(video.container.demux(video.stream))
    delay = 0 if first.pts is None or first.dts is None else first.pts - first.dts
    images, visited = {}, set()
    for target in targets:
        around = [index.search_timestamp(target - delay, backward=backward) for backward in (True, False)]
        keys = [index[i].timestamp + delay for i in around if i >= 0]
        if len(keys) == 2:  # else jump to the target, and see which key frame that leads to
            inside = [key for key in keys if begin <= video.seconds(key) + TIME_TOLERANCE < finish]
            target = min(inside or keys, key=lambda key: abs(key - target))
        if target in visited:
            continue
        visited.add(target)
        packet = _read_key_frame(video, target)
        if packet.pts in images:
            continue
        for frame in video.decoder.decode(packet) + video.decoder.decode(None):
            if frame.pts == packet.pts and not frame.is_corrupt:
                images[frame.pts] = make_image(frame)
        if packet.pts not in images:
            raise NotExact
    return images


def _read_key_frame(video, target):
    """The packet of a key frame near the target (in ticks), before it if possible."""
    for seconds_back in STEPS_BACK:
        try:
            tick = max(video.first_tick, target - int(seconds_back / video.time_base))
            video.container.seek(tick, stream=video.stream)
        except pyav().FFmpegError as error:
            raise NotExact from error
        packet = next((packet for packet in video.container.demux(video.stream) if packet.is_keyframe), None)
        if packet is not None and packet.pts is not None:
            return packet
        index = video.stream.index_entries
        if len(index) and index[-1].timestamp >= tick:
            break  # the index knows a key frame there, but the file is cut off
    raise NotExact


def decode_everything(video, targets, size):
    """The frames shown at the targets (ticks, ascending), by decoding all that precedes them: {pts: image}."""
    make_image = ImageMaker(size)
    interval = 1 / video.fps / video.time_base
    stored = _sorted_times(video) if video.may_lack_times else []
    waiting, images = deque(targets), {}
    shown, shown_pts = None, None  # the frame that is shown until the next one
    is_damaged = is_shown_damaged = False  # since the last key frame

    def take(frame, pts, is_damaged):
        if is_damaged:
            raise VideoDecodingError(
                f"{video.name}: damaged at {video.seconds(pts):.3f} s; encode or download it again"
            )
        images[pts] = make_image(frame)

    for count, frame in enumerate(video.container.decode(video.stream)):
        if count < len(stored):
            pts = stored[count]
        else:
            pts = video.first_tick + round(count * interval) if frame.pts is None else frame.pts
        is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
        if shown is None:
            shown, shown_pts, is_shown_damaged = frame, pts, is_damaged
        if pts < shown_pts:
            continue
        while waiting and waiting[0] < pts:
            take(shown, shown_pts, is_shown_damaged)
            waiting.popleft()
        if not waiting:
            return images
        shown, shown_pts, is_shown_damaged = frame, pts, is_damaged
    if shown is None:
        raise VideoDecodingError(f"{video.name}: not one of its frames can be decoded")
    end = shown_pts + (shown.duration or interval)
    if waiting[-1] >= end + interval / 2:
        raise video.early_end(end, end)
    take(shown, shown_pts, is_shown_damaged)
    return images


def _sorted_times(video):
    """The times of all packets in the order in which their frames are shown; [] if some have none."""
    times = [packet.pts for packet in video.container.demux(video.stream) if packet.size > 0]
    video.reopen()
    return [] if None in times else sorted(times)


def decode_with_torchcodec(video, targets, size):
    """The frames shown at the targets (ticks, ascending): {pts: image}."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it is installed, but finds no FFmpeg
        raise ImportError('backend="torchcodec" needs FFmpeg and torchcodec: pip install torchcodec') from error
    source = video.source if isinstance(video.source, bytes) else os.fspath(video.source)
    try:
        decoder = VideoDecoder(source, stream_index=video.stream.index, num_ffmpeg_threads=video.threads)
        first, last = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        times = [(target + 0.5) * video.time_base for target in targets]
        if times[-1] >= last + 0.5 / video.fps:
            raise EndsEarly(last - video.zero)
        times = [min(max(time, first), last - 0.5 * video.time_base) for time in times]
        batch = decoder.get_frames_played_at(times)
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
