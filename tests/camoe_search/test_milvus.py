# SPDX-License-Identifier: Apache-2.0
"""An index in Milvus (the embedded milvus-lite) compared with the folder that it is a copy of."""

import json

import pytest

from camoe_search import milvus_store
from camoe_search.cli import main
from camoe_search.errors import SearchError
from camoe_search.files import cut_windows
from camoe_search.index import VideoIndex
from camoe_search.milvus_collection import settings
from camoe_search.milvus_store import MilvusStore
from camoe_search.schemas import SearchBody
from camoe_search.service import SearchService
from camoe_search.writer import IndexWriter, StoredWindow
from tests.camoe_search.random_index import make_index, moment, random_bank, random_index, random_texts, random_videos
from tests.camoe_search.scenes import SceneEncoder, overlaps, scene_vector, vector_index


pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

COUNT = 40


def copy_to(folder, uri, source="one", collection="camoe", **options) -> tuple[int, int]:
    """Bring a collection up to date with an index folder: rows written, rows deleted."""
    with IndexWriter(folder) as writer:
        milvus = settings(str(uri), collection, source, str(folder), **options)
        writer.describe(milvus=writer.description.milvus or milvus | {"id": f"id of {source}"})
        store = MilvusStore(writer.description.milvus["uri"], collection)
        try:
            return store.update(writer)
        finally:
            store.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("local") / "index", COUNT)


@pytest.fixture(scope="module", params=["folded", "column"])
def milvus(request, tmp_path_factory):
    """The same vectors in a database."""
    folder = tmp_path_factory.mktemp("milvus")
    random_index(folder / "index", COUNT)
    assert copy_to(folder / "index", folder / "videos.db", bias=request.param) == (COUNT, 0)
    index = VideoIndex.connect(str(folder / "videos.db"))
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
def test_the_ranking_equals_that_of_the_folder_and_takes_one_request(local, milvus, options, monkeypatch):
    requests = []
    for name in ("search", "query", "get"):
        call = getattr(pymilvus.MilvusClient, name)
        monkeypatch.setattr(
            pymilvus.MilvusClient, name, lambda *a, call=call, **o: requests.append(1) or call(*a, **o)
        )
    texts = random_texts(12).numpy()
    found, expected = milvus.search_vectors(texts, COUNT, **options), local.search_vectors(texts, COUNT, **options)
    assert len(requests) == 1
    assert places(found) == places(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-6)


def test_a_moment_and_its_expert_scores_are_found_by_key(local, milvus):
    text = random_texts(1).numpy()
    ours, theirs = milvus.search_vectors(text, 1)[0][0], local.search_vectors(text, 1)[0][0]
    assert milvus.store.locate(ours.key) == ours._replace(score=0.0)
    assert milvus.expert_scores(text[0], ours.key) == pytest.approx(local.expert_scores(text[0], theirs.key), abs=1e-6)
    with pytest.raises(KeyError):
        milvus.store.locate('x" or key like "%')
    with pytest.raises(SearchError, match="Milvus gives 16384 results at most"):
        milvus.search_vectors(text, 20_000)


def test_the_page_finds_moments_in_milvus_by_key(local, milvus):
    text = random_texts(1).numpy()
    service, best = SearchService("films", milvus, page_size=3), milvus.search_vectors(text, 1)[0][0]
    found = service.search(SearchBody(like=best.key)).hits
    expected = local.search_similar(local.search_vectors(text, 1)[0][0].key, 3)
    assert [f"{hit.folder}/{hit.name}" for hit in found] == [hit.path for hit in expected]
    assert service.locate(found[0].key).path == expected[0].path
    for key in ("0", 'x" or key like "%', f"other.{best.key}"):
        with pytest.raises(SearchError, match="not in the index"):
            service.locate(key)


def test_a_path_filter_matches_special_characters_literally(tmp_path):
    names = ["/50%.mp4", "/50x.mp4", "/a_b.mp4", "/axb.mp4", '/quo"te.mp4', "/quo'te/back\\slash.mp4", "/été.mp4"]
    with make_index(tmp_path / "index") as writer:
        moments = [StoredWindow(name[1:], 0.0, 1.0, 1, 1, f"{i:032x}") for i, name in enumerate(names)]
        writer.add_moments("/v", moments, random_videos(len(names))[0].numpy())
    copy_to(tmp_path / "index", tmp_path / "videos.db")
    for index in (VideoIndex(tmp_path / "index"), VideoIndex.connect(str(tmp_path / "videos.db"))):
        for wanted in ("50%", "a_b", 'quo"te', "quo'te", "back\\slash", "été", "ÉTÉ"):
            hits = index.search_vectors(random_texts(1).numpy(), path=wanted)[0]
            assert sorted(hit.path for hit in hits) == [f"/v{name}" for name in names if wanted.lower() in name]
        index.close()


def test_windows_become_moments_and_what_needs_the_folder_is_an_error(tmp_path):
    films = {
        path: [(s, e, scene_vector([7 if 100 <= s + (i + 0.5) * 10 / 12 < 125 else 1 for i in range(12)]) * share)
               for s, e in cut_windows(240.0)]
        for path, share in (("a.mp4", 1.0), ("b.mp4", 0.5))
    }  # fmt: skip
    vector_index(tmp_path / "index", films).close()
    copy_to(tmp_path / "index", tmp_path / "videos.db")
    index = VideoIndex.connect(str(tmp_path / "videos.db"), model=SceneEncoder(str(tmp_path)))
    hits = index.search("scene 7", k=20)
    assert [(hit.path, hit.start, hit.end) for hit in hits[:2]] == [
        ("/films/a.mp4", 100.0, 125.0),
        ("/films/b.mp4", 100.0, 125.0),
    ]
    assert len(hits) > 2 and overlaps(hits) == 0 < overlaps(index.search("scene 7", k=20, merge=False))
    grouped = index.search("scene 7", group_by="file", min_score=0.4)
    assert [(hit.path, [moment.start for moment in hit.moments]) for hit in grouped] == [
        ("/films/a.mp4", [100.0]),
        ("/films/b.mp4", [100.0]),
    ]
    for option, value in (("then", "scene 1"), ("words", True), ("glob", "*.mp4"), ("where", "year=2020")):
        with pytest.raises(SearchError, match=f"^{option} .*folder"):
            index.search("scene 7", **{option: value})
    index.close()


def test_two_folders_share_a_collection_and_each_changes_only_its_own_rows(tmp_path, local):
    vectors = random_videos(COUNT)[0].numpy()
    for name, rows in (("one", range(25)), ("two", range(25, COUNT))):
        with make_index(tmp_path / name) as writer:
            writer.add_moments("/videos", [moment(i) for i in rows], vectors[rows.start : rows.stop])
    uri = tmp_path / "videos.db"
    assert copy_to(tmp_path / "one", uri, "one") == (25, 0) and copy_to(tmp_path / "two", uri, "two") == (
        COUNT - 25,
        0,
    )
    assert copy_to(tmp_path / "one", uri) == (0, 0)
    text = random_texts(1).numpy()

    def found():
        index = VideoIndex.connect(str(uri))
        hits = index.search_vectors(text, COUNT)
        index.close()
        return places(hits)

    assert found() == places(local.search_vectors(text, COUNT))
    VideoIndex(tmp_path / "one").remove([f"*/{i:03}.mp4" for i in range(5)])  # sends what changed, too
    assert [[hit for hit in found()[0] if hit[1] < 5]] == [[]] and len(found()[0]) == COUNT - 5
    # A lost folder: its rows go by name, and those of the other stay.
    main(["remove", "--source", "one", "--uri", str(uri)])
    assert len(found()[0]) == COUNT - 25
    with pytest.raises(SearchError, match="has no source 'one'; it has: two"):
        MilvusStore(str(uri)).remove_source("one")


@pytest.mark.parametrize(
    ("name", "value"), [("sampling", "keyframe"), ("num_frames", 3), ("weights", "of another model"), ("tau", 0.2)]
)
def test_what_gives_a_vector_or_a_bias_its_meaning_must_agree(tmp_path, name, value):
    uri = tmp_path / "videos.db"
    random_index(tmp_path / "one")
    copy_to(tmp_path / "one", uri, "one")
    random_index(tmp_path / "two")
    with IndexWriter(tmp_path / "two") as writer:
        if name == "tau":
            writer.set_bank(random_bank(value))
        else:
            writer.describe(**{name: value})
    with pytest.raises(SearchError, match=f"is shared, and was made with {name} .*not {value}: name another"):
        copy_to(tmp_path / "two", uri, "two")
    with pytest.raises(SearchError, match="rows of another index by the name one: .*camoe remove --source one"):
        with IndexWriter(tmp_path / "two") as writer:
            writer.describe(milvus=settings(str(uri), None, "one", "two") | {"id": "another"})
            MilvusStore(str(uri)).update(writer)


def test_another_bank_of_the_only_source_is_sent(tmp_path):
    uri = tmp_path / "videos.db"
    random_index(tmp_path / "one")
    copy_to(tmp_path / "one", uri)
    with IndexWriter(tmp_path / "one") as writer:
        writer.set_bank(random_bank(0.2))
    assert copy_to(tmp_path / "one", uri) == (COUNT, 0)
    text, index = random_texts(1).numpy(), VideoIndex.connect(str(uri))
    assert places(index.search_vectors(text)) == places(VideoIndex(tmp_path / "one").search_vectors(text))
    index.close()


@pytest.mark.parametrize("kind", ["HNSW", "HNSW_SQ", "IVF_FLAT"])
def test_other_index_types_are_made_as_asked(tmp_path, kind, monkeypatch):
    made, create = [], pymilvus.MilvusClient.create_collection

    def spy(client, name, **options):
        made.append((options["consistency_level"], [index.to_dict() for index in options["index_params"]]))
        return create(client, name, **options)

    monkeypatch.setattr(pymilvus.MilvusClient, "create_collection", spy)
    random_index(tmp_path / "one")
    params = {"nlist": 4} if kind == "IVF_FLAT" else {"M": 8, "efConstruction": 64}
    copy_to(tmp_path / "one", tmp_path / "videos.db", index_type=kind, params=params)
    consistency, indexes = made[1]
    fields = {index["field_name"]: index for index in indexes}
    assert consistency == "Bounded" and fields.keys() == {"vector", "path_lower", "source"}
    assert (fields["vector"]["index_type"], fields["source"]["index_type"]) == (kind, "INVERTED")
    assert params.items() <= fields["vector"].get("params", fields["vector"]).items()
    index = VideoIndex.connect(str(tmp_path / "videos.db"))
    assert len(index.search_vectors(random_texts(1).numpy(), 10)[0]) == 10
    index.close()


def test_a_path_of_too_many_bytes_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    with make_index(tmp_path / "index") as writer:
        names = ["short.mp4", "é" * 4000 + ".mp4", "犬" * 3000 + ".mp4"]  # 3,000 characters, 9,000 bytes
        moments = [StoredWindow(name, 0.0, 1.0, 1, 1, f"{i:032x}") for i, name in enumerate(names)]
        writer.add_moments("/v", moments, random_videos(3)[0].numpy())
    monkeypatch.setattr(MilvusStore, "_rows", lambda *a: pytest.fail("it sends rows"))
    with pytest.raises(SearchError, match="a path is longer than 8192 bytes; nothing was sent: /v/犬犬"):
        copy_to(tmp_path / "index", tmp_path / "videos.db")


def run(capsys, *arguments) -> str:
    main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_commands_index_and_search_in_milvus(videos, checkpoint, tmp_path, capsys):
    """Files are added, changed, renamed, removed, and the index calibrated: results always equal the folder's."""
    folder, uri = tmp_path / "index", tmp_path / "videos.db"
    index = ["index", videos, "--index", folder, "--num-workers", "0", "--no-text-tower", "--json"]
    place = ["--store", "milvus", "--uri", uri, "--source", "here"]
    query = ["search", "a red star spins", "--json", "--device", "cpu"]

    def agree():
        rows = json.loads(run(capsys, *query, "--index", folder))
        found = json.loads(run(capsys, *query, "--uri", uri))
        assert [(row["path"], row["start"]) for row in found] == [(row["path"], row["start"]) for row in rows]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in rows], abs=1e-6)
        return rows

    report = json.loads(run(capsys, *index, "--model", checkpoint, *place))
    assert (report["written"], report["deleted"], report["moments"]) == (6, 0, 6) and len(agree()) == 6
    (videos / "clip_1.mp4").unlink()
    (videos / "clip_2.mp4").rename(videos / "renamed.mp4")
    report = json.loads(run(capsys, *index, "--prune"))  # the index knows its collection
    assert report["deleted"] == 2 and report["written"] >= 1 and len(agree()) == 5
    (tmp_path / "log.txt").write_text("a blue disc\ntwo kids\n")
    run(capsys, "calibrate", "--bank", tmp_path / "log.txt", "--index", folder)
    agree()
    run(capsys, *index, "--model", checkpoint, "--rebuild", *place, "--bank", tmp_path / "log.txt")
    assert len(agree()) == 5  # its rows replaced the old ones
    run(capsys, "remove", videos / "clip_3.mp4", "--index", folder)
    assert len(agree()) == 4


def test_the_next_run_sends_what_a_killed_run_did_not(videos, checkpoint, tmp_path, capsys, monkeypatch):
    command = ["index", videos, "--model", checkpoint, "--index", tmp_path / "index", "--num-workers", "0", "--json"]
    command += ["--store", "milvus", "--uri", tmp_path / "videos.db", "--no-text-tower"]
    upsert, sent = pymilvus.MilvusClient.upsert, []

    def interrupted(client, collection, rows):
        if collection == "camoe":
            if sent:
                raise KeyboardInterrupt
            sent.append(rows)
        return upsert(client, collection, rows)

    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", interrupted)
    monkeypatch.setattr(milvus_store, "BATCH_BYTES", 1)  # one row per request
    with pytest.raises(SystemExit) as stop:
        run(capsys, *command)
    assert stop.value.code == 130
    capsys.readouterr()
    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", upsert)
    report = json.loads(run(capsys, *command))
    assert (report["unchanged"], report["written"]) == (6, 5)  # one row was sent before


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
    # Nothing was made or encoded for an address that does not answer.
    assert f"Milvus cannot open {nobody}" in error_line(*index, "--store", "milvus", "--uri", nobody)
    assert not (tmp_path / "index" / "index.sqlite").exists()
