# SPDX-License-Identifier: Apache-2.0
"""Windows become moments: merged, grouped by file, identical files once; and their times."""

import shutil

import numpy as np
import pytest

from camoe_search.database import transaction
from camoe_search.errors import SearchError
from camoe_search.files import cut_windows
from camoe_search.writer import IndexWriter
from tests.camoe_search.scenes import SCENES, SceneEncoder, build, overlaps, scene_vector, vector_index, write_film
from tests.video_files import write_video


def windows_of(seconds, scenes_of, **options):
    """Windows of a film whose scene at a second is `scenes_of(second)`."""
    return [
        (start, end, scene_vector([scenes_of(start + (i + 0.5) * (end - start) / 12) for i in range(12)]))
        for start, end in cut_windows(seconds, **options)
    ]


@pytest.fixture
def library(tmp_path):
    """A film of four minutes whose picture drifts, and 200 clips of one to five overlapping windows."""
    generator = np.random.default_rng(0)
    films = {}
    for n, seconds in enumerate([240.0, *generator.uniform(5, 35, 200)]):
        windows = cut_windows(seconds, 10.0, 5.0)
        drift = np.cumsum(generator.standard_normal((len(windows), SCENES)), axis=0)
        drift /= np.linalg.norm(drift, axis=1, keepdims=True)
        films[f"{n}.mp4"] = [(start, end, vector) for (start, end), vector in zip(windows, drift, strict=True)]
    return vector_index(tmp_path / "index", films)


def test_no_two_of_the_first_ten_overlap(library):
    queries = np.random.default_rng(1).standard_normal((50, SCENES)).astype(np.float32)
    queries[:25] = [library.store.vectors([hit.key])[hit.key] for hit in library.search_vectors(queries[:1], 25)[0]]
    raw = library.search_vectors(queries, 10, merge=False)
    merged = library.search_vectors(queries, 10)
    assert sum(map(overlaps, raw)) > 20  # there was something to merge
    assert sum(map(overlaps, merged)) == 0 and all(len(hits) == 10 for hits in merged)
    for windows, moments in zip(raw, merged, strict=True):
        assert moments[0].score == windows[0].score and moments[0].key == windows[0].key
        assert all(moment.start <= moment.peak[0] < moment.peak[1] <= moment.end for moment in moments)


def test_more_windows_are_looked_at_until_there_are_enough_moments(tmp_path):
    """One film has the 147 best windows."""
    films = {"long.mp4": [(start, end, 0.9 * scene_vector([1])) for start, end in cut_windows(740.0)]}
    films |= {f"{n}.mp4": [(0.0, 5.0, scene_vector([1, 2, 3]))] for n in range(9)}
    index = vector_index(tmp_path / "index", films, SceneEncoder(str(tmp_path)))
    hits = index.search("scene 1", k=10)
    assert [hit.path for hit in hits] == ["/films/long.mp4", *(f"/films/{n}.mp4" for n in range(9))]
    assert (hits[0].start, hits[0].end) == (0.0, 740.0)  # all of it is alike


def test_a_moment_ends_where_the_film_turns_to_something_else(tmp_path):
    """Scene 7 lasts from 100 s to 135 s and again from 200 s to 215 s of four minutes."""

    def scene(second):
        return 7 if 100 <= second < 135 or 200 <= second < 215 else 1 + int(second // 20) % 5

    index = vector_index(tmp_path / "index", {"film.mp4": windows_of(240.0, scene)}, SceneEncoder(str(tmp_path)))
    first, second = index.search("scene 7", k=2)
    assert (first.start, first.end) == (100.0, 135.0) and (second.start, second.end) == (200.0, 215.0)
    (grouped,) = index.search("scene 7", group_by="file")
    assert [(moment.start, moment.end) for moment in grouped.moments] == [(100.0, 135.0), (200.0, 215.0)]
    assert grouped.key == grouped.moments[0].key
    assert [hit.start for hit in index.search("scene 7", min_score=0.9)] == [100.0, 200.0]
    assert len(index.search("scene 7", k=50, merge=False)) == 47


def test_touching_windows_of_one_scene_are_one_moment(tmp_path):
    windows = windows_of(60.0, lambda second: 3 if 20 <= second < 40 else 1, window=10.0, stride=10.0)
    index = vector_index(tmp_path / "index", {"film.mp4": windows}, SceneEncoder(str(tmp_path)))
    hit = index.search("scene 3", k=1)[0]
    assert (hit.start, hit.end, hit.peak) == (20.0, 40.0, (20.0, 30.0))


def test_group_by_file_gives_the_best_moment_of_each(library):
    query = np.random.default_rng(2).standard_normal((1, SCENES)).astype(np.float32)
    grouped = library.search_vectors(query, 30, group_by="file")[0]
    assert len({hit.path for hit in grouped}) == 30
    best = {}
    for hit in library.search_vectors(query, 2000, merge=False)[0]:
        best.setdefault(hit.path, hit.score)
    expected = sorted(best.values(), reverse=True)[:30]
    assert [hit.score for hit in grouped] == pytest.approx(expected, abs=1e-6)
    for hit in grouped:
        starts = [moment.start for moment in hit.moments]
        assert starts == sorted(starts) and hit.start in starts and not overlaps(list(hit.moments))


def test_identical_files_are_one_result_with_all_paths(library):
    with IndexWriter(library.folder) as writer, transaction(writer.connection) as connection:
        connection.execute(
            "INSERT INTO files(root, path, size, mtime_ns, content) "
            "SELECT root, 'copy of ' || path, size, mtime_ns, content FROM files WHERE path IN ('0.mp4', '5.mp4')"
        )
    key = next(hit.key for hit in library.search_vectors(np.eye(SCENES)[:1], 2000)[0] if hit.path == "/films/5.mp4")
    query = library.store.vectors([key])[key][None]
    hits = library.search_vectors(query, 10)[0]
    assert hits[0].paths == ("/films/5.mp4", "/films/copy of 5.mp4")
    assert sum("5.mp4" in hit.path and hit.score == hits[0].score for hit in hits) == 1
    assert library.search_vectors(query, 10, path="copy of 5")[0][0].paths == ("/films/copy of 5.mp4",)
    raw = library.search_vectors(query, 2, merge=False)[0]
    assert [hit.path for hit in raw] == ["/films/5.mp4", "/films/copy of 5.mp4"]


def test_best_moments_of_a_real_film_are_within_a_window_of_the_truth(tmp_path):
    """Four minutes of 17 scenes that begin where no window does."""
    lengths = [11, 17, 9, 14, 16, 12, 19, 8, 13, 15, 18, 10, 14, 16, 17, 9, 22]
    (tmp_path / "videos").mkdir()
    film = write_film(tmp_path / "videos" / "film.mp4", list(enumerate(lengths)))
    shutil.copy(film, tmp_path / "videos" / "same.mp4")
    index = build(tmp_path / "videos", tmp_path / "index", SceneEncoder(str(tmp_path)))
    assert len(index) == 2 * 47
    start = 0
    for number, length in enumerate(lengths):
        hits = index.search(f"scene {number}", k=10)
        assert abs(hits[0].start - start) <= 10 and abs(hits[0].end - (start + length)) <= 10
        assert hits[0].peak[0] < start + length and hits[0].peak[1] > start
        assert len(hits[0].paths) == 2 and overlaps(hits) == 0
        start += length


@pytest.mark.parametrize(("name", "begin"), [("film.mp4", 0.0), ("late.mp4", 3.0), ("late.mkv", 3.0)])
def test_windows_cover_a_film_whose_pictures_begin_late(tmp_path, name, begin):
    """The sound may come first, as in a recording of a broadcast: times count from it, as in a player."""
    film = write_video(tmp_path / name, 144, 12, start=begin, audio=15.0)
    encoder = SceneEncoder(str(tmp_path))
    index = build(film, tmp_path / "index", encoder, window=5, stride=5)
    assert [(row["start"], row["end"]) for row in index.table().to_pylist()] == [
        pytest.approx((begin + start, begin + start + 5), abs=0.2) for start in (0, 5, 7)
    ]


def test_an_unknown_grouping_is_an_error(library):
    with pytest.raises(SearchError, match="grouped by file"):
        library.search_vectors(np.eye(SCENES)[:1], group_by="folder")
