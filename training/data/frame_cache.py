# SPDX-License-Identifier: Apache-2.0
"""A cache of sampled frames on disk, for runs of many epochs: every clip is decoded once.

One file per clip, `DIR/ab/abcdef....npy`, uint8 (T',3,H,W), read through a memory map. Its name is a hash of the
video's path, size and modification time, the window and the sampling settings, so changed settings never read the
wrong frames. A file is written under a temporary name and renamed, so several processes may fill a cache together.

With jitter, `JITTER_CHOICES` times as many frames are stored, and every access draws one per segment.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np
import torch

from modeling_camoe.frames import Clip, SampledFrames


JITTER_CHOICES = 2  # frames stored per segment: twice the disk space, so that epochs still see different frames


class ArrayFolder:
    """Arrays in files that are named after a hash of their origin; safe with several processes.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, *origin) -> Path:
        """The file for the array made from `origin` (JSON values)."""
        name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.npy"

    def load(self, path: Path) -> np.ndarray | None:
        """The array, memory-mapped; None if the file is missing, or was truncated when the machine crashed."""
        try:
            return np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return None

    def store(self, path: Path, array: np.ndarray):
        """Write under a temporary name, then rename: a reader sees the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(partial, "wb") as file:
                np.save(file, array)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


class FrameCache:
    """Decodes clips through a folder of stored frames, in place of a video processor.

    Args:
        folder: created if it does not exist. video_processor: decodes what is not stored yet.
    """

    def __init__(self, folder: str | os.PathLike, video_processor):
        self.arrays = ArrayFolder(folder)
        self.video_processor = video_processor

    def __call__(self, *args, **kwargs):
        """Frames -> inputs of a model, by the video processor."""
        return self.video_processor(*args, **kwargs)

    def decode(self, clip: Clip, sampling: str | None = None, seed: int | None = None) -> SampledFrames:
        """Like `video_processor.decode`; the frames of a stored clip come from the disk."""
        sampling = sampling or self.video_processor.sampling
        path = self.arrays.path(clip_identity(clip), frame_settings(self.video_processor, sampling))
        frames = self.arrays.load(path)
        if frames is None:
            frames = decode_all(self.video_processor, clip, sampling).numpy()
            try:
                self.arrays.store(path, frames)
            except OSError as error:
                raise OSError(f"cannot write the frame cache {self.arrays.folder}: {error}") from error
        if sampling == "jitter":
            frames = frames[jitter_positions(len(frames), self.video_processor.num_frames, seed)]
        return SampledFrames(frames=torch.from_numpy(np.array(frames)), times=(), duration=0.0)


def decode_all(video_processor, clip: Clip, sampling: str) -> torch.Tensor:
    """All frames of a clip that a run may draw: (T',3,H,W) uint8."""
    if sampling != "jitter":
        return video_processor.decode(clip, sampling=sampling, num_frames=video_processor.num_frames).frames
    return video_processor.decode(
        clip, sampling="uniform", num_frames=JITTER_CHOICES * video_processor.num_frames
    ).frames


def clip_identity(clip: Clip) -> list:
    """What identifies a clip: path, size and time of its file, or a hash of its bytes; and its window."""
    if isinstance(clip.source, bytes):
        file = [hashlib.sha256(clip.source).hexdigest()]
    else:
        file = [os.path.abspath(clip.source)]
        try:
            status = os.stat(clip.source)
            file += [status.st_size, status.st_mtime_ns]
        except OSError:
            file += ["missing"]  # decoding will report it
    return [file, clip.start, clip.end]


def frame_settings(video_processor, sampling: str) -> list:
    """The settings that determine the stored frames."""
    stored = JITTER_CHOICES if sampling == "jitter" else 1
    sizes = [dict(video_processor.size), dict(video_processor.crop_size)]
    return [sampling, stored * video_processor.num_frames, sizes]


def jitter_positions(available: int, num_frames: int, seed: int | None) -> list[int]:
    """A random position in each of `num_frames` equal segments of `available` frames, increasing."""
    if available <= num_frames:
        return list(range(available))
    bounds = np.linspace(0, available, num_frames + 1)
    positions = bounds[:-1] + np.random.default_rng(seed).random(num_frames) * np.diff(bounds)
    return sorted(set(positions.astype(int).tolist()))
