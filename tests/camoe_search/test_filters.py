# SPDX-License-Identifier: Apache-2.0
"""Filters by what is beside a video and in its header; subtitles; indexes from before all that."""

import json
import os
import shutil
import sqlite3
from datetime import date, datetime

import pytest

from camoe_search.database import FILE, connect, has_table
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.sidecars import read_subtitles
from tests.camoe_search.random_index import random_index, random_texts
from tests.camoe_search.scenes import SIZE, SceneEncoder, build, write_film
from tests.video_files import index_picture, write_video


ROWS = [
    {"file_name": "2019/a.mp4", "year": 2019, "place": "Rome", "day": "2019-07-01", "tags": ["sea", "sun"]},
    {"file_name": "2020/b.mp4", "year": 2020, "place": "rome", "day": "2020-01-15", "indoors": True},
    {"file_name": "2020/c.mp4", "year": "2021", "place": "Ostia", "camera": {"name": "X1"}, "note": None},
]


@pytest.fixture
def videos(tmp_path):
    """Four files of different lengths, sizes and times; three have metadata."""
    folder = tmp_path / "videos"
    for name in ("2019", "2020"):
        (folder / name).mkdir(parents=True)
    write_film(folder / "2019" / "a.mp4", [(1, 4)])
    write_film(folder / "2020" / "b.mp4", [(2, 6)])
    write_film(folder / "2020" / "c.mp4", [(3, 12)])
    pictures = [index_picture(4, 160, 120)] * 4
    write_video(folder / "d.mp4", 4, 2, (160, 120), pictures=pictures)
    for number, name in enumerate(("2019/a.mp4", "2020/b.mp4", "2020/c.mp4", "d.mp4")):
        when = datetime(2024, 1 + number, 1, 12).timestamp()
        os.utime(folder / name, (when, when))
    write_metadata(folder, ROWS)
    return folder


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def encoder(tmp_path):
    return SceneEncoder(str(tmp_path))


@pytest.fixture
def index(videos, tmp_path, encoder):
    return build(videos, tmp_path / "index", encoder)


def found(index, **filters) -> str:
    return "".join(sorted(os.path.basename(hit.path)[0] for hit in index.search("scene 1", **filters)))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"glob": "2020/*.mp4"}, "bc"),
        ({"glob": "*/[ad].mp4"}, "ad"),
        ({"glob": "[!ad].mp4"}, "bc"),
        ({"path": "B.MP4"}, "b"),
        ({"min_duration": 5}, "bc"),
        ({"min_duration": 3, "max_duration": 7}, "ab"),
        ({"min_resolution": 100}, "d"),
        ({"max_resolution": SIZE[1]}, "abc"),
        ({"after": "2024-02-01"}, "bcd"),
        ({"after": date(2024, 3, 1), "before": "2024-04-01"}, "c"),
        ({"before": "2024-02-01T12:00"}, "a"),
        ({"after": datetime(2024, 4, 1, 13)}, ""),
        ({"where": "year>=2020"}, "bc"),
        ({"where": ["year > 2019", "place=ROME"]}, "b"),
        ({"where": {"place": "Rome"}}, "ab"),
        ({"where": "place!=Rome"}, "c"),
        ({"where": "day<2020"}, "a"),
        ({"where": "tags=sun"}, "a"),
        ({"where": "tags!=sun"}, ""),
        ({"where": "indoors=true"}, "b"),
        ({"where": "camera.name=x1"}, "c"),
        ({"where": "year>=2020", "glob": "2020/*", "max_duration": 7}, "b"),
    ],
)
def test_filters_leave_exactly_these_files(index, filters, expected):
    assert found(index, **filters) == expected
    assert found(index, merge=False, **filters) == expected


def test_a_filter_that_makes_no_sense_is_an_error(index):
    with pytest.raises(SearchError, match="did you mean year?"):
        found(index, where="yeer=2020")
    with pytest.raises(SearchError, match="such as year>=2020"):
        found(index, where="2020")
    with pytest.raises(SearchError, match="2024-13-01.* is not a date"):
        found(index, after="2024-13-01")


def test_metadata_follows_its_file(index, videos, encoder):
    write_metadata(videos, [ROWS[0] | {"place": "Paris"}, {"file_name": "d.mp4", "year": 2030}])
    report = index.add([videos], num_workers=0, text_encoder=False)
    assert report.encoded == 0
    assert found(index, where="place=Paris") == "a" and found(index, where="year>=2020") == "d"
    write_metadata(videos / "2019", [{"file_name": "a.mp4", "place": "Oslo"}])  # the inner one has the last word
    shutil.move(videos / "d.mp4", videos / "eclipse.mp4")
    index.add([videos], num_workers=0, text_encoder=False)
    assert found(index, where="place=Oslo") == "a" and found(index, where="year=2019") == "a"
    with pytest.raises(SearchError, match="place"):
        found(index, where="plaice=Oslo")
    assert found(index, words=True) == "abce"
    assert index.search("eclipse scene 9", words=True)[0].path.endswith("eclipse.mp4")
    index.remove([videos / "2019"])
    for table in ("metadata", "texts", "sidecars"):
        assert index.store.select(f"SELECT count(*) FROM {table} WHERE file NOT IN (SELECT id FROM files)") == [(0,)]
    assert index.store.select("SELECT count(*) FROM metadata WHERE value = 'Oslo'") == [(0,)]
    assert not index.store.select("SELECT 1 FROM words WHERE words MATCH 'oslo'")


def test_an_unchanged_sidecar_is_not_read_again(index, videos, monkeypatch):
    monkeypatch.setattr("camoe_search.sidecars._texts_of", None)
    index.add([videos], num_workers=0, text_encoder=False)


def test_odd_metadata_is_left_out_and_the_rest_stays(videos, tmp_path, encoder):
    lines = [
        "[1, 2]",
        "{",
        '{"file_name": 3}',
        "",
        '{"file_name": "2019/a.mp4", "year": 1e400, "x": "\\ud800", "n": 7}',
    ]
    (videos / "metadata.jsonl").write_text("\n".join(lines))
    index = build(videos, tmp_path / "index", encoder)
    assert found(index, where="n=7") == "a"
    assert found(index, where=f"n<{10**30}") == "a"


def test_subtitles_of_all_sorts_are_read(tmp_path):
    file = tmp_path / "film.srt"
    file.write_bytes(
        "\ufeff1\r\n00:00:01,500 --> 00:00:03,000\r\n{\\an8}Good <b>day</b>\r\nto you\r\n\r\n"
        "2\r\n01:00:00,000 --> 01:00:01,000\r\n\r\n3\r\n00:00:09,000 --> 00:00:05,000\r\nbackwards\r\n".encode()
    )
    assert read_subtitles(file) == [(1.5, 3.0, "Good day to you")]
    file = tmp_path / "film.vtt"
    file.write_text(
        "WEBVTT\n\nNOTE no cue\n\nintro\n00:01.000 --> 00:02.250 align:start\n<v Anna>Tea &amp; cake</v>\n"
        "00:03.000 --> 00:04.000\nno blank line before",
    )
    assert read_subtitles(file) == [(1.0, 2.25, "Tea & cake"), (3.0, 4.0, "no blank line before")]
    (tmp_path / "old.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nCaf\xe9\n".encode("cp1252"))
    assert read_subtitles(tmp_path / "old.srt") == [(1.0, 2.0, "Café")]
    (tmp_path / "wide.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nČaj\n".encode("utf-16"))
    assert read_subtitles(tmp_path / "wide.srt") == [(1.0, 2.0, "Čaj")]
    (tmp_path / "noise.srt").write_bytes(bytes(range(256)) * 10)
    assert read_subtitles(tmp_path / "noise.srt") == [] == read_subtitles(tmp_path / "missing.srt")


# --- an index from before --------------------------------------------------------------------------------------------


def make_old(folder):
    """Take away what an earlier version of the same format did not have."""
    with sqlite3.connect(folder / FILE) as connection:
        for trigger in ("content_removed", "file_removed", "text_added", "text_removed"):
            connection.execute(f"DROP TRIGGER {trigger}")
        for table in ("words", "texts", "metadata", "pictures", "sidecars"):
            connection.execute(f"DROP TABLE {table}")
        ((text,),) = connection.execute("SELECT value FROM settings WHERE name = 'description'")
    assert "windows" not in json.loads(text)  # which an earlier version would not know
    connection.close()


def test_an_index_from_before_is_searched_and_gets_what_it_lacks_when_it_is_updated(index, videos, encoder):
    index.close()
    make_old(index.folder)
    old = VideoIndex(index.folder, encoder)
    assert found(old) == "abcd" and found(old, glob="2020/*", min_duration=7) == "c"
    for options in ({"where": "year=2019"}, {"min_resolution": 10}, {"words": True}):
        with pytest.raises(SearchError, match="camoe index --index DIR` adds"):
            found(old, **options)
    assert not has_table(old.store.connection, "words")
    report = old.add([], num_workers=0, text_encoder=False)
    assert report.encoded == 0
    assert found(old, where="year=2019") == "a" and found(old, min_resolution=100) == "d"
    assert old.search("x1 scene 9", words=True)[0].path.endswith("c.mp4")


def test_what_needs_the_folder_is_an_error_in_milvus():
    from camoe_search.filters import make_filters
    from camoe_search.milvus_collection import filter_expression

    with pytest.raises(SearchError, match="glob cannot be a filter in Milvus"):
        filter_expression(make_filters(glob="*.mp4"))
    assert filter_expression(make_filters(min_seconds=2)) == "seconds >= 2.0"


def test_opening_to_write_changes_an_old_index_once(tmp_path):
    index = random_index(tmp_path / "index")
    index.close()
    make_old(tmp_path / "index")
    for _ in range(2):
        with connect(tmp_path / "index", write=True) as connection:
            assert has_table(connection, "words")
        connection.close()
    assert len(VideoIndex(tmp_path / "index").search_vectors(random_texts(1).numpy(), 5)[0]) == 5
