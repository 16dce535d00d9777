# SPDX-License-Identifier: Apache-2.0
"""Which video files there are, whether they changed, and which moments of them are indexed.

Notable features:
- a walk follows links but enters every folder once, so that a loop of links ends;
- a file is unchanged if path, size and modification time are; if only the time differs, its content hash decides;
- a moment is a whole short video or a window of a long one, in seconds.
"""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass

from modeling_camoe.frames import VIDEO_EXTENSIONS

from .errors import SearchError


# Our choice. Up to half a minute a video is one moment: about what the models' training clips last. Longer ones are
# cut into windows that overlap by half, so that what takes up to half a window lies whole in one of them.
WHOLE_SECONDS = 30.0
WINDOW_SECONDS = 10.0

HASH_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class VideoFile:
    """A file as it was when the walk met it."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Walk:
    """What a walk over folders found: candidates by name, what it could not read, and the other files by extension."""

    videos: list[VideoFile]  # sorted by path
    skipped: list[dict]  # {"path", "cause"}
    others: Counter  # extension -> number of files


def find_videos(paths) -> Walk:
    """Video files under files and folders, each once.

    A file that is named itself is taken whatever its extension; in folders, VIDEO_EXTENSIONS decide.

    Raises:
        SearchError: a path does not exist.
    """
    found, skipped, others = {}, [], Counter()
    folders_seen = set()

    def take(path: str):
        try:
            os.fsencode(path).decode()  # Arrow keeps text as UTF-8
            status = os.stat(path)
        except UnicodeDecodeError:
            skipped.append({"path": ascii(path), "cause": "its name is not valid UTF-8; rename it"})
        except OSError as error:
            skipped.append({"path": path, "cause": f"{path}: {error.strerror}"})
        else:
            found.setdefault(os.path.realpath(path), VideoFile(path, status.st_size, status.st_mtime_ns))

    for root in map(os.fspath, paths):
        root = os.path.abspath(os.path.expanduser(root))
        if os.path.isfile(root):
            take(root)
            continue
        if not os.path.isdir(root):
            raise SearchError(f"{root} does not exist: give folders or files of videos")
        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_note_in(skipped)):
            identity = os.path.realpath(folder)
            if identity in folders_seen:
                subfolders.clear()
                continue
            folders_seen.add(identity)
            subfolders.sort()
            for name in sorted(names):
                extension = os.path.splitext(name)[1].lower()
                if extension in VIDEO_EXTENSIONS:
                    take(os.path.join(folder, name))
                else:
                    others[extension or name] += 1
    return Walk(sorted(found.values(), key=lambda video: video.path), skipped, others)


def _note_in(skipped: list[dict]):
    """A folder that cannot be listed is noted, not fatal."""

    def note(error: OSError):
        skipped.append({"path": error.filename, "cause": f"{error.filename}: {error.strerror}"})

    return note


def is_unchanged(video: VideoFile) -> bool:
    """Whether the file still is as the walk met it."""
    try:
        status = os.stat(video.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)


def content_hash(path: str) -> str:
    """128-bit BLAKE2b of the whole file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def moments(duration: float, window: float | None = None, stride: float | None = None) -> list[tuple[float, float]]:
    """Windows that cover a video, as (start, end) in seconds.

    Args:
        duration: of the video, seconds.
        window: length of a window; 0 takes every video whole; None picks by length (WHOLE_SECONDS, WINDOW_SECONDS).
        stride: from one start to the next; None: half a window. The last window ends where the video does.
    """
    if window is None:
        window = 0 if duration <= WHOLE_SECONDS else WINDOW_SECONDS
    if window == 0 or duration <= window:
        return [(0.0, duration)]
    stride = window / 2 if stride is None else stride
    steps = math.ceil((duration - window) / stride - 1e-9)  # a window that fits exactly is not doubled
    starts = [step * stride for step in range(steps)] + [duration - window]
    return [(start, min(start + window, duration)) for start in starts]
