# SPDX-License-Identifier: Apache-2.0
"""An S3 API on loopback: clips are encoded from it as from a disk, by the ranges that they need."""

import contextlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from camoe_search.columns import as_matrix
from modeling_camoe.frames import VideoDecodingError, sample_frames
from tests.camoe_search.test_encode import encode, rows_of
from tests.video_files import write_video


moto_server = pytest.importorskip("moto.server", reason="an S3 API on this machine: pip install moto[server] s3fs")
s3fs = pytest.importorskip("s3fs", reason="an S3 API on this machine: pip install moto[server] s3fs")

TEN_MINUTES, FPS = 600, 25
SHARE = 0.2  # of a file of ten minutes that 12 frames may cost


@pytest.fixture
def bucket(monkeypatch):
    """The file system of an S3 server with a bucket `films`; `requests` has the bytes of each answer."""
    import fsspec

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "*",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.makedirs("films", exist_ok=True)  # the servers of one process share what they hold
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    with contextlib.suppress(Exception):  # of a server that is told to stop
        server.stop()


@pytest.fixture
def transferred(monkeypatch):
    """The number of bytes of each answer with content."""
    counts = []
    fetch = s3fs.core._inner_fetch

    async def counting(*args, **kwargs):
        content = await fetch(*args, **kwargs)
        counts.append(len(content))
        return content

    monkeypatch.setattr(s3fs.core, "_inner_fetch", counting)
    return counts


def test_a_bucket_is_encoded_as_a_folder_is(bucket, videos, checkpoint, tmp_path, capsys):
    for path in videos.iterdir():
        bucket.put_file(str(path), f"films/clips/{path.name}")
    bucket.pipe_file("films/clips/bad.mp4", b"no video" * 99)
    report = encode(capsys, "s3://films/clips/*.mp4", checkpoint, "s3://films/parts", "--files-per-part", 4)
    assert (report["moments"], report["failed"], report["parts"]) == (6, 1, 2)
    again = encode(capsys, "s3://films/clips", checkpoint, "s3://films/parts", "--files-per-part", 4)
    assert (again["files"], again["present"]) == (0, 7)
    encode(capsys, videos, checkpoint, tmp_path / "parts")
    parts = [pyarrow.parquet.read_table(bucket.open(name)) for name in bucket.ls("films/parts", detail=False)]
    remote = pa.concat_tables(parts).sort_by("path")
    remote = remote.filter(pa.compute.is_null(remote["error"]))
    local = rows_of(tmp_path / "parts").sort_by("path")
    assert remote["path"].to_pylist() == [f"s3://films/clips/clip_{i}.mp4" for i in range(6)]
    # Parts of other sizes make batches of other sizes, whose sums have another order.
    np.testing.assert_allclose(as_matrix(remote["vector"]), as_matrix(local["vector"]), atol=1e-6)


def test_an_object_that_is_not_there_and_a_bucket_that_refuses_are_named(bucket):
    with pytest.raises(VideoDecodingError, match="^s3://films/none.mp4: no such file"):
        sample_frames("s3://films/none.mp4")
    with pytest.raises(VideoDecodingError, match="^s3://elsewhere/none.mp4: "):
        sample_frames("s3://elsewhere/none.mp4")


@pytest.mark.slow
def test_twelve_frames_of_ten_minutes_cost_a_fifth_of_the_file_at_most(bucket, transferred, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (240, 400, 3), np.uint8)  # a window moves over it

    class Pictures:
        def __getitem__(self, n):
            x, y = 2 * n % 240, n % 120
            return np.ascontiguousarray(noise[y : y + 120, x : x + 160])

    options = {"g": "250", "keyint_min": "250", "sc_threshold": "0", "preset": "ultrafast", "crf": "30"}  # 10 s
    count = TEN_MINUTES * FPS
    path = write_video(tmp_path / "film.mp4", count, FPS, (160, 120), pictures=Pictures(), options=options)
    bucket.put_file(str(path), "films/film.mp4")
    size = os.path.getsize(path)
    transferred.clear()
    found = sample_frames("s3://films/film.mp4", 12, size=32)
    assert len(found.times) == 12 and 0 < sum(transferred) <= SHARE * size, (sum(transferred), size)
