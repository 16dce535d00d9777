# SPDX-License-Identifier: Apache-2.0
"""Collections in Milvus: their addresses and settings, their columns, filters as Milvus writes them, its errors.

A collection has a row per moment and file:

    key          VARCHAR, primary: hash of source, content, window and path
    vector       FLOAT_VECTOR or FLOAT16_VECTOR, metric inner product: the folded vector (K) and, unless the bias has a
                 column of its own, minus the bias
    bias         the query bank's correction
    path, path_lower (what the path filter compares), start, end, seconds, gate_weights, is_hub
    source       which index folder it comes from
"""

import contextlib
import hashlib
import os
import socket
import uuid

import numpy as np

from .columns import as_matrix
from .database import Description
from .errors import SearchError
from .results import Filters


DEFAULT_COLLECTION = "camoe"
# Milvus counts VARCHAR in bytes. Systems allow 4,096 for a path; its lower case may be longer.
MAX_PATH, MAX_SOURCE = 8192, 256


def settings(
    uri: str | None,
    collection: str | None,
    source: str | None,
    folder: str,
    index_type: str | None = None,
    params: dict | None = None,
    dtype: str | None = None,
    bias: str | None = None,
) -> dict:
    """What `Description.milvus` holds.

    Args:
        source: name of the folder in the collection; default: the folder's name and the machine's.
        bias: "folded" (default) or "column".

    Raises:
        SearchError: there is no address, or a name is too long.
    """
    if uri is None:
        raise SearchError("--store milvus needs --uri: a server's address, or a file name ending in .db")
    source = source or f"{os.path.basename(os.path.abspath(folder))}@{socket.gethostname()}"
    if len(source.encode()) > MAX_SOURCE or '"' in source or "\\" in source:
        raise SearchError(f"the source {source!r} must have at most {MAX_SOURCE} bytes, and no quotes or backslashes")
    return {
        "uri": uri if "://" in uri else os.path.abspath(os.path.expanduser(uri)),
        "collection": collection or DEFAULT_COLLECTION,
        "source": source,
        "index_type": index_type or "FLAT",
        "params": params or {},
        "dtype": dtype or "float32",
        "bias": bias or "folded",
    }


def with_id(milvus: dict, old: dict | None) -> dict:
    """Settings of a copy with the id that its rows have: the index's own where the copy is the one it had."""
    same = old is not None and all(old[name] == milvus[name] for name in ("uri", "collection", "source"))
    return milvus | {"id": old["id"] if same else uuid.uuid4().hex}


def short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def description_schema(client):
    """Of the second collection, which says what the first one holds."""
    from pymilvus import DataType

    schema = client.create_schema()
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # every collection needs one
    return schema


def moments_schema(client, description: Description):
    """Of a collection that holds the moments of such an index."""
    from pymilvus import DataType

    milvus, width = description.milvus, description.width
    kind = DataType.FLOAT16_VECTOR if milvus["dtype"] == "float16" else DataType.FLOAT_VECTOR
    schema = client.create_schema()
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("vector", kind, dim=width + (milvus["bias"] == "folded"))
    for name in ("path", "path_lower"):
        schema.add_field(name, DataType.VARCHAR, max_length=MAX_PATH)
    schema.add_field("source", DataType.VARCHAR, max_length=MAX_SOURCE)
    schema.add_field("bias", DataType.FLOAT)
    for name in ("start", "end", "seconds"):
        schema.add_field(name, DataType.DOUBLE)
    experts = len(description.experts)
    schema.add_field("gate_weights", DataType.ARRAY, element_type=DataType.FLOAT, max_capacity=experts)
    schema.add_field("is_hub", DataType.BOOL)
    return schema


def rows_of_table(description: Description, table, numbers: list[int]) -> list[dict]:
    """Rows of a collection from rows of a part (parts.py), whose windows have these numbers within their files.

    Raises:
        SearchError: a path is too long.
    """
    milvus, vectors = description.milvus, as_matrix(table["vector"])
    bias = table["bias"].to_numpy()
    if milvus["bias"] == "folded":
        vectors = np.concatenate([vectors, -bias[:, None].astype(vectors.dtype)], axis=1)  # (b,K+1)
    vectors = vectors.astype(milvus["dtype"])
    columns = (table[name].to_pylist() for name in ("path", "start", "end", "content_hash", "gate_weights"))
    made = []
    for n, (path, start, end, digest, gate_weights) in enumerate(zip(*columns, strict=True)):
        if len(path.lower().encode()) > MAX_PATH or len(path.encode()) > MAX_PATH:
            raise SearchError(f"a path is longer than {MAX_PATH} bytes: {path[:200]}…")
        key = short_hash(repr((milvus["source"], digest, numbers[n], path)))
        row = {"key": key, "vector": vectors[n], "path": path, "path_lower": path.lower(), "bias": float(bias[n])}
        row |= {"source": milvus["source"], "start": start, "end": end, "seconds": end - start}
        made.append(row | {"gate_weights": gate_weights, "is_hub": False})
    return made


def filter_expression(filters: Filters) -> str:
    """Filters as a Milvus boolean expression.

    Raises:
        SearchError: a filter is on what a collection does not hold.
    """
    parts = []
    missing = [name for name in filters.names if name not in ("path", "min_seconds", "max_seconds")]
    if missing:
        raise SearchError(
            f"{missing[0]} cannot be a filter in Milvus, which holds path and times only: search the folder, --index"
        )
    if filters.path is not None:
        # Servers disagree on how to escape a backslash in a pattern, so it becomes "any one character".
        pattern = filters.path.lower().replace("\\", "\0").replace("%", "\\%").replace("_", "\\_").replace("\0", "_")
        literal = pattern.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        parts.append(f'path_lower like "%{literal}%"')
    if filters.min_seconds is not None:
        parts.append(f"seconds >= {float(filters.min_seconds)!r}")
    if filters.max_seconds is not None:
        parts.append(f"seconds <= {float(filters.max_seconds)!r}")
    return " and ".join(parts)


@contextlib.contextmanager
def milvus_errors(action: str):
    """Turn Milvus's errors into a SearchError: one line that says what failed."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        raise SearchError(f"Milvus cannot {action}: {reason}") from error
