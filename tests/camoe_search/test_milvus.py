# SPDX-License-Identifier: Apache-2.0
"""An index in Milvus (the embedded milvus-lite) compared with a flat FAISS index of the same vectors."""

import dataclasses
import json

import pytest

from camoe_search.cli import main
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.milvus_store import MilvusStore
from camoe_search.serve import SearchService
from tests.camoe_search.random_index import random_index, random_texts


pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

COUNT = 40


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("flat") / "index", COUNT)


@pytest.fixture(scope="module")
def milvus(flat, tmp_path_factory):
    """The same vectors in a database."""
    uri = str(tmp_path_factory.mktemp("milvus") / "videos.db")
    store = MilvusStore(uri)
    description = dataclasses.replace(flat.description, store="milvus", uri=uri, collection="camoe", source="one")
    assert store.update(description, flat.moments.data.table) == (COUNT, 0)
    index = VideoIndex(None, store=store)
    yield index
    index.close()


def places(found):
    return [[(hit.path, hit.start, hit.end) for hit in hits] for hits in found]


@pytest.mark.parametrize(
    "options",
    [
        {"correction": "none"},
        {"correction": "query_bank"},
        {"correction": "dynamic"},
        {"experts": {"action": 2.0, "scene": 0.0}},
        {"path": "VIDEOS/1", "min_seconds": 5, "max_seconds": 30},
        {"path": "nothing_%"},
    ],
)
def test_the_ranking_equals_that_of_the_flat_index(flat, milvus, options):
    texts = random_texts(12).numpy()
    expected, found = (index.search_vectors(texts, COUNT, **options) for index in (flat, milvus))
    assert places(found) == places(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-6)


def test_a_moment_and_its_expert_scores_are_found_by_key(flat, milvus):
    text = random_texts(1).numpy()
    ours, theirs = milvus.search_vectors(text, 1)[0][0], flat.search_vectors(text, 1)[0][0]
    assert milvus.store.locate(ours.row) == ours._replace(score=0.0)
    assert milvus.expert_scores(text[0], ours.row) == pytest.approx(flat.expert_scores(text[0], theirs.row), abs=1e-6)
    with pytest.raises(KeyError):
        milvus.store.locate('x" or key like "%')
    with pytest.raises(SearchError, match="Milvus gives 16384 results at most"):
        milvus.search_vectors(text, 20_000)


def test_the_page_finds_moments_in_milvus_by_key(flat, milvus):
    service, best = SearchService(milvus, page_size=3), milvus.search_vectors(random_texts(1).numpy(), 1)[0][0]
    found = service.search({"like": f"milvus.{best.row}"})["hits"]
    row = next(i for i, path in enumerate(flat.moments["path"]) if path == best.path)
    expected = flat.search_similar(row, 3)
    assert [f"{hit['folder']}/{hit['name']}" for hit in found] == [hit.path for hit in expected]
    assert service.locate(found[0]["key"]).path == expected[0].path
    for key in ("milvus.0", 'milvus.x" or key like "%', f"other.{best.row}", best.row):
        with pytest.raises(SearchError, match="not in the index"):
            service.locate(key)


def test_a_path_filter_matches_special_characters_literally(tmp_path, flat):
    uri = str(tmp_path / "videos.db")
    description = dataclasses.replace(flat.description, store="milvus", uri=uri, collection="camoe")
    table = flat.moments.data.table.slice(0, 7)
    names = ["/50%.mp4", "/50x.mp4", "/a_b.mp4", "/axb.mp4", '/quo"te.mp4', "/quo'te/back\\slash.mp4", "/été.mp4"]
    table = table.set_column(table.schema.get_field_index("path"), "path", [names])
    store = MilvusStore(uri)
    store.update(description, table)
    index = VideoIndex(None, store=store)
    for wanted in ("50%", "a_b", 'quo"te', "quo'te", "back\\slash", "été", "ÉTÉ"):
        hits = index.search_vectors(random_texts(1).numpy(), path=wanted)[0]
        assert sorted(hit.path for hit in hits) == [name for name in names if wanted.lower() in name]
    store.close()


def test_two_folders_share_a_collection_and_each_changes_only_its_own_rows(tmp_path, flat):
    uri = str(tmp_path / "videos.db")
    one, two = (
        dataclasses.replace(flat.description, store="milvus", uri=uri, collection="films", source=source)
        for source in ("one", "two")
    )
    table = flat.moments.data.table
    store = MilvusStore(uri, "films")
    assert store.update(one, table.slice(0, 25)) == (25, 0)
    assert store.update(two, table.slice(25)) == (COUNT - 25, 0)
    assert store.update(one, table.slice(0, 25)) == (0, 0) and len(store) == COUNT
    text = random_texts(1).numpy()
    index = VideoIndex(None, store=store)
    assert places(index.search_vectors(text, COUNT)) == places(flat.search_vectors(text, COUNT))
    assert store.update(one, table.slice(5, 20)) == (0, 5) and len(store) == COUNT - 5
    other = dataclasses.replace(two, weights="of another model")
    with pytest.raises(SearchError, match="holds vectors of nowhere .*not of nowhere: name another with --collection"):
        store.update(other, table)
    store.close()


def run(capsys, *arguments) -> str:
    main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_commands_index_and_search_in_milvus(videos, checkpoint, tmp_path, capsys):
    """Files are added, changed, removed, and the index calibrated: results always equal those of a flat index."""
    flat, milvus, uri = tmp_path / "flat", tmp_path / "milvus", tmp_path / "videos.db"
    settings = ["--model", checkpoint, "--num-workers", "0"]
    place = ["--store", "milvus", "--uri", uri]
    query = ["search", "a red star spins", "--json"]

    def agree():
        rows = json.loads(run(capsys, *query, "--index", flat))
        for opened in (["--index", milvus], ["--uri", uri]):
            found = json.loads(run(capsys, *query, *opened))
            assert [(row["path"], row["start"]) for row in found] == [(row["path"], row["start"]) for row in rows]
            assert [row["score"] for row in found] == pytest.approx([row["score"] for row in rows], abs=1e-6)
        return rows

    run(capsys, "index", videos, "--index", flat, *settings)
    report = json.loads(run(capsys, "index", videos, "--index", milvus, *settings, *place, "--json"))
    assert (report["written"], report["deleted"], report["moments"]) == (6, 0, 6) and len(agree()) == 6
    assert not list(milvus.glob("generation-*/vectors.faiss"))

    (videos / "clip_1.mp4").unlink()
    (videos / "clip_2.mp4").rename(videos / "renamed.mp4")
    for folder in (flat, milvus):  # later runs find the store in the folder
        report = json.loads(run(capsys, "index", videos, "--index", folder, "--prune", *settings[2:], "--json"))
    assert report["deleted"] == 2 and report["written"] >= 1 and len(agree()) == 5

    (tmp_path / "log.txt").write_text("a blue disc\ntwo kids\n")
    for folder in (flat, milvus):
        run(capsys, "calibrate", "--queries", tmp_path / "log.txt", "--index", folder)
    agree()
    run(capsys, "index", videos, "--index", milvus, "--rebuild", *settings, *place, "--queries", tmp_path / "log.txt")
    agree()  # its rows replaced the old ones
    index = VideoIndex.load(milvus, device="cpu")
    assert index.remove([videos / "clip_3.mp4"]) == 1 and len(index.search("a star")) == 4
    index.add([videos / "clip_3.mp4"], num_workers=0)
    index.close()
    agree()


def test_the_next_run_sends_what_a_killed_run_did_not(videos, checkpoint, tmp_path, capsys, monkeypatch):
    command = ["index", videos, "--model", checkpoint, "--index", tmp_path / "index", "--num-workers", "0", "--json"]
    command += ["--store", "milvus", "--uri", tmp_path / "videos.db"]
    upsert, sent = pymilvus.MilvusClient.upsert, []

    def interrupted(client, collection, rows):
        if collection == "camoe" and len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(rows)
        return upsert(client, collection, rows)

    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", interrupted)
    monkeypatch.setattr("camoe_search.milvus_store.BATCH_BYTES", 1)  # one row per request
    with pytest.raises(SystemExit) as stop:
        run(capsys, *command)
    assert stop.value.code == 130
    capsys.readouterr()
    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", upsert)
    report = json.loads(run(capsys, *command))
    assert (report["unchanged"], report["written"]) == (6, 5)  # one row was sent, and the description


def test_mistakes_are_one_line_each(tmp_path, checkpoint, videos, capsys, monkeypatch):
    def error_line(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    index = ["index", videos, "--model", checkpoint, "--index", tmp_path / "index", "--num-workers", "0"]
    assert "needs --uri" in error_line(*index, "--store", "milvus")
    assert "give --store milvus" in error_line(*index, "--uri", "videos.db")
    assert "has no collection" in error_line("search", "a star", "--uri", tmp_path / "empty.db")
    assert "--index DIR, or --uri" in error_line("search", "a star")
    assert "one of them" in error_line("search", "a star", "--index", tmp_path, "--uri", "videos.db")
    nobody = "http://127.0.0.1:1"
    monkeypatch.setattr("camoe_search.milvus_store.TIMEOUT", 0.5)
    assert f"Milvus cannot open {nobody}" in error_line("search", "a star", "--uri", nobody)
