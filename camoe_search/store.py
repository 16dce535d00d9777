# SPDX-License-Identifier: Apache-2.0
"""The index folder: what is in it, and how it is replaced so that a kill at any time leaves an index that works.

    index.json             what the index is (`Description`) and the name of its generation; replaced last, atomically
    generation-<id>/
        moments/           HF Dataset (Arrow, memory-mapped), a row per moment, sorted by path and start
        vectors.faiss      (B,K+1) inner-product index: the folded vectors, and minus the bank's bias in the last
                           entry; absent where Milvus holds them (milvus_store.py)
        query_bank.json    texts of the query bank, if there is one
        query_bank.npy     (Q,K) their vectors
    skipped.jsonl          files that could not be read, with the cause
    shards/                finished batches of an unfinished run (shards.py)

Columns of `moments`: path, start, end (seconds), size (bytes), mtime_ns, content_hash, vector (K), gate_weights (E),
bias, is_hub. B moments, K = E*D entries a folded vector, Q queries.

The last entry of a query's vector is 1 to subtract the bias and 0 not to (`hubs.fold_bias`), so that one FAISS
index serves both.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow as pa

from .bank import QueryBank, hub_bias
from .errors import SearchError


try:
    import fcntl  # POSIX only
except ImportError:
    fcntl = None

FORMAT = 1
# How much of an approximate index a query visits. With FAISS's defaults (1 and 16) recall against flat is too low.
NPROBE, EF_SEARCH = 16, 64


@dataclasses.dataclass(frozen=True)
class Description:
    """What an index is: index.json."""

    model: str  # folder or Hub id
    weights: str  # hash of the weights: only vectors of the same weights are comparable
    experts: list[str]
    dim: int  # D, entries of an expert's part of a vector
    num_frames: int  # decoded of each moment
    sampling: str  # how frames are chosen: "uniform" or "keyframe"
    window: float | None = None  # seconds; 0: whole files; None: depends on the duration
    stride: float | None = None  # seconds; None: half a window
    faiss: str = "flat"  # kind of vector index
    store: str = "faiss"  # where the vectors are searched: "faiss" in this folder, or "milvus" at `uri`
    uri: str | None = None
    collection: str | None = None
    source: str = ""  # identifies this folder's rows in a collection shared by several folders
    tau: float | None = None  # temperature of the query bank, None without one
    generation: str = ""
    format: int = FORMAT

    @property
    def width(self) -> int:
        """K, entries of a folded vector."""
        return len(self.experts) * self.dim


def read_description(folder: str | os.PathLike) -> Description:
    """
    Raises:
        SearchError: there is no index, or one that this version cannot read.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise SearchError(
            f"{folder} holds no index: make one with `camoe index VIDEOS --model MODEL --index {folder}`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SearchError(f"{path} is damaged ({error}): index the videos again") from error
    if values.get("format") != FORMAT:
        raise SearchError(f"{path} has format {values.get('format')}, this version reads {FORMAT}: index again")
    return Description(**values)


def moments_schema(width: int, num_experts: int) -> pa.Schema:
    """Columns of `moments`, for vectors of `width` entries."""
    return pa.schema(
        {
            "path": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "size": pa.int64(),
            "mtime_ns": pa.int64(),
            "content_hash": pa.string(),
            "vector": pa.list_(pa.float32(), width),
            "gate_weights": pa.list_(pa.float32(), num_experts),
            "bias": pa.float32(),
            "is_hub": pa.bool_(),
        }
    )


def moments_table(rows: dict, vectors: np.ndarray, gate_weights: np.ndarray) -> pa.Table:
    """Columns by name, (B,K) and (B,E) float32 -> a table, for now without biases."""
    schema = moments_schema(vectors.shape[1], gate_weights.shape[1])
    rows = rows | {
        "vector": _fixed_size_lists(vectors),
        "gate_weights": _fixed_size_lists(gate_weights),
        "bias": np.zeros(len(vectors), np.float32),
        "is_hub": np.zeros(len(vectors), bool),
    }
    return pa.Table.from_pydict({name: rows[name] for name in schema.names}, schema=schema)


def _fixed_size_lists(matrix: np.ndarray) -> pa.Array:
    values = pa.array(np.ascontiguousarray(matrix, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, matrix.shape[1])


def column_matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of equal length -> (B, length)."""
    column = table[name]
    return column.combine_chunks().flatten().to_numpy().reshape(len(table), column.type.list_size)


def write_index(folder: Path, description: Description, table: pa.Table, bank: QueryBank | None) -> Description:
    """Make `table` the content of the index: a new generation beside the old one, then one atomic rename.

    The order and the biases of the rows depend on the content alone, not on the runs that led to it.
    """
    table = table.sort_by([("path", "ascending"), ("start", "ascending")])
    vectors = column_matrix(table, "vector")
    bias, is_hub = hub_bias(bank, vectors)
    for name, values in (("bias", bias), ("is_hub", is_hub)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))

    generation = folder / f"generation-{uuid.uuid4().hex[:12]}"
    generation.mkdir(parents=True)
    # Without num_shards an empty data set is saved as no file at all, and cannot be loaded.
    datasets.Dataset(table).save_to_disk(generation / "moments", num_shards=None if len(table) else 1)
    if description.store == "faiss":
        folded = np.concatenate([vectors, -bias[:, None]], axis=1)  # (B,K+1)
        faiss.write_index(make_faiss(folded, description.faiss), str(generation / "vectors.faiss"))
    if bank is not None:
        (generation / "query_bank.json").write_text(json.dumps(bank.texts, ensure_ascii=False), encoding="utf-8")
        np.save(generation / "query_bank.npy", bank.vectors)

    description = dataclasses.replace(description, generation=generation.name, tau=None if bank is None else bank.tau)
    write_atomically(folder / "index.json", json.dumps(dataclasses.asdict(description), indent=2))
    for old in folder.glob("generation-*"):
        if old != generation:
            shutil.rmtree(old)
    return description


def make_faiss(vectors: np.ndarray, kind: str) -> faiss.Index:
    """(B,K+1) -> inner-product index: "flat" is exact; "hnsw" and "ivf" are approximate, faster for many rows."""
    if kind == "ivf":
        # sqrt(B) lists balance finding lists against scanning them; FAISS wants 39 rows or more to train a centroid
        lists = max(1, min(round(len(vectors) ** 0.5), len(vectors) // 39))
        factory = f"IVF{lists},Flat"
    else:
        factory = {"flat": "Flat", "hnsw": "HNSW32"}[kind]
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.nprobe = NPROBE
    if kind == "hnsw":
        index.hnsw.efSearch = EF_SEARCH
    if len(vectors):
        index.train(vectors)
        index.add(vectors)
    return index


def read_moments(folder: Path, description: Description) -> datasets.Dataset:
    return datasets.load_from_disk(folder / description.generation / "moments")


def read_faiss(folder: Path, description: Description) -> faiss.Index:
    """Memory-mapped: opening reads nothing, and processes share the pages."""
    return faiss.read_index(str(folder / description.generation / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC)


def read_bank(folder: Path, description: Description) -> QueryBank | None:
    if description.tau is None:
        return None
    generation = folder / description.generation
    texts = json.loads((generation / "query_bank.json").read_text(encoding="utf-8"))
    return QueryBank(texts, np.load(generation / "query_bank.npy"), description.tau)


def write_atomically(path: Path, text: str):
    """Write to a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def write_lock(folder: Path):
    """Only one process at a time changes an index. The system releases the lock of a process that dies.

    Raises:
        SearchError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SearchError(f"another process is writing to {folder}: wait until it ends") from None
        yield
