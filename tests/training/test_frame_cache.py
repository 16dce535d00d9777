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

    def decode(self, clip, sampling, num_frames, fps=None):
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


def test_other_settings_windows_contents_or_decoders_are_other_entries(tmp_path, clip, monkeypatch):
    decoder = CountingDecoder()
    folder = tmp_path / "cache"
    FrameCache(folder, decoder).decode(clip)
    for change in (
        lambda: FrameCache(folder, decoder).decode(Clip(clip.source, 0.0, 1.0)),
        lambda: FrameCache(folder, decoder).decode(clip, "keyframe"),
        lambda: setattr(decoder, "num_frames", 5) or FrameCache(folder, decoder).decode(clip),
        lambda: clip.source.write_bytes(b"another clip") and FrameCache(folder, decoder).decode(clip),
        lambda: setattr(decoder, "fps", 1.0) or FrameCache(folder, decoder).decode(clip),
        lambda: setattr(decoder, "do_center_crop", False) or FrameCache(folder, decoder).decode(clip),
        lambda: setattr(decoder, "resample", 2) or FrameCache(folder, decoder).decode(clip),
        lambda: monkeypatch.setattr("data.frame_cache.FRAMES_VERSION", -1) or FrameCache(folder, decoder).decode(clip),
        lambda: monkeypatch.setattr("av.__version__", "0") or FrameCache(folder, decoder).decode(clip),
        lambda: FrameCache(folder, decoder, jpeg=90).decode(clip),
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


def test_stored_frames_are_read_into_a_batch_as_decoded_ones_are(tmp_path, clip):
    cache = FrameCache(tmp_path / "cache", CountingDecoder())
    for sampling in ("uniform", "jitter"):
        stored = cache.open(clip, sampling, seed=5)
        batch = np.full((6, 3, 8, 8), 99, dtype=np.uint8)
        assert stored.read_into(batch) == 4
        assert np.array_equal(batch[:4], cache.decode(clip, sampling, seed=5).frames.numpy())
        assert (batch[4:] == 99).all()


def test_with_a_rate_a_short_clip_has_as_many_jittered_frames_as_the_rate_gives(tmp_path, clip):
    decoder = CountingDecoder(num_frames=4)
    decoder.fps = 1.0
    decoder.decode = lambda clip, sampling, num_frames, fps: CountingDecoder().decode(clip, sampling, round(3 * fps))
    frames = FrameCache(tmp_path / "cache", decoder).decode(clip, "jitter", seed=0).frames[:, 0, 0, 0].tolist()
    assert len(frames) == 3 and all(frame in (2 * k, 2 * k + 1) for k, frame in enumerate(frames))


def test_jpeg_keeps_frames_nearly_and_takes_a_fraction_of_the_space(tmp_path, clip):
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(4, 3, 64, 64)
    decoder = CountingDecoder(size=64)
    decoder.decode = lambda clip, sampling, num_frames: SampledFrames(ramp.clone(), (0,) * 4, 1.0)
    cache = FrameCache(tmp_path / "cache", decoder, jpeg=95)
    for _ in range(2):
        frames = cache.decode(clip).frames
        assert frames.shape == ramp.shape and (frames.int() - ramp.int()).abs().max() <= 3
    (file,) = (tmp_path / "cache").rglob("*.npy")
    assert file.stat().st_size < ramp.numel() / 5
