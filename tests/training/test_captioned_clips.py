# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set -> clips: windows, names, and what is refused."""

import datasets
import pytest

from data.captioned_clips import read_captioned_clips
from data.errors import UserError


def read(**columns):
    count = len(columns["video"])
    table = datasets.Dataset.from_dict({"captions": [[f"a dog {n}"] for n in range(count)], **columns})
    return read_captioned_clips(table, ["fusion"], None)


def test_windows_of_one_video_are_clips_with_names_of_their_own():
    split = read(video=["a/x.mp4"] * 3 + ["y.mp4"], start=[0.0, 2.5, 4.0, None], end=[2.5, 4.0, None, None])
    assert split.video_ids == ["x@0-2.5", "x@2.5-4", "x@4-", "y"]
    assert [(clip.start, clip.end) for clip in split.clips] == [(0.0, 2.5), (2.5, 4.0), (4.0, None), (None, None)]


def test_the_same_window_twice_is_refused():
    with pytest.raises(UserError, match="'x@0-2' appears twice.*each window of one, one row"):
        read(video=["x.mp4", "x.mp4"], start=[0.0, 0.0], end=[2.0, 2.0])


@pytest.mark.parametrize("start", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_named_with_its_row(start):
    with pytest.raises(UserError, match="row 1 of the data set has .* as 'start': give seconds from 0 on"):
        read(video=["x.mp4", "y.mp4"], start=[0.0, start], end=[2.0, 2.0])
