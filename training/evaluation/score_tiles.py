# SPDX-License-Identifier: Apache-2.0
"""Scores of N texts (rows) with M videos (columns), a tile at a time: no N x M matrix is ever made.

A score s is the inner product of two vectors, or an entry of a stored matrix. Small sets are float64 throughout. Of
large ones a tile is float32, `rounding` says how far its entries may be from s, and whoever needs to know better asks
for single pairs or rows in float64.

Imports torch and numpy alone, because the `evaluate.Metric` beside it ships it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


logger = logging.getLogger(__name__)

# Up to this many scores (2,000 texts and videos) tiles are float64: a second or so, and no rounding to think about.
FLOAT64_LIMIT = 2**22
# Rows and columns of a tile. On a CPU a product of this size runs at full speed; elsewhere it should be worth a
# kernel's launch. (No power of two: sums over columns that lie so far apart collide in the cache.)
CPU_BLOCK, GPU_BLOCK = 1000, 4096
PART = 2**18  # scores of a tile that are worked on at a time on a CPU: they and their like stay in the cache of a core
MOST_THREADS = 16  # more of them outrun the memory


class Work:
    """How the work is cut: into strips of rows and tiles, over processes and threads.

    Args:
        block_size: rows, and columns, of a tile. shard: (index, count) of this process.
        gather: a tensor -> those of all processes. device: where tiles are.
    """

    def __init__(self, block_size: int | None, shard: tuple[int, int], gather: Callable | None, device: str):
        on_cpu = torch.device(device).type == "cpu"
        self.block_size = block_size or (CPU_BLOCK if on_cpu else GPU_BLOCK)
        self.shard, self.gather = shard, gather
        self.threads = min(torch.get_num_threads(), MOST_THREADS) if on_cpu else 1

    def strips(self, num_rows: int, group_of_row: torch.Tensor | None = None) -> list[slice]:
        """This process's strips of `block_size` rows or so; rows of one group, which are neighbours, stay together."""
        workers = self.threads * self.shard[1]
        size = -(-num_rows // (workers * -(-num_rows // (workers * self.block_size))))  # as many for each
        if group_of_row is None:
            strips = [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        else:
            strips, start = [], 0
            for end in group_of_row.unique_consecutive(return_counts=True)[1].cumsum(0).tolist():
                if strips and end - strips[-1].start <= size:
                    strips[-1] = slice(strips[-1].start, end)
                else:
                    strips.append(slice(start, end))
                start = end
        return strips[self.shard[0] :: self.shard[1]]

    def columns(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        """The columns of each tile of a strip: fewer rows, more columns."""
        width = max(self.block_size**2 // max(num_rows, 1), 1)
        for start in range(0, num_columns, width):
            yield slice(start, min(start + width, num_columns))

    def parts(self, tile: torch.Tensor) -> list[slice]:
        """Rows of a tile to do everything with, one part after the other."""
        size = max(PART // tile.shape[1], 1) if tile.is_cpu else len(tile)
        return [slice(start, min(start + size, len(tile))) for start in range(0, len(tile), size)]

    def each(self, work: Callable, pieces: Sequence) -> Iterator:
        """`work(piece)` of every piece, in order.

        On a CPU as many pieces are at work as there are threads, each in one: an operation on part of a tile takes
        some tens of microseconds, and shared out it would take longer to wait for the slowest thread.
        """
        if self.threads == 1 or len(pieces) == 1 or self.block_size < 256:  # tiny tiles would wait for the interpreter
            yield from map(work, pieces)
            return

        def in_one_thread(piece):
            torch.set_num_threads(1)  # of this thread alone
            with torch.inference_mode():
                return work(piece)

        threads = torch.get_num_threads()
        executor = ThreadPoolExecutor(self.threads)
        try:
            yield from executor.map(in_one_thread, pieces)
        finally:
            executor.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def merge(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum, maximum (amax) or logsumexp over processes."""
        if self.gather is None:
            return tensor
        tensors = torch.stack(list(self.gather(tensor)))
        return {"sum": torch.sum, "amax": torch.amax, "logsumexp": torch.logsumexp}[how](tensors, dim=0)


def as_array(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """The tensor for numpy, where numpy can see it."""
    return tensor.numpy() if tensor.is_cpu else tensor


class Flags:
    """Which scores of a tile are above two thresholds, (2,R,C) booleans `values`, how many, and where the two differ.

    On a CPU numpy compares and torch adds large arrays: each is several times slower at the other's work. Small ones
    are numpy's: its threads do not wait for one another at every step.
    """

    def __init__(self, rows: int, columns: int, device: torch.device):
        # Booleans are bytes, and a sum of 64-bit words adds eight columns at once, as long as no byte passes 255: so
        # rows are added in parts, and words along a row in parts. What fills them up stays false.
        row_parts, column_parts = -(-rows // 255), -(-columns // (8 * 255))
        height, width = -(-rows // row_parts), -(-columns // (8 * column_parts))
        padded = torch.zeros(2, row_parts * height, 8 * column_parts * width, dtype=torch.bool, device=device)
        self.values = padded[:, :rows, :columns]
        self.array = as_array(self.values)
        self.on_cpu = isinstance(self.array, np.ndarray)
        self.library = np if self.on_cpu else torch
        words = padded.view(torch.int64)
        self.words_of_column = words.view(2, row_parts, height, -1)
        self.words_of_row = words[:, :rows].view(2, rows, column_parts, -1)

    def compare(self, rows: slice, s, above, at_least) -> None:
        """Set some rows: values[0] where s > above, values[1] where s >= at_least. Broadcasts; all `as_array`."""
        self.library.greater(s, above, out=self.array[0, rows])
        self.library.greater_equal(s, at_least, out=self.array[1, rows])

    def sum(self, axis: int) -> np.ndarray:
        """How many are true in each column, (2,C), for axis 0, or in each row, (2,R), for axis 1."""
        if not self.on_cpu:
            return self.values.sum(dim=1 + axis).cpu().numpy()
        if axis == 0:
            return self.words_of_column.sum(dim=2).numpy().view(np.uint8).sum(axis=1)[:, : self.values.shape[2]]
        return self.words_of_row.sum(dim=3).view(torch.uint8).sum(dim=2).numpy()

    def differing(self, axis: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the scores between the thresholds, in some columns (axis 0) or rows (1)."""
        if not self.on_cpu:
            part = self.values.index_select(2 - axis, torch.from_numpy(places).to(self.values.device)).cpu().numpy()
        else:
            part = self.array[:, :, places] if axis == 0 else self.array[:, places]
        row, column = np.divmod(np.flatnonzero(part[0] != part[1]), part.shape[2])
        return (row, places[column]) if axis == 0 else (places[row], column)


class Buffers:
    """Tiles that are written again and again: fresh memory would cost more than the arithmetic on it."""

    def __init__(self):
        self.tiles = {}

    def flags(self, rows: int, columns: int, device: torch.device) -> Flags:
        flags = self.tiles.get((rows, columns))
        if flags is None:
            flags = self.tiles[rows, columns] = Flags(rows, columns, device)
        return flags

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tile = self.tiles.get((name, rows, columns))
        if tile is None:  # most tiles of a strip are of one shape, the last is another
            tile = self.tiles[name, rows, columns] = torch.empty(rows, columns, dtype=dtype, device=device)
        return tile

    def like(self, name: str, tile: torch.Tensor) -> torch.Tensor:
        return self.get(name, *tile.shape, tile.dtype, tile.device)


class TiledScores:
    """s of all rows and columns.

    Attributes:
        shape: (N, M). rounding: how far a float32 tile may be from s. bound: no |s| is larger. exact: s are entries of
            a matrix, not sums that rounding makes inexact even in float64.
        order: None, or the text of each row (the rows then are the texts in another order).
    """

    def __init__(
        self, shape: tuple[int, int], bound: float, rounding: float, in_float64: bool, exact: bool, device: str
    ):
        self.shape, self.bound, self.rounding, self.exact = shape, bound, rounding, exact
        self.device, self.order = torch.device(device), None
        in_float64 = in_float64 or shape[0] * shape[1] <= FLOAT64_LIMIT
        self.dtype = torch.float64 if in_float64 else torch.float32

    def texts(self, rows: slice | torch.Tensor) -> slice | torch.Tensor:
        rows = rows.cpu() if isinstance(rows, torch.Tensor) else rows
        return rows if self.order is None else self.order[rows]

    def full(self, axis: int, value: float) -> torch.Tensor:
        """A float64 for every row (0) or column (1)."""
        return torch.full((self.shape[axis],), value, dtype=torch.float64, device=self.device)

    def tiles(self, rows: slice, work: Work, buffers: Buffers):
        """Yields columns (a slice) and their s (R,C) of a strip, in a buffer that the next tile overwrites."""
        num_rows = rows.stop - rows.start
        left = self.load(rows, self.dtype)
        for columns in work.columns(num_rows, self.shape[1]):
            out = buffers.get("s", num_rows, columns.stop - columns.start, self.dtype, self.device)
            yield columns, self.fill(left, columns, out)

    def float64_tiles(self, rows: torch.Tensor, columns: torch.Tensor, work: Work):
        """Columns (C,) and their s (R,C) in float64, of any rows and columns."""
        left = self.load(rows, torch.float64)
        for part in work.columns(len(rows), len(columns)):
            out = torch.empty(len(rows), part.stop - part.start, dtype=torch.float64, device=self.device)
            yield columns[part], self.fill(left, columns[part], out)

    # Of vectors and of a matrix: `load` what a strip needs, `fill` tiles from it, and single `pairs`, (P,) float64.


class VectorScores(TiledScores):
    """Inner products of (N,K) and (M,K) vectors. `names` are what a row and a column are, for messages."""

    def __init__(self, left, right, device: str, names: tuple[str, str]):
        self.left, self.right = torch.as_tensor(left).float(), torch.as_tensor(right).to(device).float()
        shapes = tuple(self.left.shape), tuple(self.right.shape)
        if self.left.ndim != 2 or self.right.ndim != 2 or shapes[0][1] != shapes[1][1] or 0 in shapes[0] + shapes[1]:
            raise ValueError(
                f"Vectors must be (N,K) and (M,K), not empty, with the same K: {names[0]}s are {shapes[0]}, "
                f"{names[1]}s {shapes[1]}."
            )
        norms = self.left.norm(dim=1), self.right.norm(dim=1)
        bad_row, bad_column = (first_true(~norm.isfinite()) for norm in norms)
        if bad_column is not None:  # spoils every row, so the first that meets it; row 0 may itself be spoilt
            raise not_finite(0, 0 if bad_row == 0 else bad_column, names)
        if bad_row is not None:
            raise not_finite(bad_row, 0, names)
        bound = float(norms[0].max()) * float(norms[1].max())
        # A float32 product of K terms is within K roundings of |x||y|. It is closer in practice: never more than 13 of
        # them in 240 million products that we looked at, K from 64 to 2,048, cosines from 0 to 0.99. This allows 32.
        rounding = min(shapes[0][1], 32) * torch.finfo(torch.float32).eps / 2 * bound
        super().__init__((shapes[0][0], shapes[1][0]), bound, rounding, False, False, device)
        if self.dtype == torch.float32 and not self._products_are_float32():
            logger.warning("Float32 products are computed in TF32 or bfloat16 here: scoring in float64 instead.")
            self.dtype = torch.float64

    def _products_are_float32(self) -> bool:
        rows, columns = (torch.arange(min(512, size), device=self.device) for size in self.shape)
        product = self.load(rows, torch.float32) @ self.right[columns].T
        exact = self.load(rows, torch.float64) @ self.right[columns].double().T
        return float((product - exact).abs().max()) <= self.rounding

    def load(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.left[self.texts(rows)].to(self.device, dtype)

    def fill(self, left: torch.Tensor, columns: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(left, self.right[columns].to(left.dtype).T, out=out)

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        s = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for start in range(0, len(rows), 2048):  # 2,048 pairs of 2,048 dims: 64 MB
            part = slice(start, start + 2048)
            left = self.load(rows[part], torch.float64)
            s[part] = (left * self.right[columns[part]].double()).sum(dim=1)
        return s


class MatrixScores(TiledScores):
    """Entries of a stored (N,M) matrix: a tensor, an array, a memory-mapped file."""

    def __init__(self, matrix, device: str, names: tuple[str, str]):
        self.matrix = matrix if isinstance(matrix, torch.Tensor | np.ndarray) else np.asarray(matrix)
        if self.matrix.ndim != 2 or 0 in self.matrix.shape:
            raise ValueError(f"Scores must be ({names[0]}s, {names[1]}s), not of shape {tuple(self.matrix.shape)}.")
        bound, rows_at_once = 0.0, max(1, 2**22 // self.matrix.shape[1])
        for start in range(0, self.matrix.shape[0], rows_at_once):
            rows = self.entries(slice(start, start + rows_at_once), slice(None))
            bad = first_true(~rows.isfinite().flatten())
            if bad is not None:
                raise not_finite(start + bad // rows.shape[1], bad % rows.shape[1], names)
            bound = max(bound, float(rows.abs().max()))
        in_float64 = str(self.matrix.dtype).removeprefix("torch.") in ("float64", "int32", "int64")
        super().__init__(tuple(self.matrix.shape), bound, 0.0, in_float64, True, device)

    def load(self, rows: slice | torch.Tensor, dtype: torch.dtype):
        return self.texts(rows)

    def fill(self, left, columns: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if isinstance(left, torch.Tensor) and isinstance(columns, torch.Tensor):
            left = left[:, None]
        return out.copy_(self.entries(left, columns))

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return self.entries(self.texts(rows), columns).to(self.device, torch.float64)

    def entries(self, rows: slice | torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(self.matrix, torch.Tensor):
            return self.matrix[rows, columns]
        rows, columns = (index if isinstance(index, slice) else index.cpu().numpy() for index in (rows, columns))
        return torch.from_numpy(np.array(self.matrix[rows, columns]))  # a copy: the file may be mapped read-only


def tiled_scores(left, right, device: str, names: tuple[str, str]) -> TiledScores:
    """Of vectors or, with `right` None, of a matrix."""
    return MatrixScores(left, device, names) if right is None else VectorScores(left, right, device, names)


def first_true(flags: torch.Tensor) -> int | None:
    """The first position that is true."""
    return int(flags.int().argmax()) if flags.any() else None


def not_finite(row: int, column: int, names: tuple[str, str]) -> ValueError:
    """The error that names a score."""
    return ValueError(
        f"The score of ({names[0]} {row}, {names[1]} {column}) is not a finite number, and it is the first such. "
        "A rank among such scores means nothing: look for damaged frames or overflow in half precision."
    )
