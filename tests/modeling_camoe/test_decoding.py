# SPDX-License-Identifier: Apache-2.0
"""Lazy decoding finds the exact frames in files of all kinds, whole and damaged, at little cost."""

import av
import numpy as np
import pytest
import torch

from modeling_camoe import decoding, timeline, video_file
from modeling_camoe import frames as frames_module
from modeling_camoe.frames import VideoDecodingError
from tests.video_files import H264, KINDS, indices_of, natural_picture, sample, stored_times, write_video


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_shown_at_the_targets(folder, name, monkeypatch):
    path = write_video(folder / (name if "." in name else f"plain.{name}"), **{"num_frames": 60, **KINDS[name]})
    lazy, targets = [], []
    times_of = frames_module._times
    monkeypatch.setattr(frames_module, "_times", lambda *args: targets.append(times_of(*args)) or targets[-1])
    plain = frames_module.decode_everything
    monkeypatch.setattr(frames_module, "decode_everything", lambda *args: lazy.append(False) or plain(*args))

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


def test_a_lazy_decode_that_fails_is_done_again_by_decoding_everything(long_video, monkeypatch):
    expected = sample(long_video, 12)

    def doubt(self, target):
        raise decoding._Doubt

    monkeypatch.setattr(decoding.PacketReader, "find_shown_at", doubt)
    sampled = sample(long_video, 12)
    assert torch.equal(sampled.frames, expected.frames)
    assert sampled.times == expected.times


def test_a_stream_without_time_stamps_is_counted(folder):
    raw = write_video(folder / "raw.h264", num_frames=50, fps=25, format="h264")
    sampled = sample(raw, 5)
    assert indices_of(sampled.frames) == [5, 15, 25, 35, 45]
    assert sampled.times == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8])


# --- cost ------------------------------------------------------------------------------------------------------------


def count_decoded(monkeypatch):
    """Counts the packets that a lazy decode gives to the decoder, and those of them it may leave out."""
    counts = {"decoded": 0, "skippable": 0}
    decode = decoding.PictureDecoder.decode

    def counting(self, packet, is_needed):
        decode(self, packet, is_needed)
        if packet is not None:
            counts["decoded"] += 1
            counts["skippable"] += self.video.decoder.skip_frame == "NONREF"

    monkeypatch.setattr(decoding.PictureDecoder, "decode", counting)
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


@pytest.mark.parametrize("sampling", ["uniform", "keyframe"])
def test_a_piped_matroska_file_is_read_through_once_for_all_its_windows(folder, sampling, monkeypatch):
    """It states no duration and has no index. A video this short would be kept in memory while it is read."""
    pictures = [natural_picture(48, 64, seed=i) for i in range(240)]
    path = write_video(
        folder / f"piped_{sampling}.mkv", 240, gop=24, pictures=pictures, container_options={"live": "1"}, audio=20.0
    )
    monkeypatch.setattr(timeline, "MAX_KEPT", 0)
    read = []
    packets_of = av.container.InputContainer.demux

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, *streams):
            for packet in packets_of(self.container, *streams):
                read.append(packet.pos)
                yield packet

    open_container = video_file.VideoFile._open_container
    monkeypatch.setattr(video_file.VideoFile, "_open_container", lambda *args: Counting(open_container(*args)))

    def windows():
        return [sample(path, 2, sampling, start=start, end=start + 2) for start in (0, 14, 4, 18)]

    first = windows()
    assert len(read) > 240
    read.clear()
    again = windows()
    assert 0 < len(read) < 4 * 48
    for before, after in zip(first, again, strict=True):
        assert before.times == after.times
        assert torch.equal(before.frames, after.frames)
    assert [round(12 * time) for window in again for time in window.times] == (
        [6, 18, 174, 186, 54, 66, 222, 234] if sampling == "uniform" else [0, 168, 48, 216]
    )

    write_video(path, 120, gop=24, container_options={"live": "1"})  # another file of that name
    assert sample(path, 1).duration == pytest.approx(10.0, abs=0.01)


def test_pictures_that_no_other_refers_to_are_left_out(folder, monkeypatch):
    path = write_video(folder / "one_group.mp4", num_frames=120, gop=300)
    counts = count_decoded(monkeypatch)
    sample(path, 3)
    assert counts["decoded"] > 90
    assert counts["skippable"] > 0.9 * counts["decoded"]


# --- damage ----------------------------------------------------------------------------------------------------------


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


def test_a_lost_slice_that_ffmpeg_does_not_report_is_damage(folder):
    """It leaves the picture as the memory was, but frames come out of order."""
    path = write_video(folder / "lost_slice.mkv", 48, gop=12)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    lost = next(i for i, p in enumerate(packets) if p.is_keyframe and i > 0) + 1  # a P-frame: B-frames follow
    content = bytearray(path.read_bytes())
    place = content.index(bytes(packets[lost])) + 5  # past length and NAL header
    content[place : place + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(VideoDecodingError, match=r"damaged at 1\.0\d* s, up to 2\.0\d* s"):
        sample(path, 8)
    assert indices_of(sample(path, 4, start=2.1).frames) == [28, 33, 39, 45]


def test_frames_cut_away_by_an_edit_list_are_not_shown(folder, monkeypatch):
    """As an editor cuts without encoding again: the file still holds the frames from the key frame to the cut."""
    path = write_video(folder / "edited.mp4", 48, gop=12)
    content = bytearray(path.read_bytes())
    edit = content.index(b"elst") + 12  # past version, flags and number of edits (1): duration, beginning
    duration, beginning = (int.from_bytes(content[edit + i : edit + i + 4], "big") for i in (0, 4))
    content[edit : edit + 4] = (duration - 1500).to_bytes(4, "big")  # milliseconds
    content[edit + 4 : edit + 8] = (beginning + 18 * 1024).to_bytes(4, "big")  # 18 frames of 1024 ticks
    path.write_bytes(content)
    monkeypatch.setattr(frames_module, "decode_everything", None)
    sampled = sample(path, 120)
    assert indices_of(sampled.frames) == list(range(18, 48))
    assert sampled.times[0] == 0.0
    assert sampled.duration == pytest.approx(2.5)
