# SPDX-License-Identifier: Apache-2.0
"""`camoe load`: parts into an index folder or into Milvus. Nothing is encoded.

Loading again adds what is new: a window is known by the hash of its file and its time. At the end the rows are counted
in the store, and must be as many as the parts have.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .addresses import is_address
from .columns import as_matrix
from .database import Description, connect, create, exists, read_description, write_lock
from .errors import SearchError
from .parts import MEANING, PartFolder, description_of
from .prepare import check_model, choose_bank
from .writer import IndexWriter, LoadedWindow


COLUMNS = "path start end number duration size mtime_ns content_hash vector gate_weights bias error".split()
PLACE = r"^(?:([A-Za-z][A-Za-z0-9+.-]+://[^/]*)/)?(?s:.*)$"  # the bucket of an address; nothing of a path
ROWS = 16_384  # read and written at a time: 32 MB of 512 float32


@dataclass
class LoadReport:
    """What was loaded."""

    parts: int = 0
    added: int = 0  # moments
    present: int = 0  # moments that were there
    failed: int = 0  # rows of the parts without a vector
    moments: int = 0  # of the store now
    text_encoder: str = ""  # why the index has no text tower
    seconds: float = 0.0


class Parts:
    """The parts of a folder, an address or a data set on the Hub, as one table.

    Args:
        source: "parts", "s3://films/parts", or "user/name".

    Raises:
        SearchError: there are none, or they were not all made alike.
    """

    def __init__(self, source: str):
        if not os.path.isdir(source) and not is_address(source) and source.count("/") == 1:
            from .hub import download

            source = download(source)
        self.folder = PartFolder(source)
        self.names = sorted(self.folder.names())
        if not self.names:
            raise SearchError(f"{source} has no parts: make them with `camoe encode … --out {source}`")
        self.description: Description | None = None
        for name in self.names:
            with self.folder.open(name) as file:
                self._check(name, description_of(file.schema_arrow))

    def _check(self, name: str, description: Description | None):
        if description is None:
            raise SearchError(f"{self.folder.join(name)} does not say how it was made: it is not from `camoe encode`")
        first = self.description = self.description or description
        differing = [each for each in MEANING if getattr(first, each) != getattr(description, each)]
        if differing:
            raise SearchError(
                f"{self.folder.join(name)} has {differing[0]} {getattr(description, differing[0])}, other parts have "
                f"{getattr(first, differing[0])}: load them from folders of their own"
            )

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """Some rows at a time, with the name of their part."""
        for name in self.names:
            with self.folder.open(name) as file:
                for batch in file.iter_batches(ROWS, columns=COLUMNS):
                    yield name, pa.Table.from_batches([batch])

    def roots(self) -> list[str]:
        """Folders that all files are in: one of this machine's, and one of each bucket."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            paths = pc.drop_null(self.folder.read(name, ["path"])["path"])
            places = pc.replace_substring_regex(paths, pattern=PLACE, replacement="\\1")
            ends = pa.table({"place": places, "path": paths}).group_by("place")
            for row in ends.aggregate([("path", "min"), ("path", "max")]).to_pylist():
                found.setdefault(row["place"], []).extend([row["path_min"], row["path_max"]])
        # What the first and the last of sorted paths have in common, all between them have.
        return [os.path.commonprefix([min(ends), max(ends)]).rpartition("/")[0] or "/" for ends in found.values()]


def load_into_index(
    source: str,
    folder: str | os.PathLike,
    model: str | None = None,
    device: str | None = None,
    text_tower: bool = True,
    queries: list[str] | None = None,
    tau: float | None = None,
) -> LoadReport:
    """Put parts into an index folder, new or not.

    Args:
        source: see [`Parts`].
        folder: of the index.
        model: the one that made the parts, if it has moved.
        text_tower: export it, for searches without torch.
        queries, tau: a new query bank, as of `VideoIndex.calibrate`; default: the index's, or the parts'.

    Raises:
        SearchError: the index is of another model or other settings, or not all rows have arrived.
    """
    begin, report = time.perf_counter(), LoadReport()
    parts, folder = Parts(source), Path(folder)
    description = parts.description
    is_needed = text_tower or description.bank or queries is not None or tau is not None
    encoder = _load_model(description, model, device) if is_needed else None
    with write_lock(folder):
        _prepare(folder, description, encoder, queries, tau)
        with IndexWriter(folder) as writer:
            roots, seen = parts.roots(), _Distinct()
            ((before,),) = writer.connection.execute("SELECT count(*) FROM windows WHERE row IS NOT NULL")
            for _, table in parts.tables():
                report.failed += len(table) - table["error"].null_count
                table = _complete(table)
                good = table.filter(pc.is_null(table["error"]))
                seen.add(good)
                report.added += writer.load(roots, _windows(table), as_matrix(good["vector"]))
            writer.refresh_hubs()
            writer.tidy()
            ((after,),) = writer.connection.execute("SELECT count(*) FROM windows WHERE row IS NOT NULL")
            report.parts, report.present = len(parts.names), seen.count() - report.added
            if after - before != report.added or report.present < 0:
                raise SearchError(f"{report.added} moments were loaded, but {folder} has {after - before} more")
            if encoder is not None and text_tower:
                from .update import export_text_tower

                report.text_encoder = export_text_tower(writer, encoder)
            report.moments = after
    report.seconds = time.perf_counter() - begin
    return report


def _load_model(description: Description, model: str | None, device: str | None):
    """The model of the parts: for its text tower, or the vectors of a query bank."""
    from .encoder import load_encoder

    encoder = load_encoder(model or description.model, device, description.sampling)
    check_model(encoder, description)
    return encoder


def _prepare(folder: Path, description: Description, encoder, queries: list[str] | None, tau: float | None):
    """Make the index, or check that it is of the same kind. Its query bank is there before rows are."""
    if exists(folder):
        with contextlib.closing(connect(folder)) as connection:
            old = read_description(connection)
        for name in MEANING:
            if name not in ("on_damage", "tau", "bank") and getattr(old, name) != getattr(description, name):
                raise SearchError(
                    f"the index {folder} was made with {name} {getattr(old, name)}, the parts with "
                    f"{getattr(description, name)}: give another --index"
                )
        if queries is not None or tau is not None:
            with IndexWriter(folder) as writer:
                writer.set_bank(choose_bank(encoder, writer.bank, queries, tau))
        return
    name = description.model if encoder is None else encoder.name
    create(folder, dataclasses.replace(description, model=name, tau=None, bank="", milvus=None, cache=None))
    if description.bank or queries is not None or tau is not None:
        with IndexWriter(folder) as writer:
            writer.set_bank(choose_bank(encoder, None, queries, tau or description.tau))


def _complete(table: pa.Table) -> pa.Table:
    """With a time for each window that has a vector, and a name for each content."""
    start = pc.fill_null(table["start"], 0.0)
    end = pc.coalesce(table["end"], table["duration"], start)
    digest = pc.coalesce(table["content_hash"], table["path"])  # of a file that could not be hashed
    columns = {"start": start, "end": end, "content_hash": digest}
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table.filter(pc.is_valid(table["path"]))


def _windows(table: pa.Table) -> list[LoadedWindow]:
    columns = (table[name].to_pylist() for name in LoadedWindow._fields)
    return list(map(LoadedWindow._make, zip(*columns, strict=True)))


class _Distinct:
    """Counts windows, each once, by 8 bytes of each."""

    def __init__(self):
        self._hashes: list[np.ndarray] = []

    def add(self, table: pa.Table):
        columns = (table[name].to_pylist() for name in ("content_hash", "start", "end"))
        self._hashes.append(np.fromiter(map(hash, zip(*columns, strict=True)), np.int64, len(table)))

    def count(self) -> int:
        return len(np.unique(np.concatenate(self._hashes))) if self._hashes else 0


# --- Milvus ----------------------------------------------------------------------------------------------------------


def load_into_milvus(
    source: str,
    uri: str | None,
    collection: str | None = None,
    name: str | None = None,
    index_type: str | None = None,
    dtype: str | None = None,
    model: str | None = None,
    device: str | None = None,
    queries: list[str] | None = None,
    tau: float | None = None,
) -> LoadReport:
    """Put parts into a collection of Milvus, where rows of the same key are replaced.

    Args:
        source: see [`Parts`]. name: what these rows are called in the collection; default: the folder's name.
        uri, collection, index_type, dtype: as of `camoe index --store milvus`.
        model, device, queries, tau: as of `load_into_index`; default: the biases that the parts have.

    Raises:
        SearchError: as `MilvusStore.prepare`; or not all rows have arrived.
    """
    from .milvus_collection import rows_of_table, settings
    from .milvus_store import MilvusStore

    begin, report = time.perf_counter(), LoadReport()
    parts = Parts(source)
    name = name or os.path.basename(parts.folder.path.rstrip("/"))
    given = settings(uri, collection, name, source, index_type, None, dtype)
    milvus = given | {"id": f"parts:{name}"}
    description, bank = dataclasses.replace(parts.description, milvus=milvus), None
    if queries is not None or tau is not None:
        bank = choose_bank(_load_model(description, model, device), None, queries, tau)
        description = dataclasses.replace(description, tau=bank and bank.tau, bank=bank.hash if bank else "")
    with contextlib.closing(MilvusStore(milvus["uri"], milvus["collection"])) as store:
        store.prepare(description)
        before, keys = store.count_source(name), set()
        numbers = _Numbers()
        for _, table in parts.tables():
            report.failed += len(table) - table["error"].null_count
            good = _complete(table.filter(pc.is_null(table["error"])))
            if bank is not None:
                biases = pa.array(bank.bias(as_matrix(good["vector"]).astype(np.float32))[0])
                good = good.set_column(good.column_names.index("bias"), "bias", biases)
            rows = rows_of_table(description, good, numbers(good))
            keys.update(row["key"] for row in rows)
            store.upsert(rows)
        store.flush()
        after = store.count_source(name)
        report.parts, report.added, report.present = len(parts.names), after - before, len(keys) - (after - before)
        report.moments = after
        if after < len(keys):
            raise SearchError(f"the parts have {len(keys)} moments, but {milvus['collection']} has {after} of them")
    report.seconds = time.perf_counter() - begin
    return report


class _Numbers:
    """The number of each window within its file: the part's, or counted on for windows that a manifest gave."""

    def __init__(self):
        self._next: dict[str, int] = {}

    def __call__(self, table: pa.Table) -> list[int]:
        found = []
        for digest, number in zip(table["content_hash"].to_pylist(), table["number"].to_pylist(), strict=True):
            if number is None:
                number = self._next.get(digest, 0)
                self._next[digest] = number + 1
            found.append(number)
        return found
