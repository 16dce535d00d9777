# SPDX-License-Identifier: Apache-2.0
"""Pictures of moments, made while an index is made, from the frames that the model sees."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from camoe_search.index import VideoIndex
from camoe_search.kernel import encode
from camoe_search.service import SearchService
from modeling_camoe.frames import sample_frames
from tests.video_files import KINDS, index_of, index_picture, write_video


OPTIONS = {"num_workers": 0, "text_encoder": False, "window": 2, "stride": 1}


@pytest.fixture
def three_frames(encoder):
    """The frames of a window are those at 1/6, 1/2 and 5/6 of it."""
    encoder.processor.video_processor.num_frames = 3
    return encoder


@pytest.fixture
def films(tmp_path):
    """Two films of 6 s whose frames show their numbers, and a still one."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_video(folder / "wide.mp4", 72, 12, (128, 48))
    write_video(folder / "late.ts", 72, 12, (64, 48), start=7.0)
    shutil.copy(folder / "wide.mp4", folder / "again.mp4")
    return folder


def names(index) -> set[str]:
    return {path.name for path in (index.folder / "thumbnails").iterdir()}


def expected_names(index) -> set[str]:
    return {f"{key}.jpg" for key in index.table()["key"].to_pylist()}


def picture_of(service, key) -> Image.Image:
    return Image.open(io.BytesIO(service.picture(key)))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_moment_has_a_picture_without_its_video(films, three_frames, tmp_path, workers):
    index = VideoIndex.create_or_update(
        [films], tmp_path / "index", three_frames, **OPTIONS | {"num_workers": workers}
    )
    films.rename(tmp_path / "elsewhere")
    service = SearchService("index", index, 10)
    rows = index.table().to_pylist()
    assert len(rows) == 15  # three files with five windows each
    for row in rows:
        picture = picture_of(service, row["key"])
        middle = (row["start"] + row["end"]) / 2
        assert index_of(np.asarray(picture).transpose(2, 0, 1)) == pytest.approx(12 * middle, abs=1)
        # All of the frame: the model sees its central 32 x 32 alone.
        assert picture.size == ((128, 48) if row["path"].endswith(".mp4") else (64, 48))
    assert names(index) == expected_names(index) and len(names(index)) == 10  # identical files share them


@pytest.mark.parametrize("name, size, options", [
    ("turned.mp4", (64, 48), {"rotation": 90}),
    ("mirrored.mp4", (64, 48), {"rotation": 180}),
    ("broad.mp4", (64, 48), {"pixel_aspect": 2}),
    ("avi", (64, 48), KINDS["avi"]),
    ("variable_rate.mkv", (64, 48), KINDS["variable_rate.mkv"]),
])  # fmt: skip
def test_a_picture_is_upright_with_square_pixels(three_frames, tmp_path, name, size, options):
    path = write_video(tmp_path / f"film.{name.rpartition('.')[2]}", 24, 12, size, **options)
    index = VideoIndex.create_or_update([path], tmp_path / "index", three_frames, **OPTIONS | {"window": 0})
    (key,) = index.table()["key"].to_pylist()
    kept = np.asarray(Image.open(index.folder / "thumbnails" / f"{key}.jpg")).astype(int)  # (H,W,3)
    whole = sample_frames(path, 1, size=None).frames[0].permute(1, 2, 0).numpy()
    shown = np.asarray(Image.fromarray(whole).resize(kept.shape[1::-1])).astype(int)
    assert kept.shape[1] / kept.shape[0] == pytest.approx(whole.shape[1] / whole.shape[0], rel=0.03)
    assert np.abs(kept - shown).mean() < 3


def test_vectors_are_the_same_with_and_without_pictures(films, three_frames, tmp_path):
    write_video(films / "odd.mp4", 24, 12, (70, 38), rotation=270)  # its crop cannot be in the very centre
    made = [
        VideoIndex.create_or_update(
            [films], tmp_path / str(thumbnails), three_frames, thumbnails=thumbnails, **OPTIONS
        )
        for thumbnails in (True, False)
    ]
    with_pictures, without = (index.table().to_pylist() for index in made)
    assert [row["vector"] for row in with_pictures] == [row["vector"] for row in without]
    assert not (made[1].folder / "thumbnails").exists()


def test_an_index_without_pictures_makes_them_when_they_are_asked_for(films, three_frames, tmp_path):
    index = VideoIndex.create_or_update([films], tmp_path / "index", three_frames, **OPTIONS)
    shutil.rmtree(index.folder / "thumbnails")
    (key,) = index.table()["key"].to_pylist()[:1]
    assert picture_of(SearchService("index", index, 10), key).size in ((128, 48), (64, 48))
    assert names(index) == {f"{key}.jpg"}


def test_pictures_go_with_their_moments(films, three_frames, tmp_path):
    index = VideoIndex.create_or_update([films], tmp_path / "index", three_frames, **OPTIONS)
    (index.folder / "thumbnails" / "left.part").write_bytes(b"of a run that was killed")
    (films / "late.ts").unlink()
    (films / "wide.mp4").unlink()
    index.add([films], prune=True, **{name: OPTIONS[name] for name in ("num_workers",)})
    assert names(index) == expected_names(index) and len(names(index)) == 5  # of the copy
    index.remove([str(films / "again.mp4")])
    assert names(index) == set()


def test_another_cut_has_its_own_pictures(films, three_frames, tmp_path):
    folder = tmp_path / "index"
    VideoIndex.create_or_update([films / "wide.mp4"], folder, three_frames, **OPTIONS)
    again = OPTIONS | {"window": 3, "stride": 3, "rebuild": True, "thumbnails": False}
    index = VideoIndex.create_or_update([films / "wide.mp4"], folder, three_frames, **again)
    key = index.table()["key"].to_pylist()[1]  # from 3 to 6 s, and not from 1 to 3 s as before
    picture = np.asarray(picture_of(SearchService("index", index, 10), key)).transpose(2, 0, 1)
    assert index_of(picture) == pytest.approx(12 * 4.5, abs=1)


def test_a_picture_is_small_whatever_the_video_is(three_frames, tmp_path):
    path = write_video(tmp_path / "strip.mp4", 4, 2, (1280, 16), pictures=[index_picture(1, 1280, 16)] * 4)
    index = VideoIndex.create_or_update([path], tmp_path / "index", three_frames, **OPTIONS | {"window": 0})
    (key,) = index.table()["key"].to_pylist()
    assert picture_of(SearchService("index", index, 10), key).size == (320, 4)


def test_rows_of_the_kernel_have_pictures_on_request(films, three_frames):
    table = pa.table({"path": [str(films / "wide.mp4"), str(films / "missing.mp4")]})
    assert "thumbnail" not in encode(table, three_frames).column_names
    good, bad = encode(table, three_frames, thumbnails=True)["thumbnail"].to_pylist()
    assert Image.open(io.BytesIO(good)).size == (128, 48) and bad is None
