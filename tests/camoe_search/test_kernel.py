# SPDX-License-Identifier: Apache-2.0
"""The stateless kernel: a table of clips in, the same table with vectors out."""

import math

import numpy as np
import pyarrow as pa
import pytest

from camoe_search.bank import QueryBank
from camoe_search.columns import as_matrix
from camoe_search.files import content_hash
from camoe_search.kernel import encode
from modeling_camoe.encode import encode_videos
from modeling_camoe.frames import Clip
from tests.video_files import cut_off, write_video


def clips_of(paths, start=None, end=None, **more):
    count = len(paths)
    columns = {"path": pa.array(paths, pa.string())}
    if start is not None:
        columns |= {"start": pa.array(start, pa.float64()), "end": pa.array(end, pa.float64())}
    return pa.table(columns | {name: pa.array(values) for name, values in more.items()}).slice(0, count)


def test_rows_keep_their_order_and_their_other_columns(videos, encoder):
    paths = [str(videos / f"clip_{i}.mp4") for i in (3, 0, 5)]
    found = encode(clips_of(paths, caption=["c", "a", "e"]), encoder, batch_size=2)
    assert found["path"].to_pylist() == paths and found["caption"].to_pylist() == ["c", "a", "e"]
    expected = encode_videos(encoder.model, encoder.processor, paths, batch_size=2)
    assert np.array_equal(as_matrix(found["vector"]), expected.vectors.numpy())
    np.testing.assert_allclose(as_matrix(found["gate_weights"]), expected.gate_weights.numpy(), atol=1e-6)
    assert found["error"].to_pylist() == [None] * 3 and found["bias"].to_pylist() == [0.0] * 3
    assert found["content_hash"].to_pylist() == [content_hash(path) for path in paths]


def test_a_window_is_encoded_as_the_window_that_it_is(videos, encoder):
    path = str(videos / "clip_5.mp4")
    found = encode(clips_of([path, path], [0.5, None], [1.0, None]), encoder)
    expected = encode_videos(encoder.model, encoder.processor, [Clip(path, 0.5, 1.0), Clip(path)])
    assert np.array_equal(as_matrix(found["vector"]), expected.vectors.numpy())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_whatever_is_wrong_with_a_row_is_that_rows_error(videos, encoder, tmp_path, batch_size):
    good, gone, cut = str(videos / "clip_0.mp4"), str(tmp_path / "gone.mp4"), str(tmp_path / "cut.mp4")
    cut_off(write_video(tmp_path / "cut.mp4", 48))
    rows = [
        (None, None, None, "names no file"),
        (good, None, None, None),
        (gone, None, None, "no such file"),
        (good, -1.0, 2.0, "start is -1.0"),
        (cut, None, None, "cut.mp4"),
        (good, 1.0, 0.5, "the window is empty"),
        (good, 0.0, math.inf, "end is inf"),
        (good, math.nan, 1.0, "start is nan"),
        (good, 0.0, 0.5, None),
        ("", None, None, "names no file"),
    ]
    paths, starts, ends, causes = zip(*rows, strict=True)
    found = encode(clips_of(paths, starts, ends), encoder, batch_size=batch_size)
    for error, cause, vector in zip(found["error"].to_pylist(), causes, found["vector"].to_pylist(), strict=True):
        assert (error is None) == (cause is None) == (vector is not None)
        assert cause is None or cause in error


def test_a_table_without_a_row_has_all_columns(encoder, videos):
    empty = encode(clips_of([]), encoder)
    full = encode(clips_of([str(videos / "clip_0.mp4")]), encoder)
    assert len(empty) == 0 and empty.schema == full.schema


def test_the_bias_is_the_query_banks(videos, encoder):
    texts = ["a dog", "a red car"]
    bank = QueryBank(texts, encoder.encode_texts(texts), 0.05)
    found = encode(clips_of([str(videos / "clip_1.mp4"), "gone.mp4"]), encoder, bank=bank)
    vector = as_matrix(found["vector"].slice(0, 1))
    assert found["bias"].to_pylist() == [pytest.approx(bank.bias(vector)[0][0]), None]


def test_rows_that_are_encoded_again_have_each_column_once(videos, encoder):
    once = encode(clips_of([str(videos / "clip_1.mp4")]), encoder)
    assert encode(once, encoder).equals(once)
