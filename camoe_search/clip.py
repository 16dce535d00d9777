# SPDX-License-Identifier: Apache-2.0
"""A moment of a file as MP4 that every browser plays: H.264 and AAC.

Pictures that are H.264 already are copied as they are stored; all others are encoded again, with at most 720 lines.
"""

import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from modeling_camoe.frames import VideoDecodingError
from modeling_camoe.video_file import VideoFile, open_video


MAX_SECONDS = 120.0
MAX_LINES = 720
SEEK_MARGIN = 10.0  # seconds
MAX_LEAD = 30.0  # seconds of pictures before the start that a copy may hold, from the key frame on
EPSILON = 1e-3  # seconds; Matroska rounds to milliseconds
SOUND_RATE = 48_000
VIDEO = {"preset": "veryfast", "crf": "23"}
MOVFLAGS = {"movflags": "faststart"}


class ClipCache:
    """The last clips that were asked for, in a temporary folder.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int = 32):
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="camoe-clips-")
        self._lock = threading.Lock()  # encoding takes all cores as it is

    def clip(self, key: str, path: str, start: float, end: float, encode: bool = False) -> Path:
        """A file with the moment; `encode` as in `write_clip`.

        Raises:
            VideoDecodingError: the moment cannot be read.
        """
        output = Path(self._folder.name) / f"{key}-{start:.3f}-{end:.3f}{'-encoded' if encode else ''}.mp4"
        with self._lock:
            if not output.exists():
                for old in sorted(output.parent.iterdir(), key=os.path.getmtime)[: -self.count + 1]:
                    old.unlink()
                partial = output.with_suffix(".part.mp4")
                write_clip(path, start, end, partial, encode)
                partial.replace(output)
        return output


def write_clip(path: str, start: float, end: float, output: Path, encode: bool = False):
    """The file from `start` to `end` (seconds, at most MAX_SECONDS of it).

    Args:
        encode: also what could be copied, for a browser that cannot play the copy either.

    Raises:
        VideoDecodingError: it cannot be read.
    """
    end = min(end, start + MAX_SECONDS)
    for write in (_encode,) if encode else (_copy, _encode):
        with open_video(path) as video, av.open(str(output), "w", options=MOVFLAGS) as target:
            # What damage leaves is better than nothing, and somebody waits: all cores, and no error for a fault.
            video.decoder.thread_count, video.decoder.thread_type = 0, "AUTO"
            # Earlier than needed: in a transport stream, a search for a key frame may end behind the time asked for.
            if start > SEEK_MARGIN:
                video.container.seek(int((video.zero + start - SEEK_MARGIN) * av.time_base), backward=True)
            if write(video, target, video.zero + start, end - start):
                return


def _copy(video: VideoFile, target, begin: float, length: float) -> bool:
    """Copy the pictures as they are stored, from the key frame before `begin` on; encode the sound.

    What comes before `begin` has times below 0, which MP4 tells players to skip: later pictures need it.

    Returns:
        False where that is not possible.
    """
    # An MP4 or Matroska file states the profile of its H.264: baseline, main and high have 8 bits and 4:2:0.
    is_playable = video.decoder.name == "h264" and (video.decoder.extradata or b"")[:2] in (b"\1B", b"\1M", b"\1d")
    if not (is_playable and video.has_absolute_times):
        return False
    picture = target.add_stream_from_template(video.stream)
    sound = _Sound(target, begin, length) if video.container.streams.audio else None
    offset = round(begin / video.stream.time_base)
    head: list | None = []  # the pictures from the last key frame before `begin` on
    late: list = []  # pictures after the end, but perhaps those after them are not
    for packet in _dated(video.container.demux(video.stream, *video.container.streams.audio[:1]), video.stream):
        if packet.stream is not video.stream:
            for frame in packet.decode():
                target.mux(sound.encode(frame))
            continue
        packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, picture
        shown, stored = float(packet.pts * packet.time_base), float(packet.dts * packet.time_base)
        if stored >= length - EPSILON:
            break
        if head is not None:
            if packet.is_keyframe and (shown <= EPSILON or not head):
                head = []
            head.append(packet)
            if stored <= EPSILON:
                continue
            if not head[0].is_keyframe or float(head[0].pts * head[0].time_base) < -MAX_LEAD:
                return False
            target.mux(head)
            head = None
            continue
        late.append(packet)
        if shown < length - EPSILON:
            target.mux(late)
            late = []
    if head is not None:
        return False
    if sound is not None:
        target.mux(sound.encode(None))
    return True


def _dated(packets: Iterable[av.Packet], stream) -> Iterator[av.Packet]:
    """Packets, of which those of a stream state when they are decoded.

    Matroska does not store that, and FFmpeg cannot tell it for the first packets, whose frames come later.
    """
    undated: list = []
    for packet in packets:
        if packet.stream is not stream:
            yield packet
        elif packet.dts is None and packet.pts is not None:
            undated.append(packet)
        elif packet.dts is not None and packet.pts is not None:
            step = round(1 / ((stream.average_rate or Fraction(25)) * stream.time_base))
            for number, waiting in enumerate(undated):
                waiting.dts = packet.dts - step * (len(undated) - number)
                yield waiting
            undated = []
            yield packet


def _encode(video: VideoFile, target, begin: float, length: float) -> bool:
    """Encode `length` seconds of pictures and sound again."""
    picture = target.add_stream("libx264", rate=video.stream.average_rate or Fraction(25), options=VIDEO)
    picture.time_base = picture.codec_context.time_base = Fraction(1, 90_000)
    picture.pix_fmt = "yuv420p"
    sound = _Sound(target, begin, length) if video.container.streams.audio else None
    reformatter, is_first, waiting = VideoReformatter(), True, []
    times = _times_of(video)
    for frame in video.container.decode(video.stream, *video.container.streams.audio[:1]):
        if isinstance(frame, av.AudioFrame):
            waiting += sound.encode(frame)
        elif (time := times(frame)) is not None and time >= begin + length:
            break
        elif time is not None and time >= begin - EPSILON:
            if is_first:
                picture.width, picture.height = _size(frame, video.stream)
                if frame.rotation:
                    picture.set_display_rotation(frame.rotation)
                is_first = False
            shown = reformatter.reformat(frame, picture.width, picture.height, "yuv420p")
            shown.pts, shown.time_base = round((time - begin) * 90_000), Fraction(1, 90_000)
            shown.pict_type = av.video.frame.PictureType.NONE
            target.mux(picture.encode(shown))
        if not is_first:  # the first packet closes the header, which the first picture is part of
            target.mux(waiting)
            waiting = []
    if is_first:
        raise VideoDecodingError(f"{video.name}: there is no picture at that time")
    target.mux(picture.encode(None))
    if sound is not None:
        target.mux(sound.encode(None))
    return True


def _times_of(video: VideoFile) -> Callable[[av.VideoFrame], float | None]:
    """A function: the next frame -> when it is shown.

    AVI has the times at which frames are stored. Where that is another order, they are counted from the first one on.
    """
    if video.container.format.name != "avi" or not video.decoder.has_b_frames:
        return lambda frame: frame.time
    rate, first, numbers = video.stream.average_rate, None, itertools.count()

    def count(frame) -> float | None:
        nonlocal first
        first = frame.time if first is None else first
        return None if first is None else first + float(next(numbers) / rate)

    return count


class _Sound:
    """The sound of a clip, encoded again.

    Args:
        begin, length: of the clip in the file, in seconds.
    """

    def __init__(self, target, begin: float, length: float):
        self.begin, self.length = begin, length
        self.stream = target.add_stream("aac", rate=SOUND_RATE, layout="stereo")
        self.resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SOUND_RATE)
        self.samples: int | None = None  # so far, with the silence before the first

    def encode(self, frame) -> list:
        """A frame of the file -> packets; none for what is not in the clip. None: the last ones."""
        if frame is None:
            return self.stream.encode(None)
        if frame.time is None or not self.begin - EPSILON <= frame.time < self.begin + self.length:
            return []
        if self.samples is None:
            self.samples = max(0, round((frame.time - self.begin) * SOUND_RATE))
        packets = []
        for part in self.resampler.resample(frame):
            part.pts, part.time_base = self.samples, Fraction(1, SOUND_RATE)
            self.samples += part.samples
            packets += self.stream.encode(part)
        return packets


def _size(frame, stream) -> tuple[int, int]:
    """Width and height with square pixels, even, at most MAX_LINES high."""
    width = frame.width * float(stream.sample_aspect_ratio or 1)
    scale = min(1.0, MAX_LINES / min(width, frame.height))
    return max(2, round(width * scale / 2) * 2), max(2, round(frame.height * scale / 2) * 2)
