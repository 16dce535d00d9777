# SPDX-License-Identifier: Apache-2.0
"""
An open video file: which stream is decoded, when its frames are shown, where it ends; and errors that name the file.

Time comes from three places, in this order of trust: the time stamps of all packets ([`Timeline`], read once), those
of the last packets, and what the header states. A header is believed only where an index of all frames supports it
(MP4). Decoding is in `decoding.py`. "Seconds" count from the beginning of the file, as in a player; "ticks" are the
time stamps of the stream.
"""

import bisect
import functools
import io
import math
import multiprocessing
import os
import re
import stat
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch


# Pixels. Below, a clip of some seconds is decoded in less time than it takes to start the threads that would share it.
SMALL_AREA = 256 * 256

# Pixels of one frame; 8K has half as many. A few kilobytes can unpack to frames far larger, and a decoder keeps up to
# 17 of them. FFmpeg checks every frame: a video may begin small and grow.
MAX_PIXELS = 2**26

# Keeps FFmpeg from decoding the first frames while it opens a file: 1 ms instead of 8 (360p) or 25 (720p). Only for
# files that list their streams at the beginning, as these two do: others crash PyAV 17.
OPEN_QUICKLY = {"skip_frame": "all"}
MP4_BOXES, MATROSKA_MARK = (b"ftyp", b"moov"), b"\x1aE\xdf\xa3"

# Containers whose time stamps are the same after a jump, as FFmpeg names them. All others are read from the beginning.
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"

# Decoders that tell key frames and damage truly. Files of all others are decoded from the first packet on.
TRUSTED_DECODERS = frozenset(
    "h264 hevc vp8 vp9 av1 libdav1d mpeg1video mpeg2video mpeg4 theora vc1 wmv3 mjpeg prores dnxhd png".split()
)

# Decoders that report damage in whichever way they share the work between threads.
FRAME_THREADS = frozenset("h264 hevc vp8 vp9 av1 libdav1d".split())

# Seconds. A frame counts as shown this much before its time: Matroska rounds the time to milliseconds.
TIME_TOLERANCE = 0.0005

# For streams that do not state their frame rate.
DEFAULT_FPS = 25.0

# Bytes of packets that are kept while a file is read to its end, so that it need not be read again.
MAX_KEPT = 2**26

# Matroska files whose end and key frames are remembered, some kilobytes each: one that was written to a pipe states no
# duration and has no index, and would be read through for each of its windows.
MAX_REMEMBERED = 512

# Bytes in which to look for signs of encryption.
MAX_HEADER = 2**16

# What a file begins with that is no video, and what it is. Manifests are refused before FFmpeg sees them: it would
# open the files and addresses that they name.
NO_VIDEOS = {
    b"version https://git-lfs": "a Git LFS pointer, not the video itself: run `git lfs pull`",
    b"<!doctype html": "a saved web page, not a video; download the video itself",
    b"<html": "a saved web page, not a video; download the video itself",
    b"#extm3u": "a playlist that names other files, not a video; give one of these files",
    b"ffconcat": "a list of other files, not a video; give one of these files",
    b"file '": "a list of other files, not a video; give one of these files",
    b"[playlist]": "a playlist that names other files, not a video; give one of these files",
    b"[reference]": "a playlist that names other files, not a video; give one of these files",
    b"<asx": "a playlist that names other files, not a video; give one of these files",
    b"<mpd": "a DASH manifest that names other files, not a video; give one of these files",
    b"<smil": "a playlist that names other files, not a video; give one of these files",
    b"<compositionplaylist": "a playlist that names other files, not a video; give one of these files",
    b"v=0": "a session description that names addresses, not a video",
    b"pk\x03\x04": "a ZIP archive, not a video; unpack it first",
    b"\x1f\x8b": "a gzip archive, not a video; unpack it first",
}
MANIFEST_FORMATS = frozenset("concat dash hls imf rtsp sdp webm_dash_manifest".split())


class VideoDecodingError(ValueError):
    """A video that cannot be decoded. The message names the file and the cause."""


class EncryptedVideoError(VideoDecodingError):
    """A video that is encrypted."""

    def __init__(self, name):
        super().__init__(f"{name}: encrypted; it can only be decoded with its key")


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
        VideoDecodingError: for whatever goes wrong with the file, also inside of the `with` statement.
    """
    av = pyav()
    name = describe_source(source)
    try:
        with closing(VideoFile(source, threads)) as video:
            yield video
    except ImportError:
        raise
    except VideoDecodingError as error:
        if isinstance(error, EncryptedVideoError) or not _is_encrypted(source):
            raise
        raise EncryptedVideoError(name) from error
    except av.FFmpegError as error:
        raise VideoDecodingError(
            f"{name}: damaged or incomplete ({error.strerror}); encode or download it again"
        ) from error
    except Exception as error:  # PyAV meets things in files that it did not expect
        raise VideoDecodingError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


@dataclass
class Timeline:
    """What the packets of the video stream say, in decoding order. Packets without content are not among them."""

    times: list[int] = field(default_factory=list)  # pts; where packets have none, as if frames came at a steady rate
    is_timed: bool = True  # each packet has a time stamp of its own
    is_reordered: bool = False  # some packet comes after one that is shown later
    begins_with_key: bool = False
    first: int = 0  # tick at which the first frame appears; those before it are cut away by an edit list
    end: int = 0  # tick at which the last frame disappears

    @functools.cached_property
    def sorted_times(self):
        return sorted(self.times)

    @functools.cached_property
    def positions(self):
        """pts -> the number of its packet."""
        return {pts: i for i, pts in reversed(list(enumerate(self.times)))}


@dataclass(frozen=True)
class IndexEntry:
    """As PyAV has them."""

    timestamp: int  # ticks
    pos: int  # bytes before the block of packets that it is in


class KeyIndex(list):
    """[`IndexEntry`] of all key frames of a file, ascending: read by PyAV's interface."""

    def search_timestamp(self, timestamp, *, backward=True):
        """The number of the last entry up to a time, or of the first from there on; -1 if there is none."""
        if backward:
            return bisect.bisect_right(self, timestamp, key=lambda entry: entry.timestamp) - 1
        found = bisect.bisect_left(self, timestamp, key=lambda entry: entry.timestamp)
        return found if found < len(self) else -1


@dataclass
class Memory:
    """What a file that had to be read through is remembered by."""

    span: tuple[float, float] | None = None  # seconds
    keys: KeyIndex | None = None


@functools.lru_cache(MAX_REMEMBERED)
def _memory_of(path, size, modified):
    """The same object for the same content of a file; empty at first."""
    return Memory()


# --- opening ---------------------------------------------------------------------------------------------------------


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
        self.tail_options = OPEN_QUICKLY if head.startswith(MATROSKA_MARK) else {}
        self.is_careful = False  # decodes with one thread, and goes on after damage
        self.true_end = None  # seconds; where the video ends, if a decoder found that to be before its stated end
        self.true_first = None  # the same of its first frame, if those that are stored before it cannot be decoded
        self.damage = []  # (start, end) in seconds, as far as a careful decoder was asked to go around it
        self.is_strict = False  # frames came out of order: each fault in a packet is an error then
        self.counts_frames = False  # time stamps turned out not to be in the order of frames: they are counted instead
        self._timeline = None
        self._kept = None  # packets, if they were all kept
        self._keys = None  # KeyIndex, if the file has no index of its own but was read through
        self._open()

    def close(self):
        self.container.close()

    def reopen(self):
        """Back to the first packet, with a fresh decoder. Not every format can jump there."""
        self.container.close()
        self._open()

    def be_careful(self):
        """Opens the file anew for a decoder that judges damage: one thread, all of the header."""
        self.options, self.is_careful = {}, True
        self.reopen()

    def _open(self):
        self._skip_to = None  # pts of the first packet to read
        self.container = self._open_container(self.options)
        try:
            self.stream = self._choose_stream()
            if self.options and len(self.container.streams.video) > 1:  # to choose, FFmpeg must have looked at them
                self.container.close()
                self.options = {}
                self.container = self._open_container(self.options)
                self.stream = self._choose_stream()
        except VideoDecodingError:
            self.container.close()
            raise
        self.decoder = self.stream.codec_context
        self.decoder.options = {"max_pixels": str(MAX_PIXELS)}
        self.threads = _suitable_threads(self.stream) if self.wanted_threads is None else self.wanted_threads
        if self.is_careful:
            self.threads = 1
        if self.threads != 1 or self.is_strict:
            # Threads that share pictures do not pass on all that they know of damage: make it an error at once.
            self.decoder.options |= {"err_detect": "explode"}
        self.decoder.thread_count = self.threads
        in_frames = self.decoder.name in FRAME_THREADS
        self.decoder.thread_type = "NONE" if self.threads == 1 else "AUTO" if in_frames else "SLICE"
        self.time_base = float(self.stream.time_base)  # seconds per tick
        self.first_tick = self.stream.start_time or 0
        self.zero = (self.container.start_time or 0) / 1e6  # seconds; FFmpeg counts it in microseconds
        self.fps = float(self.stream.average_rate or DEFAULT_FPS)

    def _open_container(self, options):
        av = pyav()
        # An absolute path, because "12:30.mp4" would be taken for a protocol called "12".
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)
        try:
            return av.open(file, options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            raise VideoDecodingError(
                f"{self.name}: no video, or cut off before its end ({error.strerror}); encode or download it again"
            ) from error

    def _choose_stream(self):
        """The stream that FFmpeg thinks best, but no cover picture: that is a video stream of one frame to it."""
        if self.container.format.name == "tty":  # FFmpeg would make a film of the letters of a text file
            raise VideoDecodingError(f"{self.name}: a text file, not a video")
        if self.container.format.name in MANIFEST_FORMATS:
            raise VideoDecodingError(f"{self.name}: a list of other files, not a video; give one of these files")
        streams = [s for s in self.container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        if not streams:
            raise VideoDecodingError(f"{self.name}: has no video stream")
        best = self.container.streams.best("video") if len(streams) > 1 else streams[0]
        stream = best if any(best is s or best.index == s.index for s in streams) else streams[0]
        if stream.codec_context is None:
            raise VideoDecodingError(f"{self.name}: the installed FFmpeg has no decoder for its video stream")
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width} x {stream.height}"
            raise VideoDecodingError(f"{self.name}: frames of {size} pixels are too large; scale it down")
        return stream

    @property
    def findings(self):
        """What decoders have found out about the file: other targets may follow from it."""
        return self.true_first, self.true_end, tuple(self.damage), self.counts_frames, self.is_strict

    @property
    def pixel_aspect(self):
        """Width of a pixel / its height. The decoder knows it only after its first frame."""
        return float(self.stream.sample_aspect_ratio or self.decoder.sample_aspect_ratio or 1)

    @property
    def can_jump(self):
        """Whether to jump in the file rather than read it through."""
        return self.has_absolute_times and self._kept is None

    @property
    def has_absolute_times(self):
        return self.container.format.name in (MP4, MATROSKA)

    @property
    def is_trusted(self):
        """Packets may be left out: their key flags and time stamps will be checked by what the decoder says."""
        if self.decoder.name not in TRUSTED_DECODERS:
            return False
        if self.has_absolute_times and self._timeline is None:
            return True
        timeline = self.timeline()
        return timeline.is_timed and timeline.begins_with_key and not self.lacks_order

    @property
    def lacks_order(self):
        """
        Frames are reordered, but time stamps are not: they were made from the order of packets, as always in AVI.
        """
        return bool(self.decoder.has_b_frames) and self.timeline().is_timed and not self.timeline().is_reordered

    # --- the clock ---------------------------------------------------------------------------------------------------

    def ticks(self, seconds):
        return math.floor((seconds + TIME_TOLERANCE + self.zero) / self.time_base)

    def seconds(self, ticks):
        return max(0.0, ticks * self.time_base - self.zero)

    @property
    def interval(self):
        """Ticks from frame to frame, on average."""
        return 1 / self.fps / self.time_base

    def packets(self):
        """Reads the packets of the video stream from the first one on, but for those without content."""
        if self._kept is not None:
            return iter(self._kept)
        return self._read_packets()

    def _read_packets(self):
        skip_to, self._skip_to = self._skip_to, None
        for packet in self.container.demux(self.stream):
            if skip_to is not None and packet.pts != skip_to:
                continue
            skip_to = None
            if packet.size:
                if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                    raise EncryptedVideoError(self.name)
                yield packet

    @property
    def index(self):
        """Entries (timestamp, position) of key frames, sorted by decoding time. Possibly only of some."""
        return self.stream.index_entries if self._keys is None else self._keys

    def seek(self, tick):
        """Jumps to the last key frame before a tick, if the file lets FFmpeg know where that is."""
        if self._keys is None:
            self.container.seek(tick, stream=self.stream)
            return
        # FFmpeg would read all that lies between. After a jump by position alone its parser would not start anew.
        self.container.seek(self._keys[0].timestamp, stream=self.stream)
        entry = self._keys[max(0, self._keys.search_timestamp(tick))]
        self.container.seek(entry.pos, stream=self.stream, unsupported_byte_offset=True)
        self._skip_to = entry.timestamp  # the block may begin before it

    def timeline(self):
        """Reads all packets, once."""
        if self._timeline is None:
            self._timeline, self._kept = self._read_timeline()
            if self.container.format.name == MATROSKA:
                entries = [IndexEntry(entry.timestamp, entry.pos) for entry in self.stream.index_entries]
                self._keys = KeyIndex(entries) if entries else None
            if self._kept is None:
                self.reopen()
        return self._timeline

    def _read_timeline(self):
        line, kept, kept_bytes = Timeline(), [], 0
        highest = first = end = None
        try:
            for packet in self.container.demux(self.stream):
                pts = packet.pts
                if pts is None and packet.dts is None and not packet.size:
                    continue  # PyAV ends with an empty packet
                if pts is not None and not packet.is_discard:
                    end = max(pts if end is None else end, pts + (packet.duration or self.interval))
                if not packet.size:
                    continue  # the frame before is shown on
                if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                    raise EncryptedVideoError(self.name)
                if pts is None:
                    line.is_timed = False
                    pts = self.first_tick if highest is None else round(line.times[-1] + self.interval)
                if highest is None:
                    line.begins_with_key = packet.is_keyframe
                elif pts < highest:
                    line.is_reordered = True
                highest = pts if highest is None else max(highest, pts)
                line.times.append(pts)
                if not packet.is_discard:
                    first = pts if first is None else min(first, pts)
                kept_bytes += packet.size
                if kept_bytes <= MAX_KEPT:
                    kept.append(packet)
        except pyav().FFmpegError:
            pass  # the file breaks off here
        line.is_timed &= len(set(line.times)) == len(line.times)
        if line.times:
            line.first = line.sorted_times[0] if first is None else first
            line.end = highest + self.interval if end is None else max(end, highest)
        return line, kept if kept_bytes <= MAX_KEPT else None

    @functools.cached_property
    def _stated_span(self):
        first = self.seconds(self.first_tick)
        if self.container.format.name == MP4 and self.stream.duration and self._index_agrees():
            return first, self.seconds(self.first_tick + self.stream.duration)
        if self.container.format.name == MATROSKA and self.container.duration:
            end = self._end_of_matroska()
            if end is not None:
                return first, end
        if self.container.format.name == MATROSKA:
            return self._remembered_span()
        return self._span_of_packets()

    def _span_of_packets(self):
        timeline = self.timeline()
        if not timeline.times:
            raise VideoDecodingError(f"{self.name}: its video stream is empty")
        return self.seconds(timeline.first), self.seconds(timeline.end)

    def _remembered_span(self):
        """Of a Matroska file that must be read through: at its second window it need not be."""
        memory = Memory()
        if not isinstance(self.source, bytes):
            path = os.path.abspath(self.source)
            status = os.stat(path)
            memory = _memory_of(path, status.st_size, status.st_mtime_ns)
        if memory.span is None:
            span = self._span_of_packets()
            if self.is_trusted:
                memory.span, memory.keys = span, self._keys
            return span
        self._keys = memory.keys
        return memory.span

    def span(self):
        """When the first frame appears and when the last one disappears, in seconds."""
        first, last = self._stated_span
        first = first if self.true_first is None else self.true_first
        return first, max(first, last if self.true_end is None else self.true_end)

    def _index_agrees(self):
        """Whether the index of an MP4 lists frames up to the last one before the stated end."""
        index = self.stream.index_entries
        if not len(index):
            return False
        listed = (index[-1].timestamp - index[0].timestamp) * self.time_base  # from the first frame to the last
        return -0.001 <= self.stream.duration * self.time_base - listed <= 1.5 / self.fps

    def _end_of_matroska(self):
        """
        Matroska states how long the longest stream is: reads when the video stream ends from its last packets. None if
        they do not tell.
        """
        stated = self.container.duration / 1e6  # seconds
        end, end_of_file = None, None
        with closing(self._open_container(self.tail_options)) as container:
            try:
                container.seek((self.container.start_time or 0) + self.container.duration)
                packets = list(container.demux())
            except pyav().FFmpegError:
                packets = []
        for packet in packets:
            if packet.pts is not None and packet.time_base is not None:
                is_video = packet.stream_index == self.stream.index
                duration = packet.duration or (self.interval if is_video else 0)
                seconds = (packet.pts + duration) * float(packet.time_base)
                end_of_file = max(end_of_file or 0.0, seconds)
                if is_video:
                    end = max(end or 0.0, seconds)
        if end_of_file is not None and end_of_file < stated - 1:  # a second: some writers round
            if _missing_bytes_of_matroska(self.source):
                raise VideoDecodingError(
                    f"{self.name}: cut off: it should last {stated:.3f} s, but ends at {end_of_file:.3f} s; "
                    "download it again"
                )
            end = None
        return None if end is None else end - self.zero

    def correct_end(self, seconds):
        """Notes that the video ends before its stated end. It cannot do so twice: then its packets do not add up."""
        if self.true_end is not None and seconds >= self.true_end:
            raise VideoDecodingError(f"{self.name}: breaks off at {seconds:.3f} s")
        self.true_end = seconds

    def check_end(self, end, here):
        """
        For a video that ends before the last wanted time: corrects its end, unless the file was cut off.

        Args:
            end: tick at which its last frame disappears.
            here: tick of decoding its last packet.
        """
        index = self.stream.index_entries
        if self.has_absolute_times and len(index) and index[-1].timestamp > here:
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
    """The first bytes. Tells in words, before FFmpeg comes in, what is wrong with a path or with what it holds."""
    if isinstance(source, bytes):
        head = source[:1024]
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
                raise VideoDecodingError(f"{name}: a pipe or a device, not a file")
            with open(source, "rb") as file:
                head = file.read(1024)
        except FileNotFoundError as error:
            remedy = "; only files can be decoded: download it first" if "://" in name else ""
            raise VideoDecodingError(f"{name}: no such file{remedy}") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in a path
            raise VideoDecodingError(f"{name}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not head:
        raise VideoDecodingError(f"{name}: the file is empty")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml"):
        text = text[text.find(b"?>") + 2 :].lstrip()
    for beginning, what in NO_VIDEOS.items():
        if text.startswith(beginning):
            raise VideoDecodingError(f"{name}: {what}")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "an animated WebP" if b"ANIM" in head[:64] else "a WebP picture"
        raise VideoDecodingError(f"{name}: {kind}, which FFmpeg cannot decode as a video; convert it first")
    return head


# What an encrypted file has in its header: an MP4 boxes, a Matroska file elements, an ASF file identifiers.
ENCRYPTED = re.compile(
    rb"encv|pssh|tenc|\x50\x35.{1,8}\x47\xe1|\xfb\xb3\x11\x22\x23\xbd\xd2\x11|\x14\xe6\x8a\x29\x22\x26\x17\x4c",
    re.DOTALL,
)


def _is_encrypted(source):
    """Whether the reason why a file cannot be decoded may be that it is encrypted."""
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            source = file.read(MAX_HEADER)
    return ENCRYPTED.search(source[:MAX_HEADER]) is not None


def _missing_bytes_of_matroska(source):
    """How many bytes a Matroska file lacks at its end, by the size that its segment states; 0 if it states none."""
    if isinstance(source, bytes):
        head, size = source[:4096], len(source)
    else:
        size = os.path.getsize(source)
        with open(source, "rb") as file:
            head = file.read(4096)
    start = head.find(b"\x18\x53\x80\x67") + 4  # ID of the segment
    if start < 4 or start >= len(head) or not head[start]:
        return 0
    length = 9 - head[start].bit_length()  # of the number that follows; its first bit set tells
    stated = int.from_bytes(head[start : start + length], "big") & ((1 << 7 * length) - 1)
    if stated == (1 << 7 * length) - 1:  # all ones: unknown
        return 0
    return max(0, start + length + stated - size)
