# SPDX-License-Identifier: Apache-2.0
"""The file at an address as an HTTP answer: whole, or the range that a player asks for, and no more is transferred."""

import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from modeling_camoe.video_address import BLOCK_BYTES, RemoteFile

from .guard import problem


RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII | re.IGNORECASE)


def remote_response(address: str, wanted: str | None, media_type: str, download: bool = False) -> Response:
    """The answer to a request for the file at an address.

    Args:
        wanted: the request's header Range. Several ranges in one are answered by the whole file, as HTTP allows.
        download: a browser saves it instead of playing it.

    Raises:
        VideoDecodingError: it cannot be read; names the cause.
    """
    file = RemoteFile(address)
    found = find_range(wanted, file.size)
    headers = {"Accept-Ranges": "bytes"}
    if download:
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(os.path.basename(file.name))}"
    if found is None:
        first, last, status = 0, file.size - 1, 200
    else:
        (first, last), status = found, 206
        headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        if first > last:
            file.close()
            refusal = problem(416, "the file has no such range of bytes")
            refusal.headers["Content-Range"] = f"bytes */{file.size}"
            return refusal
    headers["Content-Length"] = str(last + 1 - first)
    return StreamingResponse(_read(file, first, last + 1), status, headers, media_type)


def find_range(wanted: str | None, size: int) -> tuple[int, int] | None:
    """The first and last byte of a header Range in a file of some bytes; None where it names no single range.

    A range that the file does not have ends before it begins.
    """
    match = RANGE.fullmatch("".join((wanted or "").split()))
    if match is None or match[0].endswith("=-"):
        return None
    first, last = (int(number) if number else None for number in match.groups())
    if first is None:  # the last bytes
        return (size, size - 1) if last == 0 else (max(0, size - last), size - 1)
    if last is not None and last < first:
        return None
    return first, size - 1 if last is None else min(last, size - 1)


def _read(file: RemoteFile, position: int, end: int) -> Iterator[bytes]:
    try:
        while position < end:
            content = file.read_at(position, min(BLOCK_BYTES, end - position))
            if not content:
                return
            yield content
            position += len(content)
    finally:
        file.close()
