# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
- checked: a lazy decode that did not yield every wanted frame undamaged is thrown away and done again the plain way,
  from the first packet on. What cannot be decoded then is an error with the name of the file and the cause: no frame
  is ever made up.

Units: "seconds" count from the beginning of the file, as in a player; "ticks" are the time stamps of the stream.
"""

import io
import math
import multiprocessing
import os
import random
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError:  # the rest of the model works without a decoder
    av = None

# What a program that walks over a folder takes for a video.
VIDEO_EXTENSIONS = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)

SAMPLINGS = ("uniform", "jitter", "keyframe")
BACKENDS = ("pyav", "torchcodec")

# H.264 and HEVC let at most 16 pictures overtake another between decoding and showing; no other codec allows more. So
# after 17 packets with time stamps above t, every frame up to t has been read. (Decoding time stamps would tell the
# same sooner, but not every container has them.)
REORDER_LIMIT = 17

# Where the file has no index of key frames: up to this distance, reading on is cheaper than a jump into the dark.
BLIND_JUMP_SECONDS = 10.0

# Pixels. Below, a clip of some seconds is decoded in less time than it takes to start the threads that would share it.
SMALL_AREA = 256 * 256

# Keeps FFmpeg from decoding the first frames while it opens a file: 1 ms instead of 8 (360p) or 25 (720p).
OPEN_QUICKLY = {"skip_frame": "all"}

# Where to look for a key frame, in seconds before the target, in a file without an index: FFmpeg may land after it.
STEPS_BACK = (0, 4, 16, 64)

# Seconds. A frame counts as shown this much before its time: Matroska rounds the time to milliseconds.
TIME_TOLERANCE = 0.0005

# For streams that do not state their frame rate.
DEFAULT_FPS = 25.0


class VideoDecodingError(ValueError):
    """A video that cannot be decoded. The message names the file and the cause."""


@dataclass(frozen=True, repr=False)
class Clip:
    """What to decode: a whole video or a window of it."""

    source: str | os.PathLike | bytes  # path, or the file's bytes
    start: float | None = None  # seconds; None: from the beginning
    end: float | None = None  # seconds; None: to the end

    def __repr__(self):  # in a message, a megabyte of video helps nobody
        return f"Clip({describe_source(self)}, start={self.start}, end={self.end})"


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
        VideoDecodingError: the file is missing, damaged or no video, or the window lies outside of the video.
        ValueError: an argument makes no sense.
    """
    clip = as_clip(source)
    start = clip.start if start is None else start
    end = clip.end if end is None else end
    _check_arguments(num_frames, sampling, size, start, end, fps, backend)
    name = describe_source(clip.source)

    plainly = False  # decode the plain way, because the lazy one failed
    true_end = None  # seconds; where the video ends, if that turned out to be before its stated end
    with _naming(name):
        while True:
            with _Video(clip.source, threads=threads, thorough=plainly) as video:
                begin, finish = _window(video, start, end, true_end)
                times = _times(video, begin, finish, num_frames, sampling, fps, seed)
                targets = [video.ticks(time) for time in times]
                try:
                    if backend == "torchcodec":
                        images = _decode_with_torchcodec(video, targets, size)
                    elif plainly:
                        images = _decode_everything(video, targets, size)
                    elif sampling == "keyframe":
                        images = _decode_key_frames(video, targets, size, begin, finish)
                    else:
                        images = _LazyDecoder(video, size).run(targets)
                    break
                except _NotExact:
                    plainly = True
                except _EndsEarly as problem:
                    if true_end is not None and problem.seconds >= true_end:
                        raise VideoDecodingError(f"{name}: breaks off at {problem.seconds:.3f} s") from None
                    true_end = problem.seconds

    shown = sorted(images)
    return SampledFrames(
        frames=torch.from_numpy(np.stack([images[pts] for pts in shown])),  # (T', 3, size, size)
        times=tuple(video.seconds(pts) for pts in shown),
        duration=finish - begin,
    )


def probe_video(source: str | os.PathLike | bytes | Clip) -> VideoInfo:
    """
    Reads what the header of a video says, without decoding it.

    Raises:
        VideoDecodingError: the file is missing or no video.
    """
    source = as_clip(source).source
    with _naming(describe_source(source)), _Video(source) as video:
        first, last = video.span()
        return VideoInfo(
            duration=last - first,
            width=video.stream.width,
            height=video.stream.height,
            average_fps=video.fps,
            num_frames=video.stream.frames or max(1, round((last - first) * video.fps)),
            codec=video.decoder.name,
        )


def as_clip(source: str | os.PathLike | bytes | Clip) -> Clip:
    """A [`Clip`] as it is; anything else as the whole of its video."""
    # No isinstance: a processor loaded with remote code has a Clip class of its own.
    return source if hasattr(source, "source") else Clip(source)


def describe_source(source: str | os.PathLike | bytes | Clip) -> str:
    """A short name for messages: the path, or how many bytes were given."""
    source = as_clip(source).source
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


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
    if end is not None and end <= (start or 0):
        raise ValueError(f"the window is empty: it starts at {start or 0} s and ends at {end} s")


def _window(video, start, end, true_end):
    """The part of [start, end) in which there is video, in seconds."""
    first, last = video.span()
    if true_end is not None:
        last = min(last, true_end)
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


# --- the file --------------------------------------------------------------------------------------------------------


class _NotExact(Exception):
    """The lazy way did not yield every wanted frame: decode the plain way."""


class _EndsEarly(Exception):
    """The video ends before the end that its header states."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.seconds = seconds


@contextmanager
def _naming(name):
    """Lets FFmpeg's errors name the file."""
    if av is None:
        raise ImportError("decoding a video needs PyAV: pip install av")
    try:
        yield
    except av.FFmpegError as error:
        raise VideoDecodingError(
            f"{name}: damaged or incomplete ({error.strerror}); encode or download it again"
        ) from error


class _Video:
    """
    An open video file. Only to be used as a context manager within one call: a decoder must not live through a fork.

    Args:
        source: path or bytes.
        threads: of the decoder; 0: one per core; None: whatever suits the video and the process.
        thorough: open an MP4 as any other file, although its header says all that we need to know.
    """

    def __init__(self, source, threads=1, thorough=False):
        self.source = source
        self.name = describe_source(source)
        self.wanted_threads = threads
        head = _first_bytes(source, self.name)
        self.options = OPEN_QUICKLY if head[4:8] in (b"ftyp", b"moov") and not thorough else {}
        self._open()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.container.close()

    def _file(self):
        # An absolute path, because "12:30.mp4" would be taken for a protocol called "12".
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)

    def _open(self):
        try:
            self.container = av.open(self._file(), options=self.options)
        except av.FFmpegError as error:
            raise VideoDecodingError(
                f"{self.name}: no video, or cut off before its end ({error.strerror}); encode or download it again"
            ) from error
        try:
            self.stream = self._choose_stream()
        except VideoDecodingError:
            self.container.close()
            raise
        self.decoder = self.stream.codec_context
        self.threads = _suitable_threads(self.stream) if self.wanted_threads is None else self.wanted_threads
        self.decoder.thread_count = self.threads
        self.decoder.thread_type = "NONE" if self.threads == 1 else "AUTO"
        self.time_base = float(self.stream.time_base)  # seconds per tick
        self.first_tick = self.stream.start_time or 0
        self.zero = (self.container.start_time or 0) / 1e6  # seconds; FFmpeg counts it in microseconds
        self.fps = float(self.stream.average_rate or DEFAULT_FPS)

    def _choose_stream(self):
        if self.container.format.name == "tty":  # FFmpeg would make a film of the letters of a text file
            raise VideoDecodingError(f"{self.name}: a text file, not a video")
        # The cover picture of an audio file is a video stream of one frame to FFmpeg.
        streams = [s for s in self.container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        if not streams:
            raise VideoDecodingError(f"{self.name}: has no video stream")
        if streams[0].codec_context is None:
            raise VideoDecodingError(f"{self.name}: the installed FFmpeg has no decoder for its video stream")
        return streams[0]

    def reopen(self):
        """Back to the first packet. Not every format can jump there."""
        self.container.close()
        self._open()

    @property
    def has_few_times(self):
        """An MPEG program stream has one for some frames only. After a jump FFmpeg is unsure about the others."""
        return self.container.format.name == "mpeg"

    @property
    def may_lack_times(self):
        """AVI has no time stamps. FFmpeg derives them from the order of packets: wrong where frames are reordered."""
        return self.container.format.name == "avi" and self.decoder.has_b_frames

    def ticks(self, seconds):
        return math.floor((seconds + TIME_TOLERANCE + self.zero) / self.time_base)

    def seconds(self, ticks):
        return max(0.0, ticks * self.time_base - self.zero)

    def span(self):
        """When the first frame appears and when the last one disappears, in seconds."""
        first = self.seconds(self.first_tick)
        if self.stream.duration and not self.has_few_times:
            return first, max(first, self.seconds(self.first_tick + self.stream.duration))
        return first, max(first, self._end_of_packets())

    def _end_of_packets(self):
        """For Matroska, WebM, FLV and raw streams, which do not state how long the video stream is."""
        stated = (self.container.duration or 0) / 1e6  # seconds, of the longest stream
        for jump in (True, False) if stated and not self.has_few_times else (False,):
            count, end, end_of_file = self._count_packets(jump)
            if jump and end_of_file is not None and end_of_file < stated - 1:  # a second: some writers round
                raise VideoDecodingError(
                    f"{self.name}: cut off: it should last {stated:.3f} s, but ends at {end_of_file:.3f} s; "
                    "download it again"
                )
            if end is not None:
                return end - self.zero
        return count / self.fps

    def _count_packets(self, jump):
        """
        Reads the file, or only its last group of pictures: (number of video packets, when the last frame disappears,
        when the last stream ends), in seconds as they are stored.
        """
        count, end, end_of_file = 0, None, None
        with av.open(self._file(), options=OPEN_QUICKLY) as container:
            if jump:
                container.seek((self.container.start_time or 0) + self.container.duration)
            for packet in container.demux():
                is_video = packet.stream_index == self.stream.index
                count += is_video and packet.size > 0
                if packet.pts is not None:
                    seconds = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    end_of_file = max(end_of_file or 0.0, seconds)
                    end = max(end or 0.0, seconds) if is_video else end
        return count, end, end_of_file

    def early_end(self, end, here):
        """The exception for a video that ends at tick `end`, too soon, with a packet to be decoded at tick `here`."""
        index = self.stream.index_entries
        if len(index) and index[-1].timestamp > here:
            return VideoDecodingError(
                f"{self.name}: cut off: its index lists frames up to {self.seconds(index[-1].timestamp):.3f} s, "
                f"but it ends at {self.seconds(end):.3f} s; download it again"
            )
        return _EndsEarly(self.seconds(end))


def _suitable_threads(stream):
    is_worker = multiprocessing.parent_process() is not None or torch.utils.data.get_worker_info() is not None
    is_small = stream.width * stream.height < SMALL_AREA
    return 1 if is_worker or is_small else 0


def _first_bytes(source, name):
    """The first 12 bytes. Tells in words, before FFmpeg comes in, what is wrong with a path."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        try:
            with open(source, "rb") as file:
                head = file.read(12)
        except FileNotFoundError as error:
            remedy = "; only files can be decoded: download it first" if "://" in name else ""
            raise VideoDecodingError(f"{name}: no such file{remedy}") from error
        except OSError as error:
            raise VideoDecodingError(f"{name}: cannot be read ({error.strerror})") from error
    if not head:
        raise VideoDecodingError(f"{name}: the file is empty")
    return head


# --- decoding --------------------------------------------------------------------------------------------------------


class _ImageMaker:
    """Decoded frame -> (3, size, size) uint8 RGB."""

    def __init__(self, size):
        self.size = size
        self.reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame

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


class _LazyDecoder:
    """
    Decodes the frames shown at given times, and as little else as possible.

    Packets are read ahead into a queue until it is certain which frame is shown at the next target. Only then does the
    decoder get packets: from the last key frame before the target (what precedes that is dropped) up to the wanted
    frame. The rest of the queue waits for the next target.
    """

    def __init__(self, video, size):
        self.video = video
        self.make_image = _ImageMaker(size)
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
            raise _NotExact
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
            except av.FFmpegError:
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
            raise self.read_error or _NotExact
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
        """Reads a packet into the queue; returns the pts of its frame if that will be shown."""
        try:
            packet = next(self.packets, None)
        except av.FFmpegError as error:
            self.read_error, packet = error, None
        if packet is None or packet.size == 0:  # PyAV ends with an empty packet
            self.at_end = True
            return None
        if packet.pts is None:
            raise _NotExact
        self.reorders |= packet.pts < self.highest
        self.highest = max(self.highest, packet.pts)
        self.here = packet.pts if packet.dts is None else packet.dts
        if packet.is_keyframe:
            self.delay = packet.pts - self.here
        elif self.decoder_is_fresh and not self.queue:
            return None  # belongs to a key frame that was not read
        self.queue.append(packet)
        if packet.is_discard:  # other frames refer to it, but the edit list of the file cuts it away
            return None
        self.shown[packet.pts] = packet.duration or 0
        return packet.pts

    def _decode_through(self, pts):
        """Gives the decoder what it needs to decode the frame `pts`."""
        if self.video.may_lack_times and not self.reorders:
            raise _NotExact  # frames are reordered, but time stamps are not
        position = next((i for i, packet in enumerate(self.queue) if packet.pts == pts), -1)
        keys = [i for i in range(position + 1) if self.queue[i].is_keyframe and self.queue[i].pts <= pts]
        if self.decoder_is_fresh and not keys:
            raise _NotExact
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
        except av.FFmpegError as error:
            raise _NotExact from error
        for frame in frames:
            # What refers to a damaged picture is damaged, too, though FFmpeg does not say so. (Frames shown before the
            # key frame do not count: in an open group of pictures, they refer to others that we did not decode.)
            if frame.pts is None or (frame.is_corrupt and frame.pts >= self.newest_key):
                raise _NotExact
            if frame.pts in self.missing and not frame.is_corrupt:
                self.images[frame.pts] = self.make_image(frame)
                self.missing.discard(frame.pts)

    def _drain(self):
        """Gets the last frames out of the decoder and makes it ready to begin at another key frame."""
        if not self.decoder_is_fresh:
            self._decode(None)
            self.video.decoder.flush_buffers()
            self.decoder_is_fresh = True


def _decode_key_frames(video, targets, size, begin, finish):
    """The key frames nearest to the targets (ticks), if possible within the window (seconds): {pts: image}."""
    make_image = _ImageMaker(size)
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
            raise _NotExact
    return images


def _read_key_frame(video, target):
    """The packet of a key frame near the target (in ticks), before it if possible."""
    for seconds_back in STEPS_BACK:
        try:
            tick = max(video.first_tick, target - int(seconds_back / video.time_base))
            video.container.seek(tick, stream=video.stream)
        except av.FFmpegError as error:
            raise _NotExact from error
        packet = next((packet for packet in video.container.demux(video.stream) if packet.is_keyframe), None)
        if packet is not None and packet.pts is not None:
            return packet
        index = video.stream.index_entries
        if len(index) and index[-1].timestamp >= tick:
            break  # the index knows a key frame there, but the file is cut off
    raise _NotExact


def _decode_everything(video, targets, size):
    """The frames shown at the targets (ticks, ascending), by decoding all that precedes them: {pts: image}."""
    make_image = _ImageMaker(size)
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


def _decode_with_torchcodec(video, targets, size):
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
            raise _EndsEarly(last - video.zero)
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
