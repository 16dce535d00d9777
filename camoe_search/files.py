# SPDX-License-Identifier: Apache-2.0
"""Finding video files, telling whether they changed, and cutting them into windows.

Notable features:
- symbolic links are followed, but every folder is entered once, so that a cycle of links ends;
- a file is unchanged if its path, size and modification time are; otherwise its content hash decides;
- a short video is one window, a long one is cut into several;
- what begins like `s3://` is an address, whose files fsspec lists and opens (addresses.py).
"""

import fnmatch
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import addresses
from .addresses import is_address
from .errors import SearchError


# Our choice. A video of up to half a minute, about the length of training clips, is one window. A longer one is cut
# into windows that overlap by half, so that anything up to half a window long lies entirely inside one of them.
WHOLE_SECONDS = 30.0
WINDOW_SECONDS = 10.0

HASH_BLOCK = 1 << 20  # bytes read at a time
# Blocks that the hash of a large file reads, evenly spaced from the first to the last. A file share of 50,000 large
# files is then 400 GB to read, not all of it.
HASH_BLOCKS = 8


@dataclass(frozen=True)
class VideoFile:
    """A file as it was when it was found."""

    path: str  # absolute, or an address
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Scan:
    """What was found in folders."""

    videos: list[VideoFile]  # by name; sorted by path
    skipped: list[dict]  # what could not be read: {"path", "cause"}
    other_extensions: Counter  # of files that are no videos: extension -> number of files
    paths: Sequence[str] = ()  # what was looked at, absolute


def find_videos(paths, exclude: Sequence[str] = ()) -> Scan:
    """Video files under files and folders, each once.

    A file that is given by name is taken whatever its extension; inside folders, VIDEO_EXTENSIONS decide.

    Args:
        paths: files and folders, or their addresses.
        exclude: patterns ("*.part", ".trash", "raw/*") that are compared with the name of each file and folder, and
            with its path from the folder that was given.

    Raises:
        SearchError: a path does not exist.
    """
    from modeling_camoe.frames import VIDEO_EXTENSIONS  # imports torch, which the rest of this file does not need

    found, skipped, other_extensions = {}, [], Counter()
    entered = set()

    def add(path: str):
        try:
            os.fsencode(path).decode()  # the database keeps text as UTF-8
            status = os.stat(path)
        except UnicodeDecodeError:
            skipped.append({"path": ascii(path), "cause": "its name is not valid UTF-8; rename it"})
        except OSError as error:
            skipped.append({"path": path, "cause": f"{path}: {error.strerror}"})
        else:
            found.setdefault(os.path.realpath(path), VideoFile(path, status.st_size, status.st_mtime_ns))

    def walk_address(root: str):
        """The videos below a folder at an address, or the one file there."""
        files = addresses.list_files(root) if addresses.is_folder(root) else {root: None}
        if None in files.values() and not addresses.exists(root):
            raise SearchError(f"{root} does not exist: give folders or files of videos")
        for address, status in files.items():
            names = address[len(root) + 1 :].split("/")
            below = ["/".join(names[: n + 1]) for n in range(len(names))]
            if any(is_excluded(name, path) for name, path in zip(names, below, strict=True)):
                continue
            extension = os.path.splitext(address)[1].lower()
            if status is None or extension in VIDEO_EXTENSIONS:
                size, mtime_ns = status or addresses.stat(address)
                found.setdefault(address, VideoFile(address, size, mtime_ns))
            else:
                other_extensions[extension or names[-1]] += 1

    def note_unreadable(error: OSError):  # a folder that cannot be listed
        skipped.append({"path": error.filename, "cause": f"{error.filename}: {error.strerror}"})

    def is_excluded(name: str, relative: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(relative, pattern) for pattern in exclude)

    paths = [absolute(path) for path in paths]
    for root in paths:
        if is_address(root):
            walk_address(root)
            continue
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
            from_root = os.path.relpath(folder, root)
            from_root = "" if from_root == "." else from_root
            subfolders[:] = sorted(n for n in subfolders if not is_excluded(n, os.path.join(from_root, n)))
            for name in sorted(names):
                extension = os.path.splitext(name)[1].lower()
                if is_excluded(name, os.path.join(from_root, name)):
                    continue
                if extension in VIDEO_EXTENSIONS:
                    add(os.path.join(folder, name))
                else:
                    other_extensions[extension or name] += 1
    return Scan(sorted(found.values(), key=lambda video: video.path), skipped, other_extensions, paths)


def absolute(path: str | os.PathLike) -> str:
    """An absolute path, also of a `file://` address; other addresses as they are."""
    path = os.fspath(path)
    if is_address(path):
        return path.rstrip("/")
    for prefix in ("file://", "local://"):
        path = path[len(prefix) :] if path.lower().startswith(prefix) else path
    return os.path.abspath(os.path.expanduser(path))


def exists(path: str) -> bool:
    return addresses.exists(path) if is_address(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    return addresses.is_folder(path) if is_address(path) else os.path.isdir(path)


def relative(path: str, folder: str) -> str:
    """The path of a file from a folder that it is in, to which `os.path.join` gives the file again."""
    return path[len(folder.rstrip(os.sep)) + 1 :]


def is_inside(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder's own or in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def matches(path: str, pattern: str) -> bool:
    """Whether an absolute path is a file or in a folder that is named, or fits a pattern such as "*/2019/*.mp4"."""
    wanted = pattern if pattern.startswith("*") else absolute(pattern)
    return is_inside(path, wanted) or fnmatch.fnmatchcase(path, wanted)


def is_unchanged(video: VideoFile) -> bool:
    """Whether the file is still as it was when it was found."""
    try:
        if is_address(video.path):
            return addresses.stat(video.path) == (video.size, video.mtime_ns)
        status = os.stat(video.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)


def content_hash(path: str) -> str:
    """128-bit BLAKE2b of a file's size and content, in hexadecimal.

    Of files above HASH_BLOCKS megabytes it reads that many blocks, the first and the last among them. Videos that
    differ have other headers, sizes and compressed bytes throughout; what this could miss is a file changed by hand
    between the blocks without a change of its size. For a file at an address see `addresses.content_hash`.

    Raises:
        OSError: it cannot be read.
    """
    if is_address(path):
        return addresses.content_hash(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        if size <= HASH_BLOCKS * HASH_BLOCK:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
        else:
            for number in range(HASH_BLOCKS):
                file.seek((size - HASH_BLOCK) * number // (HASH_BLOCKS - 1))
                digest.update(file.read(HASH_BLOCK))
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


def read_lines(path: str | None) -> list[str] | None:
    """The lines of a file that an option names, "-" for standard input, without empty ones; None without a file.

    Raises:
        SearchError: it is not UTF-8 text.
    """
    if path is None:
        return None
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SearchError(f"{path} is not UTF-8 text: give one per line") from None
    return [line for line in text.split("\n") if line.strip()]  # names may hold U+2028, which `splitlines` splits at
