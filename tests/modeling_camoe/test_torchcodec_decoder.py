# SPDX-License-Identifier: Apache-2.0
"""The torchcodec back end beside PyAV: the same frames, with pixels that are close."""

import functools

import pytest

from tests.video_files import KINDS, indices_of, natural_picture, sample, write_video


@functools.cache
def _torchcodec_loads():
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not _torchcodec_loads(), reason="torchcodec or its FFmpeg is not installed")


@needs_torchcodec
@pytest.mark.parametrize("name", ["mp4", "mkv", "variable_rate.mp4", "late_in_file.mp4", "one_key_frame.mp4"])
@pytest.mark.parametrize("sampling", ["uniform", "jitter"])
def test_torchcodec_finds_the_same_frames(folder, name, sampling):
    path = write_video(folder / f"torchcodec_{name if '.' in name else 'plain.' + name}", 60, **KINDS[name])
    for window in ({}, {"start": 2.0, "end": 3.3}):
        by_pyav, by_torchcodec = (
            sample(path, 9, sampling, seed=1, backend=backend, **window) for backend in ("pyav", "torchcodec")
        )
        assert indices_of(by_torchcodec.frames) == indices_of(by_pyav.frames)
        assert by_torchcodec.times == pytest.approx(by_pyav.times, abs=1e-6)
        assert by_torchcodec.duration == by_pyav.duration


@needs_torchcodec
def test_torchcodec_pixels_are_close(folder):
    path = write_video(folder / "pixels.mp4", 1, size=(320, 180), pictures=[natural_picture(180, 320)])
    by_pyav, by_torchcodec = (sample(path, 1, size=60, backend=backend) for backend in ("pyav", "torchcodec"))
    difference = (by_pyav.frames.float() - by_torchcodec.frames.float()).abs()
    assert difference.mean() < 5  # the fast path of swscale, which torchcodec takes, is 1 to 2 levels too dark
