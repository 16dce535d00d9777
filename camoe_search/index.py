# SPDX-License-Identifier: Apache-2.0
"""[`VideoIndex`]: build an index of videos, open it, search it.

    index = VideoIndex.build(["~/videos"], "my-index", "runs/demo")
    for hit in index.search("a dog catches a frisbee on the beach", k=5):
        print(f"{hit.score:.3f} {hit.path} from {hit.start:.0f} s to {hit.end:.0f} s")

N queries, B moments (rows), E experts, D dims, K = E*D entries a folded vector. A score is s of retrieval.py, in
[-1, 1], minus the moment's bias where the query bank corrects it.
"""

import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from .encoder import Encoder
from .errors import SearchError
from .faiss_store import FaissStore
from .hub import download, upload
from .results import Filters, Hit, VectorStore
from .store import read_bank, read_description, read_moments
from .update import IndexOptions, UpdateReport, check_model, remove_files, replace_bank, update_index


CORRECTIONS = ("none", "query_bank", "dynamic")


class VideoIndex:
    """An index of videos. Make one with `build`, open one with `load`, or with `connect` if it is in Milvus only.

    Args:
        folder: of the index, see store.py for its files; it is memory-mapped. None: there is only `store`.
        encoder: the model that made it; None loads it at the first text query.
        device: for a model that is loaded later.
        store: an open `MilvusStore`. None: opens the one that the folder names.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        encoder: Encoder | None = None,
        device: str | None = None,
        store: VectorStore | None = None,
    ):
        self._folder = None if folder is None else Path(folder)
        self.device = device
        self._encoder = encoder
        self.store = store
        self.report: UpdateReport | None = None  # of the `build` that made this object
        self._reopen()

    def _reopen(self):
        if self._folder is None:
            self.description = self.store.description()
            self._moments = None
        else:
            self.description = read_description(self._folder)
            self._moments = read_moments(self._folder, self.description)
            self.store = self.store or self._open_store()
        if self._encoder is not None:
            check_model(self._encoder, self.description)

    def _open_store(self) -> VectorStore:
        if self.description.store == "milvus":
            from .milvus_store import MilvusStore

            return MilvusStore(self.description.uri, self.description.collection)
        return FaissStore(self.folder, self.description, self._moments.data.table)

    @property
    def folder(self) -> Path:
        """
        Raises:
            SearchError: the index was opened with `connect`, without a folder.
        """
        if self._folder is None:
            raise SearchError(self._needs_folder())
        return self._folder

    @property
    def moments(self) -> datasets.Dataset:
        """One row per moment: path, times, content hash, vector, gate weights, bias. All columns: store.py."""
        if self._moments is None:
            raise SearchError(self._needs_folder())
        return self._moments

    def _needs_folder(self) -> str:
        return f"only {self.store.uri} is open: this needs the folder where the index was made: give it as --index"

    def __len__(self) -> int:
        return len(self.store if self._moments is None else self._moments)

    def is_outdated(self) -> bool:
        """Whether the folder holds a newer generation of the index than the one that is open."""
        return self._folder is not None and read_description(self._folder).generation != self.description.generation

    def close(self):
        """Close the connection to a database. An index in files does not need it."""
        self.store.close()

    # --- making and changing -----------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        paths: Sequence[str | os.PathLike],
        folder: str | os.PathLike,
        model: "str | Encoder | None" = None,
        *,
        sampling: str | None = None,
        device: str | None = None,
        **options,
    ) -> "VideoIndex":
        """Index the videos under `paths`, or bring the index in `folder` up to date with them.

        Args:
            paths: folders and files.
            folder: of the index.
            model: checkpoint folder, Hub id or [`Encoder`]; None: the one that the index was made with.
            sampling: "uniform" or "keyframe" (faster, less exact); None: the index's, or the model's for a new one.
            device: for the model.
            options: the fields of `update.IndexOptions`.

        Returns:
            The open index; its attribute `report` says what was done.

        Raises:
            SearchError: saying what is wrong and what to do.
        """
        is_old = (Path(folder) / "index.json").exists() and not options.get("rebuild")
        if not isinstance(model, Encoder):
            old = read_description(folder) if is_old or model is None else None
            sampling = sampling or (old.sampling if is_old else None)
            model = Encoder.from_pretrained(model or old.model, device, sampling)
        report = update_index(paths, folder, model, IndexOptions(**options))
        index = cls(folder, model)
        index.report = report
        return index

    @classmethod
    def load(
        cls, folder_or_repo: str | os.PathLike, model: "str | Encoder | None" = None, device: str | None = None
    ) -> "VideoIndex":
        """Open an index: a folder, or a data set on the Hub made by `push_to_hub`.

        Args:
            model: the model that made it, if it has moved. Its weights are compared.
        """
        if not Path(folder_or_repo).is_dir():
            folder_or_repo = download(str(folder_or_repo))
        if isinstance(model, str):
            model = Encoder.from_pretrained(model, device, read_description(folder_or_repo).sampling)
        return cls(folder_or_repo, model, device)

    @classmethod
    def connect(
        cls,
        uri: str,
        collection: str | None = None,
        model: "str | Encoder | None" = None,
        device: str | None = None,
    ) -> "VideoIndex":
        """Search what one or many index folders put into Milvus. No folder is needed.

        Args:
            uri: a server's address, or the file name of an embedded database.
            collection: by default "camoe".
            model: as for `load`.
        """
        from .milvus_store import DEFAULT_COLLECTION, MilvusStore

        store = MilvusStore(uri, collection or DEFAULT_COLLECTION)
        description = store.description()
        if description is None:
            raise SearchError(
                f"{uri} has no collection {store.collection} made by `camoe index … --store milvus --uri {uri}`"
            )
        if isinstance(model, str):
            model = Encoder.from_pretrained(model, device, description.sampling)
        return cls(None, model, device, store)

    def add(self, paths: Sequence[str | os.PathLike], **options) -> UpdateReport:
        """Index more files or folders; takes the fields of `update.IndexOptions` as options."""
        with self._changing() as folder:
            return update_index(paths, folder, self.encoder, IndexOptions(**options))

    def remove(self, paths: Sequence[str | os.PathLike]) -> int:
        """Remove files, and all files under folders. Returns the number of moments removed."""
        with self._changing() as folder:
            return remove_files(folder, paths)

    def calibrate(self, queries: list[str], tau: float | None = None):
        """Replace the query bank by these texts, for example a log of what users asked. No video is encoded again.

        Args:
            queries: at most 1000 are used, evenly spaced over the list.
            tau: temperature in units of the score; None keeps the current one.
        """
        with self._changing() as folder:
            replace_bank(folder, self.encoder, queries, tau)

    @contextlib.contextmanager
    def _changing(self):
        """Close the store, give the folder to a change, and open the result."""
        folder = self.folder
        self.close()  # an embedded database can be open only once
        try:
            yield folder
        finally:
            self.store = None
            self._reopen()

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload the index as a data set; `VideoIndex.load(repo_id)` opens it. Returns its URL.

        The videos are not uploaded, but their paths are part of the index.

        Raises:
            SearchError: the vectors are in Milvus.
        """
        if self.description.store != "faiss":
            raise SearchError(f"the vectors are in {self.description.uri}: index with --store faiss to push them")
        return upload(self.folder, self.description, len(self), repo_id, private)

    # --- searching ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The model, loaded on first use."""
        if self._encoder is None:
            encoder = Encoder.from_pretrained(self.description.model, self.device, self.description.sampling)
            check_model(encoder, self.description)
            self._encoder = encoder
        return self._encoder

    @property
    def default_correction(self) -> str:
        return "none" if self.description.tau is None else "query_bank"

    def search(self, query: str, k: int = 10, **options) -> list[Hit]:
        """The k best moments for a text; takes the options of `search_vectors`.

        Raises:
            SearchError: the query is empty, or an option is invalid.
        """
        return self.search_batch([query], k, **options)[0]

    def search_batch(self, queries: Sequence[str], k: int = 10, **options) -> list[list[Hit]]:
        """The k best moments for each text; takes the options of `search_vectors`."""
        return self.search_vectors(self.encoder.encode_texts(list(queries)), k, **options)

    def search_like(self, clip, k: int = 10, **options) -> list[Hit]:
        """The k moments most like a video (path, bytes or `Clip`). Uncorrected: the bank holds texts."""
        return self.search_vectors(self.encoder.encode_clip(clip), k, **options | {"correction": "none"})[0]

    def search_similar(self, row: int | str, k: int = 10, **options) -> list[Hit]:
        """The k moments most like one of the index, without itself. Needs no model. Uncorrected, as `search_like`."""
        hits = self.search_vectors(self.similar_vector(row)[None], k + 1, **options | {"correction": "none"})[0]
        return [hit for hit in hits if hit.row != row][:k]

    def similar_vector(self, row: int | str) -> np.ndarray:
        """The query vector (K,) that finds moments like one of the index: its experts, each of length 1."""
        experts = self.store.vector(row).reshape(len(self.description.experts), -1)  # (E,D), gated
        lengths = np.linalg.norm(experts, axis=1, keepdims=True)
        return (experts / np.maximum(lengths, 1e-12)).reshape(-1)

    def search_vectors(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        correction: str | None = None,
        experts: Mapping[str, float] | None = None,
        path: str | None = None,
        min_seconds: float | None = None,
        max_seconds: float | None = None,
    ) -> list[list[Hit]]:
        """The k best moments for each query vector.

        Args:
            vectors: (N,K) folded text vectors.
            k: how many.
            correction: "none", "query_bank", or "dynamic" (corrects only queries whose best uncorrected moment is a
                hub: two searches). None: query_bank if the index has a bank.
            experts: expert -> weight of its part of the score; 1 for those not given.
            path: only files whose path contains this text, case-insensitive.
            min_seconds, max_seconds: only moments of at least, at most this length.

        Raises:
            SearchError: an unknown correction or expert, or a correction without a bank.
        """
        correction = self._check_correction(correction)
        if k < 1:
            raise SearchError(f"k is {k}: ask for one result or more")
        if not len(self):
            return [[] for _ in vectors]
        weights = self._expert_weights(experts)  # (K,)
        filters = Filters(path, min_seconds, max_seconds)
        bias_switch = np.full((len(vectors), 1), correction == "query_bank", np.float32)
        queries = np.concatenate([vectors * weights, bias_switch], axis=1, dtype=np.float32)  # (N,K+1)
        found = self.store.search(queries, k, filters)
        if correction == "dynamic":
            corrected = [n for n, hits in enumerate(found) if hits and self.store.is_hub(hits[0].row)]
            if corrected:
                queries[corrected, -1] = 1
                for n, hits in zip(corrected, self.store.search(queries[corrected], k, filters), strict=True):
                    found[n] = hits
        return found

    def expert_scores(self, vector: np.ndarray, row: int | str) -> dict[str, float]:
        """What each expert adds to the uncorrected score of a moment for a query vector (K,)."""
        parts = (vector * self.store.vector(row)).reshape(len(self.description.experts), -1).sum(axis=1)
        return dict(zip(self.description.experts, parts.tolist(), strict=True))

    def _check_correction(self, correction: str | None) -> str:
        correction = correction or self.default_correction
        if correction not in CORRECTIONS:
            raise SearchError(f"unknown correction {correction!r}: choose from {', '.join(CORRECTIONS)}")
        if correction != "none" and self.description.tau is None:
            raise SearchError(
                f"correction {correction} needs a query bank, which this index does not have: add one with "
                "`camoe calibrate --queries FILE`, or search with correction none"
            )
        return correction

    def _expert_weights(self, experts: Mapping[str, float] | None) -> np.ndarray:
        names = self.description.experts
        for name in experts or {}:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the model has {', '.join(names)}"
                raise SearchError(f"unknown expert {name!r}: {hint}")
        weights = [(experts or {}).get(name, 1.0) for name in names]
        return np.repeat(np.asarray(weights, np.float32), self.description.dim)

    # --- describing --------------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """What is in the index: counts, hours, model, settings, mean gates, query bank, size on disk."""
        columns, description = self.moments.data, self.description
        seconds = columns.column("end").to_numpy() - columns.column("start").to_numpy()
        paths = columns.column("path").to_pylist()
        last_end = {}
        for path, end in zip(paths, columns.column("end").to_pylist(), strict=True):
            last_end[path] = max(end, last_end.get(path, 0.0))
        gates = columns.column("gate_weights").combine_chunks().flatten().to_numpy()
        mean_gates = gates.reshape(-1, len(description.experts)).mean(axis=0).tolist() if len(self) else []
        bank = read_bank(self.folder, description)
        skipped = self.folder / "skipped.jsonl"
        return {
            "files": len(last_end),
            "moments": len(self),
            "hours": sum(last_end.values()) / 3600,
            "mean_moment_seconds": float(seconds.mean()) if len(self) else None,
            "skipped": len(skipped.read_text(encoding="utf-8").splitlines()) if skipped.exists() else 0,
            "model": description.model,
            "weights": description.weights,
            "num_frames": description.num_frames,
            "sampling": description.sampling,
            "window": description.window,
            "stride": description.stride,
            "store": description.store if description.uri is None else f"milvus {description.uri}",
            "faiss": description.faiss,
            "width": description.width,
            "mean_gates": dict(zip(description.experts, mean_gates, strict=False)),
            "query_bank": None if bank is None else {"queries": len(bank.texts), "tau": bank.tau},
            "hubs": int(columns.column("is_hub").to_numpy().sum()),
            "bytes": sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()),
        }

    def export(self, path: str | os.PathLike):
        """Write all columns as .parquet or .jsonl, or all but the vectors as .csv."""
        suffix = Path(path).suffix
        if suffix == ".parquet":
            self.moments.to_parquet(path)
        elif suffix == ".jsonl":
            self.moments.to_json(path)
        elif suffix == ".csv":
            self.moments.remove_columns(["vector", "gate_weights"]).to_csv(path)
        else:
            raise SearchError(f"cannot export to {path}: name it .parquet, .jsonl or .csv")
