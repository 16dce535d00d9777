# SPDX-License-Identifier: Apache-2.0
"""
An open video file: which stream is decoded, when its frames are shown, where it ends; and errors that name the file.

Only the header is read here, and time stamps of packets where the header does not say enough. Decoding is in
`decoding.py`. "Seconds" count from the beginning of the file, as in a player; "ticks" are the time stamps of the
stream.
"""

import io
import math
import multiprocessing
import os
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch


# Pixels. Below, a clip of some seconds is decoded in less time than it takes to start the threads that would share it.
SMALL_AREA = 256 * 256

# Pixels of one frame; 8K has half as many. A few kilobytes can unpack to frames far larger, and a decoder keeps up to
# 17 of them. FFmpeg checks every frame: a video may begin small and grow.
MAX_PIXELS = 2**26

# Keeps FFmpeg from decoding the first frames while it opens a file: 1 ms instead of 8 (360p) or 25 (720p). Only for
# files that list their streams at the beginning, as these two do: others crash PyAV 17.
OPEN_QUICKLY = {"skip_frame": "all"}
MP4_BOXES, MATROSKA = (b"ftyp", b"moov"), b"\x1aE\xdf\xa3"

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


def as_clip(source: str | os.PathLike | bytes | Clip) -> Clip:
    """A [`Clip`] as it is; anything else as the whole of its video."""
    # No isinstance: a processor loaded with remote code has a Clip class of its own.
    return source if hasattr(source, "source") else Clip(source)


def describe_source(source: str | os.PathLike | bytes | Clip) -> str:
    """A short name for messages: the path, or how many bytes were given."""
    source = as_clip(source).source
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def pyav():
    """The library that decodes, imported at the first video: a program that reads only texts never loads FFmpeg."""
    try:
        import av
    except ImportError as error:
        raise ImportError("decoding a video needs PyAV: pip install av") from error
    return av


@contextmanager
def open_video(source, threads=1):
    """
    Opens a video for as long as a `with` statement lasts, within one call: a decoder must not live through a fork.

    Args:
        source: path or bytes.
        threads: of the decoder; 0: one per core; None: whatever suits the video and the process.

    Yields:
        [`VideoFile`]

    Raises:
        VideoDecodingError: also for any error of FFmpeg inside of the `with` statement.
    """
    av = pyav()
    name = describe_source(source)
    try:
        with closing(VideoFile(source, threads)) as video:
            yield video
    except av.FFmpegError as error:
        raise VideoDecodingError(
            f"{name}: damaged or incomplete ({error.strerror}); encode or download it again"
        ) from error


class VideoFile:
    """
    An open video file: container, video stream and its decoder, and the clock of the stream.

    Args:
        source: path or bytes.
        threads: of the decoder, as in [`open_video`].
    """

    def __init__(self, source, threads=1):
        self.source = source
        self.name = describe_source(source)
        self.wanted_threads = threads
        head = _first_bytes(source, self.name)
        self.options = OPEN_QUICKLY if head[4:8] in MP4_BOXES else {}
        self.tail_options = OPEN_QUICKLY if head.startswith(MATROSKA) else {}
        self.true_end = None  # seconds; where the video ends, if a decoder found that to be before its stated end
        self._open()

    def close(self):
        self.container.close()

    def _file(self):
        # An absolute path, because "12:30.mp4" would be taken for a protocol called "12".
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)

    def _open(self):
        av = pyav()
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
        self.decoder.options = {"max_pixels": str(MAX_PIXELS)}
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
        if streams[0].width * streams[0].height > MAX_PIXELS:
            size = f"{streams[0].width} x {streams[0].height}"
            raise VideoDecodingError(f"{self.name}: frames of {size} pixels are too large; scale it down")
        return streams[0]

    def reopen(self, quickly=True):
        """Back to the first packet. Not every format can jump there."""
        self.container.close()
        if not quickly:
            self.options = {}
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
        if self.true_end is not None:
            last = self.true_end
        elif self.stream.duration and not self.has_few_times:
            last = self.seconds(self.first_tick + self.stream.duration)
        else:
            last = self._end_of_packets()
        return first, max(first, last)

    def correct_end(self, seconds):
        """Notes that the video ends before its stated end. It cannot do so twice: then its packets do not add up."""
        if self.true_end is not None and seconds >= self.true_end:
            raise VideoDecodingError(f"{self.name}: breaks off at {seconds:.3f} s")
        self.true_end = seconds

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
        with pyav().open(self._file(), options=self.tail_options) as container:
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

    def check_end(self, end, here):
        """
        For a video that ends before the last wanted time: corrects its end, unless the file was cut off.

        Args:
            end: tick at which its last frame disappears.
            here: tick of decoding its last packet.
        """
        index = self.stream.index_entries
        if len(index) and index[-1].timestamp > here:
            raise VideoDecodingError(
                f"{self.name}: cut off: its index lists frames up to {self.seconds(index[-1].timestamp):.3f} s, "
                f"but it ends at {self.seconds(end):.3f} s; download it again"
            )
        self.correct_end(self.seconds(end))


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
