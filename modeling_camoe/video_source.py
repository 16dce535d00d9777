# SPDX-License-Identifier: Apache-2.0
"""
What a video is read from (a path, an address, bytes, a window of one of them), how messages name it, and what its
bytes tell without FFmpeg: that it is no video at all, that it is encrypted, that its end is missing.
"""

import os
import re
import stat
from dataclasses import dataclass


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

# Bytes in which to look for signs of encryption.
MAX_HEADER = 2**16

# At least two letters before the colon: C://clip.mp4 is a file. "::" joins a member to its archive.
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
LOCAL = re.compile(r"(?:file|local)://(?!.*::)", re.IGNORECASE | re.DOTALL)

# What an encrypted file has in its header: an MP4 boxes, a Matroska file elements, an ASF file identifiers.
ENCRYPTED = re.compile(
    rb"encv|pssh|tenc|\x50\x35.{1,8}\x47\xe1|\xfb\xb3\x11\x22\x23\xbd\xd2\x11|\x14\xe6\x8a\x29\x22\x26\x17\x4c",
    re.DOTALL,
)


class VideoDecodingError(ValueError):
    """A video that cannot be decoded. The message names the file and the cause."""


class EncryptedVideoError(VideoDecodingError):
    """A video that is encrypted."""

    def __init__(self, name):
        super().__init__(f"{name}: encrypted; it can only be decoded with its key")


@dataclass(frozen=True, repr=False)
class Clip:
    """What to decode: a whole video or a window of it."""

    source: str | os.PathLike | bytes  # path, address that fsspec opens (s3://, https://, ...), or the file's bytes
    start: float | None = None  # seconds; None: from the beginning
    end: float | None = None  # seconds; None: to the end

    def __repr__(self):  # in a message, a megabyte of video helps nobody
        return f"Clip({describe_source(self)}, start={self.start}, end={self.end})"


def as_clip(source: str | os.PathLike | bytes | Clip) -> Clip:
    """A [`Clip`] as it is; anything else as the whole of its video."""
    # No isinstance: a processor loaded with remote code has a Clip class of its own.
    return source if hasattr(source, "source") else Clip(source)


def describe_source(source: str | os.PathLike | bytes | Clip) -> str:
    """A short name for messages: the path or address, or how many bytes were given."""
    source = as_clip(source).source
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else without_secrets(os.fspath(source))


def is_address(source) -> bool:
    """Whether a source is an address that fsspec opens, rather than a path or bytes."""
    return isinstance(source, str) and bool(ADDRESS.match(source)) and not LOCAL.match(source)


def without_local_prefix(source):
    """A source as it is, but the address of a local file (`file:///clips/a.mp4`) as its path."""
    match = LOCAL.match(source) if isinstance(source, str) else None
    return source[match.end() :] if match else source


def without_secrets(name: str) -> str:
    """An address as messages show it: a password before the host is a secret, and so is what a query may hold."""
    if not is_address(name):
        return name
    shown = re.sub(r"//[^/@]*@", "//", name)
    return re.split(r"[?#]", shown)[0] if name.lower().startswith("http") else shown


def pyav():
    """The library that decodes, imported at the first video: a program that reads only texts never loads FFmpeg."""
    try:
        import av
    except ImportError as error:
        raise ImportError("decoding a video needs PyAV: pip install av") from error
    return av


# --- its bytes -------------------------------------------------------------------------------------------------------


def first_bytes(source, name):
    """The first bytes. Tells in words, before FFmpeg comes in, what is wrong with a path or with what it holds."""
    if isinstance(source, bytes):
        head = source[:1024]
    elif hasattr(source, "read_at"):
        head = source.read_at(0, 1024)
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
                raise VideoDecodingError(f"{name}: a pipe or a device, not a file")
            with open(source, "rb") as file:
                head = file.read(1024)
        except FileNotFoundError as error:
            raise VideoDecodingError(f"{name}: no such file") from error
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


def is_encrypted(source):
    """Whether the reason why a file cannot be decoded may be that it is encrypted."""
    if hasattr(source, "read_at"):
        source = source.read_at(0, MAX_HEADER)
    elif not isinstance(source, bytes):
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            source = file.read(MAX_HEADER)
    return ENCRYPTED.search(source[:MAX_HEADER]) is not None


def missing_bytes_of_matroska(source):
    """How many bytes a Matroska file lacks at its end, by the size that its segment states; 0 if it states none."""
    if isinstance(source, bytes):
        head, size = source[:4096], len(source)
    elif hasattr(source, "read_at"):
        head, size = source.read_at(0, 4096), source.size
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
