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

A container is not believed: the decoder itself must say that what follows a gap is a key frame, and frames must come
out in the order of their time stamps. Whatever is doubtful (no time stamp, no key frame, damage, a frame that does not
come out) ends the lazy attempt with None. Then `decode_everything` starts at the first packet and skips nothing. It is
the reference: it knows which frames a damaged picture spoils, and returns the frames or raises an error.
`decode_key_frames` takes the key frames next to the targets.

All three take a [`VideoFile`], [`Targets`] and a [`PictureMaker`], and return {time stamp: (3, H, W) uint8 RGB}. They
return None as well where the video ends before the last target; then they have corrected the end of the [`VideoFile`].
"""

import math
from collections import deque
from dataclasses import dataclass

from .video_file import TIME_TOLERANCE
from .video_source import VideoDecodingError, pyav


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
    skips_damage: bool = False  # instead of an error, damage is noted in the file, and other targets can be chosen


# --- lazy ------------------------------------------------------------------------------------------------------------


class _Doubt(Exception):
    """The lazy decoder is not certain of its frames. Ends in `decode_lazily`."""


def decode_lazily(video, targets, make_picture):
    """The frames shown at the targets, decoding as little else as possible."""
    wanted = WantedFrames(make_picture)
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
                    decoder.decode(packet, is_needed=packet.pts >= pts or packet.is_keyframe)
        decoder.drain()
    except _Doubt:
        return None
    return None if wanted.missing else wanted.images


def find_shown(video, targets):
    """The time stamps of the frames shown at the targets, without decoding; None if they are doubtful."""
    reader, found = PacketReader(video), []
    try:
        for target in targets.ticks:
            if reader.may_jump_to(target):
                reader.jump_to(target)
            pts = reader.find_shown_at(target)
            if pts is None:
                return None
            if not found or pts != found[-1]:
                found.append(pts)
                reader.take_through(pts)
    except _Doubt:
        return None
    return found


class WantedFrames:
    """The frames that were asked for: images of those that have come out of the decoder, time stamps of the others."""

    def __init__(self, make_picture):
        self.make_picture = make_picture
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
            self.images[frame.pts] = self.make_picture(frame)
            self.missing.discard(frame.pts)


class PictureDecoder:
    """The decoder of the stream: packets in, wanted frames out."""

    def __init__(self, video, wanted):
        self.video = video  # not its decoder: a file that is opened again has another one
        self.wanted = wanted
        # HEVC, too, has pictures that no other refers to, but only "no other of their temporal layer".
        self.can_skip = video.decoder.name == "h264"
        self._refresh()

    def _refresh(self):
        self.is_fresh = True  # it has seen no packet, hence can only begin with a key frame
        self.begin = -math.inf  # pts of the key frame that it began with
        self.first_key = None  # the same, until that frame has come out
        self.newest_out = -math.inf  # pts of the newest frame that came out

    def decode(self, packet, is_needed):
        """Decodes a packet; if it is not needed, only if others may refer to it. None is the end."""
        if packet is not None:
            if self.is_fresh:
                self.begin = packet.pts
                self.first_key = (
                    None if packet.is_discard else packet.pts
                )  # an edit list cuts it away: not to come out
            self.is_fresh = False
            if packet.pts < self.begin:
                return  # open group of pictures: it refers to others that were not decoded, and so do only its like
        # The decoder knows which pictures no other refers to; we know which are shown before the wanted one.
        self.video.decoder.skip_frame = "NONREF" if self.can_skip and not is_needed else "DEFAULT"
        try:
            frames = self.video.decoder.decode(packet)
        except pyav().FFmpegError as error:
            raise _Doubt from error
        for frame in frames:
            self._check(frame)
            self.wanted.take(frame)

    def _check(self, frame):
        # What refers to a damaged picture is damaged, too, though FFmpeg does not say so.
        if frame.pts is None or frame.is_corrupt or frame.pts <= self.newest_out:
            raise _Doubt
        self.newest_out = frame.pts
        if self.first_key is not None and frame.pts >= self.first_key:
            if frame.pts != self.first_key or not frame.key_frame:
                raise _Doubt  # the container says that it is a key frame, the decoder does not
            self.first_key = None

    def drain(self):
        """Gets the last frames out of the decoder and makes it ready to begin at another key frame."""
        if not self.is_fresh:
            self.decode(None, is_needed=True)
            self.video.decoder.flush_buffers()
            self._refresh()


class PacketReader:
    """Reads packets ahead of the decoder into a queue, and jumps in the file."""

    def __init__(self, video):
        self.video = video
        self.here = video.first_tick  # decoding time of the packet read last
        self.delay = 0  # from decoding to showing a key frame
        self.can_jump = self.can_jump_blindly = video.can_jump
        self._start()

    def _start(self):
        self.packets = self.video.packets()
        self.queue = deque()  # packets that were read but not decoded, in decoding order
        self.shown = {}  # pts -> duration of the packets read since the last jump, from the newest wanted frame on
        self.at_end = False
        self.error = None  # that ended reading

    def may_jump_to(self, target):
        """True if the index knows a key frame before the target that has not been read, or knows too little."""
        if target <= self.here or not self.can_jump:
            return False
        index = self.video.index
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
                self.video.seek(tick)
            except pyav().FFmpegError:
                break
            self._start()
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
        if self.at_end and self.video.has_absolute_times and (above == 0 or self.error):
            # The last frame, or the last that could be read. Is it really still shown at the target?
            end = pts + (self.shown[pts] or self.video.interval)
            if target >= end + self.video.interval / 2:
                if self.error:
                    raise self.error
                self.video.check_end(end, self.here)
                return None
        return pts

    def _read(self):
        """Reads a packet into the queue; returns its pts, or None at the end."""
        try:
            packet = next(self.packets, None)
        except pyav().FFmpegError as error:
            self.error, packet = error, None
        if packet is None:
            self.at_end = True
            return None
        # Only a key frame can come first, in the file and after a jump.
        if packet.pts is None or packet.is_corrupt or not (self.shown or packet.is_keyframe):
            raise _Doubt
        if packet.pts in self.shown:
            raise _Doubt  # two frames at a time
        self.here = packet.pts if packet.dts is None else packet.dts
        if packet.is_keyframe:
            self.delay = packet.pts - self.here
        self.queue.append(packet)
        self.shown[packet.pts] = packet.duration or 0
        return packet.pts

    def take_through(self, pts):
        """
        Takes the packets up to the frame `pts` out of the queue, and drops those before the last key frame:
        (packets, how many were dropped). No packets if the frame was taken already.
        """
        self.shown = {other: duration for other, duration in self.shown.items() if other >= pts}
        count = next((i + 1 for i, packet in enumerate(self.queue) if packet.pts == pts), 0)
        keys = [i for i in range(count) if self.queue[i].is_keyframe and self.queue[i].pts <= pts]
        dropped = keys[-1] if keys else 0
        packets = [self.queue.popleft() for _ in range(count)][dropped:]
        return packets, dropped


# --- key frames ------------------------------------------------------------------------------------------------------


def decode_key_frames(video, targets, make_picture):
    """The key frames nearest to the targets, if possible within the window."""
    video.decoder.thread_count, video.decoder.thread_type = 1, "NONE"  # threads work on successive frames
    if video.can_jump:
        packets = _key_packets_by_index(video, targets)
    else:
        packets = _key_packets_of_all(video, targets)
    images = {}
    for packet in packets:
        if packet is None:
            return None
        if packet.pts in images:
            continue
        try:
            frames = video.decoder.decode(packet) + video.decoder.decode(None)
        except pyav().FFmpegError:
            return None
        for frame in frames:
            if frame.pts == packet.pts and frame.key_frame and not frame.is_corrupt:
                images[frame.pts] = make_picture(frame)
        if packet.pts not in images:
            return None
        video.decoder.flush_buffers()
    return images or None


def _nearest(keys, target, targets, video):
    """The key frame (in ticks) next to a target, within the window if there is one."""
    inside = [key for key in keys if targets.begin <= video.seconds(key) + TIME_TOLERANCE < targets.finish]
    return min(inside or keys, key=lambda key: abs(key - target))


def _key_packets_of_all(video, targets):
    """From a file that is read from its beginning."""
    if not video.is_trusted:
        yield None
        return
    keys = {packet.pts: packet for packet in video.packets() if packet.is_keyframe}
    for target in targets.ticks:
        yield keys[_nearest(keys, target, targets, video)]


def _key_packets_by_index(video, targets):
    """From a file with an index, or without one, by jumps."""
    index = video.index
    first = next(video.packets(), None)
    delay = 0 if first is None or first.pts is None or first.dts is None else first.pts - first.dts
    visited = set()
    for target in targets.ticks:
        around = [index.search_timestamp(target - delay, backward=backward) for backward in (True, False)]
        keys = [index[i].timestamp + delay for i in around if i >= 0]
        is_covered = len(index) and index[-1].timestamp >= target - delay
        if len(keys) == 2 or (keys and is_covered):  # else jump to the target, and see which key frame that leads to
            target = _nearest(keys, target, targets, video)
        if target not in visited:
            visited.add(target)
            yield _read_key_frame(video, target)


def _read_key_frame(video, target):
    """The packet of a key frame near the target (in ticks), before it if possible. None if none is found."""
    for seconds_back in STEPS_BACK:
        try:
            tick = max(video.first_tick, target - int(seconds_back / video.time_base))
            video.seek(tick)
            packet = next((packet for packet in video.packets() if packet.is_keyframe), None)
        except pyav().FFmpegError:
            return None
        if packet is not None and packet.pts is not None:
            return packet
        index = video.index
        if len(index) and index[-1].timestamp >= tick:
            break  # the index knows a key frame there, but the file is cut off
    return None


# --- everything ------------------------------------------------------------------------------------------------------


def decode_everything(video, targets, make_picture):
    """
    The frames shown at the targets, by decoding all that precedes them. If the [`VideoFile`] is careful, damage is an
    error that names the time; otherwise None, for others than the damaged pictures may be spoiled.
    """
    timeline = video.timeline()
    if not timeline.times:
        raise VideoDecodingError(f"{video.name}: its video stream is empty")
    clock = FrameClock(video, timeline)
    damage = Damage(timeline)
    waiting, taken = deque(targets.ticks), {}  # taken: pts -> (image, number of its packet or None)
    shown = None  # (frame, pts) until the next frame is shown
    patience = REORDER_LIMIT  # frames to decode after the last target: they may tell of damage in those before
    for frame in _decoded_frames(video, damage):
        pts = clock.time_of(frame, damage)
        if pts is None:
            return None  # they are not in order: the clock will count frames, or the decoder find the cause
        if damage.is_found and not video.is_careful:
            return None
        if shown is None and video.true_first is None and pts > timeline.first + 1.5 * video.interval:
            video.true_first = video.seconds(pts)  # it refers to pictures before the beginning, as after a cut
            return None
        if shown is not None and pts <= shown[1]:
            continue
        while waiting and shown is not None and waiting[0] < pts:
            waiting.popleft()
            if shown[1] not in taken:
                taken[shown[1]] = make_picture(*shown), timeline.positions.get(shown[0].pts)
        shown = frame, pts
        if not waiting:
            patience -= 1
            if not video.is_careful or (patience < 0 and not (targets.skips_damage and damage.is_found)):
                break
    else:
        if not video.is_careful and clock.count < len(timeline.times):
            return None  # at the end, threads drop errors
    if damage.is_found and not video.is_careful:
        return None
    if shown is None:
        cause = f" ({damage.cause})" if damage.cause else ""
        raise VideoDecodingError(f"{video.name}: not one of its frames can be decoded{cause}")

    if targets.ticks[-1] >= timeline.end + video.interval / 2:
        video.check_end(timeline.end, timeline.sorted_times[-1])
        return None
    regions = damage.regions()  # in ticks
    spoiled = [tick for tick in targets.ticks if any(start <= tick < end for start, end in regions)]
    spoiled += [pts for pts, (_, position) in taken.items() if damage.spoils(position)]
    if spoiled and targets.skips_damage:
        video.damage = [(video.seconds(start), video.seconds(end)) for start, end in regions]
        return None
    if spoiled:
        start, end = next(((s, e) for s, e in regions if s <= min(spoiled) < e), (min(spoiled), math.inf))
        # Frames that come out may be spoiled; if none do, something else than their content may be the cause.
        if end == math.inf and damage.newest_seen < damage.spans()[-1][0]:
            what = f"damaged or incomplete: nothing from {video.seconds(start):.3f} s on can be decoded"
        else:
            until = f", up to {video.seconds(end):.3f} s" if end < math.inf else ""
            what = f"damaged at {video.seconds(start):.3f} s{until}"
        raise VideoDecodingError(f"{video.name}: {what}; encode or download it again")
    if waiting:
        frame, pts = shown
        end = max(pts + (frame.duration or video.interval), timeline.end)
        if waiting[-1] >= end + video.interval / 2:
            video.check_end(end, end)
            return None
        taken[pts] = make_picture(frame, pts), None
    return {pts: image for pts, (image, _) in taken.items()}


def _decoded_frames(video, damage):
    """All frames in the order in which they are shown. What the decoder refuses is noted as damage."""
    position = -1
    for position, packet in enumerate(video.packets()):
        try:
            yield from video.decoder.decode(packet)
        except pyav().FFmpegError as error:
            damage.add(position, error.strerror)
    try:
        yield from video.decoder.decode(None)
    except pyav().FFmpegError as error:
        damage.add(position, error)


class FrameClock:
    """When a decoded frame is shown."""

    def __init__(self, video, timeline):
        self.video = video
        self.timeline = timeline
        self.counts = video.counts_frames or video.lacks_order
        self.count = 0  # of frames that have come out
        self.newest = None  # time of the last frame

    def time_of(self, frame, damage):
        """The time of the next frame, in ticks. None if frames turn out not to be in order."""
        times = self.timeline.sorted_times
        if self.counts:
            position = self.timeline.positions.get(frame.pts)
            if frame.key_frame and position is not None and damage.is_found:
                self.count = position  # all that came before it is shown before it
            pts = times[min(self.count, len(times) - 1)]
        elif frame.pts is not None:
            pts = frame.pts
            is_label = pts in self.timeline.positions
            if self.newest is not None and pts < self.newest and is_label and self.timeline.is_timed:
                if not self.timeline.is_reordered:
                    self.video.counts_frames = True
                    return None
                if not self.video.is_strict:  # FFmpeg does not report a lost slice, but puts frames out of order then
                    self.video.is_strict = True
                    return None
        else:
            pts = times[0] if self.newest is None else round(self.newest + self.video.interval)
        self.count += 1
        self.newest = pts if self.newest is None else max(self.newest, pts)
        damage.see(frame, self.timeline.positions.get(frame.pts), pts)
        return pts


class Damage:
    """Which packets are damaged, and which others they spoil: all up to the next key frame."""

    def __init__(self, timeline):
        self.timeline = timeline
        self.lost = set()  # numbers of packets
        self.keys = []  # numbers of packets that the decoder called key frames
        self.newest_seen = -1  # highest number of a packet whose frame came out
        self.cause = None

    @property
    def is_found(self):
        return bool(self.lost)

    def add(self, position, cause=None):
        self.lost.add(position)
        self.cause = self.cause or cause

    def see(self, frame, position, pts):
        """Notes what a frame says that came out of the decoder."""
        if position is None:  # it carries no time stamp of a packet
            position = min(range(len(self.timeline.times)), key=lambda i: abs(self.timeline.times[i] - pts))
        self.newest_seen = max(self.newest_seen, position)
        if frame.is_corrupt:
            self.add(position)
        elif frame.key_frame:
            self.keys.append(position)

    def spans(self):
        """[first, last) numbers of spoiled packets."""
        spans = []
        for position in sorted(self.lost):
            if not spans or position >= spans[-1][1]:
                spans.append((position, min((key for key in self.keys if key > position), default=math.inf)))
        return spans

    def spoils(self, position):
        return position is not None and any(first <= position < last for first, last in self.spans())

    def regions(self):
        """[start, end) of the spoiled times, in ticks."""
        times, regions = self.timeline.times, []
        for first, last in self.spans():
            first = max(0, min(first, len(times) - 1))
            end = times[last] if last < len(times) else math.inf
            start = min(times[first : last if last < len(times) else None])
            regions.append((start, max(start, end)))
        return regions
