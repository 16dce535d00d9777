# SPDX-License-Identifier: Apache-2.0
"""What is to be encoded, as a table: from Parquet, JSON Lines or CSV, a folder, or a pattern of files.

A manifest has a column of paths or addresses, perhaps `start` and `end` in seconds, and any others, which stay beside
the vectors. Relative paths are relative to the manifest, as in a VideoFolder. All of it may lie at addresses.
"""

import glob
import json
import os
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from .addresses import is_address, is_folder, open_system
from .errors import SearchError
from .files import absolute, find_videos


PATH_COLUMNS = ("path", "file_name", "video", "video_path", "file", "url")  # the first of them that there is
TIME_COLUMNS = ("start", "end")
# What the parts say of each row: a manifest cannot have columns of these names.
OWN_COLUMNS = ("number", "duration", "size", "mtime_ns", "content_hash", "vector", "gate_weights", "bias", "damaged")
OWN_COLUMNS += ("error",)
READERS = {".parquet": "_read_parquet", ".jsonl": "_read_jsonl", ".csv": "_read_csv", ".tsv": "_read_csv"}


def read_manifest(source: str, names: Mapping[str, str | None] | None = None, exclude=()) -> pa.Table:
    """Rows to encode.

    Args:
        source: a file (.parquet, .jsonl, .csv, .tsv; also compressed: .csv.gz), a folder, or a pattern such as
            "s3://films/2024/*.mp4"; a path or an address.
        names: what the columns `path`, `start` and `end` are called there; without, see PATH_COLUMNS.
        exclude: patterns of files of a folder that are left out.

    Returns:
        a table with `path` (absolute, or an address), `start` and `end` if the manifest has them, and its other
        columns.

    Raises:
        SearchError: it cannot be read, or a column is missing; says which there are.
    """
    source = absolute(source)
    kind = _kind_of(source)
    if kind is None:
        return pa.table({"path": pa.array(_list_videos(source, exclude), pa.string())})
    table = _with_names(globals()[READERS[kind]](source), source, names or {})
    for name in TIME_COLUMNS:
        if name in table.column_names:
            position = table.column_names.index(name)
            table = table.set_column(position, name, _seconds(table[name], name, source))
    position = table.column_names.index("path")
    return table.set_column(position, "path", _from_manifest(table["path"], os.path.dirname(source)))


def _kind_of(source: str) -> str | None:
    """The extension of a manifest; None for files themselves."""
    name = source[: -len(".gz")] if source.endswith(".gz") else source
    extension = os.path.splitext(name)[1].lower()
    if extension in READERS and not glob.has_magic(source):
        return extension
    return None


def _list_videos(source: str, exclude) -> list[str]:
    """A folder's videos, the files that fit a pattern, or one video."""
    folder = is_folder(source) if is_address(source) else os.path.isdir(source)
    if folder or not glob.has_magic(source):
        return [video.path for video in find_videos([source], exclude).videos]
    if is_address(source):
        system, pattern = open_system(source)
        protocol = source[: source.index("://") + 3]
        found = [protocol + path.lstrip("/") for path in system.glob(pattern)]
    else:
        found = [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
    if not found:
        raise SearchError(f"no file fits {source}")
    return sorted(found)


# --- reading ---------------------------------------------------------------------------------------------------------


def _open(source: str):
    import fsspec

    try:
        return fsspec.open(source, "rb", compression="infer").open()
    except (OSError, ValueError) as error:
        raise SearchError(f"the manifest {source} cannot be read: {error}") from error


def _read_parquet(source: str) -> pa.Table:
    with _open(source) as file:
        try:
            return pyarrow.parquet.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise SearchError(f"the manifest {source} is no complete Parquet file: {_one_line(error)}") from error


def _read_csv(source: str) -> pa.Table:
    parsing = pyarrow.csv.ParseOptions(delimiter="\t" if ".tsv" in source else ",", newlines_in_values=True)
    text = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in PATH_COLUMNS})
    with _open(source) as file:
        try:
            return pyarrow.csv.read_csv(file, parse_options=parsing, convert_options=text)
        except pa.ArrowException as error:
            raise SearchError(f"the manifest {source} is no CSV in UTF-8: {_one_line(error)}") from error


def _read_jsonl(source: str) -> pa.Table:
    rows = []
    with _open(source) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise SearchError(f"{source}, line {number}: no JSON object in UTF-8 ({_one_line(error)})") from error
            if row is not None:
                rows.append(row)
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise SearchError(f"{source}: {name!r} has values of different kinds ({_one_line(error)})") from error
    return pa.table(columns)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- columns ---------------------------------------------------------------------------------------------------------


def _with_names(table: pa.Table, source: str, names: Mapping[str, str | None]) -> pa.Table:
    """With the columns `path`, `start` and `end` by these names."""
    table = table.rename_columns([name.strip().removeprefix("\ufeff") for name in table.column_names])
    wanted = {name: given for name, given in names.items() if given}
    for given in wanted.values():
        if given not in table.column_names:
            raise SearchError(f"{source} has no column {given!r}; it has {', '.join(table.column_names)}")
    if "path" not in wanted:
        found = next((name for name in PATH_COLUMNS if name in table.column_names), None)
        if found is None:
            raise SearchError(
                f"{source} has no column of paths; it has {', '.join(table.column_names) or 'none'}: name it with "
                "--path-column"
            )
        wanted["path"] = found
    renamed = {given: name for name, given in wanted.items()}
    hidden = [name for name in table.column_names if name in wanted and renamed.get(name) != name]
    table = table.drop_columns(hidden)  # a column `path` where another was named
    table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    for name in table.column_names:
        if name in OWN_COLUMNS or table.column_names.count(name) > 1:
            raise SearchError(f"{source} has a column {name!r}, as the result will: give it another name")
    return table


def _from_manifest(column: pa.ChunkedArray, folder: str) -> pa.Array:
    """Paths as they are found from anywhere. What is no text is null: that row's error."""
    paths = [path.get("path") if isinstance(path, dict) else path for path in column.to_pylist()]

    def whole(path) -> str | None:
        if not isinstance(path, str) or not path.strip():
            return None
        if is_address(path) or path.lower().startswith(("file://", "local://")):
            return absolute(path)
        if is_address(folder) and not os.path.isabs(path):
            return f"{folder}/{path}"
        return absolute(os.path.join(folder, os.path.expanduser(path)))

    return pa.array([whole(path) for path in paths], pa.string())


def _seconds(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    try:
        return pc.cast(column, pa.float64())
    except pa.ArrowException as error:
        raise SearchError(f"{source}: the column {name!r} must hold seconds: {_one_line(error)}") from error
