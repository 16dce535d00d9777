# SPDX-License-Identifier: Apache-2.0
"""Reading untrusted videos and images, within fixed limits on their cost: for the endpoint and the Space.

Nothing here opens a path or a URL. A refusal is a RequestError whose message is for the sender: it names the item
(`videos[0]`) and the limit.
"""

import base64
import binascii
import io

import av
from PIL import Image


MAX_FRAMES = 64  # of one video sent as images
MAX_BYTES = 64 * 2**20  # after base64, of all videos of a request
MAX_PIXELS = 4096 * 2304  # of one frame
MAX_FRAME_PIXELS = 2**27  # of all images of one video: 0.4 GB as RGB, and as much again as a batch
MAX_SECONDS = 600.0  # of one video
MAX_STORED_FRAMES = 36_000  # of one video: ten minutes at 60 per second

# Containers that hold their frames themselves. Other formats can refer to files and URLs (playlists, file lists), or
# generate frames from something else (text, patterns).
FORMATS = "asf,avi,flv,gif,matroska,mov,mp4,mpeg,mpegts,ogg,webm"


class RequestError(ValueError):
    """The request is invalid; the message is for its sender."""


def check_video(content: bytes, where: str, probe_video) -> bytes:
    """Return `content` if it is a video within the limits. The size of its frames is checked on a decoded one, too.

    Args:
        content: the bytes of the file.
        where: its name in error messages.
        probe_video: the function of the released code (frames.py): bytes -> what the header says.

    Raises:
        RequestError: not a video, too long, too many frames, or frames too large.
    """
    try:
        with av.open(io.BytesIO(content), options={"format_whitelist": FORMATS}) as container:
            info = probe_video(content)
            check_pixels(info.width, info.height, where)
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            frame = next(container.decode(stream), None)
    except RequestError:
        raise
    except (ValueError, av.FFmpegError) as error:
        raise RequestError(f"{where} is not a video that can be decoded: {error}") from error
    if frame is None:
        raise RequestError(f"{where} is not a video that can be decoded: it has no frames")
    check_pixels(frame.width, frame.height, where)
    if info.duration > MAX_SECONDS:
        raise RequestError(f"{where} lasts {info.duration:.0f} s; the limit is {MAX_SECONDS:.0f} s")
    if info.num_frames > MAX_STORED_FRAMES:
        raise RequestError(f"{where} has {info.num_frames} frames; the limit is {MAX_STORED_FRAMES}")
    return content


def decode_base64(text: str, where: str, budget: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) * 3 // 4 > budget:
        raise RequestError(f"{where}: the videos of a request may have {MAX_BYTES // 2**20} MiB together")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where} is not base64 ({error}); paths and URLs are refused, send the file") from error
    if not content:
        raise RequestError(f"{where} is empty")
    return content


def is_image(text: str) -> bool:
    """Whether base64 is that of an image, by its first bytes."""
    head = text.partition(",")[2] if text.startswith("data:") else text
    try:
        start = base64.b64decode(head[:64])
    except ValueError:
        return False
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG")) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")


def read_frames(frames, where: str, budget: int) -> tuple[list[Image.Image], int]:
    """Images, decoded only after their size was checked, and their number of bytes."""
    if not isinstance(frames, list) or not 1 <= len(frames) <= MAX_FRAMES:
        raise RequestError(f"{where}.frames must be a list of 1 to {MAX_FRAMES} images in base64")
    images, size, pixels = [], 0, 0
    for index, frame in enumerate(frames):
        name = f"{where}.frames[{index}]"
        if not isinstance(frame, str | Image.Image):
            raise RequestError(f"{name} must be an image in base64")
        try:
            if isinstance(frame, str):
                content = decode_base64(frame, name, budget - size)
                size += len(content)
                frame = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
            check_pixels(*frame.size, name)
            pixels += frame.width * frame.height
            if pixels > MAX_FRAME_PIXELS:
                raise RequestError(
                    f"{where}.frames have more than {MAX_FRAME_PIXELS} pixels together; send smaller ones"
                )
            images.append(frame.convert("RGB"))
        except RequestError:
            raise
        except Image.DecompressionBombError as error:  # PIL's own limit comes before ours
            raise RequestError(f"{name} has too many pixels; the limit is {MAX_PIXELS}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise RequestError(f"{name} is not a JPEG, PNG or WebP image that can be decoded") from error
    if len({image.size for image in images}) > 1:
        raise RequestError(f"{where}.frames must all have the same size")
    return images, size


def check_pixels(width: int, height: int, where: str):
    if width * height > MAX_PIXELS:
        raise RequestError(f"{where} has frames of {width} x {height} pixels; the limit is {MAX_PIXELS} pixels")
