# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set -> clips: windows, names, and what is refused. Rows stay on disk, captions are tagged once for
all runs, videos in a table are read when needed."""

import json
import pickle

import datasets
import pytest

from data import captioned_clips
from data.captioned_clips import ArrowColumn, load_split, read_captioned_clips
from data.errors import UserError
from modeling_camoe.captions import SpacyTagger


@pytest.fixture
def tagged(monkeypatch, tmp_path):
    """Counts the captions that are tagged; the cache of data sets is a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    count, original = [], captioned_clips.caption_streams

    def counted(captions, *arguments):
        count.extend(captions)
        return original(captions, *arguments)

    monkeypatch.setattr(captioned_clips, "caption_streams", counted)
    return count


def write_table(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


ROWS = [{"video": f"v{n}.mp4", "captions": [f"a dog number {n} runs", "a cat"], "start": 1.0 * n} for n in range(30)]


def read(folder, limit=None, experts=("fusion", "entity"), tagger="none"):
    return read_captioned_clips(load_split(folder, "train", limit=limit), experts, tagger, root="/videos")


def test_a_second_run_tags_no_caption_and_reads_the_same(tmp_path, tagged):
    folder = write_table(tmp_path / "data", ROWS)
    first = read(folder)
    assert len(tagged) == 60
    tagged.clear()
    second = read(folder)
    assert tagged == []
    assert second.flat("all") == first.flat("all") and second.captions[3] == ["a dog number 3 runs", "a cat"]
    assert second.clips[3].source == "/videos/v3.mp4" and second.clips[3].start == 3.0


def test_other_experts_taggers_rules_or_rows_are_tagged_again(tmp_path, tagged, monkeypatch):
    folder = write_table(tmp_path / "data", ROWS)
    read(folder)
    for change in ({"experts": ("fusion",)}, {"limit": 20}, {"tagger": SpacyTagger()}):
        tagged.clear()
        read(folder, **change)
        assert len(tagged) == 2 * change.get("limit", 30)
    monkeypatch.setattr(captioned_clips, "rules_version", lambda tagger: ["another"])
    tagged.clear()
    read(folder)
    assert len(tagged) == 60


def test_a_column_reads_rows_one_by_one_and_follows_a_selection(tmp_path, tagged):
    data = load_split(write_table(tmp_path / "data", ROWS), "train").select([5, 2, 9])
    column = ArrowColumn(data, ["video", "start"], lambda row, *values: (row, *values))
    assert list(column) == [(0, "v5.mp4", 5.0), (1, "v2.mp4", 2.0), (2, "v9.mp4", 9.0)]
    assert column[-1] == column[2] and column[:2] == list(column)[:2]
    with pytest.raises(IndexError):
        column[3]
    clips = read_captioned_clips(data, ["fusion"], None)
    assert clips.video_ids[1] == "v2@2-" and clips.captions[2][0] == "a dog number 9 runs"
    assert clips.caption_counts.tolist() == [2, 2, 2]


def test_a_split_on_disk_is_sent_to_a_worker_as_a_path(tmp_path, tagged):
    clips = read(write_table(tmp_path / "data", ROWS * 1 + [{**ROWS[0], "video": f"w{n}.mp4"} for n in range(3000)]))
    clips.captions[0]
    copy = pickle.loads(pickle.dumps(clips))
    assert copy.captions[3029] == clips.captions[3029]
    assert len(pickle.dumps(clips.captions)) < 20_000


def test_videos_in_a_table_are_read_one_at_a_time(tmp_path, tagged, monkeypatch):
    videos = [{"bytes": bytes([n]) * 1000, "path": None} for n in range(8)]
    rows = {"video": videos, "caption": [f"clip {n}" for n in range(8)]}
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    clips = read(str(tmp_path / "data"))
    loaded = []
    original = captioned_clips._source_of
    monkeypatch.setattr(
        captioned_clips, "_source_of", lambda value, *rest: loaded.append(value) or original(value, *rest)
    )
    assert clips.clips[5].source == bytes([5]) * 1000 and len(loaded) == 1
    assert clips.video_ids[5] == "000005"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["a dog", " "]}, "row 7 of the data set has an empty caption in column 'captions'"),
        ({"captions": []}, "row 7 of the data set has an empty caption"),
        ({"video": "v3.mp4", "start": 3.0}, "video id 'v3@3-' appears twice"),
        ({"video": ""}, "row 7 of the data set has no video in column 'video'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, tagged, change, message):
    rows = [dict(row) for row in ROWS]
    rows[7] |= change
    with pytest.raises(UserError, match=message):
        read(write_table(tmp_path / "data", rows))


def read_rows(**columns):
    count = len(columns["video"])
    table = datasets.Dataset.from_dict({"captions": [[f"a dog {n}"] for n in range(count)], **columns})
    return read_captioned_clips(table, ["fusion"], None)


def test_windows_of_one_video_are_clips_with_names_of_their_own():
    split = read_rows(video=["a/x.mp4"] * 3 + ["y.mp4"], start=[0.0, 2.5, 4.0, None], end=[2.5, 4.0, None, None])
    assert list(split.video_ids) == ["x@0-2.5", "x@2.5-4", "x@4-", "y"]
    assert [(clip.start, clip.end) for clip in split.clips] == [(0.0, 2.5), (2.5, 4.0), (4.0, None), (None, None)]


def test_the_same_window_twice_is_refused():
    with pytest.raises(UserError, match="'x@0-2' appears twice.*each window of one, one row"):
        read_rows(video=["x.mp4", "x.mp4"], start=[0.0, 0.0], end=[2.0, 2.0])


@pytest.mark.parametrize("start", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_named_with_its_row(start):
    with pytest.raises(UserError, match="row 1 of the data set has .* as 'start': give seconds, 0 or more"):
        read_rows(video=["x.mp4", "y.mp4"], start=[0.0, start], end=[2.0, 2.0])


def test_a_stream_that_is_the_caption_takes_no_space_and_reads_as_it(tmp_path, tagged):
    def tagger(caption):
        return {"entity": "dog" if "dog" in caption else ""}

    clips = read(write_table(tmp_path / "data", ROWS), tagger=tagger)
    assert clips.streams[4] == [["a dog number 4 runs", "dog"], ["a cat", "a cat"]]
    stored = clips.streams.data.data.column("streams")[4].as_py()
    assert stored == [[None, "dog"], [None, None]]
