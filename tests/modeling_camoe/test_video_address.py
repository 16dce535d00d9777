# SPDX-License-Identifier: Apache-2.0
"""Videos at addresses: the frames of the file, by the ranges that they need; whatever fails names the address."""

import functools
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from torch.utils.data import DataLoader

from modeling_camoe.frames import Clip, VideoDecodingError, probe_video, sample_frames, sample_windows
from modeling_camoe.video_address import BLOCK_BYTES, RemoteFile
from modeling_camoe.video_source import describe_source, is_address
from tests.video_files import cut_off, write_video


class CountedFiles(AbstractFileSystem):
    """Files by name that count the bytes that were read, and can fail after some."""

    protocol, cachable = "counted", True
    contents: dict[str, bytes] = {}
    read, limit, error = 0, None, OSError("the cable is out")

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.contents:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.contents[path]), "type": "file"}

    def _open(self, path, mode="rb", block_size=None, cache_options=None, **kwargs):
        return CountedFile(self, path, mode, block_size, cache_options=cache_options, **kwargs)


class CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        CountedFiles.read += end - start
        if CountedFiles.limit is not None and CountedFiles.read > CountedFiles.limit:
            raise CountedFiles.error
        return self.fs.contents[self.path][start:end]


@pytest.fixture
def storage(monkeypatch):
    fsspec.register_implementation("counted", CountedFiles, clobber=True)
    monkeypatch.setattr(CountedFiles, "contents", {})
    for name in ("read", "limit", "error"):
        monkeypatch.setattr(CountedFiles, name, getattr(CountedFiles, name))
    return CountedFiles


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", 48)


@pytest.fixture(scope="module")
def frames(video):
    return sample_frames(str(video), 4, size=32).frames


def test_what_is_an_address():
    addresses = ["s3://b/a.mp4", "HF://datasets/x/a.mp4", "https://h/a.mp4", "zip://a.mp4::/b/c.zip", "memory://a.mp4"]
    addresses += ["zip://a.mp4::file:///b/c.zip"]
    assert all(map(is_address, addresses))
    paths = [
        "a.mp4",
        "/b/a.mp4",
        "C://a.mp4",
        "C:\\a.mp4",
        "file:///b/a.mp4",
        "b/s3://a.mp4",
        "12:30.mp4",
        b"s3://",
        "",
    ]
    assert not any(map(is_address, paths))


def test_a_file_is_the_same_wherever_it_lies(video, frames, tmp_path, storage):
    content = video.read_bytes()
    fsspec.filesystem("memory").pipe_file("/videos/a.mp4", content)
    storage.contents["a.mp4"] = content
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/a.mp4", content)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(video, "in/a.mp4")
    addresses = ["memory://videos/a.mp4", f"file://{video}", "counted://a.mp4"]
    addresses += [f"zip://in/a.mp4::{tmp_path}/a.zip", f"tar://in/a.mp4::file://{tmp_path}/a.tar"]
    for address in addresses:
        assert torch.equal(sample_frames(address, 4, size=32).frames, frames), address
        assert probe_video(address).duration == probe_video(video).duration
    windows = [Clip("counted://a.mp4", 0.5, 2.0), Clip("counted://a.mp4", 1.0, 3.0)]
    for ours, clip in zip(sample_windows(windows, 4, size=32), windows, strict=True):
        assert torch.equal(ours.frames, sample_frames(Clip(video, clip.start, clip.end), 4, size=32).frames)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_every_container_is_read_as_from_a_disk(tmp_path, storage, suffix):
    path = write_video(tmp_path / f"a.{suffix}", 48)
    storage.contents[path.name] = path.read_bytes()
    ours, theirs = sample_frames(f"counted://{path.name}", 4, size=32), sample_frames(path, 4, size=32)
    assert torch.equal(ours.frames, theirs.frames) and ours.times == theirs.times


def test_workers_read_after_their_parent_did(video, frames, storage):
    storage.contents["a.mp4"] = video.read_bytes()
    assert torch.equal(sample_frames("counted://a.mp4", 4, size=32).frames, frames)
    loader = DataLoader(["counted://a.mp4"] * 2, batch_size=None, num_workers=2, collate_fn=_frames_of)
    assert all(torch.equal(found, frames) for found in loader)


def _frames_of(address):
    return sample_frames(address, 4, size=32).frames


def test_what_is_not_asked_for_is_not_read(storage):
    storage.contents["large"] = bytes(range(256)) * (40 * BLOCK_BYTES // 256)
    file = RemoteFile("counted://large")
    assert file.read_at(256 * 1000 + 7, 3) == b"\x07\x08\x09"
    reader = file.reader()
    reader.seek(-4, 2)
    assert reader.read(10) == b"\xfc\xfd\xfe\xff" and reader.read(1) == b""
    assert file.reader().read(2) == b"\x00\x01"  # each has its own position
    assert storage.read == 3 * BLOCK_BYTES
    file.close()


def test_a_frame_of_a_long_file_costs_a_part_of_it(tmp_path, storage):
    path = write_video(tmp_path / "long.mp4", 600, gop=8, size=(160, 120), pictures=_noise(600))
    storage.contents["long.mp4"] = path.read_bytes()
    ours = sample_frames("counted://long.mp4", 4, size=32)
    assert storage.read < 0.4 * path.stat().st_size
    assert torch.equal(ours.frames, sample_frames(path, 4, size=32).frames)


def _noise(count):
    """Pictures of 160 x 120 that do not compress."""
    return np.random.default_rng(0).integers(0, 256, (count, 120, 160, 3), np.uint8)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_missing_object_and_an_unknown_kind_of_address_are_named(tmp_path, video):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.mp4", b"")
    for address in ("memory://none.mp4", "file:///none.mp4", f"zip://a.mp4::{tmp_path}/a.zip"):
        with pytest.raises(VideoDecodingError, match=f"^{address}: no such file"):
            sample_frames(address)
    with pytest.raises(VideoDecodingError, match="^tape://a.mp4: cannot be read .*Protocol not known"):
        sample_frames("tape://a.mp4")


@pytest.fixture(scope="module")
def noisy_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    options = {"num_frames": 60, "size": (160, 120), "pictures": _noise(60)}
    return {suffix: write_video(folder / f"a.{suffix}", **options).read_bytes() for suffix in ("mp4", "ts")}


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError("the cable is out"), "cannot be read .*the cable is out"),
        (FileNotFoundError("a.mp4"), "no such file"),
        (PermissionError("Access Denied"), "cannot be read .*access is refused: check the credentials"),
        (RuntimeError("no credentials"), "cannot be read .*no credentials"),
        (ImportError("install tapefs"), "cannot be read .*install tapefs"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_an_object_that_vanishes_while_it_is_read_is_never_taken_for_a_shorter_one(
    noisy_files, storage, monkeypatch, error, cause, share, suffix
):
    storage.contents["a.mp4"] = noisy_files[suffix]
    monkeypatch.setattr(storage, "error", error)
    sample_frames("counted://a.mp4", 12, size=32)
    monkeypatch.setattr(storage, "limit", storage.read + int(share * storage.read))
    with pytest.raises(VideoDecodingError, match=f"^counted://a.mp4: {cause}"):
        sample_frames("counted://a.mp4", 12, size=32)


def test_a_damaged_file_is_damaged_at_an_address_too(tmp_path, storage):
    path = cut_off(write_video(tmp_path / "cut.mp4", 48))
    storage.contents["cut.mp4"] = path.read_bytes()
    with pytest.raises(VideoDecodingError, match="^counted://cut.mp4: no video, or cut off before its end"):
        sample_frames("counted://cut.mp4")


def test_secrets_of_an_address_are_in_no_message():
    address = "https://me:hf_hidden@127.0.0.1:9/a.mp4?token=hf_hidden"
    assert describe_source(address) == "https://127.0.0.1:9/a.mp4"
    assert describe_source("s3://key:hf_hidden@b/a.mp4") == "s3://b/a.mp4"
    with pytest.raises(VideoDecodingError, match="^https://127.0.0.1:9/a.mp4: cannot be read") as error:
        sample_frames(address)
    assert "hf_hidden" not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_web_server_with_and_without_ranges(tmp_path, video, frames, has_ranges):
    (tmp_path / "a.mp4").write_bytes(video.read_bytes())

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

        def do_GET(self):
            if not has_ranges or "Range" not in self.headers:
                return super().do_GET()
            content = (tmp_path / "a.mp4").read_bytes()
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(start) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            self.end_headers()
            self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(sample_frames(f"{address}/a.mp4", 4, size=32).frames, frames)
        with pytest.raises(VideoDecodingError, match="/none.mp4: no such file"):
            sample_frames(f"{address}/none.mp4")
    finally:
        server.shutdown()
        server.server_close()
