# SPDX-License-Identifier: Apache-2.0
"""`camoe encode`: a manifest to parts, as a stranger uses it."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from camoe_search.cli import main
from camoe_search.columns import as_matrix
from camoe_search.files import content_hash
from camoe_search.index import VideoIndex
from camoe_search.manifest import read_manifest
from tests.video_files import cut_off, write_video


def encode(capsys, manifest, checkpoint, out, *options) -> dict:
    """The report of a run."""
    arguments = ["--num-workers", "0", "--device", "cpu", "--json", *options]
    main(["encode", str(manifest), "--model", str(checkpoint), "--out", str(out), *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def mistake(capsys, *arguments) -> str:
    """The one line of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ")
    return error


def rows_of(folder) -> pa.Table:
    """All rows of the parts in a folder."""
    return pa.concat_tables([pyarrow.parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def test_a_folder_has_the_vectors_of_its_index(videos, checkpoint, encoder, tmp_path, capsys):
    write_video(videos / "long.mp4", 40 * 4, fps=4)
    cut_off(write_video(videos / "broken.mp4", 48))
    report = encode(capsys, videos, checkpoint, tmp_path / "parts", "--files-per-part", 3)
    assert (report["files"], report["parts"], report["present"], report["failed"]) == (8, 3, 0, 1)
    assert "no video, or cut off before its end" in next(iter(report["causes"]))
    rows = rows_of(tmp_path / "parts")
    good = rows.filter(pa.compute.is_null(rows["error"])).sort_by([("path", "ascending"), ("start", "ascending")])
    index = VideoIndex.create_or_update(
        [videos], tmp_path / "index", encoder, num_workers=0, text_encoder=False
    ).table()
    assert report["moments"] == len(good) == len(index) == 6 + 7
    for name in ("path", "start", "end", "content_hash", "size", "mtime_ns"):
        assert good[name].to_pylist() == index[name].to_pylist(), name
    for name in ("vector", "gate_weights"):  # batches have other neighbours, and sums another order
        np.testing.assert_allclose(as_matrix(good[name]), as_matrix(index[name]), atol=1e-6)
    np.testing.assert_allclose(good["bias"].to_numpy(), index["bias"].to_numpy(), atol=1e-6)
    bad = rows.filter(pa.compute.is_valid(rows["error"])).to_pylist()
    assert [(row["path"], row["vector"]) for row in bad] == [(str(videos / "broken.mp4"), None)]


MANIFESTS = {
    "csv with a byte order mark": ("m.csv", b"\xef\xbb\xbfpath,caption\r\nclip_0.mp4,\"a, b\"\r\nclip_1.mp4,c\r\n"),
    "tsv": ("m.tsv", b"file_name\tcaption\nclip_0.mp4\ta, b\nclip_1.mp4\tc\n"),
    "jsonl with a byte order mark": (
        "m.jsonl",
        b'\xef\xbb\xbf{"video": "clip_0.mp4", "caption": "a, b"}\n\n{"video": "clip_1.mp4", "caption": "c"}\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_is_read_as_it_comes(videos, kind):
    name, content = MANIFESTS[kind]
    (videos / name).write_bytes(content)
    table = read_manifest(videos / name)
    assert table["path"].to_pylist() == [str(videos / "clip_0.mp4"), str(videos / "clip_1.mp4")]
    assert table["caption"].to_pylist() == ["a, b", "c"]


def test_a_parquet_manifest_at_an_address_names_files_beside_it():
    table = pa.table({"path": ["a.mp4", "s3://b/c.mp4", "/d/e.mp4", None, "file:///f.mp4"], "start": [0, 1, 2, 3, 4]})
    with fsspec.open("memory://lists/m.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    found = read_manifest("memory://lists/m.parquet")
    assert found["path"].to_pylist() == ["memory://lists/a.mp4", "s3://b/c.mp4", "/d/e.mp4", None, "/f.mp4"]
    assert found["start"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_columns_that_are_named_otherwise(tmp_path):
    (tmp_path / "m.csv").write_text("clip,from,to,path\na.mp4,1,2.5,x\n")
    found = read_manifest(tmp_path / "m.csv", {"path": "clip", "start": "from", "end": "to"})
    assert found.to_pylist() == [{"path": str(tmp_path / "a.mp4"), "start": 1.0, "end": 2.5}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.csv",
            b"clip,caption\na.mp4,x\n",
            "has no column of paths; it has clip, caption: name it with --path-column",
        ),
        ("m.csv", b"path,vector\na.mp4,1\n", "has a column 'vector', as the result will"),
        ("m.csv", b"path,start\na.mp4,soon\n", "the column 'start' must hold seconds"),
        ("m.csv", b"path,caption\na.mp4,\xff\xfe\n\xff", "is no CSV in UTF-8"),
        ("m.csv", b"path\n", "names no file"),
        ("m.csv", b"", "is no CSV"),
        ("m.jsonl", b'{"path": "a.mp4"}\n{"path": \n', "line 2: no JSON object in UTF-8"),
        ("m.jsonl", b'{"path": "a.mp4", "n": 1}\n{"path": "b.mp4", "n": "x"}\n', "'n' has values of different kinds"),
        ("m.parquet", b"PAR1 and no more", "is no complete Parquet file"),
        ("none.csv", None, "cannot be read"),
        ("none/*.mp4", None, "no file fits"),
        ("none", None, "does not exist"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_one_line(checkpoint, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = mistake(capsys, "encode", tmp_path / name, "--model", checkpoint, "--out", tmp_path / "parts")
    assert message in found and not (tmp_path / "parts").exists()


def test_windows_of_a_manifest_are_its_own_and_each_mistake_is_a_rows(videos, checkpoint, tmp_path, capsys):
    rows = [("clip_5.mp4", 0.5, 1.5), ("clip_5.mp4", 1.0, 0.5), ("none.mp4", None, None), ("", 0.0, 1.0)]
    rows += [("clip_5.mp4", -1.0, 1.0), ("tape://x.mp4", None, None), ("clip_0.mp4", None, None)]
    columns = zip(*rows, strict=True)
    table = pa.table({name: list(values) for name, values in zip(("path", "start", "end"), columns, strict=True)})
    pyarrow.parquet.write_table(table, videos / "m.parquet")
    report = encode(capsys, videos / "m.parquet", checkpoint, tmp_path / "parts")
    assert (report["moments"], report["failed"]) == (2, 5)
    found = rows_of(tmp_path / "parts").to_pylist()
    errors = ["", "the window is empty", "no such file", "names no file", "start is -1.0", "Protocol not known", ""]
    for row, error in zip(found, errors, strict=True):
        assert error in (row["error"] or "") and bool(error) == (row["vector"] is None)
    assert (found[0]["start"], found[0]["end"], found[0]["number"]) == (0.5, 1.5, None)
    assert (found[-1]["start"], found[-1]["end"], found[-1]["number"]) == (0.0, 1.0, 0)


def test_what_is_there_is_not_encoded_again_however_the_manifest_grows(videos, checkpoint, tmp_path, capsys):
    out = tmp_path / "parts"
    names = sorted(path.name for path in videos.iterdir())
    manifest = videos / "m.csv"
    manifest.write_text("path\n" + "\n".join(names[1:4]) + "\n")
    assert encode(capsys, manifest, checkpoint, out, "--files-per-part", 2)["moments"] == 3
    assert encode(capsys, manifest, checkpoint, out, "--files-per-part", 2)["present"] == 3
    manifest.write_text("path\n" + "\n".join(names) + "\n")  # more before and after
    report = encode(capsys, manifest, checkpoint, out, "--files-per-part", 2)
    assert (report["files"], report["moments"], report["present"]) == (3, 3, 3)
    again = encode(capsys, manifest, checkpoint, out, "--files-per-part", 2)
    assert (again["files"], again["present"]) == (0, 6)
    assert sorted(rows_of(out)["path"].to_pylist()) == [str(videos / name) for name in names]


def test_rows_that_name_the_same_window_are_encoded_once_and_counted(videos, checkpoint, tmp_path, capsys):
    """As in a list with a row for each caption."""
    rows = ["clip_0.mp4,a,,", "clip_1.mp4,b,,", "clip_0.mp4,c,,", "clip_0.mp4,d,0,0.5", "clip_0.mp4,e,0,0.5"]
    (videos / "m.csv").write_text("path,caption,start,end\n" + "\n".join(rows) + "\n")
    report = encode(capsys, videos / "m.csv", checkpoint, tmp_path / "parts")
    assert (report["files"], report["moments"], report["repeated"]) == (2, 3, 2)
    assert rows_of(tmp_path / "parts")["caption"].to_pylist() == ["a", "b", "d"]
    again = encode(capsys, videos / "m.csv", checkpoint, tmp_path / "parts")
    assert (again["moments"], again["present"], again["repeated"]) == (0, 3, 2)


def test_shares_of_a_manifest_are_the_whole(videos, checkpoint, tmp_path, capsys):
    for shard in ("0/3", "1/3", "2/3"):
        report = encode(capsys, videos, checkpoint, tmp_path / "parts", "--files-per-part", 1, "--shard", shard)
        assert report["files"] == 2
    assert len(rows_of(tmp_path / "parts")) == 6
    assert encode(capsys, videos, checkpoint, tmp_path / "parts", "--files-per-part", 1)["present"] == 6


def test_rows_that_failed_are_tried_again_on_demand_in_their_part(videos, checkpoint, tmp_path, capsys):
    out, gone = tmp_path / "parts", videos / "clip_2.mp4"
    (videos / "m.csv").write_text("path\n" + "".join(f"clip_{i}.mp4\n" for i in range(6)))
    content = gone.read_bytes()
    gone.unlink()
    assert encode(capsys, videos / "m.csv", checkpoint, out)["failed"] == 1
    before = rows_of(out)
    gone.write_bytes(content)
    assert encode(capsys, videos / "m.csv", checkpoint, out)["present"] == 6
    report = encode(capsys, videos / "m.csv", checkpoint, out, "--retry")
    assert (report["files"], report["failed"], report["present"]) == (1, 0, 5)
    after = rows_of(out)
    assert len(list(out.iterdir())) == 1 and len(after) == 6
    assert sorted(after["path"].to_pylist()) == sorted(before["path"].to_pylist())
    assert after["error"].null_count == 6


def test_parts_of_another_model_or_other_settings_are_refused(videos, checkpoint, tmp_path, capsys):
    encode(capsys, videos, checkpoint, tmp_path / "parts")
    arguments = ["encode", videos, "--model", checkpoint, "--out", tmp_path / "parts"]
    assert "give another --out" in mistake(capsys, *arguments, "--dtype", "float16")


def test_half_precision_is_what_is_stored(videos, checkpoint, tmp_path, capsys):
    encode(capsys, videos, checkpoint, tmp_path / "half", "--dtype", "float16")
    encode(capsys, videos, checkpoint, tmp_path / "full")
    half, full = (as_matrix(rows_of(tmp_path / name)["vector"]) for name in ("half", "full"))
    assert half.dtype == np.float16 and np.array_equal(half, full.astype(np.float16))


def test_a_part_that_was_cut_short_is_named(videos, checkpoint, tmp_path, capsys):
    encode(capsys, videos, checkpoint, tmp_path / "parts")
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:-100])
    found = mistake(capsys, "encode", videos, "--model", checkpoint, "--out", tmp_path / "parts")
    assert f"{part} was cut short" in found and "delete it" in found
    part.unlink()
    assert encode(capsys, videos, checkpoint, tmp_path / "parts")["moments"] == 6


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_of_a_part(
    videos, checkpoint, tmp_path, capsys, monkeypatch
):
    write = pyarrow.parquet.ParquetWriter.write_table
    written = []

    def fill(self, table, *args, **kwargs):
        written.append(len(table))
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return write(self, table, *args, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_table", fill)
    arguments = ["encode", videos, "--model", checkpoint, "--out", tmp_path / "parts", "--num-workers", 0]
    found = mistake(capsys, *arguments, "--files-per-part", 2)
    assert "No space left on device" in found and "make room" in found
    assert len(list((tmp_path / "parts").iterdir())) == 1  # the first part, and nothing else
    monkeypatch.undo()
    assert encode(capsys, videos, checkpoint, tmp_path / "parts", "--files-per-part", 2)["present"] == 2


def test_parts_and_videos_may_be_at_addresses(videos, checkpoint, tmp_path, capsys):
    system = fsspec.filesystem("memory")
    for path in videos.iterdir():
        system.pipe_file(f"/clips/{path.name}", path.read_bytes())
    report = encode(capsys, "memory://clips/*.mp4", checkpoint, "memory://out/parts", "--files-per-part", 4)
    assert (report["moments"], report["parts"]) == (6, 2)
    assert encode(capsys, "memory://clips", checkpoint, "memory://out/parts", "--files-per-part", 4)["present"] == 6
    encode(capsys, videos, checkpoint, tmp_path / "parts", "--files-per-part", 4)
    local = rows_of(tmp_path / "parts")
    names = sorted(system.ls("/out/parts", detail=False))
    remote = pa.concat_tables([pyarrow.parquet.read_table(system.open(name)) for name in names]).sort_by("path")
    assert np.array_equal(as_matrix(remote["vector"]), as_matrix(local.sort_by("path")["vector"]))
    assert remote["path"].to_pylist() == [f"memory://clips/clip_{i}.mp4" for i in range(6)]


def test_a_killed_run_goes_on_and_has_every_clip_once(videos, checkpoint, tmp_path, capsys):
    for i in range(60):
        write_video(videos / f"more_{i:02}.mp4", 12)
    out = tmp_path / "parts"
    command = ["encode", str(videos), "--model", str(checkpoint), "--out", str(out), "--files-per-part", "4"]
    command += ["--num-workers", "1", "--device", "cpu", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-m", "camoe_search", *command], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(out.glob("part-*"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(out.glob("part-*")))
    assert 3 <= before < 17
    report = encode(capsys, videos, checkpoint, out, "--files-per-part", 4)
    assert report["present"] == 4 * before and report["moments"] == 66 - 4 * before
    rows = rows_of(out)
    assert sorted(rows["path"].to_pylist()) == sorted(map(str, videos.iterdir())) and not list(out.glob(".part-*"))
    assert rows["content_hash"].to_pylist() == [content_hash(path) for path in rows["path"].to_pylist()]


def test_the_folder_of_parts_is_no_file(videos, checkpoint, tmp_path, capsys):
    (tmp_path / "parts").write_text("notes")
    found = mistake(capsys, "encode", videos, "--model", checkpoint, "--out", tmp_path / "parts")
    assert f"{tmp_path}/parts is a file" in found
    assert "is a file" in mistake(capsys, "load", tmp_path / "parts", "--index", tmp_path / "i")


def test_a_number_of_decoders_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["encode", "m.csv", "--model", "m", "--out", "o", "--num-workers", "-1"])
    assert ended.value.code == 2 and "'-1' is not a whole number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["encode", "m.csv", "--model", "m", "--out", "o", "--shard", text])
    assert "of the form I/N" in capsys.readouterr().err


def test_a_time_that_is_none_is_refused(videos, checkpoint, tmp_path, capsys):
    arguments = ["encode", videos, "--model", checkpoint, "--out", tmp_path / "parts"]
    assert "--window is -1" in mistake(capsys, *arguments, "--window", -1)
    assert "--stride needs a --window" in mistake(capsys, *arguments, "--stride", 1)


def test_ray_that_is_not_installed_is_named(videos, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["encode", videos, "--model", checkpoint, "--out", tmp_path / "parts", "--engine", "ray"]
    assert 'pip install "camoe[cluster]"' in mistake(capsys, *arguments)
