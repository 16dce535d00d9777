# SPDX-License-Identifier: Apache-2.0
"""Which files are found, and into which windows a video is cut."""

import os

import pytest

from camoe_search.errors import SearchError
from camoe_search.files import content_hash, cut_windows, find_videos


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
