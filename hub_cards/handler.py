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
"""Inference Endpoint: texts and videos in, vectors or scores out. Exposed to strangers, so it trusts nothing.

Request body (JSON):

    {"inputs": {"texts": ["a dog runs"]}}                           -> {"text_vectors": [[...]]}
    {"inputs": {"videos": ["<base64 of a video file>"]}}            -> {"video_vectors": [[...]]}
    {"inputs": {"texts": [...], "videos": [...]}}                   -> {"scores": [[...]]}, rows texts, columns videos
    {"inputs": "a dog runs"}                                        -> as one text

A video is base64 of a file, {"frames": [base64 of an image, ...]}, or {"url": "https://..."} where the owner of the
endpoint has set CAMOE_ALLOW_URLS=1. A mistake in the request is a RequestError, which the endpoint's server answers as
HTTP 400 {"error": message}; the next request is served as if nothing had happened.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import os
import socket
import ssl
import time
from urllib.parse import urlsplit

import av
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MAX_TEXTS = 256
MAX_CHARACTERS = 2_000  # of one text; CLIP reads 77 tokens at most
MAX_VIDEOS = 8
MAX_FRAMES = 64  # sent as images, of one video
MAX_BYTES = 64 * 2**20  # decoded, of all videos of a request
MAX_PIXELS = 4096 * 2304  # of one frame
MAX_SECONDS = 600.0  # of one video
MAX_STORED_FRAMES = 36_000  # of one video: as many as ten minutes at 60 a second
URL_SECONDS = 20.0  # for the whole download
PORT = 443


class RequestError(ValueError):
    """The request is at fault; the message is for whoever sent it."""


class EndpointHandler:
    """What the inference toolkit calls.

    Args:
        path: folder of this repository.
        allow_urls: download videos from https addresses; by default only if CAMOE_ALLOW_URLS=1 is set.
    """

    def __init__(self, path: str = "", allow_urls: bool | None = None):
        self.allow_urls = os.environ.get("CAMOE_ALLOW_URLS") == "1" if allow_urls is None else allow_urls
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.probe_video = get_class_from_dynamic_module("frames.probe_video", path)

    def __call__(self, data: dict) -> dict:
        """One request -> what is answered, made of lists and numbers.

        Raises:
            RequestError: what is wrong with the request.
        """
        texts, videos = _read_inputs(data)
        result = {}
        with torch.inference_mode():
            if texts:
                result["text_vectors"] = self._embed(text=texts)
            if videos:
                result["video_vectors"] = self._embed(videos=self._read_videos(videos))
        if len(result) == 2:
            return {"scores": (result["text_vectors"] @ result["video_vectors"].T).tolist()}
        return {name: vectors.tolist() for name, vectors in result.items()}

    def _embed(self, **inputs) -> torch.Tensor:
        """Texts or videos -> vectors, (N,K) or (B,K)."""
        try:
            inputs = self.processor(**inputs, return_tensors="pt").to(self.model.device)
        except ValueError as error:  # an empty caption, a video that breaks off
            raise RequestError(str(error)) from error
        if "input_ids" in inputs:
            return self.model.get_text_features(**inputs).pooler_output.float().cpu()
        return self.model.get_video_features(**inputs).pooler_output.float().cpu()

    def _read_videos(self, videos: list) -> list:
        budget = MAX_BYTES
        read = []
        for index, video in enumerate(videos):
            where = f"videos[{index}]"
            if isinstance(video, dict) and set(video) == {"frames"}:
                frames, size = _read_frames(video["frames"], where, budget)
                read.append(frames)
            elif isinstance(video, dict) and set(video) == {"url"}:
                content = self._download(video["url"], where, budget)
                size = len(content)
                read.append(self._checked(content, where))
            elif isinstance(video, str):
                content = _decode_base64(video, where, budget)
                size = len(content)
                read.append(self._checked(content, where))
            else:
                raise RequestError(f'{where} must be base64 of a video file, {{"frames": [...]}} or {{"url": "..."}}')
            budget -= size
        return read

    def _checked(self, content: bytes, where: str) -> bytes:
        """A video that can be decoded at a bearable cost. Its header is not believed about the size of its frames."""
        try:
            info = self.probe_video(content)
            _check_pixels(info.width, info.height, where)
            with av.open(io.BytesIO(content)) as container:
                stream = container.streams.video[0]
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                frame = next(container.decode(stream), None)
        except RequestError:
            raise
        except (ValueError, av.FFmpegError) as error:
            raise RequestError(f"{where} is not a video that can be decoded: {error}") from error
        if frame is None:
            raise RequestError(f"{where} is not a video that can be decoded: it has no frames")
        _check_pixels(frame.width, frame.height, where)
        if info.duration > MAX_SECONDS:
            raise RequestError(f"{where} lasts {info.duration:.0f} s; the limit is {MAX_SECONDS:.0f} s")
        if info.num_frames > MAX_STORED_FRAMES:
            raise RequestError(f"{where} has {info.num_frames} frames; the limit is {MAX_STORED_FRAMES}")
        return content

    def _download(self, url, where: str, budget: int) -> bytes:
        if not self.allow_urls:
            raise RequestError(f"{where}: this endpoint does not download; send the file as base64")
        return download(url, where, budget)


def _read_inputs(data) -> tuple[list[str], list]:
    """The request's texts and videos; at least one of them is not empty."""
    inputs = data.get("inputs") if isinstance(data, dict) else None
    if isinstance(inputs, str):
        inputs = {"texts": [inputs]}
    elif isinstance(inputs, Image.Image):  # content type image/*: the toolkit has decoded it
        inputs = {"videos": [{"frames": [inputs]}]}
    if not isinstance(inputs, dict) or not inputs or not set(inputs) <= {"texts", "videos"}:
        raise RequestError(
            'the body must be {"inputs": {"texts": [...], "videos": [...]}}, with one of the two or both'
        )
    texts, videos = inputs.get("texts", []), inputs.get("videos", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not isinstance(videos, list):
        raise RequestError("texts and videos must be lists")
    if not texts and not videos:
        raise RequestError("there are no texts and no videos")
    if len(texts) > MAX_TEXTS or len(videos) > MAX_VIDEOS:
        raise RequestError(f"{len(texts)} texts, {len(videos)} videos; the limits are {MAX_TEXTS} and {MAX_VIDEOS}")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"texts[{index}] must be a text that is not empty")
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"texts[{index}] has {len(text)} characters; the limit is {MAX_CHARACTERS}")
    return texts, videos


def _decode_base64(text: str, where: str, budget: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) * 3 // 4 > budget:
        raise RequestError(f"{where}: the videos of a request may have {MAX_BYTES // 2**20} MiB together")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{where} is not base64 ({error}); paths and addresses are refused, send the file"
        ) from error
    if not content:
        raise RequestError(f"{where} is empty")
    return content


def _read_frames(frames, where: str, budget: int) -> tuple[list[Image.Image], int]:
    """Images, decoded only after their size is known to be bearable; and how many bytes they were."""
    if not isinstance(frames, list) or not 1 <= len(frames) <= MAX_FRAMES:
        raise RequestError(f"{where}.frames must be a list of 1 to {MAX_FRAMES} images in base64")
    images, size = [], 0
    for index, frame in enumerate(frames):
        name = f"{where}.frames[{index}]"
        if not isinstance(frame, str | Image.Image):
            raise RequestError(f"{name} must be an image in base64")
        try:
            if isinstance(frame, str):
                content = _decode_base64(frame, name, budget - size)
                size += len(content)
                frame = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
            _check_pixels(*frame.size, name)
            images.append(frame.convert("RGB"))
        except RequestError:
            raise
        except Image.DecompressionBombError as error:  # PIL's own limit comes before ours
            raise RequestError(f"{name} has too many pixels; the limit is {MAX_PIXELS}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise RequestError(f"{name} is no JPEG, PNG or WebP image that can be decoded") from error
    if len({image.size for image in images}) > 1:
        raise RequestError(f"{where}.frames must all have the same size")
    return images, size


def _check_pixels(width: int, height: int, where: str):
    if width * height > MAX_PIXELS:
        raise RequestError(f"{where} has frames of {width} x {height} pixels; the limit is {MAX_PIXELS} pixels")


# --- downloads, where they are switched on ---------------------------------------------------------------------------


def download(url, where: str, budget: int) -> bytes:
    """The body of an https address, at most `budget` bytes. No redirects, and no host inside the network.

    Raises:
        RequestError: another scheme, a host that resolves to a private address, too large, too slow, not found.
    """
    parts = urlsplit(url) if isinstance(url, str) else None
    if (
        parts is None
        or parts.scheme != "https"
        or not parts.hostname
        or parts.username
        or parts.port not in (None, PORT)
    ):
        raise RequestError(f"{where}.url must be an https:// address without user name and port")
    deadline = time.monotonic() + URL_SECONDS
    connection = _PinnedConnection(parts.hostname, public_address(parts.hostname, where))
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(f"{where}.url answers {response.status}; redirects are not followed")
        content = bytearray()
        while chunk := response.read1(2**16):
            content += chunk
            if len(content) > budget:
                raise RequestError(f"{where}: the videos of a request may have {MAX_BYTES // 2**20} MiB together")
            if time.monotonic() > deadline:
                raise RequestError(f"{where}.url takes more than {URL_SECONDS:.0f} s")
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{where}.url cannot be read") from error
    finally:
        connection.close()
    return bytes(content)


def public_address(host: str, where: str) -> str:
    """The address of a host, if all its addresses are public."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{where}.url: the host is unknown") from error
    if not all(ipaddress.ip_address(address).is_global for address in found):
        raise RequestError(f"{where}.url: the host is not on the public internet")
    return sorted(found)[0]


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to the address that was checked: asked again, the name might resolve to another."""

    def __init__(self, host: str, address: str):
        super().__init__(host, PORT, timeout=URL_SECONDS, context=ssl.create_default_context())
        self.address = address

    def connect(self):
        plain = socket.create_connection((self.address, PORT), self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)
