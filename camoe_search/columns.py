# SPDX-License-Identifier: Apache-2.0
"""Vectors as columns of Arrow tables, and the gates in them. B rows, K entries a folded vector, E experts."""

import numpy as np


def gates(vectors: np.ndarray, num_experts: int) -> np.ndarray:
    """(B,K) -> (B,E): a gate is the length of its expert's part, whose vector has length 1."""
    if not len(vectors):
        return np.empty((0, num_experts), np.float32)
    parts = vectors.reshape(len(vectors), num_experts, -1)
    return np.linalg.norm(parts.astype(np.float32, copy=False), axis=2)


def as_lists(matrix: np.ndarray, present: np.ndarray | None = None):
    """A matrix as a column of lists of one length, without a copy.

    Args:
        matrix: (B,n) float32 or float16.
        present: (B,) bool; the other rows are null.
    """
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    mask = None if present is None or present.all() else pa.array(~present)
    return pa.FixedSizeListArray.from_arrays(values, matrix.shape[1], mask=mask)


def as_matrix(column) -> np.ndarray:
    """A column of lists of one length, none of them null, as a matrix (B,n)."""
    lists = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), lists.type.list_size)
