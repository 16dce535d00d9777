# SPDX-License-Identifier: Apache-2.0
"""The ways of decoding that are compared take the same frames, at the same size."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import decode

from tests.video_files import indices_of, write_video


def test_every_way_takes_the_frames_at_segment_centres(tmp_path):
    path = str(write_video(tmp_path / "clip.mp4", 48, size=(160, 120)))
    ways = {"ours": decode.uniform, **decode.ways()}
    for name, way in ways.items():
        frames = way(path)
        assert tuple(frames.shape) == (12, 3, 224, 224), name
        assert indices_of(frames) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46], name
    assert decode.decode_all(path) == 48


def test_the_floor_converts_the_frames_that_ours_takes(tmp_path):
    path = str(write_video(tmp_path / "floor.mp4", 120, size=(160, 120)))
    floor = decode.Floor(path)
    assert floor() == floor() == 12
    assert 12 <= sum(pts is not None for pts, _ in floor.steps) < 120  # groups without a wanted frame are left out


def test_a_clip_shows_the_same_in_other_containers(tmp_path):
    path = str(write_video(tmp_path / "clip.mp4", 48, size=(160, 120)))
    for name, *format_and_options in decode.CONTAINERS:
        copy = decode.in_container(path, tmp_path / f"copy_{name}", *format_and_options)
        assert indices_of(decode.uniform(copy)) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46], name
