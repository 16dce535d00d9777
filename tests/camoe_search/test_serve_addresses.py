# SPDX-License-Identifier: Apache-2.0
"""`camoe serve` plays moments of videos at addresses: by the ranges that a player asks for."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from camoe_search.index import VideoIndex
from camoe_search.remote_media import find_range
from modeling_camoe.frames import sample_frames
from modeling_camoe.video_address import BLOCK_BYTES
from tests.camoe_search.test_serve import Server
from tests.video_files import index_of, write_video


# Behind the video: what nobody asks for. Far more than the buffers of a connection, which fill before it is closed.
UNUSED_BYTES = 64 << 20


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A web server with ranges that has one clip; `sent` counts the bytes of its answers."""
    path = write_video(tmp_path_factory.mktemp("storage") / "a.mp4", 48)
    content = path.read_bytes() + bytes(UNUSED_BYTES)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): ...

        def do_HEAD(self):
            self.answer(b"", len(content))

        def do_GET(self):
            if "Range" not in self.headers:
                return self.answer(content, len(content))
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(start) : int(end) + 1]
            self.answer(part, len(part), f"bytes {start}-{end}/{len(content)}")

        def answer(self, part: bytes, length: int, span: str | None = None):
            found = self.path.startswith("/films/a.mp4") and not storage.is_gone
            self.send_response((206 if span else 200) if found else 404)
            self.send_header("Content-Length", str(length if found else 0))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"1"')
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has what it wanted
                for first in range(0, len(part) if found else 0, BLOCK_BYTES):
                    storage.sent += len(part[first : first + BLOCK_BYTES])  # first: the client does not wait for it
                    self.wfile.write(part[first : first + BLOCK_BYTES])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/films/a.mp4"
    storage = SimpleNamespace(content=content, sent=0, is_gone=False, address=address)
    yield storage
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(storage, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    options = {"device": "cpu", "num_workers": 0, "window": 0, "text_encoder": False}
    index = VideoIndex.create_or_update([storage.address], folder, str(checkpoint), **options)
    assert (len(index), index.report.encoded) == (1, 1) and storage.sent < UNUSED_BYTES / 4
    assert VideoIndex.create_or_update([storage.address], folder, str(checkpoint), **options).report.unchanged == 1
    with Server(index) as server:
        yield server


@pytest.fixture
def key(server) -> str:
    return server.search(text="a red star")[1]["hits"][0]["key"]


def test_a_range_of_a_file_at_an_address_costs_its_blocks(server, storage, key):
    storage.sent = 0
    status, headers, part = server.ask("GET", f"/media/{key}", headers={"Range": "bytes=100-199"})
    assert (status, part, headers["Content-Type"]) == (206, storage.content[100:200], "video/mp4")
    assert headers["Content-Range"] == f"bytes 100-199/{len(storage.content)}"
    assert headers["Accept-Ranges"] == "bytes" and 0 < storage.sent <= 2 * BLOCK_BYTES
    status, headers, part = server.ask("GET", f"/media/{key}", headers={"Range": "bytes=-10"})
    assert (status, part, headers["Content-Length"]) == (206, storage.content[-10:], "10")
    status, headers, whole = server.ask("GET", f"/media/{key}?download=true")
    assert (status, whole) == (200, storage.content)
    assert headers["Content-Disposition"] == "attachment; filename*=utf-8''a.mp4"
    beyond = {"Range": f"bytes={len(storage.content)}-"}
    status, headers, refusal = server.ask("GET", f"/media/{key}", headers=beyond)
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(storage.content)}")
    assert "error" in json.loads(refusal)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, None),
        ("", None),
        ("bytes=0-", (0, 99)),
        ("bytes=5-7", (5, 7)),
        ("Bytes = 5 - 700", (5, 99)),
        ("bytes=-7", (93, 99)),
        ("bytes=-700", (0, 99)),
        ("bytes=-0", (100, 99)),
        ("bytes=100-", (100, 99)),
        ("bytes=7-5", None),
        ("bytes=-", None),
        ("bytes=0-1,5-7", None),
        ("items=0-1", None),
        ("bytes=\u0661-", None),
    ],
)
def test_the_range_that_a_header_names(wanted, found):
    assert find_range(wanted, 100) == found


def test_a_thumbnail_and_a_clip_of_a_video_at_an_address(server, storage, key, tmp_path):
    storage.sent = 0
    status, headers, picture = server.ask("GET", f"/thumbnail/{key}")
    assert (status, headers["Content-Type"], picture[:2]) == (200, "image/jpeg", b"\xff\xd8")
    status, _, content = server.ask("GET", f"/clip/{key}?start=1&end=2")
    assert status == 200 and storage.sent < UNUSED_BYTES / 4
    (tmp_path / "clip.mp4").write_bytes(content)
    assert index_of(sample_frames(tmp_path / "clip.mp4", 1, size=32).frames[0]) in range(12, 24)


def test_an_object_that_has_gone_is_named(server, storage, key):
    storage.is_gone = True
    try:
        status, _, content = server.ask("GET", f"/media/{key}")
    finally:
        storage.is_gone = False
    assert status == 404 and "a.mp4: no such file" in json.loads(content)["error"]
