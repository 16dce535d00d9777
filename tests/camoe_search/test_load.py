# SPDX-License-Identifier: Apache-2.0
"""Parts into an index, into Milvus, to the Hub and back: nothing is encoded, and nothing is lost or there twice."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from camoe_search.cli import main
from camoe_search.columns import as_matrix
from camoe_search.index import VideoIndex
from tests.camoe_search.test_encode import mistake, rows_of
from tests.camoe_search.test_push import hub  # noqa: F401
from tests.video_files import write_video


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="session")
def library(some_videos, tmp_path_factory):
    """Clips, one of 40 s, two of the same content, and one that is none."""
    folder = shutil.copytree(some_videos, tmp_path_factory.mktemp("library") / "videos")
    write_video(folder / "long.mp4", 40 * 4, fps=4)
    shutil.copy(folder / "clip_1.mp4", folder / "same.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    return folder


@pytest.fixture(scope="session")
def encoded(library, checkpoint, tmp_path_factory):
    """Its parts."""
    out = tmp_path_factory.mktemp("encoded") / "parts"
    command = ["encode", str(library), "--model", str(checkpoint), "--out", str(out), "--files-per-part", "4"]
    main([*command, "--num-workers", "0", "--device", "cpu"])
    return out


@pytest.fixture
def parts(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "parts")


def load(capsys, parts, *options) -> dict:
    capsys.readouterr()
    main(["load", str(parts), "--json", *map(str, options)])
    return json.loads(capsys.readouterr().out)


def test_loaded_parts_are_the_index_of_the_folder(library, parts, encoder, tmp_path, capsys):
    report = load(capsys, parts, "--index", tmp_path / "loaded")
    built = VideoIndex.create_or_update([library], tmp_path / "built", encoder, num_workers=0)
    loaded = VideoIndex.load(tmp_path / "loaded", encoder)
    ours, theirs = loaded.table(), built.table()
    for name in ("path", "start", "end", "size", "mtime_ns", "content_hash", "key"):
        assert ours[name].to_pylist() == theirs[name].to_pylist(), name
    for name in ("vector", "gate_weights"):
        np.testing.assert_allclose(as_matrix(ours[name]), as_matrix(theirs[name]), atol=1e-6)
    np.testing.assert_allclose(ours["bias"].to_numpy(), theirs["bias"].to_numpy(), atol=1e-6)
    windows = len(ours) - 1  # the same content is there once
    assert (report["added"], report["present"], report["failed"], report["moments"]) == (windows, 0, 1, windows)
    assert [entry["path"] for entry in loaded.skipped()] == [str(library / "broken.mp4")]
    queries = ["a dog", "two kids play"]
    for one, other in zip(loaded.search_batch(queries), built.search_batch(queries), strict=True):
        assert [hit.path for hit in one] == [hit.path for hit in other]

    again = VideoIndex.create_or_update(
        [library], tmp_path / "loaded", encoder, num_workers=0
    )  # it goes on as an index
    assert (again.report.unchanged, again.report.encoded) == (9, 0)


def test_loading_again_adds_what_is_new(library, parts, tmp_path, capsys):
    files = sorted(parts.iterdir(), key=lambda path: -path.stat().st_size)
    rest = tmp_path / "rest"
    rest.mkdir()
    files[0].rename(rest / files[0].name)
    first = load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    (rest / files[0].name).rename(files[0])
    second = load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    third = load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    assert 0 < first["added"] < second["moments"] and second["present"] == first["added"]
    assert (third["added"], third["present"], third["moments"]) == (0, second["moments"], second["moments"])


def test_a_file_that_is_readable_now_takes_the_place_of_its_error(library, parts, checkpoint, tmp_path, capsys):
    load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    videos = shutil.copytree(library, tmp_path / "videos")
    broken = library / "broken.mp4"
    content = broken.read_bytes()
    try:
        shutil.copy(videos / "clip_2.mp4", broken)
        options = ["--model", str(checkpoint), "--out", str(parts), "--num-workers", "0", "--files-per-part", "4"]
        main(["encode", str(library), *options, "--retry", "--device", "cpu"])
        report = load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    finally:
        broken.write_bytes(content)
    index = VideoIndex.load(tmp_path / "i")
    assert report["failed"] == 0 and index.skipped() == []
    assert str(broken) in index.table()["path"].to_pylist()


def test_windows_that_a_manifest_gave_are_loaded_as_they_are(library, checkpoint, tmp_path, capsys):
    (library / "m.csv").write_text("path,start,end\nlong.mp4,3,5\nlong.mp4,1,2.5\nlong.mp4,50,60\nclip_0.mp4,,\n")
    try:
        options = ["--model", str(checkpoint), "--out", str(tmp_path / "p"), "--num-workers", "0", "--device", "cpu"]
        main(["encode", str(library / "m.csv"), *options])
    finally:
        (library / "m.csv").unlink()
    report = load(capsys, tmp_path / "p", "--index", tmp_path / "i", "--no-text-tower")
    assert (report["added"], report["failed"]) == (3, 1)
    index = VideoIndex.load(tmp_path / "i")
    found = index.table().select(["path", "start", "end"]).to_pylist()
    assert [(row["path"][-8:], row["start"], row["end"]) for row in found] == [
        ("ip_0.mp4", 0.0, 1.0), ("long.mp4", 3.0, 5.0), ("long.mp4", 1.0, 2.5),
    ]  # fmt: skip
    (skipped,) = index.skipped()
    assert "the window starts at 50" in skipped["cause"] and (skipped["start"], skipped["end"]) == (50.0, 60.0)


def test_a_new_query_bank_is_part_of_loading(library, parts, encoder, tmp_path, capsys):
    texts = ["a dog", "two kids play", "a car"]
    (tmp_path / "log.txt").write_text("\n".join(texts) + "\n")
    load(capsys, parts, "--index", tmp_path / "one", "--bank", tmp_path / "log.txt", "--tau", 0.02)
    built = VideoIndex.create_or_update([library], tmp_path / "built", encoder, num_workers=0, text_encoder=False)
    built.calibrate(texts, 0.02)
    load(capsys, parts, "--index", tmp_path / "two")  # and into an index that is there
    before = VideoIndex.load(tmp_path / "two").table()["bias"].to_numpy()
    report = load(capsys, parts, "--index", tmp_path / "two", "--bank", tmp_path / "log.txt", "--tau", 0.02)
    assert report["added"] == 0
    for name in ("one", "two"):
        index = VideoIndex.load(tmp_path / name)
        assert index.info()["query_bank"] == built.info()["query_bank"] and index.info()["query_bank"]["queries"] == 3
        found, wanted = (each.table()["bias"].to_numpy() for each in (index, built))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert not np.allclose(found, before, atol=1e-3)


def test_parts_at_addresses_keep_the_addresses(library, checkpoint, tmp_path, capsys):
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("a/clip_0.mp4", "a/clip_1.mp4", "b/c/clip_2.mp4"):
        system.pipe_file(f"/bucket/{name}", (library / name.rpartition("/")[2]).read_bytes())
    rows = ["memory://bucket/a/clip_0.mp4", "memory://bucket/b/c/clip_2.mp4", str(library / "clip_1.mp4")]
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(rows) + "\n")
    options = ["--model", str(checkpoint), "--out", "memory://bucket/parts", "--num-workers", "0", "--device", "cpu"]
    main(["encode", str(tmp_path / "m.csv"), *options])
    report = load(capsys, "memory://bucket/parts", "--index", tmp_path / "i", "--no-text-tower")
    index = VideoIndex.load(tmp_path / "i")
    assert report["added"] == 3 and sorted(index.table()["path"].to_pylist()) == sorted(rows)
    assert set(index.info()["roots"]) == {"memory://bucket", str(library)}


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_one_line(parts, tmp_path, capsys):
    index = ["--index", tmp_path / "i"]
    (tmp_path / "empty").mkdir()
    assert "has no parts" in mistake(capsys, "load", tmp_path / "empty", *index)
    assert "give the folder of the index" in mistake(capsys, "load", parts)
    pyarrow.parquet.write_table(pa.table({"path": ["a"]}), parts / "part-x.parquet")
    assert "does not say how it was made" in mistake(capsys, "load", parts, *index)
    (parts / "part-x.parquet").write_bytes(b"PAR1 cut")
    assert "was cut short" in mistake(capsys, "load", parts, *index)
    (parts / "part-x.parquet").write_bytes(b"no part" * 9 + b"PAR1")
    assert "is damaged" in mistake(capsys, "load", parts, *index)
    assert not (tmp_path / "i").exists()


def test_parts_do_not_go_into_an_index_of_other_settings(library, parts, encoder, tmp_path, capsys):
    VideoIndex.create_or_update([library], tmp_path / "i", encoder, num_workers=0, text_encoder=False, dtype="float16")
    found = mistake(capsys, "load", parts, "--index", tmp_path / "i")
    assert "was made with dtype float16, the parts with float32" in found


# --- data sets -------------------------------------------------------------------------------------------------------


def test_parts_are_a_data_set_with_types(parts):
    data = datasets.load_dataset("parquet", data_files=str(parts / "*.parquet"), split="train")
    assert data.features["vector"] == datasets.List(datasets.Value("float32"), length=64)
    assert data.features["gate_weights"] == datasets.List(datasets.Value("float32"), length=4)
    assert data.features["start"] == datasets.Value("float64") and data.features["error"] == datasets.Value("string")
    assert len(data) == len(rows_of(parts))


@pytest.mark.slow
def test_a_published_data_set_is_searched_without_encoding(hub, parts, library, encoder, tmp_path, capsys):  # noqa: F811
    main(["push", str(parts), "me/films"])
    assert "me/films" in capsys.readouterr().out
    files = hub.files("datasets/me/films")
    names = {path.name for path in parts.iterdir()}
    assert names < set(files) and hub.repositories["datasets/me/films"].private
    card = files["README.md"].decode()
    assert f"{len(rows_of(parts))} moments" in card and "camoe load me/films" in card
    report = load(capsys, "me/films", "--index", tmp_path / "i", "--model", encoder.name)
    direct = load(capsys, parts, "--index", tmp_path / "direct", "--model", encoder.name)
    assert report["added"] == direct["added"] > 0
    ours, theirs = (VideoIndex.load(tmp_path / name, encoder).search("a dog") for name in ("i", "direct"))
    assert [(hit.path, hit.start) for hit in ours] == [(hit.path, hit.start) for hit in theirs]


# --- Milvus ----------------------------------------------------------------------------------------------------------


def test_parts_in_milvus_are_found_as_in_the_index(parts, encoder, tmp_path, capsys):
    pytest.importorskip("milvus_lite", reason="the embedded server of the extra `milvus`")
    uri = str(tmp_path / "milvus.db")
    options = ["--store", "milvus", "--uri", uri]
    report = load(capsys, parts, *options)
    again = load(capsys, parts, *options)
    count = rows_of(parts)["error"].null_count
    assert (report["added"], report["present"], report["failed"]) == (count, 0, 1)
    assert (again["added"], again["present"], again["moments"]) == (0, count, count)
    load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower")
    index, milvus = VideoIndex.load(tmp_path / "i", encoder), VideoIndex.connect(uri, model=encoder)
    for query in ("a dog", "two kids play"):
        ours, theirs = (each.search(query, k=5, merge=False) for each in (milvus, index))
        np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-5)
    milvus.close()


def test_a_new_query_bank_gives_the_rows_in_milvus_their_bias(parts, encoder, tmp_path, capsys):
    pytest.importorskip("milvus_lite", reason="the embedded server of the extra `milvus`")
    (tmp_path / "log.txt").write_text("a dog\ntwo kids play\n")
    bank = ["--bank", tmp_path / "log.txt", "--tau", 0.02]
    uri = str(tmp_path / "milvus.db")
    load(capsys, parts, "--store", "milvus", "--uri", uri, *bank)
    load(capsys, parts, "--index", tmp_path / "i", "--no-text-tower", *bank)
    index, milvus = VideoIndex.load(tmp_path / "i", encoder), VideoIndex.connect(uri, model=encoder)
    ours, theirs = (each.search("a car", k=5, merge=False) for each in (milvus, index))
    np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-5)
    milvus.close()
