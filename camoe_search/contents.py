# SPDX-License-Identifier: Apache-2.0
"""What is in a file, from its hash and its header, and the windows that it is cut into."""

from collections.abc import Container
from typing import NamedTuple

from modeling_camoe.frames import VideoDecodingError, probe_video

from .files import content_hash, cut_windows
from .shots import cut_at_shots, find_shots


LATE = 0.5  # seconds after the sound from which on pictures begin late: times count from what comes first


class Content(NamedTuple):
    """What is in a file, or the cause: why it cannot be read. Only the hash, if that content is known already."""

    hash: str | None
    duration: float | None = None  # seconds
    cause: str | None = None
    picture: tuple[int, int] | None = None  # width, height
    shots: list[float] | None = None  # seconds from the first picture to where shots begin, if windows are cut there
    begin: float = 0.0  # seconds to the first picture

    def windows(self, window: float | None, stride: float | None) -> list[tuple[float, float]]:
        """Its windows as (start, end) in seconds; see `files.cut_windows`."""
        if self.shots is None:
            windows = cut_windows(self.duration, window, stride)
        else:
            windows = cut_at_shots(self.duration, self.shots, window, stride)
        begin = self.begin if self.begin >= LATE else 0.0
        return [(begin + start, begin + end) for start, end in windows]


def examine(path: str, windows: str = "time", known: Container[str] = ()) -> Content:
    """Hash a file, and read its header unless its hash is known.

    Args:
        windows: what cuts videos: "time" or "shots".
        known: hashes of contents whose header need not be read again.
    """
    try:
        digest = content_hash(path)
    except OSError as error:
        return Content(None, cause=f"{path}: {error.strerror or error}")
    return Content(digest) if digest in known else probe(path, digest, windows)


def probe(path: str, digest: str, windows: str = "time") -> Content:
    """What the header of a file says, whose hash is known; see `examine`."""
    try:
        info = probe_video(path)
        shots = find_shots(path) if windows == "shots" else None
    except VideoDecodingError as error:
        return Content(digest, cause=str(error))
    return Content(digest, info.duration, None, (info.width, info.height), shots, info.start)
