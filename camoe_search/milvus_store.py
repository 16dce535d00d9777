# SPDX-License-Identifier: Apache-2.0
"""An index in Milvus: the vectors of one or many index folders in one collection, and searching it.

A collection has a row per moment:

    key          VARCHAR, primary: hash of folder, path, start and end
    vector       FLOAT_VECTOR (K+1): the folded vector, and minus the bank's bias; metric inner product
    path, start, end, seconds, gate_weights, is_hub
    path_lower   what the path filter compares
    source       which index folder it comes from
    version      hash of vector, gate weights and is_hub: a row is sent again when it changes

The index folder remains the place where videos are encoded and interrupted runs resume; `MilvusStore.update` makes its
rows in the collection equal to it, however far an earlier call got. Searching needs only the collection: a single row
in a second collection, NAME_index, says which model made it. So many machines can fill one collection, each from its
share of the files, and others can search it. K entries a folded vector, N queries.

The pymilvus client is the same for a server, a cluster and an embedded database (a file: milvus-lite).
"""

import contextlib
import hashlib
import json
import logging
import os

import numpy as np
import pyarrow as pa

from .errors import SearchError
from .results import Filters, Hit, sort_hits
from .store import Description, column_matrix


DEFAULT_COLLECTION = "camoe"
INDEX_TYPES = {"flat": "FLAT", "hnsw": "HNSW", "ivf": "IVF_FLAT"}
BATCH_BYTES = 8 << 20  # of vectors per request; Milvus accepts 64 MB
TIMEOUT = 10.0  # seconds to reach a server
MAX_HITS = 16_384  # Milvus's own limit per search
FIELDS = ["path", "start", "end"]


class MilvusStore:
    """An open collection: a `VectorStore` that can also be filled.

    Args:
        uri: address of a server (http://host:19530), or a file name ending in .db for the embedded database. The
            token of a server is read from the environment variable MILVUS_TOKEN, so that it is in no file.
        collection: name.

    Raises:
        ImportError: pymilvus is not installed (naming the pip command).
        SearchError: the server cannot be reached.
    """

    def __init__(self, uri: str, collection: str = DEFAULT_COLLECTION):
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError('the store milvus needs pymilvus: pip install "camoe[milvus]"') from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it raises every error that it logs
        self.uri, self.collection = uri, collection
        with _milvus_errors(f"open {uri}"):
            self._client = MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=TIMEOUT)
            for name in (self._description_collection, self.collection):
                if self._client.has_collection(name):
                    self._client.load_collection(name)  # into the server's memory; does nothing if it is loaded

    def close(self):
        """Close the connection; another process can then open an embedded database."""
        self._client.close()

    # --- what the collection is --------------------------------------------------------------------------------------

    @property
    def _description_collection(self) -> str:
        return f"{self.collection}_index"

    def description(self) -> Description | None:
        """What the collection holds; None if there is none yet."""
        with _milvus_errors(f"read {self.collection}"):
            if not self._client.has_collection(self._description_collection):
                return None
            rows = self._client.get(self._description_collection, ids=["description"], output_fields=["text"])
        return Description(**json.loads(rows[0]["text"])) if rows else None

    def _prepare(self, description: Description):
        """Create the collections if needed and write the description.

        Raises:
            SearchError: the collection holds vectors of another model.
        """
        before = self.description()
        if before is not None and (before.weights, before.experts) != (description.weights, description.experts):
            raise SearchError(
                f"the collection {self.collection} of {self.uri} holds vectors of {before.model} (weights "
                f"{before.weights[:8]}), not of {description.model}: name another with --collection, or drop it"
            )
        from pymilvus import DataType

        with _milvus_errors(f"write {self.collection}"):
            if before is None and not self._client.has_collection(self._description_collection):
                schema = self._client.create_schema()
                schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
                schema.add_field("text", DataType.VARCHAR, max_length=65_535)
                schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # every collection needs one
                self._create(self._description_collection, schema, "FLAT")
            if not self._client.has_collection(self.collection):
                self._create(self.collection, self._schema(description), INDEX_TYPES[description.faiss])
            text = json.dumps(vars(description) | {"generation": "", "source": ""})
            row = {"key": "description", "text": text, "vector": [0.0, 0.0]}
            self._client.upsert(self._description_collection, [row])

    def _create(self, name: str, schema, index_type: str):
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type=index_type, metric_type="IP")
        self._client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def _schema(self, description: Description):
        from pymilvus import DataType

        schema = self._client.create_schema()
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=description.width + 1)
        for name in ("path", "path_lower"):
            schema.add_field(name, DataType.VARCHAR, max_length=65_535)
        for name in ("source", "version"):
            schema.add_field(name, DataType.VARCHAR, max_length=32)
        for name in ("start", "end", "seconds"):
            schema.add_field(name, DataType.DOUBLE)
        experts = len(description.experts)
        schema.add_field("gate_weights", DataType.ARRAY, element_type=DataType.FLOAT, max_capacity=experts)
        schema.add_field("is_hub", DataType.BOOL)
        return schema

    # --- filling -----------------------------------------------------------------------------------------------------

    def update(self, description: Description, table: pa.Table) -> tuple[int, int]:
        """Make the rows of an index folder in the collection equal to its table.

        Args:
            description: of the index; its `source` identifies the folder's rows. Rows of other folders stay.
            table: its moments.

        Returns:
            The number of rows written (new or changed) and of rows deleted.
        """
        self._prepare(description)
        with _milvus_errors(f"write {self.collection}"):
            stored = self._versions(description.source)
            vectors = column_matrix(table, "vector")
            size = max(1, BATCH_BYTES // (4 * (description.width + 1)))
            keys, written = set(), 0
            for first in range(0, len(table), size):
                part = slice(first, first + size)
                rows = _rows(description.source, table.slice(first, size), vectors[part])
                keys.update(row["key"] for row in rows)
                changed = [row for row in rows if stored.get(row["key"]) != row["version"]]
                if changed:
                    self._client.upsert(self.collection, changed)
                written += len(changed)
            stale = sorted(stored.keys() - keys)
            for first in range(0, len(stale), MAX_HITS):
                self._client.delete(self.collection, ids=stale[first : first + MAX_HITS])
            self._client.flush(self.collection)
        return written, len(stale)

    def _versions(self, source: str) -> dict[str, str]:
        """Key -> version of the rows of an index folder."""
        pages = self._client.query_iterator(
            self.collection, filter=f'source == "{source}"', output_fields=["key", "version"], batch_size=MAX_HITS
        )
        versions = {}
        with contextlib.closing(pages):
            while page := pages.next():
                versions.update((row["key"], row["version"]) for row in page)
        return versions

    # --- searching ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with _milvus_errors(f"count {self.collection}"):
            return self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def search(self, queries: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        """The k best moments for each of (N,K+1) queries, best first; fewer where fewer pass the filters.

        Raises:
            SearchError: k is above Milvus's limit, or Milvus does not answer.
        """
        if k > MAX_HITS:
            raise SearchError(f"k is {k}: Milvus gives {MAX_HITS} results at most")
        with _milvus_errors(f"search {self.collection}"):
            found = self._client.search(
                self.collection, data=list(queries), limit=k, filter=_expression(filters), output_fields=FIELDS
            )
        return [
            sort_hits([Hit(hit["distance"], *(hit["entity"][name] for name in FIELDS), hit["key"]) for hit in hits])
            for hits in found
        ]

    def is_hub(self, key: str) -> bool:
        """Whether a moment is the best one of its index folder for some query of the bank."""
        return self._get(key, ["is_hub"])["is_hub"]

    def locate(self, key: str) -> Hit:
        """The file and time of a row, with score 0.

        Raises:
            KeyError: there is no such row.
        """
        row = self._get(key, FIELDS)
        return Hit(0.0, row["path"], row["start"], row["end"], key)

    def vector(self, key: str) -> np.ndarray:
        """(K,), without the bias."""
        return np.asarray(self._get(key, ["vector"])["vector"], np.float32)[:-1]

    def _get(self, key: str, fields: list[str]) -> dict:
        with _milvus_errors(f"read {self.collection}"):
            rows = self._client.get(self.collection, ids=[str(key)], output_fields=fields)
        if not rows:
            raise KeyError(key)
        return rows[0]


def _rows(source: str, table: pa.Table, vectors: np.ndarray) -> list[dict]:
    """Moments of an index folder as rows of the collection."""
    folded = np.concatenate([vectors, -np.asarray(table["bias"], np.float32)[:, None]], axis=1)  # (b,K+1)
    gates = column_matrix(table, "gate_weights")
    columns = [table[name].to_pylist() for name in ("path", "start", "end", "is_hub")]
    rows = []
    for vector, gate, path, start, end, is_hub in zip(folded, gates, *columns, strict=True):
        key = hashlib.blake2b(repr((source, path, start, end)).encode(), digest_size=16).hexdigest()
        version = hashlib.blake2b(vector.tobytes() + gate.tobytes() + bytes([is_hub]), digest_size=16).hexdigest()
        row = {"key": key, "vector": vector, "path": path, "path_lower": path.lower(), "source": source}
        row |= {"version": version, "start": start, "end": end, "seconds": end - start}
        rows.append(row | {"gate_weights": gate.tolist(), "is_hub": is_hub})
    return rows


def _expression(filters: Filters) -> str:
    """Filters as a Milvus boolean expression."""
    parts = []
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
def _milvus_errors(action: str):
    """Turn Milvus's errors into a SearchError: one line that says what failed."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        raise SearchError(f"Milvus cannot {action}: {reason}") from error
