# SPDX-License-Identifier: Apache-2.0
"""What is in an index: figures about it, and all of its rows as a table."""

import json
import os
from pathlib import Path

import numpy as np

from .columns import as_lists, gates
from .database import PATH
from .errors import SearchError
from .local_store import LocalStore
from .rows import Rows


# One line per moment and file.
MOMENTS = f"""
SELECT windows.row, contents.hash || '.' || windows.number, {PATH} AS path,
       windows.start, windows.end, files.size, files.mtime_ns, contents.hash, files.id, windows.id, windows.number
FROM windows JOIN contents ON contents.id = windows.content JOIN files ON files.content = contents.id
     JOIN roots ON roots.id = files.root
WHERE windows.row IS NOT NULL ORDER BY path, windows.number
"""
SAMPLE = 10_000  # rows whose gates are averaged for `info`


def info(folder: Path, store: LocalStore) -> dict:
    """Figures about an index."""
    with store.state() as rows:
        description = store.description
        ((files, seconds),) = store.select(
            "SELECT count(*), total(duration) FROM files JOIN contents ON contents.id = content "
            "WHERE contents.cause IS NULL"
        )
        ((pending,),) = store.select("SELECT count(*) FROM windows WHERE row IS NULL AND cause IS NULL")
        ((skipped,),) = store.select(
            "SELECT count(*) FROM files LEFT JOIN contents ON contents.id = content WHERE files.cause IS NOT NULL "
            "OR contents.cause IS NOT NULL OR content IN (SELECT content FROM windows WHERE cause IS NOT NULL)"
        )
        ((mean_seconds,),) = store.select("SELECT avg(end - start) FROM windows WHERE row IS NOT NULL")
        ((queries,),) = store.select("SELECT count(*) FROM bank")
        mean_gates = gates(_some_vectors(rows), len(description.experts))
        hubs = len(store.hubs(rows))
        return {
            "files": files,
            "moments": len(store),
            "pending": pending,
            "hours": seconds / 3600,
            "mean_moment_seconds": mean_seconds,
            "skipped": skipped,
            "roots": [root for (root,) in store.select("SELECT path FROM roots ORDER BY path")],
            "exclude": description.exclude,
            "model": description.model,
            "weights": description.weights,
            "num_frames": description.num_frames,
            "sampling": description.sampling,
            "windows": description.windows,
            "on_damage": description.on_damage,
            "window": description.window,
            "stride": description.stride,
            "width": description.width,
            "dtype": description.dtype,
            "mean_gates": dict(zip(description.experts, mean_gates.mean(axis=0).tolist(), strict=True))
            if len(mean_gates)
            else {},
            "query_bank": None if description.tau is None else {"queries": queries, "tau": description.tau},
            "hubs": hubs,
            "dead_rows": rows.dead,
            "approximate": description.cache and {name: description.cache[name] for name in ("kind", "recall")},
            "milvus": description.milvus,
            "text_tower": description.text_encoder or ((folder / "text").is_dir() and "exported") or "not exported",
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        }


def _some_vectors(rows: Rows) -> np.ndarray:
    """Up to SAMPLE living rows, from the first on."""
    found = []
    for part in rows.parts:
        if part.allowed is None:
            found.append(part.vectors[:SAMPLE])
        else:
            found.append(part.vectors[np.flatnonzero(part.allowed)[:SAMPLE]])
        if sum(map(len, found)) >= SAMPLE:
            break
    return np.concatenate(found).astype(np.float32) if found else np.empty((0, 1), np.float32)


def table(store: LocalStore):
    """All moments as a pyarrow table, by path and time; columns as `VideoIndex.table` says."""
    import pyarrow as pa

    with store.state() as rows:
        found = store.select(MOMENTS)
        hubs = store.hubs(rows)
        width, experts = store.description.width, len(store.description.experts)
        numbers = [row for row, *_ in found]
        vectors = rows.vectors(numbers) if numbers else np.empty((0, width), np.float32)
        columns = {
            name: [row[number] for row in found]
            for number, name in enumerate(("key", "path", "start", "end", "size", "mtime_ns", "content_hash"), start=1)
        }
        return pa.table(
            columns
            | {
                "vector": as_lists(vectors),
                "gate_weights": as_lists(gates(vectors, experts)),
                "bias": pa.array([rows.bias(row) for row in numbers], pa.float32()),
                "is_hub": pa.array([row in hubs for row in numbers], pa.bool_()),
            }
        )


def export(store: LocalStore, path: str | os.PathLike):
    """Write the table as .parquet or .jsonl, or all but the vectors as .csv.

    Raises:
        SearchError: another extension.
    """
    suffix = Path(path).suffix
    if suffix not in (".parquet", ".jsonl", ".csv"):
        raise SearchError(f"cannot export to {path}: name it .parquet, .jsonl or .csv")
    rows = table(store)
    if suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(rows, path)
    elif suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
    else:
        import pyarrow.csv

        pyarrow.csv.write_csv(rows.drop_columns(["vector", "gate_weights"]), path)
