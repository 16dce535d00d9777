# SPDX-License-Identifier: Apache-2.0
"""Reading untrusted videos and images, within fixed limits on their cost: for the endpoint and the Space.

Nothing here opens a path, and only `download` opens a URL. A refusal is a RequestError whose message is for the
sender: it names the item (`videos[0]`) and the limit.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
from urllib.parse import urlsplit

import av
from PIL import Image


MAX_FRAMES = 64  # of one video sent as images
MAX_BYTES = 64 * 2**20  # after base64, of all videos of a request
MAX_PIXELS = 4096 * 2304  # of one frame
MAX_FRAME_PIXELS = 2**27  # of all images of one video: 0.4 GB as RGB, and as much again as a batch
MAX_SECONDS = 600.0  # of one video
MAX_STORED_FRAMES = 36_000  # of one video: ten minutes at 60 per second
URL_SECONDS = 20.0  # for the whole download
PORT = 443

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


# --- downloads, if the owner has enabled them ------------------------------------------------------------------------


def download(url, where: str, budget: int) -> bytes:
    """The body of an https URL, at most `budget` bytes. No redirects, and no hosts on private networks.

    Raises:
        RequestError: another scheme, a host with a private address, too large, too slow, or not found.
    """
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        is_valid = parts is not None and parts.scheme == "https" and parts.hostname and not parts.username
        is_valid = is_valid and parts.port in (None, PORT)
    except ValueError:  # an unclosed bracket, a port that is not a number
        is_valid = False
    if not is_valid:
        raise RequestError(f"{where}.url must be an https:// URL without user name and port")
    connection = _PinnedConnection(parts.hostname, public_address(parts.hostname, where))
    # A socket's timeout restarts with every byte, so the whole download gets a time limit of its own.
    timer = threading.Timer(URL_SECONDS, connection.abort)
    timer.start()
    content = bytearray()
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(f"{where}.url answers {response.status}; redirects are not followed")
        with response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > budget:
                    raise RequestError(f"{where}: the videos of a request may have {MAX_BYTES // 2**20} MiB together")
        is_complete = not response.length  # None if the server did not announce a length
    except RequestError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a line break in the path
        if connection.is_aborted:
            raise RequestError(f"{where}.url takes more than {URL_SECONDS:g} s") from error
        raise RequestError(f"{where}.url cannot be read: {type(error).__name__}") from error
    finally:
        timer.cancel()
        connection.close()
    if connection.is_aborted:
        raise RequestError(f"{where}.url takes more than {URL_SECONDS:g} s")
    if not is_complete:
        raise RequestError(f"{where}.url is truncated")
    return bytes(content)


def public_address(host: str, where: str) -> str:
    """An address of a host, if all its addresses are public."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{where}.url: the host is unknown") from error
    if not found or not all(_is_public(address) for address in found):
        raise RequestError(f"{where}.url: the host is not on the public internet")
    return sorted(found)[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])  # without the zone of a link-local address
    return parsed.is_global and not parsed.is_multicast


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to the address that was checked: a second lookup of the name might return another one.

    The certificate must still match the host name.
    """

    def __init__(self, host: str, address: str):
        super().__init__(host, PORT, timeout=URL_SECONDS, context=ssl.create_default_context())
        self.address = address
        self.is_aborted = False
        self.channel = None  # like `sock`, which http.client drops if the server announces that it will close

    def connect(self):
        self.channel = socket.create_connection((self.address, PORT), self.timeout)
        self.sock = self.channel = self._context.wrap_socket(self.channel, server_hostname=self.host)
        if self.is_aborted:
            raise TimeoutError

    def abort(self):
        """Shut the connection down from another thread: a blocked read then fails or ends."""
        self.is_aborted = True
        with contextlib.suppress(OSError, AttributeError):  # not connected yet, or closed already
            self.channel.shutdown(socket.SHUT_RDWR)
