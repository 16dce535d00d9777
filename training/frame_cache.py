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
"""Sampled frames on disk, decoded once: for runs of many epochs.

One file a clip, `DIR/ab/abcdef....npy`, uint8 (T',3,H,W), read through a memory map. The name is a hash of the file's
path, size and modification time, of the window and of the sampling settings: another setting never reads the wrong
frames. A file is written under a name of its own process and renamed, so several processes may fill one cache at once.

With jitter, `JITTER_CHOICES` times as many frames are stored, and one of each segment's is drawn on every access.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np
import torch

from modeling_camoe.frames import Clip, SampledFrames


JITTER_CHOICES = 2  # frames stored for each one that is drawn: twice the disk, and each epoch still sees other frames


class FrameCache:
    """Decodes clips through a folder of stored frames.

    Args:
        folder: made if it is not there. video_processor: decodes what is not stored yet.
    """

    def __init__(self, folder: str | os.PathLike, video_processor):
        self.folder = Path(folder)
        self.video_processor = video_processor

    def decode(self, clip: Clip, sampling: str = "uniform", seed: int | None = None) -> SampledFrames:
        """As `video_processor.decode`; frames of a clip that was seen before come from the disk."""
        num_frames = self.video_processor.num_frames
        stored_frames = num_frames * JITTER_CHOICES if sampling == "jitter" else num_frames
        path = self._path(clip, sampling, stored_frames)
        try:
            frames = np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):  # not there, or cut off by a full disk
            decoding = "uniform" if sampling == "jitter" else sampling
            frames = self.video_processor.decode(clip, sampling=decoding, num_frames=stored_frames).frames.numpy()
            self._store(path, frames)
        if sampling == "jitter":
            frames = frames[_draw(len(frames), num_frames, seed)]
        return SampledFrames(frames=torch.from_numpy(np.array(frames)), times=(), duration=0.0)

    def _path(self, clip: Clip, sampling: str, num_frames: int) -> Path:
        if isinstance(clip.source, bytes):
            identity = hashlib.sha256(clip.source).hexdigest()
        else:
            try:
                status = os.stat(clip.source)
                identity = [os.path.abspath(clip.source), status.st_size, status.st_mtime_ns]
            except OSError:
                identity = [os.path.abspath(clip.source), "missing"]  # decoding will say so
        processor = self.video_processor
        settings = [sampling, num_frames, dict(processor.size), dict(processor.crop_size), clip.start, clip.end]
        name = hashlib.sha256(json.dumps([identity, settings]).encode()).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.npy"

    def _store(self, path: Path, frames: np.ndarray):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(partial, "wb") as file:
                np.save(file, frames)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _draw(available: int, num_frames: int, seed: int | None) -> list[int]:
    """One position of each of `num_frames` equal segments of `available` frames, increasing."""
    if available <= num_frames:
        return list(range(available))
    bounds = np.linspace(0, available, num_frames + 1)
    positions = bounds[:-1] + np.random.default_rng(seed).random(num_frames) * np.diff(bounds)
    return sorted(set(positions.astype(int).tolist()))
