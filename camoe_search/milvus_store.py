# SPDX-License-Identifier: Apache-2.0
"""An index in Milvus: a copy of one or many index folders in one collection, and searching it.

The columns of a collection are in milvus_collection.py. The folder keeps vectors and state: a new query bank and a
lost collection need every vector, and reading them here costs nothing. Its table `sent` says what the collection was
told, so that an update costs what has changed since, however far an earlier one got. Searching needs only the
collection: a second one, NAME_index, says which model and query bank made it and which sources fill it. All sources
must agree on what gives a vector or a bias its meaning (`MEANING`).

The pymilvus client is the same for a server, a cluster and an embedded database (a file: milvus-lite). K entries a
folded vector, N queries.
"""

import dataclasses
import json
import logging
import os

import numpy as np

from .columns import gates
from .database import Description, snapshot, transaction
from .describe import MOMENTS
from .errors import SearchError
from .milvus_collection import (
    DEFAULT_COLLECTION,
    MAX_PATH,
    description_schema,
    filter_expression,
    milvus_errors,
    moments_schema,
    short_hash,
)
from .moments import Timeline, Windows, merge_windows, stand_out
from .results import Filters, Grouping, Hit, single_window, sort_hits
from .rows import Rows
from .writer import IndexWriter


BATCH_BYTES = 8 << 20  # of vectors per request; Milvus accepts 64 MB
TIMEOUT = 10.0  # seconds to reach a server
MAX_HITS = 16_384  # Milvus's own limit per search
# With the bias in its own column, Milvus ranks by the uncorrected score: so many times k rows are fetched and ranked.
OVERFETCH = 10
FIELDS = ["path", "start", "end"]

# Settings of `Description` on which all sources of a collection have to agree.
MEANING = ("weights", "experts", "dim", "num_frames", "sampling", "tau", "bank")


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
        with milvus_errors(f"open {uri}"):
            self._client = MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=TIMEOUT)
            self._names = {f"{collection}_index", collection}.intersection(self._client.list_collections())
            for name in self._names:
                self._client.load_collection(name)  # into the server's memory; does nothing if it is loaded
        self.description: Description | None = None  # what the collection holds; None if there is none yet
        self.refresh()

    def close(self):
        """Close the connection; another process can then open an embedded database."""
        self._client.close()

    # --- what the collection is --------------------------------------------------------------------------------------

    @property
    def _description_collection(self) -> str:
        return f"{self.collection}_index"

    def refresh(self):
        """Read the description again."""
        self.description, self._sources = None, {}
        if self._description_collection not in self._names:
            return
        with milvus_errors(f"read {self.collection}"):
            rows = self._client.query(
                self._description_collection, filter='key != ""', output_fields=["key", "text"],
                consistency_level="Strong",
            )  # fmt: skip
        for row in rows:
            if row["key"] == "description":
                self.description = Description(**json.loads(row["text"]))
            else:
                self._sources |= json.loads(row["text"])

    def prepare(self, description: Description):
        """Create the collections if needed, and say what they hold. Vectors are not sent yet.

        Raises:
            SearchError: what is there comes from another model, another query bank or other settings, or the source is
                that of another index.
        """
        milvus = description.milvus
        source, before = milvus["source"], self.description
        if self._sources.get(source, milvus["id"]) != milvus["id"]:
            raise SearchError(
                f"the collection {self.collection} has rows of another index by the name {source}: choose another "
                f"--source, or if that index is lost: `camoe remove --source {source} --uri {self.uri}`"
            )
        differing = [name for name in MEANING if before and getattr(before, name) != getattr(description, name)]
        if differing and self._sources.keys() - {source}:
            name = differing[0]
            raise SearchError(
                f"the collection {self.collection} of {self.uri} is shared, and was made with {name} "
                f"{getattr(before, name)}, not {getattr(description, name)}: name another with --collection"
            )
        if before and before.width != description.width:
            raise SearchError(
                f"the collection {self.collection} of {self.uri} has vectors of {before.width} entries, not "
                f"{description.width}: name another with --collection, or drop it"
            )
        for name in ("dtype", "bias"):
            if before and before.milvus[name] != milvus[name]:
                raise SearchError(
                    f"the collection {self.collection} has {name} {before.milvus[name]}, not {milvus[name]}"
                )
        self._create_missing(description)
        kept = {name: milvus[name] for name in ("index_type", "params", "dtype", "bias")}
        shared = dataclasses.replace(description, milvus=kept, cache=None, exclude=[])
        self._describe("description", dataclasses.asdict(shared))
        self._describe(short_hash(source), {source: milvus["id"]})
        self.refresh()

    def _describe(self, key: str, values: dict):
        row = {"key": key, "text": json.dumps(values), "vector": [0.0, 0.0]}
        with milvus_errors(f"write {self.collection}"):
            self._client.upsert(self._description_collection, [row])

    def _create_missing(self, description: Description):
        milvus = description.milvus
        with milvus_errors(f"create {self.collection}"):
            if self._description_collection not in self._names:
                self._create(self._description_collection, description_schema(self._client), "FLAT", {}, ())
            if self.collection not in self._names:
                columns = ("path_lower", "source")
                self._create(
                    self.collection,
                    moments_schema(self._client, description),
                    milvus["index_type"],
                    milvus["params"],
                    columns,
                )

    def _create(self, name: str, schema, index_type: str, params: dict, columns: tuple[str, ...]):
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type=index_type, metric_type="IP", params=params)
        for column in columns:
            index.add_index(column, index_type="INVERTED")
        # Bounded: a search may miss what was written in the last seconds, and waits for nothing.
        self._client.create_collection(name, schema=schema, index_params=index, consistency_level="Bounded")
        self._names.add(name)

    # --- filling -----------------------------------------------------------------------------------------------------

    def update(self, writer: IndexWriter) -> tuple[int, int]:
        """Make the rows of an index folder in the collection equal to the folder.

        Returns:
            The number of rows written (new or changed) and of rows deleted.

        Raises:
            SearchError: a path is too long, see also `prepare`; nothing was sent.
        """
        description, connection = writer.description, writer.connection
        self.prepare(description)
        writer.refresh_hubs()
        source = description.milvus["source"]
        meaning = [getattr(description, name) for name in MEANING]
        version = short_hash(json.dumps(meaning))
        with snapshot(connection):
            rows = Rows(writer.folder, connection, description, {})
            hubs = {row for (row,) in connection.execute("SELECT best FROM bank")}
            wanted = {}
            for row, _, path, start, end, _, _, digest, file, window, number in connection.execute(MOMENTS):
                if len(path.lower().encode()) > MAX_PATH or len(path.encode()) > MAX_PATH:
                    raise SearchError(f"a path is longer than {MAX_PATH} bytes; nothing was sent: {path[:200]}…")
                told = (path, version, int(row in hubs), short_hash(repr((source, digest, number, path))))
                wanted[file, window] = told, row, start, end
        sent = {(file, window): tuple(told) for file, window, *told in connection.execute("SELECT * FROM sent")}
        todo = [place for place, (told, *_) in wanted.items() if sent.get(place) != told]
        size = max(1, BATCH_BYTES // (4 * (description.width + 1)))
        # Of files that were removed or renamed. They go first: `sent` forgets an old key when the new one is written.
        stale = sorted({told[-1] for told in sent.values()} - {told[-1] for told, *_ in wanted.values()})
        with milvus_errors(f"write {self.collection}"):
            for first in range(0, len(stale), MAX_HITS):
                self._client.delete(self.collection, ids=stale[first : first + MAX_HITS])
            with transaction(connection):
                gone = [place for place in sent if place not in wanted]
                connection.executemany("DELETE FROM sent WHERE file = ? AND window = ?", gone)
            for first in range(0, len(todo), size):
                part = todo[first : first + size]
                self._client.upsert(self.collection, self._rows(description, rows, [wanted[place] for place in part]))
                with transaction(connection):
                    connection.executemany(
                        "INSERT OR REPLACE INTO sent VALUES(?, ?, ?, ?, ?, ?)",
                        [(*place, *wanted[place][0]) for place in part],
                    )
            self._client.flush(self.collection)
        return len(todo), len(stale)

    def _rows(self, description: Description, rows: Rows, moments: list[tuple]) -> list[dict]:
        """Moments of an index folder as rows of the collection."""
        milvus = description.milvus
        vectors = rows.vectors([row for _, row, *_ in moments])  # (b,K)
        gate_weights = gates(vectors, len(description.experts))
        bias = np.array([rows.bias(row) for _, row, *_ in moments], np.float32)
        if milvus["bias"] == "folded":
            vectors = np.concatenate([vectors, -bias[:, None]], axis=1)  # (b,K+1)
        vectors = vectors.astype(milvus["dtype"])
        made = []
        for n, ((path, _, is_hub, key), _, start, end) in enumerate(moments):
            row = {"key": key, "vector": vectors[n], "path": path, "path_lower": path.lower(), "bias": float(bias[n])}
            row |= {"source": milvus["source"], "start": start, "end": end, "seconds": end - start}
            made.append(row | {"gate_weights": gate_weights[n].tolist(), "is_hub": bool(is_hub)})
        return made

    def upsert(self, rows: list[dict]):
        """Write rows as of `rows_of_table`; rows of the same keys are replaced."""
        size = max(1, BATCH_BYTES // (4 * (self.description.width + 1)))
        with milvus_errors(f"write {self.collection}"):
            for first in range(0, len(rows), size):
                self._client.upsert(self.collection, rows[first : first + size])

    def flush(self):
        """Wait until what was written is stored."""
        with milvus_errors(f"write {self.collection}"):
            self._client.flush(self.collection)

    def count_source(self, source: str) -> int:
        """The number of rows of a source."""
        with milvus_errors(f"read {self.collection}"):
            count = self._client.query(
                self.collection, filter=f'source == "{source}"', output_fields=["count(*)"],
                consistency_level="Strong",
            )  # fmt: skip
        return count[0]["count(*)"]

    def remove_source(self, source: str) -> int:
        """Delete all rows of a source, for example of an index that is lost. Returns their number.

        Raises:
            SearchError: the collection has no such source.
        """
        if source not in self._sources:
            names = ", ".join(sorted(self._sources)) or "none"
            raise SearchError(f"the collection {self.collection} has no source {source!r}; it has: {names}")
        condition = f'source == "{source}"'
        with milvus_errors(f"write {self.collection}"):
            count = self._client.query(
                self.collection, filter=condition, output_fields=["count(*)"], consistency_level="Strong"
            )
            self._client.delete(self.collection, filter=condition)
            self._client.delete(self._description_collection, ids=[short_hash(source)])
            self._client.flush(self.collection)
        self.refresh()
        return count[0]["count(*)"]

    # --- searching ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with milvus_errors(f"count {self.collection}"):
            return self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def search(
        self, queries: np.ndarray, k: int, filters: Filters, corrected: np.ndarray, dynamic: bool = False
    ) -> list[list[Hit]]:
        """The k best windows for each of (N,K) queries, see `VectorStore`; one request.

        Raises:
            SearchError: a filter needs an index folder, k is above Milvus's limit, or Milvus does not answer.
        """
        if k > MAX_HITS:
            raise SearchError(f"k is {k}: Milvus gives {MAX_HITS} results at most")
        milvus, count = self.description.milvus, len(queries)
        if dynamic:  # both ways in one request; the hub flag of the uncorrected best moment decides below
            queries = np.concatenate([queries, queries])
            corrected = np.arange(2 * count) >= count
        limit = k
        if milvus["bias"] == "folded":
            queries = np.concatenate([queries, corrected[:, None]], axis=1)
        elif corrected.any():
            limit = min(OVERFETCH * k, MAX_HITS)
        with milvus_errors(f"search {self.collection}"):
            found = self._client.search(
                self.collection, data=list(queries.astype(milvus["dtype"])), limit=limit,
                filter=filter_expression(filters), output_fields=[*FIELDS, "is_hub", "bias"],
            )  # fmt: skip
        lists, hubs = [], []
        for hits, is_corrected in zip(found, corrected, strict=True):
            subtract = is_corrected and milvus["bias"] == "column"
            moments = [
                single_window(
                    hit["distance"] - (hit["entity"]["bias"] if subtract else 0.0),
                    *(hit["entity"][name] for name in FIELDS),
                    hit["key"],
                )
                for hit in hits
            ]
            flags = {hit["key"]: hit["entity"]["is_hub"] for hit in hits}
            lists.append(sort_hits(moments)[:k])
            hubs.append(bool(lists[-1]) and flags[lists[-1][0].key])
        if dynamic:
            return [lists[count + n if hubs[n] else n] for n in range(count)]
        return lists

    def search_moments(
        self,
        queries: np.ndarray,
        k: int,
        filters: Filters,
        corrected: np.ndarray,
        dynamic: bool,
        grouping: Grouping,
    ) -> list[list[Hit]]:
        """Moments for each of (N,K) queries, see `VectorStore`, from the windows that a search finds.

        Identical files stay separate results: a collection does not know their content.
        """
        count, done = max(k, min(OVERFETCH * k, MAX_HITS)), {}
        waiting = list(range(len(queries)))
        while waiting:
            lists = self.search(queries[waiting], count, filters, corrected[waiting], dynamic)
            for query, hits in zip(waiting, lists, strict=True):
                is_all = len(hits) < count or count >= MAX_HITS
                if grouping.min_score is not None:
                    kept = [hit for hit in hits if hit.score >= grouping.min_score]
                    is_all, hits = is_all or len(kept) < len(hits), kept
                made = _merged(hits, k, grouping) if grouping.merge or grouping.by_file else hits[:k]
                if len(made) == k or is_all:
                    done[query] = made
            waiting = [query for query in waiting if query not in done]
            count = min(4 * count, MAX_HITS)
        return [done[query] for query in range(len(queries))]

    def locate(self, key: str) -> Hit:
        """The file and time of a row, with score 0.

        Raises:
            KeyError: there is no such row.
        """
        row = self._get([key], FIELDS).get(key)
        if row is None:
            raise KeyError(key)
        return single_window(0.0, row["path"], row["start"], row["end"], key)

    def vectors(self, keys: list[str]) -> dict[str, np.ndarray]:
        """(K,) of each key that there is, without the bias."""
        width, dtype = self.description.width, self.description.milvus["dtype"]
        found = {}
        for key, row in self._get(keys, ["vector"]).items():
            vector = row["vector"]
            if isinstance(vector, bytes):  # as a float16 vector comes
                vector = np.frombuffer(vector, dtype)
            found[key] = np.asarray(vector, np.float32)[:width]
        return found

    def _get(self, keys: list[str], fields: list[str]) -> dict[str, dict]:
        with milvus_errors(f"read {self.collection}"):
            rows = self._client.get(self.collection, ids=[str(key) for key in keys], output_fields=["key", *fields])
        return {row["key"]: row for row in rows}


def _merged(hits: list[Hit], k: int, grouping: Grouping) -> list[Hit]:
    """The first k moments among windows that were found, best first."""
    by_path: dict[str, list[Hit]] = {}
    for hit in hits:
        by_path.setdefault(hit.path, []).append(hit)
    timelines = {}
    for path, found in by_path.items():
        found.sort(key=lambda hit: hit.start)
        starts, ends, scores = (np.array([getattr(hit, name) for hit in found]) for name in ("start", "end", "score"))
        windows = Windows(path, starts, ends, [hit.key for hit in found])
        timelines[path] = Timeline(windows, lambda numbers, scores=scores: scores[numbers])

    def as_hit(moment) -> Hit:
        hit = by_path[moment.timeline.windows.owner][moment.number]
        return hit._replace(start=moment.start, end=moment.end)

    numbers = {hit.key: number for found in by_path.values() for number, hit in enumerate(found)}
    candidates = [(hit.score, timelines[hit.path], numbers[hit.key]) for hit in hits]
    made = []
    for moment in merge_windows(candidates, k, grouping.by_file):
        others = tuple(map(as_hit, stand_out(moment.timeline))) if grouping.by_file else ()
        made.append(as_hit(moment)._replace(moments=others))
    return made


def open_collection(description: Description) -> MilvusStore:
    """The collection that an index names."""
    return MilvusStore(description.milvus["uri"], description.milvus["collection"])
