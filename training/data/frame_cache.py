# SPDX-License-Identifier: Apache-2.0
"""A cache of sampled frames on disk, for runs of many epochs: every clip is decoded once.

One file per clip, `DIR/ab/abcdef....npy`, uint8 (T',3,H,W). Its name is a hash of the video's path, size and
modification time, the window, everything that determines the frames, and the decoder's version, so a change never
reads the wrong frames. A file is written under a temporary name and renamed, so several processes may fill a cache
together.

With jitter, `JITTER_CHOICES` times as many frames are stored, and every access draws one per segment.
"""

import hashlib
import io
import json
import math
import os
import uuid
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from modeling_camoe.frames import Clip, SampledFrames
from modeling_camoe.video_source import is_address


# Raised when our decoder takes or scales frames differently: stored frames are then not read any more.
FRAMES_VERSION = 1
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


class StoredFrames:
    """Frames in a file of the cache, read where they are wanted: `read_into` copies them once.

    Args:
        path: of the file. shape: (T',3,H,W) of what is wanted. offset: of the first frame in the file.
        positions: frames to take, or None for all of them.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], offset: int, positions: list[int] | None):
        self.path, self.shape, self.offset, self.positions = path, shape, offset, positions

    def read_into(self, target: np.ndarray) -> int:
        """Fill the first T' entries of a contiguous uint8 array (T,3,H,W); returns T'."""
        size = math.prod(self.shape[1:])
        wanted = memoryview(target).cast("B")
        file = os.open(self.path, os.O_RDONLY)
        try:
            if self.positions is None:
                self._read(file, wanted[: self.shape[0] * size], self.offset)
            else:
                for row, position in enumerate(self.positions):
                    self._read(file, wanted[row * size : (row + 1) * size], self.offset + position * size)
        finally:
            os.close(file)
        return self.shape[0]

    def _read(self, file: int, view: memoryview, offset: int):
        while view:
            count = os.preadv(file, [view], offset)
            if not count:
                raise OSError(f"{self.path} ends too early: delete it")
            view, offset = view[count:], offset + count

    def read(self) -> SampledFrames:
        """The frames as the decoder gives them."""
        frames = np.empty(self.shape, dtype=np.uint8)
        self.read_into(frames)
        return SampledFrames(frames=torch.from_numpy(frames), times=(), duration=0.0)


class FrameCache:
    """Decodes clips through a folder of stored frames, in place of a video processor.

    Args:
        folder: created if it does not exist. video_processor: decodes what is not stored yet.
        jpeg: quality of JPEG, 1 to 100, or None for the frames as they are. JPEG takes a fifth of the space at
            95, some time, and changes the frames a little.
    """

    def __init__(self, folder: str | os.PathLike, video_processor, jpeg: int | None = None):
        self.arrays = ArrayFolder(folder)
        self.video_processor = video_processor
        self.jpeg = jpeg
        self.settings: dict[str, str] = {}  # sampling -> what determines the frames

    def __call__(self, *args, **kwargs):
        """Frames -> inputs of a model, by the video processor."""
        return self.video_processor(*args, **kwargs)

    def decode(self, clip: Clip, sampling: str | None = None, seed: int | None = None) -> SampledFrames:
        """Like `video_processor.decode`; the frames of a stored clip come from the disk."""
        frames = self.open(clip, sampling, seed)
        return frames if isinstance(frames, SampledFrames) else frames.read()

    def open(self, clip: Clip, sampling: str | None = None, seed: int | None = None) -> StoredFrames | SampledFrames:
        """As `decode`, but raw stored frames are not read yet."""
        sampling = sampling or self.video_processor.sampling
        if sampling not in self.settings:  # once: it takes a fifth of the time of reading a clip
            self.settings[sampling] = json.dumps([frame_settings(self.video_processor, sampling), self.jpeg])
        path = self.arrays.path(clip_identity(clip), self.settings[sampling])
        header = read_header(path)
        if header is None:
            frames = decode_all(self.video_processor, clip, sampling).numpy()
            try:
                self.arrays.store(path, frames if self.jpeg is None else to_jpeg(frames, self.jpeg))
            except OSError as error:
                raise OSError(f"cannot write the frame cache {self.arrays.folder}: {error}") from error
            header = read_header(path)
        if self.jpeg is not None:
            frames = from_jpeg(np.load(path))
            positions = self._positions(sampling, len(frames), seed)
            frames = frames if positions is None else frames[positions]
            return SampledFrames(frames=frames, times=(), duration=0.0)
        shape, offset = header
        positions = self._positions(sampling, shape[0], seed)
        if positions is not None:
            shape = (len(positions), *shape[1:])
        return StoredFrames(path, shape, offset, positions)

    def _positions(self, sampling: str, available: int, seed: int | None) -> list[int] | None:
        """The frames to take of those stored; None for all."""
        if sampling != "jitter":
            return None
        wanted = self.video_processor.num_frames
        if getattr(self.video_processor, "fps", None):  # then a short clip has fewer than that
            wanted = min(wanted, max(1, round(available / JITTER_CHOICES)))
        return jitter_positions(available, wanted, seed)


_HEADERS: dict[bytes, tuple[tuple[int, ...], int]] = {}  # parsing one takes as long as reading ten frames


def read_header(path: Path) -> tuple[tuple[int, ...], int] | None:
    """Shape and offset of the data of a .npy file of bytes; None if it is missing, or was truncated in a crash."""
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        start, size = os.read(file, 128), os.fstat(file).st_size  # 128: what numpy writes for any shape of ours
        if start not in _HEADERS:
            header = io.BytesIO(start)
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            if dtype != np.uint8:
                return None
            _HEADERS[start] = shape, header.tell()
        shape, offset = _HEADERS[start]
        return (shape, offset) if size == offset + math.prod(shape) else None
    except (ValueError, EOFError):
        return None
    finally:
        os.close(file)


def to_jpeg(frames: np.ndarray, quality: int) -> np.ndarray:
    """(T',3,H,W) uint8 -> bytes: the number of frames, the length of each, the images."""
    images = [encode_jpeg(torch.from_numpy(frame), quality=quality).numpy() for frame in frames]
    lengths = np.array([len(images), *map(len, images)], dtype="<u4")
    return np.concatenate([lengths.view(np.uint8), *images])


def from_jpeg(stored: np.ndarray) -> torch.Tensor:
    """What `to_jpeg` made -> (T',3,H,W) uint8."""
    count = int(stored[:4].view("<u4")[0])
    lengths = stored[4 : 4 + 4 * count].view("<u4").astype(np.int64)
    ends = 4 + 4 * count + np.cumsum(lengths)
    images = [stored[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return torch.stack([decode_jpeg(torch.from_numpy(image.copy()), mode=ImageReadMode.RGB) for image in images])


def decode_all(video_processor, clip: Clip, sampling: str) -> torch.Tensor:
    """All frames of a clip that a run may draw: (T',3,H,W) uint8."""
    num_frames, fps = video_processor.num_frames, getattr(video_processor, "fps", None)
    if sampling != "jitter":
        return video_processor.decode(clip, sampling=sampling, num_frames=num_frames).frames
    rate = {"fps": JITTER_CHOICES * fps} if fps else {}
    return video_processor.decode(clip, sampling="uniform", num_frames=JITTER_CHOICES * num_frames, **rate).frames


def clip_identity(clip: Clip) -> list:
    """What identifies a clip: path, size and time of its file, or a hash of its bytes; and its window."""
    if isinstance(clip.source, bytes):
        file = [hashlib.sha256(clip.source).hexdigest()]
    else:
        file = [clip.source if is_address(clip.source) else os.path.abspath(clip.source)]
        try:
            status = os.stat(clip.source)
            file += [status.st_size, status.st_mtime_ns]
        except OSError:
            file += ["missing"]  # decoding will report it
    return [file, clip.start, clip.end]


def frame_settings(video_processor, sampling: str) -> list:
    """The settings that determine the stored frames, the decoder among them."""
    stored = JITTER_CHOICES if sampling == "jitter" else 1
    settings = {name: getattr(video_processor, name, None) for name in ("fps", "do_resize", "do_center_crop")}
    if getattr(video_processor, "on_damage", "error") != "error":
        settings["on_damage"] = video_processor.on_damage  # a run that wants an error must not find such frames
    resample = getattr(video_processor, "resample", None)
    return [
        sampling,
        stored * video_processor.num_frames,
        {name: dict(getattr(video_processor, name)) for name in ("size", "crop_size")},
        settings | {"resample": None if resample is None else int(resample)},
        {"av": av.__version__, "frames": FRAMES_VERSION},
    ]


def jitter_positions(available: int, num_frames: int, seed: int | None) -> list[int]:
    """A random position in each of `num_frames` equal segments of `available` frames, increasing."""
    if available <= num_frames:
        return list(range(available))
    bounds = np.linspace(0, available, num_frames + 1)
    positions = bounds[:-1] + np.random.default_rng(seed).random(num_frames) * np.diff(bounds)
    return sorted(set(positions.astype(int).tolist()))
