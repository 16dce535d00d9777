# SPDX-License-Identifier: Apache-2.0
"""
What counts as a video: paths, bytes, open files, addresses, pictures, decoders, rows of data sets, arrays, lists.

Here any of these becomes one of four things: what `frames` decodes (a path, bytes or a [`Clip`]), an open decoder, a
[`SampledFrames`], or an array of frames. Processor, pipeline and sentence-transformers module all ask here, so they
take the same.

Types of this project and of optional packages are recognised by their attributes: where code came with a checkpoint, a
class exists twice, and an object of one copy is not an instance of the other.
"""

import base64
import importlib.util
import io
import os
from collections.abc import Iterable, Mapping

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import get_session
from transformers.image_utils import is_pil_image, load_image

from .frames import VIDEO_EXTENSIONS, Clip, SampledFrames, VideoDecodingError, VideoInfo, describe_source


# A file with such a name is a clip of one frame. (A GIF is a video.)
IMAGE_EXTENSIONS = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
IMAGE_MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")

# Seconds that a server may be silent. The library's own downloads wait for ever.
DOWNLOAD_TIMEOUT = 60
# A downloaded video is held in memory. A larger one has to be saved as a file first, which is read bit by bit.
MAX_DOWNLOAD_BYTES = 1 << 30
# Above this many bytes, the ranges that a few frames need are less than the whole. Below, one request is faster.
MIN_RANGED_BYTES = 8 << 20

# Floats above 1 are taken for 0..255 only if one of them is above this. Between lie white after CLIP's normalisation
# (2.1) and pictures from 0 to 1 that bicubic resizing has overshot: taken for 0..255, they would be black.
LOWEST_BRIGHT = 3


# --- one video, or several -------------------------------------------------------------------------------------------


def is_one_video(videos) -> bool:
    """Whether it is one video, and not a batch of them. A list of pictures is one: its frames."""
    if isinstance(videos, str | os.PathLike | bytes | bytearray | memoryview | Mapping) or is_pil_image(videos):
        return True
    if _is_clip(videos) or is_sampled(videos) or is_decoder(videos) or hasattr(videos, "read"):
        return True
    if isinstance(videos, list | tuple):
        return len(videos) > 0 and all(_is_frame(item) for item in videos)
    return isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim in (2, 3, 4)


def as_videos(videos) -> list:
    """
    One video, or videos in any nesting -> list of videos.

    Raises:
        ValueError: something in it is no video.
    """
    if is_one_video(videos):
        return [videos]
    is_array = isinstance(videos, np.ndarray | torch.Tensor)
    if is_array and videos.ndim == 5:
        return list(videos)
    holds_names = isinstance(videos, np.ndarray) and videos.dtype.kind in "OU"
    if isinstance(videos, Iterable) and (holds_names or not is_array):
        return [video for item in videos for video in as_videos(item)]
    kind = type(videos).__name__ + (f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else "")
    raise ValueError(
        f"{kind} is not a video: give a path, bytes, an address, a Clip, frames of shape (T, 3, H, W) or "
        "(T, H, W, 3), or a list of images"
    )


def is_web_address(name) -> bool:
    """Whether a string is an http(s) address and nothing else."""
    return isinstance(name, str) and name.startswith(("http://", "https://")) and not any(map(str.isspace, name))


def is_file(content) -> bool:
    """Whether `frames` decodes it."""
    return isinstance(content, str | bytes) or _is_clip(content)


def is_decoder(content) -> bool:
    """torchcodec's `VideoDecoder`, which `datasets` opens for every row."""
    return hasattr(content, "get_frames_played_at")


def is_sampled(content) -> bool:
    """Whether it is a [`SampledFrames`]."""
    return hasattr(content, "frames") and hasattr(content, "times")


def _is_clip(video) -> bool:
    return hasattr(video, "source") and hasattr(video, "end")  # a column of `datasets` has a `source`, too


def _is_frame(item) -> bool:
    if isinstance(item, str | os.PathLike):
        return _suffix(item) in IMAGE_EXTENSIONS
    return is_pil_image(item) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim in (2, 3))


def _suffix(name) -> str:
    return os.path.splitext(os.fspath(name).partition("?")[0])[1].lower()


def describe_video(video) -> str:
    """A short name for messages: the path or address where there is one."""
    if isinstance(video, Mapping):
        return describe_video(video.get("path") or video.get("bytes") or video.get("array"))
    if getattr(video, "_hf_encoded", None):
        return describe_video(video._hf_encoded)
    if _is_clip(video):
        return describe_video(video.source)
    if isinstance(video, str | os.PathLike | bytes):
        return describe_source(video)[:500]  # data: is long
    if hasattr(video, "read"):
        return str(getattr(video, "name", "an open file"))
    shape = getattr(video, "shape", None)
    return type(video).__name__ if shape is None else f"frames of shape {tuple(shape)}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_video(video, index: int = 0):
    """
    One video in any form -> what it holds, and the metadata that came with it, if any.

    Args:
        index: of the video in its batch, for messages.

    Returns:
        a path, bytes, a [`Clip`], a decoder, a [`SampledFrames`], or a tensor or array of frames (T, 3, H, W) or
        (T, H, W, 3); and a mapping or None.

    Raises:
        VideoDecodingError: it cannot be downloaded, or is a picture that cannot be read; names it.
        ValueError: it is not a video.
    """
    if isinstance(video, Mapping) and "array" in video:
        return read_video(video["array"], index)[0], video.get("video_metadata")
    return _read(video, index), None


def _read(video, index):
    if isinstance(video, Mapping):
        source = video.get("path") if video.get("bytes") is None else video["bytes"]
        if source is None:
            raise ValueError(f"a video given as a dict needs 'path' or 'bytes', got {sorted(video)}")
        return _read(source, index)
    encoded = getattr(video, "_hf_encoded", None)  # what `datasets` opened this decoder from
    if encoded and (encoded["bytes"] is not None or os.path.isfile(encoded["path"] or "")):
        return _read(encoded, index)
    if is_sampled(video) or is_decoder(video):
        return video
    if _is_clip(video):
        content = _read(video.source, index)
        return Clip(content, video.start, video.end) if is_file(content) else content
    if isinstance(video, str | os.PathLike):
        return _read_name(os.fspath(video))
    if hasattr(video, "read"):
        video = video.read()
        if isinstance(video, str):
            raise ValueError(f'video {index} is a file that was opened as text: open it with mode "rb"')
    if isinstance(video, bytes | bytearray | memoryview):
        return _read_bytes(bytes(video), f"<{len(video)} bytes>")
    return _read_frames(video, index)


def _read_name(name: str):
    """A path, an address, or a data: address with base64."""
    if is_web_address(name):
        content = _download(name)
        return name if content is None else _read_bytes(content, describe_video(name))
    if name.startswith("data:"):
        return _read_bytes(_decode_data_address(name), name[:40])
    return _picture(name, name) if _suffix(name) in IMAGE_EXTENSIONS else name


def _decode_data_address(name: str) -> bytes:
    header, _, content = name.partition(",")
    try:
        if not header.endswith(";base64") or not content:
            raise ValueError
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise VideoDecodingError(f"{name[:40]}: not a data: address of base64 (data:video/mp4;base64,...)") from error


def _read_bytes(content: bytes, name: str):
    is_picture = content.startswith(IMAGE_MARKS) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")
    return _picture(io.BytesIO(content), name) if is_picture else content


def _download(address: str) -> bytes | None:
    """What is at an address; None for a large video whose server gives ranges of it: the decoder reads those."""
    name, content = describe_video(address), bytearray()
    try:
        with get_session().stream("GET", address, timeout=DOWNLOAD_TIMEOUT) as response:
            response.raise_for_status()
            if _is_better_in_ranges(response.headers) and _suffix(address) in VIDEO_EXTENSIONS:
                return None
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_DOWNLOAD_BYTES:
                    break
    except Exception as error:  # of the client that the Hub's library uses; offline mode; bad addresses
        status = getattr(getattr(error, "response", None), "status_code", "")
        cause = f"{type(error).__name__} {status}".strip()
        # Neither its message nor its traceback: both have the whole address, where a query may hold a secret.
        raise VideoDecodingError(f"{name}: cannot be downloaded ({cause})") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise VideoDecodingError(
            f"{name}: more than {MAX_DOWNLOAD_BYTES >> 20} MiB, the limit for an address; save it as a file first"
        )
    return bytes(content)


def _is_better_in_ranges(headers) -> bool:
    size = headers.get("content-length", "")
    is_large = size.isdecimal() and int(size) > MIN_RANGED_BYTES
    return is_large and headers.get("accept-ranges") == "bytes" and importlib.util.find_spec("aiohttp") is not None


def _picture(file, name: str) -> np.ndarray:
    """A picture as a clip of one frame, (1, H, W, 3)."""
    try:
        with PIL.Image.open(file) as image:
            if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
                raise VideoDecodingError(
                    f"{name}: an animated picture; convert it to a video, with FFmpeg for instance"
                )
            return _pixels(image, name)[None]
    except FileNotFoundError as error:
        raise VideoDecodingError(f"{name}: no such file") from error
    except (OSError, PIL.Image.DecompressionBombError) as error:
        raise VideoDecodingError(f"{name}: a picture that cannot be read ({error})") from error


def _pixels(image, name: str) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8. By itself, PIL makes all grey levels above 255 white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode != "F" and (image.mode != "I" or values.max() > 255):
            values = values // 257  # of 16 bits
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
            raise VideoDecodingError(f"{name}: grey levels from {low:.4g} to {high:.4g}: give them from 0 to 255")
        image = PIL.Image.fromarray(values.astype(np.uint8))
    return np.array(load_image(image))


def _read_frames(video, index) -> np.ndarray | torch.Tensor:
    """One frame, a list of frames, or an array of them -> (T, ...)."""
    if not isinstance(video, list | tuple):
        if is_pil_image(video):
            return _pixels(video, f"video {index}")[None]
        return _with_channels(video) if video.ndim == 4 else _with_channels(video)[None]
    frames = [_picture(os.fspath(frame), os.fspath(frame)) if _is_name(frame) else frame for frame in video]
    frames = [_pixels(frame, f"video {index}") if is_pil_image(frame) else frame for frame in frames]
    frames = [_with_channels(frame[0] if frame.ndim == 4 else frame) for frame in frames]
    if len({tuple(frame.shape) for frame in frames}) > 1:
        raise ValueError(f"video {index} has frames of different sizes")
    if len({str(frame.dtype) for frame in frames}) > 1:  # the same scale would be guessed for all of them
        raise ValueError(f"video {index} has frames of different types, {frames[0].dtype} and others; give uint8")
    return torch.stack(frames) if isinstance(frames[0], torch.Tensor) else np.stack(frames)


def _is_name(frame) -> bool:
    return isinstance(frame, str | os.PathLike)


def _with_channels(frame):
    if isinstance(frame, np.ndarray):  # PyTorch knows the byte order of this machine only
        frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    return frame[..., None] if frame.ndim == 2 else frame


# --- frames ----------------------------------------------------------------------------------------------------------


def as_uint8(video: torch.Tensor, index: int) -> torch.Tensor:
    """
    Frames of any type -> uint8: integers are from 0 to 255, floats from 0 to 1 or from 0 to 255.

    Raises:
        ValueError: values that are neither; names the video by its index.
    """
    if video.dtype == torch.uint8:
        return video
    if video.dtype == torch.bool or video.is_complex():
        raise ValueError(f"video {index} has frames of type {video.dtype}; give uint8 from 0 to 255")
    if video.dtype == torch.uint16:  # PyTorch can do little with it
        video = video.int()
    low, high = video.min().item(), video.max().item()
    is_float = video.is_floating_point()
    if not (0 <= low and high <= 255) or (is_float and 1 < high <= LOWEST_BRIGHT):
        scales = "from 0 to 1 or from 0 to 255" if is_float else "from 0 to 255"
        remedy = "; frames that are normalised already need do_rescale=False, do_normalize=False" if is_float else ""
        raise ValueError(f"video {index} has values from {low:.4g} to {high:.4g}: give them {scales}{remedy}")
    if is_float:
        video = (video.float() * 255 if high <= 1 else video).round()
    return video.to(torch.uint8)


def sample_decoder(decoder, num_frames: int, fps: float | None) -> tuple[SampledFrames, VideoInfo]:
    """
    Frames of an open torchcodec decoder at the centres of equal segments, as stored, and what it says of its video.

    Such a decoder does not say which file it reads. So its frames are scaled after decoding, by another scaler than a
    path's: pixels differ a little (up to 0.67 after normalisation, at edges). `datasets` remembers the file, and a
    row's decoder is read as that file is.

    Raises:
        VideoDecodingError: it cannot decode.
    """
    header = decoder.metadata
    begin, end = header.begin_stream_seconds, header.end_stream_seconds
    count = num_frames if fps is None else min(num_frames, max(1, round((end - begin) * fps)))
    try:
        batch = decoder.get_frames_played_at([begin + (i + 0.5) * (end - begin) / count for i in range(count)])
    except RuntimeError as error:
        raise VideoDecodingError(f"{describe_video(decoder)}: {error}") from error
    times = batch.pts_seconds.tolist()
    distinct = [i for i, time in enumerate(times) if i == 0 or time != times[i - 1]]
    info = VideoInfo(
        end - begin, header.width, header.height, header.average_fps or 0.0, header.num_frames or 0, header.codec or ""
    )
    return SampledFrames(batch.data[distinct], tuple(times[i] for i in distinct), end - begin), info


__all__ = ["as_uint8", "as_videos", "describe_video", "is_web_address", "is_one_video", "read_video"]
