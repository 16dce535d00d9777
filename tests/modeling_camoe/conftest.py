# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
