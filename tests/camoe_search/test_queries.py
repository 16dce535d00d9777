# SPDX-License-Identifier: Apache-2.0
"""Weighted and negative texts, videos, segments and pictures as queries, two texts in order, words."""

import json

import numpy as np
import pytest
from PIL import Image

from camoe_search.cli import main
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.queries import WeightedText, parse_like, parse_weighted
from camoe_search.writer import StoredWindow
from modeling_camoe.frames import Clip
from tests.camoe_search.random_index import make_index, random_texts, random_videos
from tests.camoe_search.scenes import SceneEncoder, build, scene_vector, vector_index, write_film
from tests.video_files import index_picture


@pytest.fixture
def encoder(tmp_path):
    return SceneEncoder(str(tmp_path))


@pytest.fixture
def pairs(tmp_path, encoder):
    """Clips of two scenes each."""
    films = {"1+2.mp4": [1, 2], "1+3.mp4": [1, 3], "2+3.mp4": [2, 3], "4.mp4": [4]}
    return vector_index(
        tmp_path / "pairs", {path: [(0.0, 5.0, scene_vector(scenes))] for path, scenes in films.items()}, encoder
    )


def names(hits) -> list[str]:
    return [hit.path.removeprefix("/films/") for hit in hits]


def test_a_score_of_several_texts_is_the_weighted_mean_of_theirs(pairs):
    scores = {text: {hit.path: hit.score for hit in pairs.search(text)} for text in ("scene 1", "scene 2", "scene 3")}
    hits = pairs.search([("scene 1", 3), "scene 2"], negative=[("scene 3", 2)])
    for hit in hits:
        one, two, three = (scores[text][hit.path] for text in scores)
        assert hit.score == pytest.approx((3 * one + two - 2 * three) / 4, abs=1e-6)
    assert names(pairs.search(["scene 1", ("scene 3", 0.5)])) == ["1+3.mp4", "1+2.mp4", "2+3.mp4", "4.mp4"]


def test_what_is_not_wanted_comes_later(pairs):
    assert names(pairs.search("scene 1"))[:2] == ["1+2.mp4", "1+3.mp4"]  # a tie, by path
    assert names(pairs.search("scene 1", negative="scene 2"))[:2] == ["1+3.mp4", "1+2.mp4"]


def test_weights_and_segments_are_read_from_text(tmp_path):
    assert parse_weighted("on a beach*0.5") == WeightedText("on a beach", 0.5)
    assert parse_weighted("5 * 3 apples") == WeightedText("5 * 3 apples", 1.0)
    assert parse_like("film.mp4@12.5-15") == Clip("film.mp4", 12.5, 15.0)
    assert parse_like("someone@home.mp4") == "someone@home.mp4"
    (tmp_path / "a@1-2").touch()
    assert parse_like(tmp_path / "a@1-2") == str(tmp_path / "a@1-2")  # a file's own name
    with pytest.raises(SearchError, match="ends before it starts"):
        parse_like("film.mp4@15-12")


def test_nothing_wanted_and_odd_weights_are_errors(pairs):
    with pytest.raises(SearchError, match="say what to look for"):
        pairs.search(negative="scene 1")
    with pytest.raises(SearchError, match="above 0"):
        pairs.search([("scene 1", 0.0)])
    with pytest.raises(SearchError, match="did you mean min_duration"):
        pairs.search("scene 1", min_durations=3)


def test_a_segment_or_a_picture_finds_its_scene(tmp_path, encoder):
    (tmp_path / "videos").mkdir()
    write_film(tmp_path / "videos" / "a.mp4", [(1, 20), (2, 20), (3, 20)])
    write_film(tmp_path / "videos" / "b.mp4", [(4, 20), (3, 20), (5, 20)])
    index = build(tmp_path / "videos", tmp_path / "index", encoder)
    hit = index.search(like=f"{tmp_path}/videos/a.mp4@22-30", k=1)[0]
    assert hit.path.endswith("a.mp4") and (hit.start, hit.end) == (20.0, 40.0)
    Image.fromarray(index_picture(5, 64, 48)).save(tmp_path / "five.png")
    hit = index.search(like=tmp_path / "five.png", k=1)[0]
    assert hit.path.endswith("b.mp4") and (hit.start, hit.end) == (40.0, 60.0)
    both = index.search("scene 4", like=tmp_path / "five.png", k=2)
    assert {(hit.start, hit.end) for hit in both} == {(0.0, 20.0), (40.0, 60.0)}
    assert all(hit.path.endswith("b.mp4") for hit in both)


# --- one after the other ---------------------------------------------------------------------------------------------


def film(*scenes):
    """Windows of 5 s, one for each set of scenes."""
    return [(5.0 * n, 5.0 * n + 5, scene_vector(numbers)) for n, numbers in enumerate(scenes)]


def test_then_finds_the_one_film_that_has_both_scenes_in_order(tmp_path, encoder):
    films = {f"{n}.mp4": film([2], [1], [3]) for n in range(3)}  # the other way round
    films |= {f"{n}.mp4": film([1], [4], [3]) for n in range(3, 6)}  # only the first
    films |= {f"{n}.mp4": film([4], [5], [2]) for n in range(6, 8)}  # only the second
    films |= {"8.mp4": film([1, 2])}  # at the same time
    films |= {"9.mp4": film([6], [1], [5], [2], [6])}
    index = vector_index(tmp_path / "index", films, encoder)
    hits = index.search("scene 1", then="scene 2")
    assert names(hits)[0] == "9.mp4" and hits[0].score == pytest.approx(1.0) and hits[1].score < 0.6
    assert (hits[0].start, hits[0].end) == (5.0, 20.0)
    assert [(moment.start, moment.end) for moment in hits[0].moments] == [(5.0, 10.0), (15.0, 20.0)]
    assert [moment.score for moment in hits[0].moments] == pytest.approx([1.0, 1.0])
    assert names(index.search("scene 1", then="scene 2", min_score=0.9)) == ["9.mp4"]
    assert names(index.search("scene 2", then="scene 1", min_score=0.9)) == ["0.mp4", "1.mp4", "2.mp4"]
    assert "9.mp4" not in names(index.search("scene 1", then="scene 2", path="3.mp4"))


def test_the_best_pair_is_that_of_all_pairs(tmp_path, encoder):
    """Windows of odd lengths with random vectors, against a loop over all pairs."""
    generator = np.random.default_rng(0)
    starts = np.sort(generator.uniform(0, 100, 30))
    windows = [(float(start), float(start + generator.uniform(1, 40)), generator.random(32)) for start in starts]
    index = vector_index(tmp_path / "index", {"film.mp4": windows}, encoder)
    one, two = encoder.encode_texts(["scene 1", "scene 2"])
    expected = max(
        (float(a @ one + b @ two) / 2, start, other)
        for start, end, a in windows
        for other, _, b in windows
        if end <= other
    )
    (hit,) = index.search("scene 1", then="scene 2")
    assert (hit.score, hit.start) == (pytest.approx(expected[0], abs=1e-6), expected[1])
    assert hit.moments[1].start == expected[2]


def test_the_best_pairs_of_many_films_are_those_of_a_loop_over_all(tmp_path, encoder):
    """The best scores of a film bound its best pair; most of these have them in the wrong order."""
    generator = np.random.default_rng(3)
    films = {}
    for n in range(200):
        shares = generator.random((6, 32)) ** 2
        order = np.argsort(shares[:, 2] - shares[:, 1])[:: -1 if n % 10 else 1]
        films[f"{n:03}.mp4"] = [(5.0 * i, 5.0 * i + 5, shares[row]) for i, row in enumerate(order)]
    index = vector_index(tmp_path / "index", films, encoder)
    best = {
        path: max(float(a[1] + b[2]) / 2 for i, (*_, a) in enumerate(film) for *_, b in film[i + 1 :])
        for path, film in films.items()
    }
    expected = sorted(best.items(), key=lambda item: -item[1])[:7]
    hits = index.search("scene 1", then="scene 2", k=7)
    assert names(hits) == [path for path, _ in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("correction", ["none", "query_bank"])
def test_a_pair_has_the_corrected_scores_of_its_moments(tmp_path, correction, dtype):
    with make_index(tmp_path / "index", dtype=dtype) as writer:
        moments = [
            StoredWindow(f"{n:02}.mp4", 5.0 * i, 5.0 * i + 5, n, n, f"{n:032x}")
            for n in range(20)
            for i in range(2 - n % 5 // 4)
        ]
        writer.add_moments("/films", moments, random_videos(len(moments))[0].numpy())
    index, queries = VideoIndex(tmp_path / "index"), random_texts(2).numpy()
    singles = index.search_vectors(queries, 99, correction=correction, merge=False)
    first, second = ({(hit.path, hit.start): hit.score for hit in hits} for hits in singles)
    found = index.search_in_order(queries, 20, correction=correction)
    assert len(found) == 16  # every fifth film has one moment: no pair
    for hit in found:
        expected = (first[hit.path, 0.0] + second[hit.path, 5.0]) / 2
        assert hit.score == pytest.approx(expected, abs=1e-6)
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, encoder):
    videos = tmp_path / "videos"
    (videos / "holidays").mkdir(parents=True)
    write_film(videos / "holidays" / "beach_rome.mp4", [(1, 5)])
    write_film(videos / "lecture.mp4", [(2, 20), (3, 20), (4, 20)])
    write_film(videos / "plain.mp4", [(5, 5)])
    (videos / "lecture.en.srt").write_text(
        "1\n00:00:02,000 --> 00:00:05,000\nWelcome <i>everyone</i>\n\n"
        "2\n00:00:45,000 --> 00:00:48,500\nphotosynthesis needs\nlight &amp; water\n",
        encoding="utf-8",
    )
    rows = [
        {"file_name": "plain.mp4", "text": "A marching band plays", "year": 2021, "place": "Rome", "tags": ["a", "b"]},
        {"file_name": "holidays/beach_rome.mp4", "year": 2019, "place": "Ostia", "camera": {"name": "X1"}},
    ]
    lines = [json.dumps(row) for row in rows]
    (videos / "metadata.jsonl").write_text("\n".join([*lines, "not JSON", '{"year": 3}']) + "\n")
    return videos


def test_words_find_names_captions_and_subtitles(library, tmp_path, encoder):
    index = build(library, tmp_path / "index", encoder)
    # "scene 9" resembles nothing: without words, the order is that of the paths.
    for text, name, time in (
        ("bands scene 9", "plain.mp4", (0.0, 5.0)),
        ("the BEACH scene 9", "beach_rome.mp4", (0.0, 5.0)),
        ("photosynthesis scene 9", "lecture.mp4", (40.0, 50.0)),  # the subtitle's middle is 46.75 s
    ):
        hit = index.search(text, words=True)[0]
        assert hit.path.endswith(name) and (hit.start, hit.end) == pytest.approx(time) and hit.score > 1 / 61
    assert not index.search("welcome scene 9", words=True, path="plain")[0].path.endswith("lecture.mp4")


def test_both_rankings_count(library, tmp_path, encoder):
    """Vectors alone say lecture, words alone beach_rome; what both have comes first."""
    index = build(library, tmp_path / "index", encoder)
    assert index.search("scene 5")[0].path.endswith("plain.mp4")
    hits = index.search("scene 5 band", words=True)
    assert hits[0].path.endswith("plain.mp4") and hits[0].score == pytest.approx(2 / 61)
    assert len({hit.path for hit in hits}) == 3


def test_words_need_a_text(pairs):
    with pytest.raises(SearchError, match="give one"):
        pairs.search(like=b"video", words=True)


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_has_all_of_it(library, tmp_path, encoder, capsys, monkeypatch):
    index = build(library, tmp_path / "index", encoder)
    monkeypatch.setattr("camoe_search.encoder.load_encoder", lambda *args, **kwargs: encoder)

    def search(*arguments):
        main(["search", *map(str, arguments), "--index", str(tmp_path / "index"), "--json"])
        return json.loads(capsys.readouterr().out)

    rows = search("scene 2", "--then", "scene 4")
    assert len(rows) == 1 and [moment["peak"][0] for moment in rows[0]["moments"]] == [0.0, 40.0]
    rows = search("scene 2", "--text", "scene 5*3", "--not", "scene 1*0.1", "--min-score", 0.1)
    assert rows[0]["path"].endswith("plain.mp4") and rows[0]["score"] == pytest.approx(0.75)
    rows = search("--like", f"{library}/lecture.mp4@22-38", "-k", 1)
    assert (rows[0]["start"], rows[0]["end"]) == (20.0, 40.0)
    rows = search("scene 9 band", "--words", "-k", 1, "--where", "year>=2020", "--where", "place=rome")
    assert rows[0]["paths"] == [str(library / "plain.mp4")]
    rows = search("scene 3", "--group-by", "file")
    assert len(rows) == 3 and [moment["start"] for moment in rows[0]["moments"]] == [20.0]
    assert len(search("scene 3", "--no-merge", "-k", 50)) == len(index) == 13
    main(["search", "scene 2", "--then", "scene 4", "--index", str(tmp_path / "index")])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[1].endswith("lecture.mp4") and table[2].split()[1:3] == ["0:00.0", "0:10.0"]
    with pytest.raises(SystemExit):
        main(["search", "x", "--where", "yeer>2", "--index", str(tmp_path / "index")])
    assert "did you mean year?" in capsys.readouterr().err


def test_a_picture_is_a_query_for_a_real_model(some_videos, checkpoint, tmp_path):
    index = VideoIndex.create_or_update(
        [some_videos], tmp_path / "index", str(checkpoint), device="cpu", num_workers=0, text_encoder=False
    )
    Image.fromarray(index_picture(40, 64, 48)).save(tmp_path / "picture.png")
    assert len(index.search(like=tmp_path / "picture.png", k=3)) == 3
    segment = index.search(like=f"{some_videos}/clip_2.mp4@0-1", k=1)[0]
    assert segment.path.endswith("clip_2.mp4")
