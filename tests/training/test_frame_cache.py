# SPDX-License-Identifier: Apache-2.0
"""The frame cache: stored frames equal decoded ones, settings never mix, processes do not interfere."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.frame_cache import FrameCache
from modeling_camoe.frames import Clip, SampledFrames, VideoDecodingError


class CountingDecoder:
    """Stands in for the video processor: frame t of a clip is filled with t, and decoding is counted."""

    def __init__(self, num_frames=4, size=8):
        self.num_frames = num_frames
        self.sampling = "uniform"
        self.size = {"shortest_edge": size}
        self.crop_size = {"height": size, "width": size}
        self.decoded = 0

    def decode(self, clip, sampling, num_frames):
        self.decoded += 1
        if not clip.source.exists():
            raise VideoDecodingError(f"{clip.source}: no such file")
        values = torch.arange(num_frames, dtype=torch.uint8).view(-1, 1, 1, 1)
        size = self.crop_size["height"]
        return SampledFrames(values.expand(-1, 3, size, size), tuple(range(num_frames)), 1.0)


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"a clip")
    return Clip(path)


def test_a_clip_is_decoded_once_and_stored_frames_equal_decoded_ones(tmp_path, clip):
    decoder = CountingDecoder()
    cache = FrameCache(tmp_path / "cache", decoder)
    first, second = cache.decode(clip), cache.decode(clip)
    assert decoder.decoded == 1
    assert torch.equal(first.frames, second.frames) and first.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert FrameCache(tmp_path / "cache", decoder).decode(clip).frames.shape == (4, 3, 8, 8)
    assert decoder.decoded == 1  # another object, another run


def test_other_settings_windows_or_contents_are_other_entries(tmp_path, clip):
    decoder = CountingDecoder()
    folder = tmp_path / "cache"
    FrameCache(folder, decoder).decode(clip)
    for change in (
        lambda: FrameCache(folder, decoder).decode(Clip(clip.source, 0.0, 1.0)),
        lambda: FrameCache(folder, decoder).decode(clip, "keyframe"),
        lambda: setattr(decoder, "num_frames", 5) or FrameCache(folder, decoder).decode(clip),
        lambda: clip.source.write_bytes(b"another clip") and FrameCache(folder, decoder).decode(clip),
    ):
        before = decoder.decoded
        change()
        assert decoder.decoded == before + 1


def test_jitter_draws_one_frame_of_each_segment_every_time(tmp_path, clip):
    cache = FrameCache(tmp_path / "cache", CountingDecoder(num_frames=4))
    drawn = [cache.decode(clip, "jitter", seed).frames[:, 0, 0, 0].tolist() for seed in range(20)]
    assert all(frame in (2 * k, 2 * k + 1) for frames in drawn for k, frame in enumerate(frames))
    assert len({tuple(frames) for frames in drawn}) > 5
    assert cache.decode(clip, "jitter", 3).frames[:, 0, 0, 0].tolist() == drawn[3]


def test_a_truncated_file_is_decoded_again(tmp_path, clip):
    decoder = CountingDecoder()
    cache = FrameCache(tmp_path / "cache", decoder)
    cache.decode(clip)
    (stored,) = (tmp_path / "cache").rglob("*.npy")
    stored.write_bytes(stored.read_bytes()[:100])
    assert cache.decode(clip).frames.shape == (4, 3, 8, 8) and decoder.decoded == 2
    assert np.load(stored).shape == (4, 3, 8, 8)


def test_a_bad_clip_is_an_error_and_leaves_nothing(tmp_path):
    cache = FrameCache(tmp_path / "cache", CountingDecoder())
    with pytest.raises(VideoDecodingError, match="no such file"):
        cache.decode(Clip(tmp_path / "gone.mp4"))
    assert not list((tmp_path / "cache").rglob("*"))


def fill(folder, clips, barrier):
    cache = FrameCache(folder, CountingDecoder())
    barrier.wait()
    for clip in clips:
        cache.decode(clip)


def test_two_processes_that_build_the_same_cache_leave_one_correct_cache(tmp_path):
    clips = []
    for n in range(20):
        path = tmp_path / f"{n}.mp4"
        path.write_bytes(bytes([n]))
        clips.append(Clip(path))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=fill, args=(tmp_path / "cache", clips, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 20 and all(path.suffix == ".npy" and not path.name.startswith(".") for path in files)
    decoder = CountingDecoder()
    cache = FrameCache(tmp_path / "cache", decoder)
    assert all(cache.decode(clip).frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3] for clip in clips)
    assert decoder.decoded == 0


def test_a_disk_that_is_full_is_an_error_and_leaves_no_partial_file(tmp_path, clip, monkeypatch):
    cache = FrameCache(tmp_path / "cache", CountingDecoder())

    def no_space(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.frame_cache.np", SimpleNamespace(load=np.load, save=no_space))
    with pytest.raises(OSError, match="No space left"):
        cache.decode(clip)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
