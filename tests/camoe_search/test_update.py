# SPDX-License-Identifier: Apache-2.0
"""Building and updating an index of real files."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from camoe_search import contents, database, update
from camoe_search.encoder import CAMoEEncoder
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.writer import IndexWriter
from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.frames import Clip
from tests.video_files import cut_off, spoil, write_audio, write_video


QUERY = "a red star spins"
OPTIONS = {"num_workers": 0, "batch_size": 2, "text_encoder": False}


def build_index(videos, folder, encoder, **options) -> VideoIndex:
    return VideoIndex.create_or_update([videos], folder, encoder, **OPTIONS | options)


def content(index) -> dict:
    """Every column by (name, start)."""
    return {(Path(row["path"]).name, row["start"]): row for row in index.table().to_pylist()}


def file_names(index) -> list[str]:
    return [Path(path).name for path in index.table()["path"].to_pylist()]


@pytest.fixture
def encoded_clips(monkeypatch):
    """Names of the clips encoded from here on."""
    names, encode_clips = [], CAMoEEncoder.encode_clips

    def spy(self, clips, *options):
        names.extend(Path(clip.source).name for clip in clips)
        return encode_clips(self, clips, *options)

    monkeypatch.setattr(CAMoEEncoder, "encode_clips", spy)
    return names


def test_scores_are_those_of_the_model(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    paths = sorted(str(path) for path in videos.iterdir())
    vectors = encode_videos(encoder.model, encoder.processor, paths, batch_size=2).vectors
    expected = (encode_texts(encoder.model, encoder.processor, [QUERY]) @ vectors.T)[0]
    hits = index.search(QUERY, k=6, correction="none")
    assert [hit.path for hit in hits] == [paths[i] for i in expected.argsort(descending=True)]
    np.testing.assert_allclose([hit.score for hit in hits], expected.sort(descending=True).values, atol=1e-6)


def test_the_progress_bar_shows_files_throughput_and_time_left(videos, tmp_path, encoder, capfd):
    build_index(videos, tmp_path / "index", encoder, progress=True)
    bars = [bar for bar in capfd.readouterr().err.split("\r") if bar.startswith("index:")]
    assert re.search(r"6/6 \[\d\d:\d\d<\d\d:\d\d, .*moment/s, 6 files, [\d.e-]+ h of video/s\]", bars[-1]), bars


def test_a_loaded_index_uses_the_model_it_names(videos, tmp_path, encoder):
    hits = build_index(videos, tmp_path / "index", encoder).search(QUERY)
    assert VideoIndex.load(tmp_path / "index", device="cpu").search(QUERY) == hits


def test_a_video_is_most_like_itself(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    best = index.search_like(str(videos / "clip_3.mp4"))[0]
    assert Path(best.path).name == "clip_3.mp4" and best.score == pytest.approx(1, abs=1e-5)


def test_every_window_is_a_moment(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder, window=1, stride=0.5)
    times = [(row["start"], row["end"]) for row in index.table().to_pylist() if row["path"].endswith("clip_5.mp4")]
    assert times == [(0, 1), (0.5, 1.5), (1, 2)] and len(index) == 5 + 3
    second_half = index.search_like(Clip(str(videos / "clip_5.mp4"), 1, 2), k=1)[0]
    assert (Path(second_half.path).name, second_half.start) == ("clip_5.mp4", 1)


def test_only_new_and_changed_files_are_encoded(videos, tmp_path, encoder, encoded_clips):
    build_index(videos, tmp_path / "index", encoder)
    assert encoded_clips == [f"clip_{i}.mp4" for i in range(6)]
    encoded_clips.clear()
    os.utime(videos / "clip_0.mp4", (1, 1))  # new modification time, same content
    write_video(videos / "clip_1.mp4", 20)
    write_video(videos / "new.mp4", 12)
    (videos / "clip_2.mp4").unlink()
    index = build_index(videos, tmp_path / "index", encoder)
    assert encoded_clips == ["clip_1.mp4", "new.mp4"]
    report = index.report
    assert (report.added, report.changed, report.moved, report.unchanged, report.dropped) == (1, 1, 0, 4, 0)
    assert "clip_2.mp4" in file_names(index)  # no --prune
    index = build_index(videos, tmp_path / "index", encoder, prune=True)
    assert index.report.dropped == 1 and "clip_2.mp4" not in file_names(index) and len(index) == 6


def test_an_incremental_index_equals_one_made_in_a_single_run(videos, tmp_path, encoder):
    late = [(videos / f"clip_{i}.mp4") for i in (1, 4)]
    away = tmp_path / "away"
    away.mkdir()
    for path in late:
        path.rename(away / path.name)
    index = build_index(videos, tmp_path / "steps", encoder)
    for path in late:
        (away / path.name).rename(path)
    index.add([videos], **OPTIONS)
    expected = content(build_index(videos, tmp_path / "at once", encoder))
    _assert_same_content(content(index), expected)


def test_removing_files_and_adding_them_again_restores_the_index(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    before, hits = content(index), index.search(QUERY)
    third = [videos / "clip_2.mp4", videos / "clip_3.mp4"]
    assert index.remove(third) == 2 and len(index) == 4
    assert {Path(hit.path).name for hit in index.search(QUERY)}.isdisjoint({"clip_2.mp4", "clip_3.mp4"})
    index.add(third, **OPTIONS)
    _assert_same_content(content(index), before)
    assert [(hit.path, hit.start) for hit in index.search(QUERY)] == [(hit.path, hit.start) for hit in hits]


def _assert_same_content(one: dict, other: dict, but: tuple[str, ...] = ()):
    """Equal up to rounding: files may be encoded in other batches."""
    assert one.keys() == other.keys()
    for key, row in one.items():
        for name, value in row.items():
            if name in but:
                continue
            if name in ("vector", "gate_weights", "bias"):
                np.testing.assert_allclose(value, other[key][name], atol=1e-6)
            else:
                assert value == other[key][name], (key, name)


def test_removing_a_folder_keeps_a_file_whose_name_begins_the_same(videos, tmp_path, encoder):
    (videos / "sub").mkdir()
    (videos / "clip_0.mp4").rename(videos / "sub" / "clip_0.mp4")
    (videos / "clip_1.mp4").rename(videos / "sub.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    assert index.remove([videos / "sub"]) == 1 and "sub.mp4" in file_names(index)


def test_unreadable_files_are_listed_and_the_others_indexed(videos, tmp_path, encoder):
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("this is no video\n" * 100)
    cut_off(write_video(videos / "broken.mp4", 48))
    write_audio(videos / "audio.mp4")
    (videos / "notes.txt").write_text("no video")
    (videos / "loop").symlink_to(videos)
    index = build_index(videos, tmp_path / "index", encoder)
    assert file_names(index) == [f"clip_{i}.mp4" for i in range(6)] and index.report.added == 6
    assert index.report.not_videos == {".txt": 1}
    skipped = index.skipped()
    assert [Path(entry["path"]).name for entry in skipped] == ["audio.mp4", "broken.mp4", "empty.mp4", "text.mp4"]
    assert all(Path(entry["path"]).name in entry["cause"] for entry in skipped) and index.report.skipped == skipped

    (videos / "empty.mp4").unlink()
    write_video(videos / "broken.mp4", 12)  # now readable
    index = build_index(videos, tmp_path / "index", encoder)
    assert "broken.mp4" in file_names(index)
    assert sorted(Path(entry["path"]).name for entry in index.report.skipped) == ["audio.mp4", "text.mp4"]


def test_a_folder_without_videos_gives_an_empty_index(tmp_path, encoder):
    (tmp_path / "empty").mkdir()
    index = build_index(tmp_path / "empty", tmp_path / "index", encoder)
    assert len(index) == 0 and index.search(QUERY) == [] and index.info()["moments"] == 0


def test_a_file_that_changes_while_it_is_read_is_skipped_and_listed(videos, tmp_path, encoder, monkeypatch):
    is_unchanged = update.is_unchanged

    def change_then_look(video):
        if video.path.endswith("clip_4.mp4"):
            write_video(videos / "clip_4.mp4", 20)
        return is_unchanged(video)

    monkeypatch.setattr(update, "is_unchanged", change_then_look)
    index = build_index(videos, tmp_path / "index", encoder)
    assert "clip_4.mp4" not in file_names(index) and len(index) == 5
    assert [entry["cause"].split(": ")[1] for entry in index.report.skipped] == [
        "it changed while it was being read; index again"
    ]
    monkeypatch.undo()
    assert len(build_index(videos, tmp_path / "index", encoder)) == 6


def test_unreadable_files_are_read_again_on_demand_only(videos, tmp_path, encoder, monkeypatch, encoded_clips):
    from modeling_camoe.frames import VideoDecodingError

    probe = contents.probe_video
    probed = []

    def failing(path):
        probed.append(Path(path).name)
        if path.endswith("clip_1.mp4"):
            raise VideoDecodingError(f"{path}: the share was away")
        return probe(path)

    monkeypatch.setattr(contents, "probe_video", failing)
    index = build_index(videos, tmp_path / "index", encoder)
    assert len(index) == 5 and "the share was away" in index.report.skipped[0]["cause"]
    monkeypatch.setattr(contents, "probe_video", probe)
    assert len(build_index(videos, tmp_path / "index", encoder)) == 5
    encoded_clips.clear()
    index = build_index(videos, tmp_path / "index", encoder, retry=True)
    assert len(index) == 6 and index.skipped() == [] and encoded_clips == ["clip_1.mp4"]


def test_moments_of_damaged_files_are_made_on_demand_and_counted(videos, tmp_path, encoder):
    def write_damaged(name, first=6):
        spoil(write_video(videos / name, 72, gop=24, size=(128, 96)), first, 24)  # the first of two frames

    write_damaged("damaged.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    assert len(index) == 6 and "damaged.mp4: damaged at" in index.report.skipped[0]["cause"]
    assert index.info()["on_damage"] == "error" and index.report.damaged == 0
    index = build_index(videos, tmp_path / "index", encoder, on_damage="around", retry=True)
    assert len(index) == 7 and (index.report.encoded, index.report.damaged) == (1, 1)
    write_damaged("another.mp4", first=8)
    index = build_index(videos, tmp_path / "index", encoder)  # the index remembers it
    assert len(index) == 8 and (index.report.encoded, index.report.damaged) == (1, 1)
    assert index.info()["on_damage"] == "around"
    with pytest.raises(SearchError, match="on_damage is 'skip': choose error or around"):
        build_index(videos, tmp_path / "index", encoder, on_damage="skip")


# --- files that move -------------------------------------------------------------------------------------------------


def test_renamed_moved_and_copied_files_are_not_encoded_again(videos, tmp_path, encoder, encoded_clips):
    before = content(build_index(videos, tmp_path / "index", encoder))
    encoded_clips.clear()
    (videos / "sub").mkdir()
    (videos / "clip_0.mp4").rename(videos / "renamed.mp4")
    (videos / "clip_1.mp4").rename(videos / "sub" / "clip_1.mp4")
    shutil.copy(videos / "clip_2.mp4", videos / "copy.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    report = index.report
    assert (report.added, report.moved, report.unchanged, report.dropped) == (1, 2, 4, 0) and encoded_clips == []
    assert sorted(file_names(index)) == sorted(["renamed.mp4", "copy.mp4", *(f"clip_{i}.mp4" for i in range(1, 6))])
    now = content(index)
    for new, old in (("renamed", "clip_0"), ("clip_1", "clip_1"), ("copy", "clip_2")):
        assert now[f"{new}.mp4", 0]["vector"] == before[f"{old}.mp4", 0]["vector"]
        assert os.path.isfile(now[f"{new}.mp4", 0]["path"])
    vector, options = np.array([before["clip_2.mp4", 0]["vector"]]), {"k": 2, "correction": "none"}
    merged = index.search_vectors(vector, **options)[0]
    assert [Path(path).name for path in merged[0].paths] == ["clip_2.mp4", "copy.mp4"]
    assert Path(merged[1].path).name not in ("clip_2.mp4", "copy.mp4")
    hits = index.search_vectors(vector, merge=False, **options)[0]
    assert [Path(hit.path).name for hit in hits] == ["clip_2.mp4", "copy.mp4"] and hits[0].score == hits[1].score


def test_a_moved_library_costs_no_clip_and_no_hash(videos, tmp_path, encoder, encoded_clips, monkeypatch):
    index = build_index(videos, tmp_path / "index", encoder)
    before, hits = content(index), index.search(QUERY)
    encoded_clips.clear()
    videos.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(contents, "content_hash", lambda path: pytest.fail("it read a file"))
    index = build_index(tmp_path / "elsewhere", tmp_path / "index", encoder)
    assert index.report.moved == 6 and encoded_clips == [] and index.info()["roots"] == [str(tmp_path / "elsewhere")]
    assert [(hit.key, hit.score) for hit in index.search(QUERY)] == [(hit.key, hit.score) for hit in hits]
    for key, row in content(index).items():
        assert row | {"path": ""} == before[key] | {"path": ""} and os.path.isfile(row["path"])


def test_a_renamed_file_whose_old_name_holds_another_video_keeps_its_moments(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    (videos / "clip_0.mp4").rename(videos / "renamed.mp4")
    write_video(videos / "clip_0.mp4", 36)
    index = build_index(videos, tmp_path / "index", encoder)
    assert sorted(file_names(index)) == sorted(["renamed.mp4", *(f"clip_{i}.mp4" for i in range(6))])


def test_a_copy_keeps_the_moments_when_the_original_is_removed(videos, tmp_path, encoder):
    shutil.copy(videos / "clip_2.mp4", videos / "copy.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    assert len(index) == 7 and index.remove([videos / "clip_2.mp4"]) == 0
    assert "copy.mp4" in file_names(index) and len(index) == 6
    assert index.remove([videos / "copy.mp4"]) == 1 and len(index) == 5


# --- what is given ---------------------------------------------------------------------------------------------------


def test_excluded_files_and_folders_are_left_out_and_the_index_remembers(videos, tmp_path, encoder):
    (videos / ".trash").mkdir()
    shutil.copy(videos / "clip_0.mp4", videos / ".trash" / "old.mp4")
    (videos / "sub").mkdir()
    write_video(videos / "sub" / "draft.mp4", 10)
    index = build_index(videos, tmp_path / "index", encoder, exclude=[".trash", "clip_1*", "sub/draft.mp4"])
    assert file_names(index) == [f"clip_{i}.mp4" for i in (0, 2, 3, 4, 5)]
    assert len(VideoIndex.create_or_update([], tmp_path / "index", encoder, **OPTIONS)) == 5
    index = build_index(videos, tmp_path / "index", encoder, exclude=["clip_[23]*"], prune=True)
    assert sorted(file_names(index)) == [
        "clip_0.mp4",
        "clip_1.mp4",
        "clip_4.mp4",
        "clip_5.mp4",
        "draft.mp4",
        "old.mp4",
    ]


def test_without_paths_the_known_folders_are_indexed(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    write_video(videos / "new.mp4", 12)
    (videos / "clip_0.mp4").unlink()
    index = VideoIndex.create_or_update([], tmp_path / "index", encoder, prune=True, **OPTIONS)
    assert (index.report.added, index.report.dropped) == (1, 1) and len(index) == 6


def test_files_that_share_nothing_but_the_root_of_all_are_known_when_they_are_given_again(
    videos, tmp_path, encoder, monkeypatch
):
    monkeypatch.setattr("camoe_search.plan.os.path.commonpath", lambda paths: os.sep)  # one of them on another disk
    paths = [videos / "clip_0.mp4", videos / "clip_1.mp4"]
    for _ in range(2):
        index = VideoIndex.create_or_update(paths, tmp_path / "index", encoder, **OPTIONS)
    assert index.info()["roots"] == [os.sep] and index.report.unchanged == 2
    assert sorted(index.table()["path"].to_pylist()) == [str(path) for path in paths]


def test_pruning_does_not_take_an_empty_mount_point_for_an_empty_folder(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    videos.rename(tmp_path / "away")
    videos.mkdir()
    with pytest.raises(SearchError, match="has no video now, and had 6: is it mounted"):
        build_index(videos, tmp_path / "index", encoder, prune=True)
    assert len(VideoIndex.load(tmp_path / "index")) == 6


def test_removing_takes_files_folders_and_patterns_and_names_what_fits_nothing(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    with pytest.raises(SearchError, match=r"fits \*/clip_9.mp4; nothing was removed"):
        index.remove([videos / "clip_0.mp4", "*/clip_9.mp4"])
    assert len(index) == 6 and index.remove(["*/clip_[12].mp4", videos / "clip_5.mp4"]) == 3
    assert file_names(index) == ["clip_0.mp4", "clip_3.mp4", "clip_4.mp4"]
    assert index.remove([videos]) == 3 and index.info()["roots"] == []


def test_many_removed_rows_are_compacted_while_a_reader_has_them_mapped(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder, window=1, stride=0.25)
    old = VideoIndex.load(tmp_path / "index", encoder)
    with old.store.state() as rows:
        mapped = rows.parts[0].vectors
        first = mapped[0].copy()
    before = content(index)
    assert index.remove([videos / "clip_5.mp4", videos / "clip_0.mp4"]) == 6
    assert index.info()["dead_rows"] == 0 and not (tmp_path / "index" / "segment-000001.vectors").exists()
    left = {key: row for key, row in before.items() if key[0][5] not in "05"}
    _assert_same_content(content(index), left, but=("is_hub",))  # others are the best of what is left
    assert (mapped[0] == first).all()
    assert old.search(QUERY) == index.search(QUERY)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_an_index_of_an_earlier_version_is_refused_with_the_command(videos, tmp_path, encoder):
    old = tmp_path / "index"
    (old / "generation-1").mkdir(parents=True)
    (old / "index.json").write_text("{}")
    for use in (lambda: VideoIndex.load(old), lambda: build_index(videos, old, encoder)):
        with pytest.raises(SearchError, match=f"earlier version: make it again with `camoe index .*{old} --rebuild`"):
            use()
    assert len(build_index(videos, old, encoder, rebuild=True)) == 6
    assert not (old / "index.json").exists() and not (old / "generation-1").exists()


def test_two_processes_cannot_write_at_the_same_time(videos, tmp_path, encoder):
    with database.write_lock(tmp_path / "index"), pytest.raises(SearchError, match="another process"):
        build_index(videos, tmp_path / "index", encoder)


def test_another_model_is_refused(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    with torch.no_grad():
        encoder.model.clip.logit_scale.add_(0.1)
    other = CAMoEEncoder("other", encoder.model, encoder.processor)
    for use in (
        lambda: VideoIndex.load(tmp_path / "index", other),
        lambda: build_index(videos, tmp_path / "index", other),
    ):
        with pytest.raises(SearchError, match="made with .*, but other has weights"):
            use()
    assert len(build_index(videos, tmp_path / "index", other, rebuild=True, queries=[QUERY], tau=0.1)) == 6


def test_other_settings_are_refused_and_the_index_keeps_its_own(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder, window=1)
    with pytest.raises(SearchError, match="made with window 1"):
        build_index(videos, tmp_path / "index", encoder, window=2)
    assert build_index(videos, tmp_path / "index", encoder).description.window == 1


def test_key_frame_sampling_is_kept_for_later_runs(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder.name, sampling="keyframe", device="cpu")
    assert index.description.sampling == "keyframe"
    again = VideoIndex.create_or_update([videos], tmp_path / "index", device="cpu", **OPTIONS)
    assert again.encoder.processor.video_processor.sampling == "keyframe" and again.report.unchanged == 6


def test_calibrating_replaces_the_bias_and_encodes_no_video(videos, tmp_path, encoder, encoded_clips):
    index = build_index(videos, tmp_path / "index", encoder)
    before = content(index)
    encoded_clips.clear()
    queries = ["a blue disc", "two kids play", "", "a beach"]
    index.calibrate(queries, tau=0.1)
    bank = encode_texts(encoder.model, encoder.processor, [query for query in queries if query])
    table = index.table()
    vectors = torch.tensor(table["vector"].to_pylist())
    expected = 0.1 * ((bank @ vectors.T / 0.1).exp().mean(dim=0)).log()
    np.testing.assert_allclose(table["bias"].to_pylist(), expected, atol=1e-6)
    assert encoded_clips == [] and content(index).keys() == before.keys()
    build_index(videos, tmp_path / "index", encoder)
    assert VideoIndex.load(tmp_path / "index", encoder).info()["query_bank"] == {"queries": 3, "tau": 0.1}


def test_the_default_temperature_is_the_one_the_evaluation_chose(videos, tmp_path, encoder, monkeypatch):
    results = Path(encoder.name) / "eval_results.json"
    results.write_text(json.dumps({"settings": {"tau": 0.02}}))
    try:
        index = build_index(videos, tmp_path / "index", encoder)
    finally:
        results.unlink()
    assert index.info()["query_bank"] == {"queries": 3, "tau": 0.02}


def test_files_that_exchange_their_names_are_not_encoded_again(videos, tmp_path, encoder, encoded_clips):
    build_index(videos, tmp_path / "index", encoder)
    before = content(VideoIndex(tmp_path / "index"))
    encoded_clips.clear()
    for number in range(5, -1, -1):  # clip_0 becomes clip_1, and so on, as when a first one is put before all
        (videos / f"clip_{number}.mp4").rename(videos / f"clip_{number + 1}.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    (videos / "clip_1.mp4").rename(videos / "aside")
    (videos / "clip_2.mp4").rename(videos / "clip_1.mp4")
    (videos / "aside").rename(videos / "clip_2.mp4")
    index = build_index(videos, tmp_path / "index", encoder, prune=True)
    assert encoded_clips == []
    after = content(index)
    assert len(after) == 6 and ("clip_0.mp4", 0.0) not in after
    for now, then in {1: 1, 2: 0, 6: 5}.items():
        old, new = before[f"clip_{then}.mp4", 0.0]["vector"], after[f"clip_{now}.mp4", 0.0]["vector"]
        assert old == new
    database_of = index.store.connection
    assert database_of.execute("SELECT count(*) FROM contents").fetchone() == (6,)


def test_a_content_that_no_file_holds_goes_even_after_a_kill(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    with index.store.state():
        pass
    with database.connect(tmp_path / "index", write=True) as connection:  # as a run that was killed leaves it
        connection.execute("UPDATE files SET content = NULL, size = -1 WHERE path = 'clip_0.mp4'")
        connection.commit()
    (videos / "clip_0.mp4").unlink()
    index = build_index(videos, tmp_path / "index", encoder, prune=True)
    assert index.store.connection.execute("SELECT count(*) FROM contents").fetchone() == (5,) and len(index) == 5


def test_files_of_a_folder_that_cannot_be_listed_are_not_forgotten(videos, tmp_path, encoder, monkeypatch):
    (videos / "deep").mkdir()
    (videos / "clip_0.mp4").rename(videos / "deep" / "clip_0.mp4")
    build_index(videos, tmp_path / "index", encoder)
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    (videos / "clip_1.mp4").unlink()
    index = build_index(videos, tmp_path / "index", encoder, prune=True)
    assert index.report.dropped == 1 and "clip_0.mp4" in file_names(index) and len(index) == 5
    assert any("Permission denied" in entry["cause"] for entry in index.report.skipped)


def test_the_name_of_a_file_is_not_taken_as_a_pattern(videos, tmp_path, encoder):
    (videos / "clip_0.mp4").rename(videos / "a[1].mp4")
    (videos / "clip_1.mp4").rename(videos / "a1.mp4")
    index = build_index(videos, tmp_path / "index", encoder)
    assert index.remove([videos / "a[1].mp4"]) == 1
    assert "a1.mp4" in file_names(VideoIndex(tmp_path / "index"))
    assert index.remove([videos / "a[1].mp4"]) == 1  # there is no such file any more: a pattern


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_run_that_was_killed_before_it_had_a_query_bank_gets_it_when_it_is_repeated(
    videos, tmp_path, encoder, monkeypatch, rebuild
):
    if rebuild:
        build_index(videos, tmp_path / "index", encoder)
    with monkeypatch.context() as patched:
        patched.setattr("camoe_search.writer.IndexWriter.set_bank", lambda *_: 1 / 0)  # stands for the kill
        with pytest.raises(ZeroDivisionError):
            build_index(videos, tmp_path / "index", encoder, rebuild=rebuild)
    index = build_index(videos, tmp_path / "index", encoder)
    assert len(index) == 6 and index.info()["query_bank"]["queries"] > 0


def test_moments_that_name_a_segment_that_is_gone_are_encoded_again(videos, tmp_path, encoder, encoded_clips):
    """As an earlier version left them, whose compaction moved rows into a segment that it then removed."""
    build_index(videos, tmp_path / "index", encoder)
    with IndexWriter(tmp_path / "index") as writer, database.transaction(writer.connection) as connection:
        lost = [row for (row,) in connection.execute("SELECT row FROM windows ORDER BY id LIMIT 2")]
        writer._kill(connection, lost)
        connection.execute("UPDATE windows SET row = row + 10000000 WHERE row IN (?, ?)", lost)
    encoded_clips.clear()
    index = build_index(videos, tmp_path / "index", encoder)
    assert sorted(encoded_clips) == ["clip_0.mp4", "clip_1.mp4"] and len(index.search(QUERY, k=9)) == 6


def test_a_log_without_its_database_is_not_taken_for_that_of_a_new_one(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    log = tmp_path / "index" / "index.sqlite-wal"
    with contextlib.closing(database.connect(tmp_path / "index", write=True)) as connection:
        connection.execute("UPDATE files SET path = 'old/' || path")
        (tmp_path / "index" / "index.sqlite").unlink()
        left = log.read_bytes()
    log.write_bytes(left)
    (videos / "clip_0.mp4").unlink()
    assert left and "old" not in str(build_index(videos, tmp_path / "index", encoder).table()["path"].to_pylist())
