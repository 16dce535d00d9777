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
"""Decoding: the exact frames, of all kinds of files, at little cost; and an error with a cause for everything else."""

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from modeling_camoe import frames as frames_module
from modeling_camoe.frames import (
    VIDEO_EXTENSIONS,
    Clip,
    VideoDecodingError,
    describe_source,
    probe_video,
    sample_frames,
)
from tests import video_files
from tests.video_files import cut_off, indices_of, stored_times, write_audio, write_video


@functools.cache
def _torchcodec_loads():
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not _torchcodec_loads(), reason="torchcodec or its FFmpeg is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder):
    """24 frames in 2 s, a key frame every half second."""
    return write_video(folder / "video.mp4", num_frames=24, fps=12, gop=6)


@pytest.fixture(scope="module")
def long_video(folder):
    """240 frames in 20 s, a key frame every 2 s, B-frames."""
    return write_video(folder / "long.mp4", num_frames=240, fps=12, gop=24)


def sample(source, *args, size=32, **kwargs):
    return sample_frames(source, *args, size=size, **kwargs)


# --- which frames ----------------------------------------------------------------------------------------------------


def test_uniform_takes_the_frame_shown_at_the_centre_of_each_segment(video):
    sampled = sample(video, 4)  # segments of 6 frames
    assert indices_of(sampled.frames) == [3, 9, 15, 21]
    assert sampled.times == pytest.approx([3 / 12, 9 / 12, 15 / 12, 21 / 12])
    assert sampled.duration == pytest.approx(2.0)
    assert sampled.frames.shape == (4, 3, 32, 32)
    assert sampled.frames.dtype == torch.uint8


def test_one_frame_is_the_middle_one(video):
    assert indices_of(sample(video, 1).frames) == [12]


def test_a_window_is_cut_into_segments_of_its_own(video):
    sampled = sample(video, 3, start=0.5, end=1.0)  # frames 6 to 11
    assert indices_of(sampled.frames) == [7, 9, 11]
    assert sampled.duration == pytest.approx(0.5)


def test_a_window_may_begin_in_the_middle_of_a_frame(video):
    # Frame 3 is shown from 0.25 to 0.333 s, hence still at the only target, 0.305 s.
    assert indices_of(sample(video, 1, start=0.3, end=0.31).frames) == [3]


def test_a_window_that_reaches_beyond_the_end_stops_there(video):
    sampled = sample(video, 2, start=1.0, end=30.0)
    assert indices_of(sampled.frames) == [15, 21]
    assert sampled.duration == pytest.approx(1.0)


def test_a_clip_carries_its_window_and_arguments_override_it(video):
    clip = Clip(video, 0.5, 1.0)
    assert indices_of(sample(clip, 3).frames) == [7, 9, 11]
    assert indices_of(sample(clip, 3, end=2.0).frames) == indices_of(sample(video, 3, start=0.5, end=2.0).frames)


def test_bytes_are_decoded_like_the_file(video):
    from_file, from_bytes = sample(video, 5), sample(video.read_bytes(), 5)
    assert torch.equal(from_file.frames, from_bytes.frames)
    assert from_file.times == from_bytes.times


def test_a_short_clip_gives_each_of_its_frames_once(folder):
    short = write_video(folder / "short.mp4", num_frames=5, fps=10)
    sampled = sample(short, 12)
    assert indices_of(sampled.frames) == [0, 1, 2, 3, 4]
    assert sampled.times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_video_of_one_frame_gives_that_frame(folder):
    assert indices_of(sample(write_video(folder / "one.mp4", num_frames=1), 12).frames) == [0]


def test_fps_limits_the_number_of_frames(video):
    assert indices_of(sample(video, 12, fps=2).frames) == [3, 9, 15, 21]  # 2 s, 2 frames a second
    assert len(sample(video, 3, fps=10).times) == 3
    assert len(sample(video, 12, fps=0.1).times) == 1


def test_jitter_takes_one_frame_from_each_segment(long_video):
    drawn = [indices_of(sample(long_video, 10, "jitter", seed=seed).frames) for seed in range(8)]
    for indices in drawn:
        assert [i // 24 for i in indices] == list(range(10))
    assert all(len({indices[k] for indices in drawn}) > 2 for k in range(10))


def test_jitter_is_repeatable(long_video):
    first, again = (sample(long_video, 6, "jitter", seed=3) for _ in range(2))
    assert first.times == again.times
    assert torch.equal(first.frames, again.frames)
    assert sample(long_video, 6, "jitter", seed=4).times != first.times


@pytest.mark.parametrize("num_frames", [12, 20, 24])
def test_jitter_draws_no_frame_twice_where_there_are_enough(video, num_frames):
    for seed in range(5):
        assert len(sample(video, num_frames, "jitter", seed=seed).times) == num_frames


def test_keyframe_takes_the_nearest_key_frames(long_video):
    sampled = sample(long_video, 3, "keyframe")  # centres 3.33, 10, 16.67 s; key frames every 2 s
    assert indices_of(sampled.frames) == [48, 120, 192]
    assert sampled.times == pytest.approx([4.0, 10.0, 16.0])


def test_keyframe_gives_each_key_frame_once(video):
    assert indices_of(sample(video, 12, "keyframe").frames) == [0, 6, 12, 18]


def test_keyframe_prefers_key_frames_inside_the_window(long_video):
    # 11.9 s is nearest to the centres of the second half, but outside.
    assert indices_of(sample(long_video, 4, "keyframe", start=10.0, end=11.9).frames) == [120]


# --- exactness, for files of all kinds -------------------------------------------------------------------------------

H264 = {"g": "24", "bf": "3", "sc_threshold": "0", "preset": "veryfast", "crf": "10"}
FILES = {
    "mp4": {},
    "all_key_frames.mp4": {"gop": 1},
    "one_key_frame.mp4": {"gop": 300},
    "no_b_frames.mp4": {"options": H264 | {"bf": "0"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "late_in_file.mp4": {"start": 1.5, "audio": 6.0},
    "late.ts": {"start": 7.0},
    "mkv": {"audio": 6.0},  # longer than the video
    "ts": {},
    "open_gop.ts": {"options": H264 | {"x264-params": "open-gop=1:b-pyramid=strict"}},
    "no_key_frames.ts": {"options": H264 | {"x264-params": "intra-refresh=1"}},
    "flv": {},
    "avi": {},  # reordered frames without time stamps
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "9000000", "qmin": "1", "qmax": "1"}},
    "mpg": {"codec": "mpeg2video", "fps": 25, "options": {"g": "12", "bf": "2", "b": "4000000"}},
    "webm": {"codec": "libvpx", "options": {"g": "24", "b": "1000000", "deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "keyint=24:log-level=none"}},
    "variable_rate.mp4": {"times": np.cumsum(1 + np.arange(60) * 7 % 5) / 25},
    "variable_rate.mkv": {"times": np.cumsum(1 + np.arange(60) * 7 % 5) / 25},
}


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_shown_at_the_targets(folder, name, monkeypatch):
    path = write_video(folder / (name if "." in name else f"plain.{name}"), **{"num_frames": 60, **FILES[name]})
    lazy, targets = [], []
    times_of = frames_module._times
    monkeypatch.setattr(frames_module, "_times", lambda *args: targets.append(times_of(*args)) or targets[-1])
    plain = frames_module._decode_everything
    monkeypatch.setattr(frames_module, "_decode_everything", lambda *args: lazy.append(False) or plain(*args))

    shown_from = stored_times(path)  # of frame 0, 1, 2, ...
    if name == "avi":  # the decoder hands out the times in the wrong order, but the right ones
        shown_from = sorted(shown_from)
    last = shown_from[-1]
    for seed, (count, sampling, start, end) in enumerate(
        [
            (1, "uniform", None, None),
            (12, "uniform", None, None),
            (12, "jitter", None, None),
            (40, "jitter", None, None),
            (7, "jitter", 0.3 * last, 0.9 * last),
            (3, "uniform", 0.7 * last, 0.75 * last),
        ]
    ):
        sampled = sample(path, count, sampling, start=start, end=end, seed=seed)
        wanted = [max([0] + [i for i, t in enumerate(shown_from) if t <= target + 5.001e-4]) for target in targets[-1]]
        assert indices_of(sampled.frames) == sorted(set(wanted))
        assert sampled.times == pytest.approx([shown_from[i] for i in sorted(set(wanted))], abs=1e-3)
    if name not in ("avi", "no_key_frames.ts", "webm"):  # the last: VP8 has packets that show nothing
        assert not lazy


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_frames(long_video, threads):
    reference = sample(long_video, 12, "jitter", seed=0, threads=1)
    sampled = sample(long_video, 12, "jitter", seed=0, threads=threads)
    assert torch.equal(sampled.frames, reference.frames)


def test_a_lazy_decode_that_fails_is_done_again_the_plain_way(long_video, monkeypatch):
    expected = sample(long_video, 12)

    def fail(self, targets):
        raise frames_module._NotExact

    monkeypatch.setattr(frames_module._LazyDecoder, "run", fail)
    sampled = sample(long_video, 12)
    assert torch.equal(sampled.frames, expected.frames)
    assert sampled.times == expected.times


def test_a_stream_without_time_stamps_is_counted(folder):
    raw = write_video(folder / "raw.h264", num_frames=50, fps=25, format="h264")
    sampled = sample(raw, 5)
    assert indices_of(sampled.frames) == [5, 15, 25, 35, 45]
    assert sampled.times == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8])


def test_times_count_from_the_beginning_of_the_file(folder):
    late = write_video(folder / "late.mkv", num_frames=12, fps=12, start=3.0, audio=5.0)
    sampled = sample(late, 3)
    assert indices_of(sampled.frames) == [2, 6, 10]
    assert sampled.times == pytest.approx([3 + 2 / 12, 3.5, 3 + 10 / 12], abs=1e-3)
    assert sampled.duration == pytest.approx(1.0, abs=0.01)


def test_an_audio_track_that_outlasts_the_video_gives_no_frozen_frames(folder):
    path = write_video(folder / "long_sound.mkv", num_frames=24, fps=12, audio=10.0)
    assert indices_of(sample(path, 4).frames) == [3, 9, 15, 21]


def test_a_header_that_promises_too_much_is_corrected(folder):
    path = write_video(folder / "promise.avi", num_frames=24, fps=12, codec="mpeg4")
    content = bytearray(path.read_bytes())
    header = content.index(b"strh")
    assert int.from_bytes(content[header + 40 : header + 44], "little") == 24  # dwLength
    content[header + 40 : header + 44] = (96).to_bytes(4, "little")
    path.write_bytes(content)
    sampled = sample(path, 4)
    assert indices_of(sampled.frames) == [3, 9, 15, 21]
    assert sampled.duration == pytest.approx(2.0)


def test_a_still_scene_is_returned_once(folder):
    held = write_video(folder / "held.mp4", num_frames=4, times=[0.0, 0.1, 3.9, 4.0])
    assert sample(held, 8).times == (0.1,)  # the last of the eight centres is at 3.83 s
    assert indices_of(sample(held, 8, start=3.6).frames) == [1, 2, 3]


# --- cost ------------------------------------------------------------------------------------------------------------


def count_decoded(monkeypatch):
    """Counts the packets that a lazy decode gives to the decoder, and those of them it may leave out."""
    counts = {"decoded": 0, "skippable": 0}
    decode = frames_module._LazyDecoder._decode

    def counting(self, packet):
        if packet is not None:
            counts["decoded"] += 1
            counts["skippable"] += self.video.decoder.skip_frame == "NONREF"
        return decode(self, packet)

    monkeypatch.setattr(frames_module._LazyDecoder, "_decode", counting)
    return counts


def test_groups_of_pictures_without_a_wanted_frame_are_not_decoded(long_video, monkeypatch):
    counts = count_decoded(monkeypatch)
    assert indices_of(sample(long_video, 3).frames) == [40, 120, 200]
    # Key frames at 24, 120 and 192: 16 + 1 + 8 pictures, and up to 3 that B-frames refer to.
    assert counts["decoded"] <= 17 + 1 + 9 + 3


@pytest.mark.parametrize("extension", ["mkv", "ts"])
def test_nor_in_files_without_an_index(folder, extension, monkeypatch):
    path = write_video(folder / f"long.{extension}", num_frames=240, fps=12, gop=24)
    counts = count_decoded(monkeypatch)
    assert indices_of(sample(path, 3).frames) == [40, 120, 200]
    assert counts["decoded"] <= 30


def test_pictures_that_no_other_refers_to_are_left_out(folder, monkeypatch):
    path = write_video(folder / "one_group.mp4", num_frames=120, gop=300)
    counts = count_decoded(monkeypatch)
    sample(path, 3)
    assert counts["decoded"] > 90
    assert counts["skippable"] > 0.9 * counts["decoded"]


def test_files_are_closed(video, folder):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files by /proc")
    broken = cut_off(shutil.copy(video, folder / "open.mp4"), 0.3)
    sample(video, 4)
    before = len(os.listdir("/proc/self/fd"))
    for sampling in ("uniform", "keyframe"):
        sample(video, 4, sampling)
        with pytest.raises(VideoDecodingError):
            sample(broken, 4, sampling)
    probe_video(video)
    assert len(os.listdir("/proc/self/fd")) == before


class _Decoding(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return sample(self.path, 3, start=index * 0.5, end=index * 0.5 + 0.5).frames


def test_workers_decode_the_same_frames(video):
    sample(video, 3)  # as a parent process may have done before it forks
    alone, by_workers = (
        [indices_of(batch[0]) for batch in torch.utils.data.DataLoader(_Decoding(video), num_workers=n)]
        for n in (0, 2)
    )
    assert by_workers == alone == [[1, 3, 5], [7, 9, 11], [13, 15, 17], [19, 21, 23]]


# --- pixels ----------------------------------------------------------------------------------------------------------


def natural_picture(height, width, seed=0):
    """Noise with the spectrum of photographs (amplitude 1/f): detail of all sizes, so that aliasing would show."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(generator.standard_normal((height, width))) / (1 + frequency)
        channel = np.fft.ifft2(spectrum).real
        channels.append(128 + 50 * channel / channel.std())
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


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


# --- errors ----------------------------------------------------------------------------------------------------------


def _write(path, content):
    path.write_bytes(content)
    return path


BROKEN = {
    "missing": (lambda folder: folder / "missing.mp4", "no such file"),
    "url": (lambda folder: "https://example.org/a.mp4", "download it first"),
    "folder": (lambda folder: folder, "cannot be read"),
    "empty": (lambda folder: _write(folder / "empty.mp4", b""), "the file is empty"),
    "text": (lambda folder: _write(folder / "text.mp4", b"not a video at all\n" * 50), "no video"),
    "text file": (lambda folder: _write(folder / "notes.txt", b"not a video at all\n" * 50), "text file|no video"),
    "bytes": (lambda folder: b"rubbish" * 20, "<140 bytes>: no video"),
    "no bytes": (lambda folder: b"", "<0 bytes>: the file is empty"),
    "audio": (lambda folder: write_audio(folder / "audio.m4a"), "has no video stream"),
    "audio with a cover": (lambda folder: write_audio(folder / "song.m4a", cover=True), "has no video stream"),
    "cut off": (lambda folder: cut_off(write_video(folder / "cut.mp4", 48)), "cut off before its end"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("call", [sample, probe_video], ids=["sample_frames", "probe_video"])
def test_a_file_that_is_no_video_is_an_error_that_names_it_and_the_cause(folder, kind, call):
    make, cause = BROKEN[kind]
    source = make(folder)
    with pytest.raises(VideoDecodingError, match=cause) as error:
        call(source)
    assert describe_source(source) in str(error.value)


@pytest.mark.parametrize("sampling", ["uniform", "keyframe"])
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_video_that_breaks_off_gives_no_part_of_the_frames(folder, sampling, extension):
    # Its header is complete, and promises 20 s.
    options = {"movflags": "faststart"} if extension == "mp4" else {}
    path = write_video(folder / f"breaks_off.{extension}", 240, gop=24, container_options=options)
    cut_off(path, 0.6)
    with pytest.raises(VideoDecodingError, match="download it again"):
        sample(path, 12, sampling)


def test_a_window_before_the_break_is_decoded(folder):
    path = write_video(folder / "begins_well.mp4", 240, gop=24, container_options={"movflags": "faststart"})
    cut_off(path, 0.6)
    assert indices_of(sample(path, 2, end=2.0).frames) == [6, 18]


def damage(path, first, last, kept=0.0):
    """Overwrites the coded pictures of some frames (12 a second) with noise, but for their first share."""
    with av.open(str(path)) as container:
        packets = [(p.pts * p.time_base * 12, p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for frame, position, size in packets:
        if first <= frame <= last:
            whole = 4 + int((size - 4) * kept)  # the first 4 bytes are its length
            content[position + whole : position + size] = generator.bytes(size - whole)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_a_damaged_frame_is_an_error_and_a_window_around_it_is_not(folder, threads):
    path = damage(write_video(folder / f"damaged{threads}.mp4", 96, gop=24, size=(128, 96)), 48, 71)
    with pytest.raises(VideoDecodingError, match="damaged") as error:
        sample(path, 12, threads=threads)
    assert str(path) in str(error.value)
    assert indices_of(sample(path, 2, end=3.0, threads=threads).frames) == [9, 27]
    assert indices_of(sample(path, 2, start=6.5, threads=threads).frames) == [82, 91]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_frame_that_refers_to_a_damaged_one_is_damaged(folder, threads):
    pictures = [natural_picture(96, 128, seed=i // 24) for i in range(96)]
    path = write_video(
        folder / f"concealed{threads}.mp4", 96, size=(128, 96), pictures=pictures, options=H264 | {"bf": "0"}
    )
    damage(path, 48, 48, kept=0.5)  # FFmpeg fills in the rest of this picture, and says so for this one only
    for start in (4.0, 5.0):  # frames 48 and 60, of the same group of pictures
        with pytest.raises(VideoDecodingError, match=r"damaged at [45]\.\d+ s"):
            sample(path, 1, start=start, end=start + 0.05, threads=threads)
    for start in (3.9, 6.0):
        assert len(sample(path, 1, start=start, end=start + 0.05, threads=threads).times) == 1


def test_frames_cut_away_by_an_edit_list_are_not_shown(folder):
    """As an editor cuts without encoding again: the file still holds the frames from the key frame to the cut."""
    path = write_video(folder / "edited.mp4", 48, gop=12)
    content = bytearray(path.read_bytes())
    edit = content.index(b"elst") + 12  # past version, flags and number of edits (1): duration, beginning
    duration, beginning = (int.from_bytes(content[edit + i : edit + i + 4], "big") for i in (0, 4))
    content[edit : edit + 4] = (duration - 1500).to_bytes(4, "big")  # milliseconds
    content[edit + 4 : edit + 8] = (beginning + 18 * 1024).to_bytes(4, "big")  # 18 frames of 1024 ticks
    path.write_bytes(content)
    sampled = sample(path, 30)
    assert indices_of(sampled.frames) == list(range(18, 48))
    assert sampled.times[0] == 0.0
    assert sampled.duration == pytest.approx(2.5)


def test_the_duration_of_a_program_stream_is_read_from_its_packets(folder):
    path = write_video(folder / "program.mpg", **{"num_frames": 60, **FILES["mpg"]})
    assert sample(path, 1).duration == pytest.approx(60 / 25, abs=0.05)


def test_a_window_after_the_end_is_an_error_that_names_the_duration(video):
    with pytest.raises(VideoDecodingError, match=r"starts at 2.5 s, but the video lasts 2.000 s"):
        sample(video, start=2.5)


def test_a_window_before_the_first_frame_is_an_error(folder):
    late = write_video(folder / "very_late.mkv", 12, start=3.0, audio=5.0)
    with pytest.raises(VideoDecodingError, match=r"ends at 1.0 s, but the first frame comes at 3.000 s"):
        sample(late, end=1.0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"sampling": "random"}, "'random' is not one of uniform, jitter, keyframe"),
        ({"backend": "opencv"}, "'opencv' is not one of pyav, torchcodec"),
        ({"sampling": "keyframe", "backend": "torchcodec"}, 'needs backend="pyav"'),
        ({"size": 0}, "size must be at least 1"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"start": -1}, "start must be a number of seconds"),
        ({"end": float("inf")}, "end must be a number of seconds"),
        ({"start": 1, "end": 1}, "the window is empty"),
        ({"end": 0}, "the window is empty"),
    ],
)
def test_arguments_that_make_no_sense_are_value_errors(video, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        sample_frames(video, **arguments)
    assert not isinstance(error.value, VideoDecodingError)


def test_the_repr_of_a_clip_does_not_print_the_video(video):
    content = video.read_bytes()
    assert repr(Clip(content, 1.0)) == f"Clip(<{len(content)} bytes>, start=1.0, end=None)"


def test_without_pyav_the_module_loads_and_a_call_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("frames_without_av", frames_module.__file__)
    without_av = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, without_av)
    spec.loader.exec_module(without_av)
    for call in (without_av.sample_frames, without_av.probe_video):
        with pytest.raises(ImportError, match="pip install av"):
            call("a.mp4")


# --- the rest --------------------------------------------------------------------------------------------------------


def test_probe_says_what_the_header_says(video):
    info = probe_video(video)
    assert (info.duration, info.width, info.height, info.average_fps) == (2.0, 64, 48, 12.0)
    assert (info.num_frames, info.codec) == (24, "h264")


def test_probe_estimates_what_the_header_lacks(folder):
    info = probe_video(write_video(folder / "probe.mkv", 30, fps=10))
    assert info.duration == pytest.approx(3.0, abs=0.01)
    assert info.num_frames == 30


def test_video_extensions_are_lower_case_suffixes():
    assert {".mp4", ".mkv", ".webm", ".mov", ".avi"} <= VIDEO_EXTENSIONS
    assert all(Path("a" + extension).suffix == extension == extension.lower() for extension in VIDEO_EXTENSIONS)


@needs_torchcodec
@pytest.mark.parametrize("name", ["mp4", "mkv", "variable_rate.mp4", "late_in_file.mp4", "one_key_frame.mp4"])
@pytest.mark.parametrize("sampling", ["uniform", "jitter"])
def test_torchcodec_finds_the_same_frames(folder, name, sampling):
    path = write_video(folder / f"torchcodec_{name if '.' in name else 'plain.' + name}", 60, **FILES[name])
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
