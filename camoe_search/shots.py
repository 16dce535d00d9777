# SPDX-License-Identifier: Apache-2.0
"""Windows that begin where the camera's shots do, found by PySceneDetect (extra `shots`).

A shot that is longer than a window is cut as a video is by time; shots shorter than MIN_SECONDS join their neighbour.
"""

from itertools import pairwise

from .errors import SearchError
from .files import cut_windows


MIN_SECONDS = 1.0  # our choice: in less, a searcher sees nothing, and a flash is no shot


def check_shots():
    """
    Raises:
        SearchError: PySceneDetect is not installed.
    """
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise SearchError(
            f'--windows shots needs PySceneDetect ({error}): pip install "camoe[shots]", or cut by --windows time'
        ) from error


def find_shots(path: str) -> list[float]:
    """The seconds at which the shots of a video begin, ascending. Decodes all of it, at a small size.

    Raises:
        VideoDecodingError: naming the file and the cause.
    """
    from scenedetect import AdaptiveDetector, detect

    from modeling_camoe.frames import VideoDecodingError

    try:
        scenes = detect(path, AdaptiveDetector(), backend="pyav", show_progress=False)
    except Exception as error:  # of OpenCV, PyAV and the package itself: a bad file must not end the run
        raise VideoDecodingError(f"{path}: its shots cannot be found ({type(error).__name__}: {error})") from error
    return [start.seconds for start, _ in scenes]


def cut_at_shots(
    duration: float, shots: list[float], window: float | None = None, stride: float | None = None
) -> list[tuple[float, float]]:
    """The windows of a video as (start, end) in seconds.

    Args:
        duration: of the video, seconds.
        shots: where they begin; the first begins at 0 whatever is given.
        window, stride: as for `files.cut_windows`, of each shot.
    """
    bounds = [0.0]
    for start in sorted(shots):
        if start - bounds[-1] >= MIN_SECONDS and duration - start >= MIN_SECONDS:
            bounds.append(start)
    return [
        (start + begin, start + finish)
        for start, end in pairwise([*bounds, duration])
        for begin, finish in cut_windows(end - start, window, stride)
    ]
