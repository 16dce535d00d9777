# SPDX-License-Identifier: Apache-2.0
"""
An open video file: which stream is decoded, when its frames are shown, where it ends; and errors that name the file.

Time comes from three places, in this order of trust: the time stamps of all packets ([`Timeline`], read once), those
of the last packets, and what the header states. A header is believed only where an index of all frames supports it
(MP4). Decoding is in `decoding.py`. "Seconds" count from the beginning of the file, as in a player; "ticks" are the
time stamps of the stream.
"""

import functools
import io
import itertools
import math
import multiprocessing
import os
from contextlib import closing, contextmanager, nullcontext

import torch

from .timeline import IndexEntry, KeyIndex, Memory, memory_of, read_timeline
from .video_address import RemoteFile
from .video_source import (
    EncryptedVideoError,
    VideoDecodingError,
    describe_source,
    first_bytes,
    is_address,
    is_encrypted,
    missing_bytes_of_matroska,
    pyav,
    without_local_prefix,
)


# Pixels. Below, a clip of some seconds is decoded in less time than it takes to start the threads that would share it.
SMALL_AREA = 256 * 256

# Pixels of one frame; 8K has half as many. A few kilobytes can unpack to frames far larger, and a decoder keeps up to
# 17 of them. FFmpeg checks every frame: a video may begin small and grow.
MAX_PIXELS = 2**26

# Keeps FFmpeg from decoding the first frames while it opens a file: 1 ms instead of 8 (360p) or 25 (720p). Only for
# files that list their streams at the beginning, as these two do: others crash PyAV 17.
OPEN_QUICKLY = {"skip_frame": "all"}
# An FLV does not list its streams, and FFmpeg looks for them in its first 5 MB and 90 seconds only.
LOOK_FURTHER = {"probesize": str(2**31 - 1), "analyzeduration": str(2**31 - 1)}  # bytes, microseconds
SEGMENT_BOXES = (b"styp", b"sidx", b"moof")  # with which a part of a streamed MP4 begins
MP4_BOXES, MATROSKA_MARK = (b"ftyp", b"moov"), b"\x1aE\xdf\xa3"

# Containers whose time stamps are the same after a jump, as FFmpeg names them. All others are read from the beginning.
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"

# Decoders that tell key frames and damage truly. Files of all others are decoded from the first packet on.
TRUSTED_DECODERS = frozenset(
    "h264 hevc vp8 vp9 av1 libdav1d mpeg1video mpeg2video mpeg4 theora vc1 wmv3 mjpeg prores dnxhd png".split()
)

# Decoders that report damage in whichever way they share the work between threads.
FRAME_THREADS = frozenset("h264 hevc vp8 vp9 av1 libdav1d".split())

# What FFmpeg calls formats that name other files.
MANIFEST_FORMATS = frozenset("concat dash hls imf rtsp sdp webm_dash_manifest".split())

# Seconds. A frame counts as shown this much before its time: Matroska rounds the time to milliseconds.
TIME_TOLERANCE = 0.0005

# For streams that do not state their frame rate.
DEFAULT_FPS = 25.0


@contextmanager
def open_video(source, threads=1):
    """
    Opens a video for as long as a `with` statement lasts, within one call: a decoder must not live through a fork.

    Args:
        source: path, address or bytes.
        threads: of the decoder; 0: one per core; None: whatever suits the video and the process.

    Yields:
        [`VideoFile`]

    Raises:
        VideoDecodingError: for whatever goes wrong with the file, also inside of the `with` statement.
    """
    pyav()  # if it is missing, that comes before anything that is wrong with the file
    name, source = describe_source(source), without_local_prefix(source)
    with closing(RemoteFile(source)) if is_address(source) else nullcontext() as remote:
        source = source if remote is None else remote
        try:
            with closing(VideoFile(source, threads, name)) as video:
                yield video
        except ImportError:
            raise
        except Exception as error:
            _raise_named(error, name, source)
        if remote is not None and remote.error is not None:  # FFmpeg took it for the end of the file
            raise remote.error


def _raise_named(error, name, source):
    """Raise what went wrong as an error that names the file."""
    if isinstance(source, RemoteFile) and source.error is not None:  # FFmpeg took it for damage
        raise source.error
    if isinstance(error, VideoDecodingError):
        if isinstance(error, EncryptedVideoError) or not is_encrypted(source):
            raise error
        raise EncryptedVideoError(name) from error
    if isinstance(error, pyav().FFmpegError):
        raise VideoDecodingError(
            f"{name}: damaged or incomplete ({error.strerror}); encode or download it again"
        ) from error
    # PyAV meets things in files that it did not expect.
    raise VideoDecodingError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


# --- opening ---------------------------------------------------------------------------------------------------------


class VideoFile:
    """
    An open video file: container, video stream and its decoder, and the clock of the stream.

    Args:
        source: path, bytes or a [`RemoteFile`].
        threads: of the decoder, as in [`open_video`].
        name: for messages.
    """

    def __init__(self, source, threads, name):
        self.source = source
        self.name = name
        self.wanted_threads = threads
        head = first_bytes(source, self.name)
        self.is_segment = head[4:8] in SEGMENT_BOXES
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
        """Opens the file again for a decoder that judges damage: one thread, all of the header."""
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
        if isinstance(self.source, bytes):
            file = io.BytesIO(self.source)
        elif isinstance(self.source, RemoteFile):
            file = self.source.reader()
        else:  # an absolute path, because "12:30.mp4" would be taken for a protocol called "12"
            file = os.path.abspath(self.source)
        try:
            return av.open(file, options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            if self.is_segment:
                raise VideoDecodingError(
                    f"{self.name}: a segment of a streamed video without its header; append it to its initialization "
                    "segment"
                ) from error
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
        if not streams and self.container.format.name == "flv" and self.options != LOOK_FURTHER:
            self.container.close()
            self.options = LOOK_FURTHER
            self.container = self._open_container(self.options)
            return self._choose_stream()
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

    @property
    def is_raw(self):
        """Only coded pictures, without a container: FFmpeg makes up their time stamps."""
        return bool(self.container.format.flags & pyav().format.Flags.no_timestamps.value)

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
        # FFmpeg would read all that lies between. After a jump by position alone its parser would not start afresh.
        self.container.seek(self._keys[0].timestamp, stream=self.stream)
        entry = self._keys[max(0, self._keys.search_timestamp(tick))]
        self.container.seek(entry.pos, stream=self.stream, unsupported_byte_offset=True)
        self._skip_to = entry.timestamp  # the block may begin before it

    def timeline(self):
        """Reads all packets, once."""
        if self._timeline is None:
            self._timeline, self._kept = read_timeline(self)
            if self.container.format.name == MATROSKA:
                entries = [IndexEntry(entry.timestamp, entry.pos) for entry in self.stream.index_entries]
                self._keys = KeyIndex(entries) if entries else None
            if self._kept is None:
                self.reopen()
        return self._timeline

    @functools.cached_property
    def _stated_span(self):
        first = self.seconds(self.first_tick)
        if self.container.format.name == MP4 and self.stream.duration and self._index_agrees():
            end = self.first_tick + self.stream.duration
            return first, self.seconds(max(end, self._end_of_uneven_mp4() or end))
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
        if isinstance(self.source, str | os.PathLike):
            path = os.path.abspath(self.source)
            status = os.stat(path)
            memory = memory_of(path, status.st_size, status.st_mtime_ns)
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

    def _end_of_uneven_mp4(self):
        """
        An MP4 states how long decoding its frames takes. If the last ones are reordered and come at an uneven rate,
        they are shown for longer: reads until when, in ticks. None for all others, and if its packets do not tell.
        """
        last = [entry.timestamp for entry in self.stream.index_entries[-18:]]  # of which 17 may have been overtaken
        steps = [later - earlier for earlier, later in itertools.pairwise(last)]
        if not self.decoder.has_b_frames or max(steps, default=0) - min(steps, default=0) <= self.interval / 2:
            return None
        with closing(self._open_container(self.options)) as container:
            stream = container.streams[self.stream.index]
            try:
                container.seek(last[-1], stream=stream)
                packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
            except pyav().FFmpegError:
                return None
        if not packets:
            return None
        # The others' durations are from decoding to decoding.
        return max(packet.pts for packet in packets) + (packets[-1].duration or self.interval)

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
            if missing_bytes_of_matroska(self.source):
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
