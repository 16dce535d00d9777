# SPDX-License-Identifier: Apache-2.0
"""Which files are found, and into which windows a video is cut."""

import os

import fsspec
import pytest

from camoe_search.errors import SearchError
from camoe_search.files import content_hash, cut_windows, find_videos, read_lines
from camoe_search.index import VideoIndex


def names(scan):
    return [os.path.basename(video.path) for video in scan.videos]


def test_videos_are_found_by_extension_and_other_files_counted(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.mp4", "A.MKV", "notes.txt", "more.txt", "deep/er/c.webm"):
        (tmp_path / name).write_bytes(b"x")
    scan = find_videos([tmp_path])
    assert names(scan) == ["A.MKV", "b.mp4", "c.webm"]
    assert scan.other_extensions == {".txt": 2} and scan.skipped == []


def test_a_file_given_by_name_is_taken_whatever_its_extension(tmp_path):
    (tmp_path / "movie.dat").write_bytes(b"x")
    assert names(find_videos([tmp_path / "movie.dat"])) == ["movie.dat"]


def test_a_cycle_of_links_ends_and_a_file_found_twice_counts_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "clip.mp4").write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a" / "clip.mp4")
    assert len(find_videos([tmp_path, tmp_path / "a"]).videos) == 1


def test_a_dangling_link_and_a_name_that_is_not_utf8_are_skipped_with_the_cause(tmp_path):
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with open(os.fsencode(tmp_path) + b"/bad\xff.mp4", "wb"):
        pass
    causes = [entry["cause"] for entry in find_videos([tmp_path]).skipped]
    assert any("No such file" in cause for cause in causes) and any("UTF-8" in cause for cause in causes)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(SearchError, match="does not exist"):
        find_videos([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("duration", "window", "stride", "expected"),
    [
        (29.0, None, None, [(0, 29)]),  # short: whole
        (35.0, None, None, [(0, 10), (5, 15), (10, 20), (15, 25), (20, 30), (25, 35)]),
        (100.0, 0, None, [(0, 100)]),
        (20.0, 8, 4, [(0, 8), (4, 12), (8, 16), (12, 20)]),
        (21.0, 8, 4, [(0, 8), (4, 12), (8, 16), (12, 20), (13, 21)]),  # the last one ends where the video ends
        (5.0, 8, 4, [(0, 5)]),
    ],
)
def test_windows_cover_a_video(duration, window, stride, expected):
    assert cut_windows(duration, window, stride) == expected


def test_the_content_hash_depends_on_the_content_alone(tmp_path):
    for name, content in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (content_hash(tmp_path / name) for name in "abc")
    assert a == b != c


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(some_videos):
    """The clips of a folder in fsspec's memory, as `memory://films`."""
    system = fsspec.filesystem("memory")
    for path in some_videos.iterdir():
        system.pipe_file(f"/films/{path.name}", path.read_bytes())
    system.pipe_file("/films/raw/clip_9.mp4", b"no video at all" * 100)
    system.pipe_file("/films/notes.txt", b"text")
    yield system
    system.rm("/films", recursive=True)


def test_a_folder_at_an_address_is_indexed_as_a_folder_is(bucket, some_videos, encoder, tmp_path):
    options = {"num_workers": 0, "text_encoder": False}
    index = VideoIndex.create_or_update(["memory://films"], tmp_path / "remote", encoder, **options)
    local = VideoIndex.create_or_update([some_videos], tmp_path / "local", encoder, **options)
    ours, theirs = index.table(), local.table()
    assert ours["path"].to_pylist() == [f"memory://films/{p.name}" for p in sorted(some_videos.iterdir())]
    assert ours["vector"].equals(theirs["vector"])
    assert index.report.not_videos == {".txt": 1}
    assert [entry["path"] for entry in index.skipped()] == ["memory://films/raw/clip_9.mp4"]

    again = VideoIndex.create_or_update([], tmp_path / "remote", encoder, **options)
    assert (again.report.unchanged, again.report.encoded) == (7, 0)
    bucket.pipe_file("/films/clip_0.mp4", (some_videos / "clip_1.mp4").read_bytes())
    bucket.rm("/films/clip_2.mp4")
    again = VideoIndex.create_or_update([], tmp_path / "remote", encoder, prune=True, exclude=["raw"], **options)
    assert (again.report.changed, again.report.dropped, again.report.encoded) == (1, 2, 0)
    assert again.skipped() == []
    remote = again.search(glob="memory://films/clip_3*", query="a dog")
    assert [hit.path for hit in remote] == ["memory://films/clip_3.mp4"]
    assert again.remove(["memory://films/clip_3.mp4"]) == 1 and len(again) == 4


def test_one_file_at_an_address_and_one_that_is_not_there(bucket, encoder, tmp_path):
    index = VideoIndex.create_or_update(
        ["memory://films/clip_4.mp4"], tmp_path / "i", encoder, num_workers=0, text_encoder=False
    )
    assert index.table()["path"].to_pylist() == ["memory://films/clip_4.mp4"]
    with pytest.raises(SearchError, match="memory://films/none.mp4 does not exist"):
        index.add(["memory://films/none.mp4"])
    with pytest.raises(SearchError, match="tape://films cannot be opened: Protocol not known"):
        index.add(["tape://films"])


def test_what_an_address_holds_is_known_by_its_content(bucket, some_videos):
    same, other = content_hash("memory://films/clip_1.mp4"), content_hash("memory://films/clip_2.mp4")
    bucket.pipe_file("/films/copy.mp4", (some_videos / "clip_1.mp4").read_bytes())
    assert content_hash("memory://films/copy.mp4") == same != other
    large = bytes(range(256)) * 40_000
    bucket.pipe_file("/films/large.mp4", large)
    bucket.pipe_file("/films/large_2.mp4", large[:-1] + b"x")
    assert content_hash("memory://films/large.mp4") != content_hash("memory://films/large_2.mp4")
    with pytest.raises(OSError):
        content_hash("memory://films/none.mp4")


def test_a_list_of_names_is_split_at_the_ends_of_its_lines_alone(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffa\u2028b.mp4\r\n\n c\x85d.mp4\n".encode())
    assert read_lines(tmp_path / "names.txt") == ["a\u2028b.mp4", " c\x85d.mp4"]
    (tmp_path / "names.txt").write_bytes(b"\xff")
    with pytest.raises(SearchError, match="names.txt is not UTF-8 text: give one per line"):
        read_lines(tmp_path / "names.txt")
