# SPDX-License-Identifier: Apache-2.0
"""
From an open video file and target times to pictures: `decode_lazily`, or else `decode_everything`.

The lazy decoder takes the targets one after the other:

1. `PacketReader` reads packets ahead of the decoder, until their time stamps make it certain which frame is shown at
   the target. Where a key frame lies ahead, it jumps there first: what lies between is not even read.
2. Of the packets in its queue, those before the last key frame up to the wanted frame are dropped.
3. `PictureDecoder` decodes the others up to the wanted frame. It leaves out H.264 pictures that no other refers to.
   The rest of the queue waits for the next target.
4. `WantedFrames` converts the wanted frames, and only these, as they come out of the decoder.

Whatever looks doubtful on the way (no time stamp, no key frame, damage, a frame that does not come out) ends the lazy
attempt with None, and `decode_everything` starts at the first packet, looks at every frame and skips nothing. It is
the reference: it returns the frames or raises an error. `decode_key_frames` takes the key frames next to the targets.

All three take a [`VideoFile`], [`Targets`] and a size, and return {time stamp: (3, H, W) uint8 RGB}. They return None
as well where the video ends before the last target; then they have corrected the end of the [`VideoFile`].
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from .video_file import TIME_TOLERANCE, VideoDecodingError, pyav


# H.264 and HEVC let at most 16 pictures overtake another between decoding and showing; no other codec allows more. So
# after 17 packets with time stamps above t, every frame up to t has been read. (Decoding time stamps would tell the
# same sooner, but not every container has them.)
REORDER_LIMIT = 17

# Where the file has no index of key frames: up to this distance, reading on is cheaper than a jump into the dark.
BLIND_JUMP_SECONDS = 10.0

# Where to look for a key frame, in seconds before the target, in a file without an index: FFmpeg may land after it.
STEPS_BACK = (0, 4, 16, 64)


@dataclass(frozen=True)
class Targets:
    """Which frames to decode."""

    ticks: list[int]  # one per segment of the window, ascending: the frame shown then is wanted
    begin: float  # of the window, seconds
    finish: float


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


# --- lazy ------------------------------------------------------------------------------------------------------------


class _Doubt(Exception):
    """The lazy decoder is not certain of its frames. Ends in `decode_lazily`."""


def decode_lazily(video, targets, size):
    """The frames shown at the targets, decoding as little else as possible."""
    wanted = WantedFrames(size)
    decoder = PictureDecoder(video, wanted)
    reader = PacketReader(video)
    try:
        for target in targets.ticks:
            if reader.may_jump_to(target):
                decoder.drain()
                reader.jump_to(target)
            pts = reader.find_shown_at(target)
            if pts is None:
                return None
            if wanted.add(pts):
                packets, dropped = reader.take_through(pts)
                if dropped:
                    decoder.drain()
                if decoder.is_fresh and not (packets and packets[0].is_keyframe and packets[0].pts <= pts):
                    raise _Doubt
                for packet in packets:
                    decoder.decode(packet, is_needed=packet.pts >= pts)
        decoder.drain()
    except _Doubt:
        return None
    return None if wanted.missing else wanted.images


class WantedFrames:
    """The frames that were asked for: images of those that have come out of the decoder, time stamps of the others."""

    def __init__(self, size):
        self.make_image = ImageMaker(size)
        self.images = {}  # pts -> (3, H, W)
        self.missing = set()  # pts
        self.newest = -math.inf  # pts

    def add(self, pts):
        """Asks for a frame; False if it was asked for already."""
        is_new = pts != self.newest
        if is_new:
            self.missing.add(pts)
            self.newest = pts
        return is_new

    def take(self, frame):
        if frame.pts in self.missing and not frame.is_corrupt:
            self.images[frame.pts] = self.make_image(frame)
            self.missing.discard(frame.pts)


class PictureDecoder:
    """The decoder of the stream: packets in, wanted frames out."""

    def __init__(self, video, wanted):
        self.video = video  # not its decoder: a file that is opened again has another one
        self.wanted = wanted
        # HEVC, too, has pictures that no other refers to, but only "no other of their temporal layer".
        self.can_skip = video.decoder.name == "h264"
        self.newest_key = -math.inf  # pts of the newest key frame in the decoder
        self.is_fresh = True  # it has seen no packet, hence can only begin with a key frame

    def decode(self, packet, is_needed):
        """Decodes a packet; if it is not needed, only if others may refer to it. None is the end."""
        if packet is not None:
            self.is_fresh = False
            if packet.is_keyframe:
                self.newest_key = packet.pts
        # The decoder knows which pictures no other refers to; we know which are shown before the wanted one.
        self.video.decoder.skip_frame = "NONREF" if self.can_skip and not is_needed else "DEFAULT"
        try:
            frames = self.video.decoder.decode(packet)
        except pyav().FFmpegError as error:
            raise _Doubt from error
        for frame in frames:
            # What refers to a damaged picture is damaged, too, though FFmpeg does not say so. (Frames shown before the
            # key frame do not count: in an open group of pictures, they refer to others that we did not decode.)
            if frame.pts is None or (frame.is_corrupt and frame.pts >= self.newest_key):
                raise _Doubt
            self.wanted.take(frame)

    def drain(self):
        """Gets the last frames out of the decoder and makes it ready to begin at another key frame."""
        if not self.is_fresh:
            self.decode(None, is_needed=True)
            self.video.decoder.flush_buffers()
            self.is_fresh = True


class PacketReader:
    """Reads packets ahead of the decoder into a queue, and jumps in the file."""

    def __init__(self, video):
        self.video = video
        self.here = video.first_tick  # decoding time of the packet read last
        self.delay = 0  # from decoding to showing a key frame
        self.can_jump = self.can_jump_blindly = not video.has_few_times
        self.order = TimeOrder()
        self._start()

    def _start(self):
        self.packets = self.video.container.demux(self.video.stream)
        self.queue = deque()  # packets that were read but not decoded, in decoding order
        self.shown = {}  # pts -> duration of the packets read since the last jump, from the newest wanted frame on
        self.has_begun = False  # a key frame was read
        self.at_end = False
        self.error = None  # that ended reading

    def may_jump_to(self, target):
        """True if the index knows a key frame before the target that has not been read, or knows too little."""
        if target <= self.here or not self.can_jump:
            return False
        index = self.video.stream.index_entries  # sorted by decoding time
        key = index.search_timestamp(target - self.delay, backward=True)
        if key >= 0 and index[key].timestamp > self.here:
            return True
        is_covered = len(index) and index[-1].timestamp >= target
        is_far = (target - self.here) * self.video.time_base > BLIND_JUMP_SECONDS
        return self.can_jump_blindly and is_far and not is_covered

    def jump_to(self, target):
        """Jumps to the last key frame before the target."""
        came_from = self.here
        for seconds_back in STEPS_BACK:
            tick = max(self.video.first_tick, target - int(seconds_back / self.video.time_base))
            try:
                self.video.container.seek(tick, stream=self.video.stream)
            except pyav().FFmpegError:
                break
            self._start()
            while not self.queue and not self.at_end:
                self._read()
            if self.queue and self.queue[0].pts <= target:
                self.can_jump_blindly &= self.here > came_from
                return
        self.video.reopen()  # no jumps in this file: read on from its first packet
        self._start()
        self.can_jump = False

    def find_shown_at(self, target):
        """
        Reads on until it is certain which frame is shown at the target; returns its pts, or None if the video ends
        before.
        """
        above = sum(pts > target for pts in self.shown)
        while above < REORDER_LIMIT and not self.at_end:
            pts = self._read()
            above += pts is not None and pts > target
        if not self.shown:
            raise self.error or _Doubt
        if min(self.shown) > target:
            return min(self.shown)  # nothing is shown yet: the first frame
        pts = max(pts for pts in self.shown if pts <= target)
        if self.at_end and (above == 0 or self.error):
            # The last frame, or the last that could be read. Is it really still shown at the target?
            interval = 1 / self.video.fps / self.video.time_base
            end = pts + (self.shown[pts] or interval)
            if target >= end + interval / 2:
                if self.error:
                    raise self.error
                self.video.check_end(end, self.here)
                return None
        return pts

    def _read(self):
        """Reads a packet into the queue; returns its pts, or None at the end and before the first key frame."""
        try:
            packet = next(self.packets, None)
        except pyav().FFmpegError as error:
            self.error, packet = error, None
        if packet is None or packet.size == 0:  # PyAV ends with an empty packet
            self.at_end = True
            return None
        if packet.pts is None:
            raise _Doubt
        self.order.add(packet.pts)
        self.here = packet.pts if packet.dts is None else packet.dts
        if packet.is_keyframe:
            self.has_begun = True
            self.delay = packet.pts - self.here
        elif not self.has_begun:
            return None  # belongs to a key frame that was not read
        self.queue.append(packet)
        self.shown[packet.pts] = packet.duration or 0
        return packet.pts

    def take_through(self, pts):
        """
        Takes the packets up to the frame `pts` out of the queue, and drops those before the last key frame:
        (packets, how many were dropped). No packets if the frame was taken already.
        """
        if self.video.may_lack_times and not self.order.is_changed:
            raise _Doubt  # frames are reordered, but time stamps are not
        self.shown = {other: duration for other, duration in self.shown.items() if other >= pts}
        count = next((i + 1 for i, packet in enumerate(self.queue) if packet.pts == pts), 0)
        keys = [i for i in range(count) if self.queue[i].is_keyframe and self.queue[i].pts <= pts]
        dropped = keys[-1] if keys else 0
        packets = [self.queue.popleft() for _ in range(count)][dropped:]
        return packets, dropped


class TimeOrder:
    """Whether packets come in another order than that in which their frames are shown."""

    def __init__(self):
        self.highest = -math.inf  # pts
        self.is_changed = False

    def add(self, pts):
        self.is_changed |= pts < self.highest
        self.highest = max(self.highest, pts)


# --- key frames ------------------------------------------------------------------------------------------------------


def decode_key_frames(video, targets, size):
    """The key frames nearest to the targets, if possible within the window."""
    make_image = ImageMaker(size)
    video.decoder.thread_count, video.decoder.thread_type = 1, "NONE"  # threads work on successive frames
    index = video.stream.index_entries  # sorted by decoding time
    first = next(video.container.demux(video.stream))
    delay = 0 if first.pts is None or first.dts is None else first.pts - first.dts
    images, visited = {}, set()
    for target in targets.ticks:
        around = [index.search_timestamp(target - delay, backward=backward) for backward in (True, False)]
        keys = [index[i].timestamp + delay for i in around if i >= 0]
        if len(keys) == 2:  # else jump to the target, and see which key frame that leads to
            inside = [key for key in keys if targets.begin <= video.seconds(key) + TIME_TOLERANCE < targets.finish]
            target = min(inside or keys, key=lambda key: abs(key - target))
        if target in visited:
            continue
        visited.add(target)
        packet = _read_key_frame(video, target)
        if packet is None:
            return None
        if packet.pts in images:
            continue
        for frame in video.decoder.decode(packet) + video.decoder.decode(None):
            if frame.pts == packet.pts and not frame.is_corrupt:
                images[frame.pts] = make_image(frame)
        if packet.pts not in images:
            return None
    return images


def _read_key_frame(video, target):
    """The packet of a key frame near the target (in ticks), before it if possible. None if none is found."""
    for seconds_back in STEPS_BACK:
        try:
            tick = max(video.first_tick, target - int(seconds_back / video.time_base))
            video.container.seek(tick, stream=video.stream)
        except pyav().FFmpegError:
            return None
        packet = next((packet for packet in video.container.demux(video.stream) if packet.is_keyframe), None)
        if packet is not None and packet.pts is not None:
            return packet
        index = video.stream.index_entries
        if len(index) and index[-1].timestamp >= tick:
            break  # the index knows a key frame there, but the file is cut off
    return None


# --- everything ------------------------------------------------------------------------------------------------------


def decode_everything(video, targets, size):
    """The frames shown at the targets, by decoding all that precedes them."""
    make_image = ImageMaker(size)
    interval = 1 / video.fps / video.time_base
    stored = _sorted_times(video) if video.may_lack_times else []
    waiting, images = deque(targets.ticks), {}
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
        video.check_end(end, end)
        return None
    take(shown, shown_pts, is_shown_damaged)
    return images


def _sorted_times(video):
    """The times of all packets in the order in which their frames are shown; [] if some have none."""
    times = [packet.pts for packet in video.container.demux(video.stream) if packet.size > 0]
    video.reopen()
    return [] if None in times else sorted(times)
