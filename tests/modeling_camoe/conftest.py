# SPDX-License-Identifier: Apache-2.0
"""Clips that several test files decode, written once per worker."""

import pytest

from tests.video_files import write_video


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def video(folder):
    """24 frames in 2 s, a key frame every half second."""
    return write_video(folder / "video.mp4", num_frames=24, fps=12, gop=6)


@pytest.fixture(scope="session")
def long_video(folder):
    """240 frames in 20 s, a key frame every 2 s, B-frames."""
    return write_video(folder / "long.mp4", num_frames=240, fps=12, gop=24)
