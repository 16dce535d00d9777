# SPDX-License-Identifier: Apache-2.0
"""Which frames are taken, and an error with a cause where there are none."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from modeling_camoe.frames import (
    VIDEO_EXTENSIONS,
    Clip,
    VideoDecodingError,
    describe_source,
    probe_video,
    sample_frames,
    sample_windows,
)
from modeling_camoe.pictures import PictureMaker
from modeling_camoe.video_file import VideoFile
from tests.video_files import KINDS, cut_off, indices_of, sample, write_audio, write_video


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


@pytest.mark.parametrize("kind", KINDS)
def test_windows_decoded_together_have_the_frames_of_each_alone(kind, tmp_path):
    options = KINDS[kind]
    name = kind if "." in kind else f"video.{kind}"
    path = str(write_video(tmp_path / name, **{"num_frames": 60 if "times" in options else 130} | options))
    last = probe_video(path).duration
    clips = [Clip(path, start, min(start + 2.0, last)) for start in (0.0, 0.7, 1.0, 2.05, last - 1.5, 0.3)]
    for clip, together in zip(clips, sample_windows(clips, 5, size=32), strict=True):
        alone = sample(clip, 5)
        assert torch.equal(together.frames, alone.frames)
        assert (together.times, together.duration) == (alone.times, alone.duration)


def test_overlapping_windows_decode_a_frame_once(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "video.mp4", 120))
    made, opened = [], []
    make_picture, open_file = PictureMaker.__call__, VideoFile.__init__

    def note_frame(self, frame):
        made.append(frame.pts)
        return make_picture(self, frame)

    def note_file(self, *arguments):
        opened.append(arguments[0])
        open_file(self, *arguments)

    monkeypatch.setattr(PictureMaker, "__call__", note_frame)
    monkeypatch.setattr(VideoFile, "__init__", note_file)
    windows = sample_windows([Clip(path, start, start + 2.0) for start in range(8)], 4, size=32)
    assert sum(len(window.frames) for window in windows) == 32 and len(made) == len(set(made)) == 18
    assert opened == [path]


def test_a_window_that_cannot_be_decoded_leaves_the_others_as_they_are(tmp_path):
    path = str(write_video(tmp_path / "video.mp4", 48))
    clips = [Clip(path, 0.0, 2.0), Clip(path, 5.0, 7.0), Clip(path, 1.0, 3.0)]
    first, bad, last = sample_windows(clips, 4, size=32)
    assert isinstance(bad, VideoDecodingError) and "starts at 5.0 s" in str(bad)
    assert torch.equal(first.frames, sample(clips[0], 4).frames) and torch.equal(
        last.frames, sample(clips[2], 4).frames
    )


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


# --- errors ----------------------------------------------------------------------------------------------------------


def _write(path, content):
    path.write_bytes(content)
    return path


BROKEN = {
    "missing": (lambda folder: folder / "missing.mp4", "no such file"),
    "url": (lambda folder: "https://127.0.0.1:9/a.mp4", "cannot be read"),
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


def test_the_duration_of_a_program_stream_is_read_from_its_packets(folder):
    path = write_video(folder / "program.mpg", **{"num_frames": 60, **KINDS["mpg"]})
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
    ],
)
def test_arguments_that_make_no_sense_are_value_errors(video, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        sample_frames(video, **arguments)
    assert not isinstance(error.value, VideoDecodingError)


@pytest.mark.parametrize("window", [{"start": 1, "end": 1}, {"end": 0}])
def test_an_empty_window_is_an_error_of_that_clip(video, window):
    with pytest.raises(VideoDecodingError, match=f"{video}: the window is empty"):
        sample_frames(video, **window)


def test_the_repr_of_a_clip_does_not_print_the_video(video):
    content = video.read_bytes()
    assert repr(Clip(content, 1.0)) == f"Clip(<{len(content)} bytes>, start=1.0, end=None)"


def test_without_pyav_a_call_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    for call in (sample_frames, probe_video):
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
