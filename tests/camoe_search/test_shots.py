# SPDX-License-Identifier: Apache-2.0
"""Windows that begin where shots do."""

import sys
import types

import numpy as np
import pytest

from camoe_search.errors import SearchError
from camoe_search.shots import cut_at_shots
from tests.camoe_search.scenes import SceneEncoder, build
from tests.video_files import write_video


@pytest.fixture
def film(tmp_path):
    """Three shots of moving noise, of 4, 6 and 5 seconds."""
    generator = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    pictures = []
    for seconds, colour in ((4, (200, 30, 30)), (6, (30, 200, 30)), (5, (30, 30, 220))):
        texture = generator.integers(0, 30, (48, 64, 1))
        for i in range(12 * seconds):
            pictures.append((np.roll(texture, i, axis=1) + np.array(colour)).clip(0, 255).astype(np.uint8))
    return write_video(tmp_path / "videos" / "film.mp4", len(pictures), pictures=pictures)


def test_shots_are_cut_like_videos_and_short_ones_are_merged():
    assert cut_at_shots(20.0, [0.0, 4.0, 10.0]) == [(0.0, 4.0), (4.0, 10.0), (10.0, 20.0)]
    assert cut_at_shots(20.0, []) == [(0.0, 20.0)]
    assert cut_at_shots(20.0, [0.3, 4.0, 4.5, 19.5]) == [(0.0, 4.0), (4.0, 20.0)]
    assert cut_at_shots(20.0, [0.0, 4.0], window=8.0) == [(0.0, 4.0), (4.0, 12.0), (8.0, 16.0), (12.0, 20.0)]
    assert cut_at_shots(50.0, [40.0]) == [(float(s), s + 10.0) for s in range(0, 35, 5)] + [(40.0, 50.0)]


def test_a_missing_package_names_the_extra_and_leaves_no_index(film, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(SearchError, match=r"camoe\[shots\]"):
        build(film.parent, tmp_path / "index", SceneEncoder(str(tmp_path)), windows="shots")
    assert not (tmp_path / "index" / "index.sqlite").exists()


def times(index):
    return [(row["start"], row["end"]) for row in index.table().to_pylist()]


def test_an_index_keeps_its_way_of_cutting(film, tmp_path, monkeypatch):
    """With a stand-in for the package, so that this runs where it is not installed."""
    package = types.ModuleType("scenedetect")
    moments = [types.SimpleNamespace(seconds=seconds) for seconds in (0.0, 4.0, 10.0, 15.0)]
    package.AdaptiveDetector = lambda: None
    package.detect = lambda *args, **kwargs: list(zip(moments, moments[1:], strict=False))
    monkeypatch.setitem(sys.modules, "scenedetect", package)
    encoder = SceneEncoder(str(tmp_path))
    index = build(film.parent, tmp_path / "index", encoder, windows="shots")
    assert times(index) == [(0.0, 4.0), (4.0, 10.0), (10.0, 15.0)]
    film.rename(film.with_name("other.mp4"))
    write_video(film, 12 * 15)
    index = build(film.parent, tmp_path / "index", encoder)
    assert index.description.windows == "shots" and len(index) == 6
    with pytest.raises(SearchError, match="made with windows shots, not time"):
        build(film.parent, tmp_path / "index", encoder, windows="time")
    build(film.parent, tmp_path / "by_time", encoder)
    with pytest.raises(SearchError, match="made with windows time, not shots"):
        build(film.parent, tmp_path / "by_time", encoder, windows="shots")


def test_real_shots_are_found_to_a_frame(film, tmp_path):
    pytest.importorskip("scenedetect")
    index = build(film.parent, tmp_path / "index", SceneEncoder(str(tmp_path)), windows="shots")
    assert np.abs(np.array(times(index)) - [(0, 4), (4, 10), (10, 15)]).max() <= 1 / 12 + 1e-6


def test_a_file_whose_shots_cannot_be_found_is_skipped_with_the_cause(film, tmp_path, monkeypatch):
    package = types.ModuleType("scenedetect")
    package.AdaptiveDetector = lambda: None

    def detect(*args, **kwargs):
        raise OSError("no frames")

    package.detect = detect
    monkeypatch.setitem(sys.modules, "scenedetect", package)
    index = build(film.parent, tmp_path / "index", SceneEncoder(str(tmp_path)), windows="shots")
    assert len(index) == 0 and "its shots cannot be found (OSError: no frames)" in index.report.skipped[0]["cause"]
