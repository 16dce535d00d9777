# SPDX-License-Identifier: Apache-2.0
"""
What was learnt by reading all packets of a video once: when its frames are shown ([`Timeline`]), where its key frames
are ([`KeyIndex`]), and what is remembered of it for the next window ([`Memory`]).
"""

import bisect
import functools
import itertools
import statistics
from dataclasses import dataclass, field

from .video_source import EncryptedVideoError, pyav


# Bytes of packets that are kept while a file is read to its end, so that it need not be read again.
MAX_KEPT = 2**26

# Matroska files whose end and key frames are remembered, some kilobytes each: one that was written to a pipe states no
# duration and has no index, and would be read through for each of its windows.
MAX_REMEMBERED = 512


@dataclass
class Timeline:
    """What the packets of the video stream say, in decoding order. Packets without content are not among them."""

    times: list[int] = field(default_factory=list)  # pts; where packets have none, as if frames came at a steady rate
    is_timed: bool = True  # each packet has a time stamp of its own
    is_reordered: bool = False  # some packet comes after one that is shown later
    begins_with_key: bool = False
    first: int = 0  # tick at which the first frame appears; those before it are cut away by an edit list
    end: int = 0  # tick at which the last frame disappears

    def at_steady_rate(self, interval):
        """The same packets, one after the other."""
        times = [self.first + round(i * interval) for i in range(len(self.times))]
        end = self.first + len(times) * interval
        return Timeline(times, is_timed=False, begins_with_key=self.begins_with_key, first=self.first, end=end)

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
def memory_of(path, size, modified):
    """The same object for the same content of a file; empty at first."""
    return Memory()


def read_timeline(video):
    """Reads all packets of a [`VideoFile`]: its [`Timeline`], and the packets themselves unless they are too large."""
    line, kept, kept_bytes = Timeline(), [], 0
    highest = first = end = None
    durations = {}  # pts -> ticks
    try:
        for packet in video.container.demux(video.stream):
            pts = packet.pts
            if pts is None and packet.dts is None and not packet.size:
                continue  # PyAV ends with an empty packet
            if pts is not None and not packet.is_discard:
                end = max(pts if end is None else end, pts + (packet.duration or video.interval))
            if not packet.size:
                continue  # the frame before is shown on
            if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                raise EncryptedVideoError(video.name)
            if pts is None:
                line.is_timed = False
                pts = video.first_tick if highest is None else round(line.times[-1] + video.interval)
            if highest is None:
                line.begins_with_key = packet.is_keyframe
            elif pts < highest:
                line.is_reordered = True
            highest = pts if highest is None else max(highest, pts)
            line.times.append(pts)
            durations[pts] = packet.duration or video.interval
            if not packet.is_discard:
                first = pts if first is None else min(first, pts)
            kept_bytes += packet.size
            if kept_bytes <= MAX_KEPT:
                kept.append(packet)
    except pyav().FFmpegError:
        pass  # the file breaks off here
    line.is_timed &= len(durations) == len(line.times)
    if line.times:
        line.first = line.sorted_times[0] if first is None else first
        line.end = highest + video.interval if end is None else max(end, highest)
    if video.is_raw and any(b - a > durations[a] + 1 for a, b in itertools.pairwise(line.sorted_times)):
        video.counts_frames = True  # of MPEG-1, FFmpeg makes up time stamps with gaps
        line = line.at_steady_rate(statistics.median(durations.values()))
    return line, kept if kept_bytes <= MAX_KEPT else None
