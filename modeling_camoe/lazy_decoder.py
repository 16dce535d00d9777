# SPDX-License-Identifier: Apache-2.0
"""
The usual way to decode: exact, and as little as possible.

Packets are read ahead of decoding, so that a group of pictures without a wanted frame is never decoded (nor read,
where the file has an index to jump by), and an H.264 picture that no other refers to only if it is wanted. Whatever
looks doubtful on the way ends in `NotExact`, and the caller decodes everything instead.
"""

import math
from collections import deque

from .frame_decoders import ImageMaker
from .video_file import STEPS_BACK, NotExact, pyav


# H.264 and HEVC let at most 16 pictures overtake another between decoding and showing; no other codec allows more. So
# after 17 packets with time stamps above t, every frame up to t has been read. (Decoding time stamps would tell the
# same sooner, but not every container has them.)
REORDER_LIMIT = 17

# Where the file has no index of key frames: up to this distance, reading on is cheaper than a jump into the dark.
BLIND_JUMP_SECONDS = 10.0


class LazyDecoder:
    """
    Decodes the frames shown at given times, and as little else as possible.

    Packets are read ahead into a queue until it is certain which frame is shown at the next target. Only then does the
    decoder get packets: from the last key frame before the target (what precedes that is dropped) up to the wanted
    frame. The rest of the queue waits for the next target.
    """

    def __init__(self, video, size):
        self.video = video
        self.make_image = ImageMaker(size)
        # HEVC, too, has pictures that no other refers to, but only "no other of their temporal layer".
        self.can_skip = video.decoder.name == "h264"
        self.images = {}  # pts -> (3, H, W); the result
        self.missing = set()  # pts of wanted frames that have not come out of the decoder yet
        self.newest = -math.inf  # pts of the newest wanted frame
        self.newest_key = -math.inf  # pts of the newest key frame in the decoder
        self.here = video.first_tick  # decoding time of the packet read last
        self.delay = 0  # from decoding to showing a key frame
        self.decoder_is_fresh = True  # it has seen no frames, hence can only begin with a key frame
        self.may_jump = self.may_jump_blindly = not video.has_few_times
        self.highest = -math.inf  # pts of the packets read
        self.reorders = False  # some packet came after one that is shown later
        self._start_reading()

    def _start_reading(self):
        self.packets = self.video.container.demux(self.video.stream)
        self.queue = deque()  # packets that were read but not decoded, in decoding order
        self.shown = {}  # pts -> duration of the packets read since the last jump, from the newest wanted frame on
        self.at_end = False
        self.read_error = None

    def run(self, targets):
        """`targets` in ticks, ascending -> {pts: image}."""
        for target in targets:
            self._jump_towards(target)
            pts = self._find_shown_at(target)
            if pts != self.newest:
                self.newest = pts
                self._decode_through(pts)
        self._drain()
        if self.missing:
            raise NotExact
        return self.images

    def _jump_towards(self, target):
        """Jumps to the last key frame before the target, if the index knows one that has not been read yet."""
        if target <= self.here or not self.may_jump:
            return
        index = self.video.stream.index_entries  # sorted by decoding time
        key = index.search_timestamp(target - self.delay, backward=True)
        if key >= 0 and index[key].timestamp > self.here:
            self._jump(target)
        elif self.may_jump_blindly and (target - self.here) * self.video.time_base > BLIND_JUMP_SECONDS:
            if len(index) and index[-1].timestamp >= target:
                return  # the index covers the target, and knows of no key frame on the way
            came_from = self.here
            self._jump(target)
            self.may_jump_blindly = self.here > came_from

    def _jump(self, target):
        self._drain()
        for seconds_back in STEPS_BACK:
            tick = max(self.video.first_tick, target - int(seconds_back / self.video.time_base))
            try:
                self.video.container.seek(tick, stream=self.video.stream)
            except pyav().FFmpegError:
                break
            self._start_reading()
            while not self.queue and not self.at_end:
                self._read()
            if self.queue and self.queue[0].pts <= target:
                return
        self.video.reopen()  # no jumps in this file: read on from its first packet
        self._start_reading()
        self.may_jump = False

    def _find_shown_at(self, target):
        """Reads on until it is certain which frame is shown at the target; returns its pts."""
        self.shown = {pts: duration for pts, duration in self.shown.items() if pts >= self.newest}
        above = sum(pts > target for pts in self.shown)
        while above < REORDER_LIMIT and not self.at_end:
            pts = self._read()
            above += pts is not None and pts > target
        if not self.shown:
            raise self.read_error or NotExact
        if min(self.shown) > target:
            return min(self.shown)  # nothing is shown yet: the first frame
        pts = max(pts for pts in self.shown if pts <= target)
        if self.at_end and (above == 0 or self.read_error):
            # The last frame, or the last that could be read. Is it really still shown at the target?
            interval = 1 / self.video.fps / self.video.time_base
            end = pts + (self.shown[pts] or interval)
            if target >= end + interval / 2:
                raise self.read_error or self.video.early_end(end, self.here)
        return pts

    def _read(self):
        """Reads a packet into the queue; returns its pts, or None at the end and before the first key frame."""
        try:
            packet = next(self.packets, None)
        except pyav().FFmpegError as error:
            self.read_error, packet = error, None
        if packet is None or packet.size == 0:  # PyAV ends with an empty packet
            self.at_end = True
            return None
        if packet.pts is None:
            raise NotExact
        self.reorders |= packet.pts < self.highest
        self.highest = max(self.highest, packet.pts)
        self.here = packet.pts if packet.dts is None else packet.dts
        if packet.is_keyframe:
            self.delay = packet.pts - self.here
        elif self.decoder_is_fresh and not self.queue:
            return None  # belongs to a key frame that was not read
        self.queue.append(packet)
        self.shown[packet.pts] = packet.duration or 0
        return packet.pts

    def _decode_through(self, pts):
        """Gives the decoder what it needs to decode the frame `pts`."""
        if self.video.may_lack_times and not self.reorders:
            raise NotExact  # frames are reordered, but time stamps are not
        position = next((i for i, packet in enumerate(self.queue) if packet.pts == pts), -1)
        keys = [i for i in range(position + 1) if self.queue[i].is_keyframe and self.queue[i].pts <= pts]
        if self.decoder_is_fresh and not keys:
            raise NotExact
        if keys and keys[-1] > 0:
            self._drain()
            for _ in range(keys[-1]):
                self.queue.popleft()
                position -= 1
        self.missing.add(pts)
        for _ in range(position + 1):  # none if the frame is on its way through the decoder already
            packet = self.queue.popleft()
            # The decoder knows which pictures no other refers to; we know which are shown before the wanted one.
            if packet.is_keyframe:
                self.newest_key = packet.pts
            self.video.decoder.skip_frame = "NONREF" if self.can_skip and packet.pts < pts else "DEFAULT"
            self._decode(packet)
        self.decoder_is_fresh = False

    def _decode(self, packet):
        try:
            frames = self.video.decoder.decode(packet)
        except pyav().FFmpegError as error:
            raise NotExact from error
        for frame in frames:
            # What refers to a damaged picture is damaged, too, though FFmpeg does not say so. (Frames shown before the
            # key frame do not count: in an open group of pictures, they refer to others that we did not decode.)
            if frame.pts is None or (frame.is_corrupt and frame.pts >= self.newest_key):
                raise NotExact
            if frame.pts in self.missing and not frame.is_corrupt:
                self.images[frame.pts] = self.make_image(frame)
                self.missing.discard(frame.pts)

    def _drain(self):
        """Gets the last frames out of the decoder and makes it ready to begin at another key frame."""
        if not self.decoder_is_fresh:
            self._decode(None)
            self.video.decoder.flush_buffers()
            self.decoder_is_fresh = True
