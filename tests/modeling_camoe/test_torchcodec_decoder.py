# SPDX-License-Identifier: Apache-2.0
"""The torchcodec back end beside PyAV: the same frames, with pixels that are close."""

import functools
import struct

import numpy as np
import pytest
import torch

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


@needs_torchcodec
@pytest.mark.parametrize("name", ["ts", "mpg", "avi"])
def test_torchcodec_leaves_files_that_it_does_not_read_exactly_to_pyav(folder, name, caplog):
    path = write_video(folder / f"inexact.{name}", **{"num_frames": 60, **KINDS[name]})
    by_pyav, by_torchcodec = (sample(path, 6, backend=backend) for backend in ("pyav", "torchcodec"))
    assert torch.equal(by_torchcodec.frames, by_pyav.frames)
    assert by_torchcodec.times == by_pyav.times
    assert "decoded by PyAV, not torchcodec" in caplog.text


@needs_torchcodec
@pytest.mark.parametrize(
    "matrix", [(-1, 0, 0, 1), (0, 1, 1, 0), (0, 1, -1, 0)], ids=["mirrored", "transposed", "turned"]
)
def test_torchcodec_shows_pictures_upright_like_pyav(folder, matrix):
    picture = np.full((48, 64, 3), 40, np.uint8)
    picture[:24, :32] = 200
    path = write_video(folder / "matrix.mp4", 2, pictures=[picture] * 2, pixel_aspect=2)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    by_pyav, by_torchcodec = (sample(path, 1, size=None, backend=backend).frames for backend in ("pyav", "torchcodec"))
    assert by_torchcodec.shape == by_pyav.shape
    assert (by_torchcodec.float() - by_pyav.float()).abs().mean() < 5
