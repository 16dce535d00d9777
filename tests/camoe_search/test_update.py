# SPDX-License-Identifier: Apache-2.0
"""Building and updating an index of real files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from camoe_search import shards, store
from camoe_search.encoder import Encoder
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.store import column_matrix
from modeling_camoe.encode import encode_texts, encode_videos
from tests.video_files import cut_off, write_audio, write_video


QUERY = "a red star spins"


def build_index(videos, folder, encoder, **options) -> VideoIndex:
    return VideoIndex.build([videos], folder, encoder, **{"num_workers": 0, "batch_size": 2} | options)


def content(index) -> dict:
    """Every column by (path, start)."""
    rows = index.moments.to_list()
    return {(Path(row["path"]).name, row["start"]): row for row in rows}


def file_names(index) -> list[str]:
    return [Path(path).name for path in index.moments["path"]]


@pytest.fixture
def encoded_clips(monkeypatch):
    """Names of the clips encoded from here on."""
    names, engine = [], shards.iter_encoded_videos

    def spy(model, processor, clips, **options):
        names.extend(Path(clip.source).name for clip in clips)
        return engine(model, processor, clips, **options)

    monkeypatch.setattr(shards, "iter_encoded_videos", spy)
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
    times = [(row["start"], row["end"]) for row in index.moments if row["path"].endswith("clip_5.mp4")]
    assert times == [(0, 1), (0.5, 1.5), (1, 2)] and len(index) == 5 + 3
    second_half = index.search_like(shards.Clip(str(videos / "clip_5.mp4"), 1, 2), k=1)[0]
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
    assert (report.added, report.changed, report.unchanged, report.dropped) == (1, 1, 4, 0)
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
    index.add([videos], num_workers=0, batch_size=2)
    expected = content(build_index(videos, tmp_path / "at once", encoder))
    _assert_same_content(content(index), expected)


def test_removing_files_and_adding_them_again_restores_the_index(videos, tmp_path, encoder):
    index = build_index(videos, tmp_path / "index", encoder)
    before, hits = content(index), index.search(QUERY)
    third = [videos / "clip_2.mp4", videos / "clip_3.mp4"]
    assert index.remove(third) == 2 and len(index) == 4
    assert {Path(hit.path).name for hit in index.search(QUERY)}.isdisjoint({"clip_2.mp4", "clip_3.mp4"})
    index.add(third, num_workers=0, batch_size=2)
    _assert_same_content(content(index), before)
    assert [(hit.path, hit.start) for hit in index.search(QUERY)] == [(hit.path, hit.start) for hit in hits]


def _assert_same_content(one: dict, other: dict):
    """Equal up to rounding: files may be encoded in other batches."""
    assert one.keys() == other.keys()
    for key, row in one.items():
        for name, value in row.items():
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
    skipped = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(Path(entry["path"]).name for entry in skipped) == [
        "audio.mp4",
        "broken.mp4",
        "empty.mp4",
        "text.mp4",
    ]
    assert all(Path(entry["path"]).name in entry["cause"] for entry in skipped)

    (videos / "empty.mp4").unlink()
    write_video(videos / "broken.mp4", 12)  # now readable
    index = build_index(videos, tmp_path / "index", encoder)
    assert "broken.mp4" in file_names(index)
    assert sorted(Path(entry["path"]).name for entry in index.report.skipped) == ["audio.mp4", "text.mp4"]


def test_a_folder_without_videos_gives_an_empty_index(tmp_path, encoder):
    (tmp_path / "empty").mkdir()
    index = build_index(tmp_path / "empty", tmp_path / "index", encoder)
    assert len(index) == 0 and index.search(QUERY) == [] and index.stats()["moments"] == 0


def test_a_file_that_changes_while_it_is_read_is_skipped_and_listed(videos, tmp_path, encoder, monkeypatch):
    write_shard = shards._write_shard

    def change_then_write(*arguments):
        write_video(videos / "clip_4.mp4", 20)
        write_shard(*arguments)

    monkeypatch.setattr(shards, "_write_shard", change_then_write)
    index = build_index(videos, tmp_path / "index", encoder)
    assert "clip_4.mp4" not in file_names(index) and len(index) == 5
    assert [entry["cause"].split(": ")[1] for entry in index.report.skipped] == [
        "it changed while it was being read; index again"
    ]
    monkeypatch.undo()
    assert len(build_index(videos, tmp_path / "index", encoder)) == 6


KILLED = """
import os, signal, sys
from camoe_search import shards
from camoe_search.index import VideoIndex
shards.BATCHES_PER_SHARD = 1
write_shard, written = shards._write_shard, []
def die_after_two(*arguments):
    write_shard(*arguments)
    written.append(1)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
shards._write_shard = die_after_two
VideoIndex.build([sys.argv[1]], sys.argv[2], sys.argv[3], device="cpu", num_workers=0, batch_size=2)
"""


def test_a_killed_run_resumes_to_the_same_index(videos, tmp_path, encoder, monkeypatch, encoded_clips):
    command = [sys.executable, "-c", KILLED, str(videos), str(tmp_path / "killed"), encoder.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(SearchError, match="holds no index"):
        VideoIndex.load(tmp_path / "killed")

    monkeypatch.setattr(shards, "BATCHES_PER_SHARD", 1)
    torch.set_num_threads(1)  # as in the killed process
    index = build_index(videos, tmp_path / "killed", encoder)
    assert encoded_clips == ["clip_4.mp4", "clip_5.mp4"]  # two of three shards were there
    assert content(index) == content(build_index(videos, tmp_path / "never killed", encoder))
    assert not (tmp_path / "killed" / "shards").exists()


def test_a_failure_while_writing_leaves_the_index_as_it_was(videos, tmp_path, encoder, monkeypatch):
    index = build_index(videos, tmp_path / "index", encoder)
    hits = index.search(QUERY)

    def disk_is_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.faiss, "write_index", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        index.remove([videos / "clip_0.mp4"])
    assert VideoIndex.load(tmp_path / "index", encoder).search(QUERY) == hits
    monkeypatch.undo()
    index.remove([videos / "clip_0.mp4"])
    assert len(list((tmp_path / "index").glob("generation-*"))) == 1  # the half-written one is deleted, too


def test_two_processes_cannot_write_at_the_same_time(videos, tmp_path, encoder):
    with store.write_lock(tmp_path / "index"), pytest.raises(SearchError, match="another process"):
        build_index(videos, tmp_path / "index", encoder)


def test_another_model_is_refused(videos, tmp_path, encoder):
    build_index(videos, tmp_path / "index", encoder)
    with torch.no_grad():
        encoder.model.clip.logit_scale.add_(0.1)
    other = Encoder("other", encoder.model, encoder.processor)
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
    again = VideoIndex.build([videos], tmp_path / "index", num_workers=0, device="cpu")
    assert again.encoder.processor.video_processor.sampling == "keyframe" and again.report.unchanged == 6


def test_calibrating_replaces_the_bias_and_encodes_no_video(videos, tmp_path, encoder, encoded_clips):
    index = build_index(videos, tmp_path / "index", encoder)
    before = content(index)
    encoded_clips.clear()
    queries = ["a blue disc", "two kids play", "", "a beach"]
    index.calibrate(queries, tau=0.1)
    bank = encode_texts(encoder.model, encoder.processor, [query for query in queries if query])
    vectors = torch.tensor(column_matrix(index.moments.data.table, "vector"))
    expected = 0.1 * ((bank @ vectors.T / 0.1).exp().mean(dim=0)).log()
    np.testing.assert_allclose(index.moments["bias"][:], expected, atol=1e-6)
    assert encoded_clips == [] and content(index).keys() == before.keys()
    build_index(videos, tmp_path / "index", encoder)
    assert VideoIndex.load(tmp_path / "index", encoder).stats()["query_bank"] == {"queries": 3, "tau": 0.1}


def test_the_default_temperature_is_the_one_the_evaluation_chose(videos, tmp_path, encoder, monkeypatch):
    results = Path(encoder.name) / "eval_results.json"
    results.write_text(json.dumps({"settings": {"tau": 0.02}}))
    try:
        index = build_index(videos, tmp_path / "index", encoder)
    finally:
        results.unlink()
    assert index.stats()["query_bank"] == {"queries": 3, "tau": 0.02}
