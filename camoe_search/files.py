# SPDX-License-Identifier: Apache-2.0
"""Finding video files, telling whether they changed, and cutting them into windows.

Notable features:
- symbolic links are followed, but every folder is entered once, so that a cycle of links ends;
- a file is unchanged if its path, size and modification time are; if only the time differs, its content hash decides;
- a short video is one window, a long one is cut into several.
"""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass

from modeling_camoe.frames import VIDEO_EXTENSIONS

from .errors import SearchError


# Our choice. A video of up to half a minute, about the length of training clips, is one window. A longer one is cut
# into windows that overlap by half, so that anything up to half a window long lies entirely inside one of them.
WHOLE_SECONDS = 30.0
WINDOW_SECONDS = 10.0

HASH_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class VideoFile:
    """A file as it was when it was found."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Scan:
    """What was found in folders."""

    videos: list[VideoFile]  # by name; sorted by path
    skipped: list[dict]  # what could not be read: {"path", "cause"}
    other_extensions: Counter  # of files that are no videos: extension -> number of files


def find_videos(paths) -> Scan:
    """Video files under files and folders, each once.

    A file that is given by name is taken whatever its extension; inside folders, VIDEO_EXTENSIONS decide.

    Raises:
        SearchError: a path does not exist.
    """
    found, skipped, other_extensions = {}, [], Counter()
    entered = set()

    def add(path: str):
        try:
            os.fsencode(path).decode()  # Arrow keeps text as UTF-8
            status = os.stat(path)
        except UnicodeDecodeError:
            skipped.append({"path": ascii(path), "cause": "its name is not valid UTF-8; rename it"})
        except OSError as error:
            skipped.append({"path": path, "cause": f"{path}: {error.strerror}"})
        else:
            found.setdefault(os.path.realpath(path), VideoFile(path, status.st_size, status.st_mtime_ns))

    def note_unreadable(error: OSError):  # a folder that cannot be listed
        skipped.append({"path": error.filename, "cause": f"{error.filename}: {error.strerror}"})

    for root in map(os.fspath, paths):
        root = os.path.abspath(os.path.expanduser(root))
        if os.path.isfile(root):
            add(root)
            continue
        if not os.path.isdir(root):
            raise SearchError(f"{root} does not exist: give folders or files of videos")
        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=note_unreadable):
            identity = os.path.realpath(folder)
            if identity in entered:
                subfolders.clear()
                continue
            entered.add(identity)
            subfolders.sort()
            for name in sorted(names):
                extension = os.path.splitext(name)[1].lower()
                if extension in VIDEO_EXTENSIONS:
                    add(os.path.join(folder, name))
                else:
                    other_extensions[extension or name] += 1
    return Scan(sorted(found.values(), key=lambda video: video.path), skipped, other_extensions)


def is_unchanged(video: VideoFile) -> bool:
    """Whether the file is still as it was when it was found."""
    try:
        status = os.stat(video.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)


def content_hash(path: str) -> str | None:
    """128-bit BLAKE2b of the whole file, in hexadecimal; None if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def cut_windows(
    duration: float, window: float | None = None, stride: float | None = None
) -> list[tuple[float, float]]:
    """The windows that cover a video, as (start, end) in seconds.

    Args:
        duration: of the video, seconds.
        window: length of a window; 0: the whole video; None: depends on the duration (WHOLE_SECONDS, WINDOW_SECONDS).
        stride: from one start to the next; None: half a window. The last window ends where the video ends.
    """
    if window is None:
        window = 0 if duration <= WHOLE_SECONDS else WINDOW_SECONDS
    if window == 0 or duration <= window:
        return [(0.0, duration)]
    stride = window / 2 if stride is None else stride
    steps = math.ceil((duration - window) / stride - 1e-9)  # no second window where the last one fits exactly
    starts = [step * stride for step in range(steps)] + [duration - window]
    return [(start, min(start + window, duration)) for start in starts]
