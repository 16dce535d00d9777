# SPDX-License-Identifier: Apache-2.0
"""Parts: Parquet files of encoded rows, each named by what it holds, together a data set.

    part-<settings>-<rows>.parquet      8 and 16 hexadecimal digits: how it was encoded, and which rows of a manifest

A name is known before a row is encoded, so a run skips the parts that are there, whoever made them. Rows of a manifest
are cut into blocks in their order; where the folder has parts of other blocks (the manifest has grown in the middle),
their rows are looked up and not encoded again. A part appears complete or not at all.

The columns are those of the manifest and of the kernel, and

    number      of the window within its file; null where the manifest gives the window
    duration    of the file, seconds; null where its header was not read
    size, mtime_ns      of the file

The schema's metadata has a [`Description`], by which a part can be loaded and searched on its own.
"""

import dataclasses
import hashlib
import json
import os
import posixpath
import tempfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from .addresses import is_address, open_system
from .database import Description
from .errors import SearchError


FILES_PER_PART = 256  # a kill loses a part: for clips of some seconds, some seconds of a GPU
METADATA = b"camoe"
# What gives a vector and its bias their meaning.
MEANING = ("weights", "experts", "dim", "num_frames", "sampling", "on_damage", "windows", "window", "stride", "dtype")
MEANING += ("tau", "bank")
KEYS = ("path", "start", "end")


@dataclass(frozen=True)
class Part:
    """Rows of a manifest to encode into one file."""

    name: str
    rows: pa.Table
    kept: bool = False  # the file is there, and its rows that have vectors stay


def settings_hash(description: Description) -> str:
    """The same for parts whose rows may stand beside each other."""
    values = [getattr(description, name) for name in MEANING]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=4).hexdigest()


def plan_parts(
    manifest: pa.Table,
    description: Description,
    out: "PartFolder",
    files_per_part: int = FILES_PER_PART,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
) -> tuple[list[Part], int]:
    """What is to be encoded of a manifest, or of its share.

    Args:
        files_per_part: rows of the manifest.
        shard: (i, n): every n-th block from the i-th on. Shares of one manifest never have a row in common.
        retry: also the rows of parts that have errors.

    Returns:
        the parts, and the number of rows that are there.

    Raises:
        SearchError: the folder has parts of other settings.
    """
    settings = settings_hash(description)
    names = out.names()
    other = next((name for name in names if not name.startswith(f"part-{settings}-")), None)
    if other is not None:
        raise SearchError(
            f"{out.path} has parts made with another model or other settings, {other}: give another --out"
        )
    blocks = [manifest.slice(first, files_per_part) for first in range(0, len(manifest), files_per_part)]
    planned = [Part(_part_name(settings, block), block) for block in blocks]
    mine = planned[shard[0] :: shard[1]]
    todo = [part for part in mine if part.name not in names]
    unknown = sorted(names - {part.name for part in planned})
    if todo and unknown:
        rows = _without_present(pa.concat_tables([part.rows for part in todo]), out, unknown)
        blocks = [rows.slice(first, files_per_part) for first in range(0, len(rows), files_per_part)]
        todo = [Part(_part_name(settings, block), block) for block in blocks]
    present = sum(len(part.rows) for part in mine) - sum(len(part.rows) for part in todo)
    if retry:
        again = _failed_parts([part for part in mine if part.name in names], out)
        todo, present = todo + again, present - sum(len(part.rows) for part in again)
    return todo, present


def without_repeated(manifest: pa.Table) -> pa.Table:
    """The rows of a manifest, each window once: of a list with a row for each caption, the first of each clip."""
    keys = pa.table({"key": _row_keys(manifest), "row": np.arange(len(manifest))})
    first = keys.group_by("key").aggregate([("row", "min")])["row_min"].combine_chunks()
    return manifest if len(first) == len(manifest) else manifest.take(first.sort())


def _part_name(settings: str, rows: pa.Table) -> str:
    digest = hashlib.blake2b("\n".join(_row_keys(rows).to_pylist()).encode(), digest_size=8)
    return f"part-{settings}-{digest.hexdigest()}.parquet"


def _row_keys(rows: pa.Table) -> pa.Array:
    """What names a row of a manifest: its path, and its window if it gives one."""
    texts = [_text(rows[name]) if name in rows.column_names else pa.scalar("") for name in KEYS]
    keys = pc.binary_join_element_wise(*texts, "\t")
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def _text(column) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(column, pa.string()), "")


def _encoded_keys(rows: pa.Table) -> pa.Array:
    """The same of rows of a part: a window that was cut is part of its whole file."""
    is_cut = pc.is_valid(rows["number"])
    texts = [_text(rows["path"])]
    texts += [pc.if_else(is_cut, "", _text(rows[name])) for name in KEYS[1:]]
    return pc.binary_join_element_wise(*texts, "\t").combine_chunks()


def _without_present(rows: pa.Table, out: "PartFolder", names: list[str]) -> pa.Table:
    found = [pc.unique(_encoded_keys(out.read(name, [*KEYS, "number"]))) for name in names]
    return rows.filter(pc.invert(pc.is_in(_row_keys(rows), pa.concat_arrays(found))))


def _failed_parts(parts: list[Part], out: "PartFolder") -> list[Part]:
    """The rows of parts that have no vector, as parts of the same names."""
    failed = []
    for part in parts:
        rows = out.read(part.name, [*KEYS, "number", "error"])
        keys = _encoded_keys(rows.filter(pc.is_valid(rows["error"])))
        bad = part.rows.filter(pc.is_in(_row_keys(part.rows), keys)) if len(keys) else part.rows.slice(0, 0)
        if len(bad):
            failed.append(Part(part.name, bad, kept=True))
    return failed


class PartFolder:
    """Where parts are: a folder, or its address.

    Args:
        path: it is made when the first part is written.
    """

    def __init__(self, path: str):
        self.path = path if is_address(path) else os.path.abspath(os.path.expanduser(path))

    def __getstate__(self):
        return {"path": self.path}  # file systems do not travel

    def names(self) -> set[str]:
        """The parts that are there, by name.

        Raises:
            SearchError: it cannot be listed; or a part was cut short.
        """
        if is_address(self.path):
            system, path = open_system(self.path)
            try:
                system.invalidate_cache()
                files = system.ls(path, detail=False) if system.exists(path) else []
            except Exception as error:  # each storage has errors of its own
                raise SearchError(f"{self.path} cannot be listed: {error}") from error
            names = {posixpath.basename(file.rstrip("/")) for file in files}
            return {name for name in names if _is_part(name)}
        if os.path.isfile(self.path):
            raise SearchError(f"{self.path} is a file: give a folder of parts")
        names = {name for name in os.listdir(self.path) if _is_part(name)} if os.path.isdir(self.path) else set()
        for name in names:
            _check_complete(os.path.join(self.path, name))
        return names

    def join(self, name: str) -> str:
        return posixpath.join(self.path, name) if is_address(self.path) else os.path.join(self.path, name)

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a part; columns that it lacks are null.

        Raises:
            SearchError: it is no complete Parquet file.
        """
        with self.open(name) as file:
            there = file.schema_arrow.names
            table = file.read(None if columns is None else [column for column in columns if column in there])
        for column in columns or ():
            if column not in there:
                table = table.append_column(column, pa.nulls(len(table), pa.float64()))
        return table if columns is None else table.select(columns)

    def open(self, name: str) -> pyarrow.parquet.ParquetFile:
        """A part that is open; see `read`."""
        try:
            if is_address(self.path):
                system, path = open_system(self.join(name))
                return pyarrow.parquet.ParquetFile(system.open(path, "rb"))
            return pyarrow.parquet.ParquetFile(self.join(name))
        except (pa.ArrowException, OSError) as error:
            raise SearchError(
                f"{self.join(name)} is damaged ({' '.join(str(error).split())[:200]}): delete it, and run the same "
                "`camoe encode` again"
            ) from error

    def writer(self, name: str, kept: bool = False) -> "PartWriter":
        return PartWriter(self, name, kept)


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _check_complete(path: str):
    with open(path, "rb") as file:
        content = file.seek(0, os.SEEK_END)
        file.seek(max(0, content - 4))
        if content < 12 or file.read(4) != b"PAR1":  # what a Parquet file begins and ends with
            raise SearchError(f"{path} was cut short, perhaps while it was copied: delete it, and run this again")


class PartWriter:
    """One part, written batch by batch; it appears when it is complete.

    Raises:
        SearchError: it cannot be written; nothing is left of it.
    """

    def __init__(self, folder: PartFolder, name: str, kept: bool):
        self.folder, self.name, self.kept = folder, name, kept
        self._file = self._writer = None

    def write(self, rows: pa.Table):
        with self._errors():
            if self._writer is None:
                self._open(rows.schema)
            self._writer.write_table(rows.select(self._writer.schema.names))

    def _open(self, schema: pa.Schema):
        beside = None if is_address(self.folder.path) else self.folder.path
        if beside is not None:
            os.makedirs(beside, exist_ok=True)
        descriptor, self._file = tempfile.mkstemp(dir=beside, prefix=f".{self.name}.")
        os.close(descriptor)
        texts = [
            field.name for field in schema if pa.types.is_string(field.type)
        ]  # the floats of vectors do not repeat
        self._writer = pyarrow.parquet.ParquetWriter(self._file, schema, use_dictionary=texts)
        if self.kept:
            old = self.folder.read(self.name)
            self._writer.write_table(old.filter(pc.is_null(old["error"])).select(schema.names).cast(schema))

    def close(self):
        """Let the part appear."""
        with self._errors():
            self._writer.close()
            if is_address(self.folder.path):
                system, path = open_system(self.folder.join(self.name))
                system.put_file(self._file, path)
                os.unlink(self._file)
                return
            with open(self._file, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(self._file, 0o644)
            os.replace(self._file, self.folder.join(self.name))

    def abort(self):
        """Leave nothing."""
        if self._file is not None and os.path.exists(self._file):
            os.unlink(self._file)

    def _errors(self):
        return _WriteErrors(self)


@dataclass
class _WriteErrors:
    part: PartWriter

    def __enter__(self): ...

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, SearchError):
            return
        self.part.abort()
        if isinstance(error, OSError | pa.ArrowException) or is_address(self.part.folder.path):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise SearchError(
                f"{self.part.folder.path} cannot be written ({reason[:200]}): make room or give access, then run the "
                "same command again; the parts that are there are kept"
            ) from error


def description_of(schema: pa.Schema) -> Description | None:
    """How the rows of a part were made; None if it does not say."""
    text = (schema.metadata or {}).get(METADATA)
    if text is None:
        return None
    values = json.loads(text)
    known = {field.name for field in dataclasses.fields(Description)}
    return Description(**{name: value for name, value in values.items() if name in known})


def with_description(table: pa.Table, description: Description) -> pa.Table:
    """A table whose schema says how its rows were made."""
    text = json.dumps(dataclasses.asdict(description), ensure_ascii=False)
    return table.replace_schema_metadata({METADATA: text.encode()})


def remove_unfinished(folder: PartFolder, parts: list[Part]):
    """Remove what a killed run left of these parts."""
    if is_address(folder.path) or not os.path.isdir(folder.path):
        return
    names = {part.name for part in parts}
    for entry in os.listdir(folder.path):
        if entry.startswith(".part-") and entry[1:].rsplit(".", 1)[0] in names:
            os.unlink(os.path.join(folder.path, entry))
