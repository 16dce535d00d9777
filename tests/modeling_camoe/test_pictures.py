# SPDX-License-Identifier: Apache-2.0
"""Pixels: scaling, cropping, colours, rotation, formats."""

import struct

import av
import numpy as np
import PIL.Image
import pytest
import torch

from modeling_camoe import video_file
from modeling_camoe.frames import VideoDecodingError
from modeling_camoe.pictures import display_matrix, upright
from tests import video_files
from tests.video_files import indices_of, natural_picture, sample, write_video


def test_scaling_is_antialiased_bicubic_like_pil(folder):
    picture = natural_picture(180, 320)
    path = write_video(
        folder / "natural.mp4", 1, size=(320, 180), pictures=[picture], pixel_format="yuv444p", options={"crf": "1"}
    )
    frame = sample(path, 1, size=60).frames[0].permute(1, 2, 0).numpy().astype(float)
    crop = np.s_[:, 23:83]  # the central 60 of 106

    def difference(**kwargs):
        reference = PIL.Image.fromarray(picture).resize((106, 60), PIL.Image.BICUBIC, **kwargs)
        return np.abs(frame - np.asarray(reference, float)[crop])

    # The cubic of swscale is a little sharper (a = -0.6, PIL has -0.5), and H.264 works in YUV: 1 level on average.
    assert difference().mean() < 1.5
    assert np.percentile(difference(), 99) < 6
    nearest = np.asarray(PIL.Image.fromarray(picture).resize((106, 60), PIL.Image.NEAREST), float)[crop]
    assert np.abs(frame - nearest).mean() > 5  # what a scaler without antialiasing comes near to


def test_colours_and_their_order_survive(folder):
    colours = [(220, 30, 30), (30, 200, 40), (40, 50, 210)]
    pictures = [np.full((48, 64, 3), colour, np.uint8) for colour in colours]
    path = write_video(folder / "colours.mp4", 3, pictures=pictures)
    for frame, colour in zip(sample(path, 3).frames, colours, strict=True):
        assert frame.float().mean((1, 2)).tolist() == pytest.approx(colour, abs=3)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 38), (130, 32), (32, 32)])
def test_the_centre_of_every_shape_is_cut_out(folder, size):
    picture = np.full((size[1], size[0], 3), 40, np.uint8)
    picture[size[1] // 2 - 8 : size[1] // 2 + 8, size[0] // 2 - 8 : size[0] // 2 + 8] = 200  # 16 x 16 in the middle
    path = write_video(folder / f"{size[0]}x{size[1]}.mp4", 1, size=size, pictures=[picture])
    frame = sample(path, 1, size=32).frames[0].float().mean(0)
    assert frame.shape == (32, 32)
    rows, columns = frame.mean(1), frame.mean(0)
    centre = (torch.arange(32) + 0.5) / 32
    for profile in (rows, columns):
        weight = profile - profile.min()
        assert (weight * centre).sum() / weight.sum() == pytest.approx(0.5, abs=0.03)


def test_size_none_keeps_the_stored_size(video):
    assert sample(video, 2, size=None).frames.shape == (2, 3, 48, 64)


@pytest.mark.parametrize("width", [82, 98, 114, 146, 148, 112])
@pytest.mark.parametrize("size", [None, 80])
def test_frames_that_keep_their_size_are_right_to_the_last_column(folder, width, size):
    picture = np.zeros((80, width, 3), np.uint8)
    picture[:] = np.linspace(40, 200, width)[:, None]
    path = write_video(folder / f"wide{width}.mp4", 4, size=(width, 80), pictures=[picture] * 4)
    left = 0 if size is None else (width - size) // 2
    for frame in sample(path, 4, size=size).frames.float():
        profile = frame.mean((0, 1)).numpy()
        expected = picture[0, left : left + len(profile), 0].astype(float)
        assert np.abs(profile - expected).max() < 3
        assert abs((profile - expected).mean()) < 0.5  # neither darker nor brighter


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_the_rotation_that_a_file_asks_for_is_applied(folder, degrees):
    picture = np.full((48, 64, 3), 40, np.uint8)
    picture[:24, :32] = 200  # top left
    path = write_video(folder / f"rotated{degrees}.mp4", 2, pictures=[picture] * 2, rotation=degrees)
    frame = sample(path, 1, size=None).frames[0].float().mean(0)
    turned = np.rot90(picture[..., 0], degrees // 90).astype(np.float32)  # counterclockwise, as the display matrix
    assert frame.shape == turned.shape
    assert np.abs(frame.numpy() - turned).mean() < 4


@pytest.mark.parametrize(
    "codec,pixel_format,extension",
    [
        ("libx264", "yuv420p10le", "mp4"),
        ("png", "rgba", "mov"),
        ("mjpeg", "yuvj420p", "mov"),
    ],
)
def test_unusual_pixel_formats_become_rgb(folder, codec, pixel_format, extension):
    options = None if codec == "libx264" else {}
    path = folder / f"{pixel_format}.{extension}"
    write_video(path, 6, codec=codec, pixel_format=pixel_format, options=options)
    assert indices_of(sample(path, 3).frames) == [1, 3, 5]


def test_an_animated_gif_is_a_video(folder):
    path = folder / "animated.gif"
    pictures = [PIL.Image.fromarray(video_files.index_picture(i, 64, 48)) for i in range(8)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    assert indices_of(sample(path, 4).frames) == [1, 3, 5, 7]


def test_frames_that_are_too_large_or_grow_to_be_are_refused(folder, monkeypatch):
    monkeypatch.setattr(video_file, "MAX_PIXELS", 100_000)
    small = write_video(folder / "small.ts", 24)
    large = write_video(folder / "large.ts", 24, size=(640, 480), start=2.0, pictures=[natural_picture(480, 640)] * 24)
    assert len(sample(small, 4).frames) == 4
    with pytest.raises(VideoDecodingError, match="large.ts: frames of 640 x 480 pixels are too large; scale it down"):
        sample(large, 4)
    (folder / "growing.ts").write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoDecodingError, match="growing.ts: damaged or incomplete"):
        sample(folder / "growing.ts", 4)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_frame_with_side_data_that_pyav_does_not_know_is_turned_nevertheless(folder, degrees):
    path = write_video(folder / f"turned{degrees}.mp4", 1)
    content = bytearray(path.read_bytes())
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[degrees // 90]
    matrix = content.index(b"tkhd") + 44
    values = (cosine, sine, 0, -sine, cosine, 0, 0, 0)
    content[matrix : matrix + 36] = struct.pack(">9i", *(value << 16 for value in values), 1 << 30)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))

    class FrameOfAnotherKind:
        """As PyAV gives one of stereoscopic HEVC."""

        rotation = frame.rotation

        @property
        def side_data(self):
            raise ValueError("29 is not a valid Type")

    image = np.arange(6).reshape(1, 2, 3)
    wanted = upright(image, display_matrix(frame))
    assert np.array_equal(upright(image, display_matrix(FrameOfAnotherKind())), wanted)
    assert np.array_equal(wanted, image) == (degrees == 0)
