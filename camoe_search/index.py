# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""[`VideoIndex`]: build an index of videos, open it, search it.

    index = VideoIndex.build(["~/videos"], "my-index", "runs/demo")
    for hit in index.search("a dog catches a frisbee on the beach", k=5):
        print(f"{hit.score:.3f} {hit.path} from {hit.start:.0f} s to {hit.end:.0f} s")

N queries, B moments (rows), E experts, D dims, K = E*D entries a folded vector. Scores are s of retrieval.py, in
[-1, 1], less the moment's bias where the query bank corrects.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from . import build as builder
from .encoder import Encoder
from .errors import SearchError
from .store import read_bank, read_description, read_faiss, read_moments


CORRECTIONS = ("none", "query_bank", "dynamic")


@dataclass(frozen=True)
class Hit:
    """One moment found."""

    score: float
    path: str
    start: float  # seconds
    end: float
    row: int  # of the index


class VideoIndex:
    """An index of videos, memory-mapped from its folder. Make one with `build`, open one with `load`.

    Args:
        folder: of the index, see store.py for its files.
        encoder: the model that made it; None loads it when a text is searched.
        device: for the model that is loaded.
    """

    def __init__(self, folder: str | os.PathLike, encoder: Encoder | None = None, device: str | None = None):
        self.folder = Path(folder)
        self.device = device
        self._encoder = encoder
        self.report: builder.BuildReport | None = None  # of the `build` that made this object
        self._reopen()

    def _reopen(self):
        self.description = read_description(self.folder)
        self.moments = read_moments(self.folder, self.description)  # HF Dataset
        self._faiss = read_faiss(self.folder, self.description)
        self._places = self.moments.select_columns(["path", "start", "end"])
        self._is_hub = self.moments.data.column("is_hub").to_numpy()  # (B,)
        if self._encoder is not None:
            builder.check_model(self._encoder, self.description)

    def __len__(self) -> int:
        return len(self.moments)

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
            sampling: "uniform" or "keyframe" (cheaper, less exact); None: as the index has it, else as the model says.
            device: for the model.
            options: of `build.update_index`: window, stride, faiss, queries, tau, batch_size, num_workers, prune,
                rebuild, progress. What was done is in the attribute `report`.

        Raises:
            SearchError: naming what is wrong and what to do.
        """
        is_old = (Path(folder) / "index.json").exists() and not options.get("rebuild")
        if not isinstance(model, Encoder):
            old = read_description(folder) if is_old or model is None else None
            sampling = sampling or (old.sampling if is_old else None)
            model = Encoder.from_pretrained(model or old.model, device, sampling)
        report = builder.update_index(paths, folder, model, **options)
        index = cls(folder, model)
        index.report = report
        return index

    @classmethod
    def load(
        cls, folder_or_repo: str | os.PathLike, model: "str | Encoder | None" = None, device: str | None = None
    ) -> "VideoIndex":
        """Open an index: a folder, or a data set on the Hub that `push_to_hub` made.

        Args:
            model: the model that made it, if it is not where it was. Weights are compared.
        """
        if not Path(folder_or_repo).is_dir():
            folder_or_repo = _download(str(folder_or_repo))
        if isinstance(model, str):
            model = Encoder.from_pretrained(model, device, read_description(folder_or_repo).sampling)
        return cls(folder_or_repo, model, device)

    def add(self, paths: Sequence[str | os.PathLike], **options) -> "builder.BuildReport":
        """Index more files or folders; takes the options of `build.update_index`."""
        report = builder.update_index(paths, self.folder, self.encoder, **options)
        self._reopen()
        return report

    def remove(self, paths: Sequence[str | os.PathLike]) -> int:
        """Take files, or all files under folders, out of the index. Returns how many moments went."""
        gone = builder.remove_files(self.folder, paths)
        self._reopen()
        return gone

    def calibrate(self, queries: list[str], tau: float | None = None):
        """Replace the query bank by these texts, for example a log of what is asked. No video is encoded again.

        Args:
            queries: at most 1000 are used, spread over the list.
            tau: temperature in units of the score; None keeps the present one.
        """
        builder.replace_bank(self.folder, self.encoder, queries, tau)
        self._reopen()

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload the index as a data set; `VideoIndex.load(repo_id)` opens it. Returns its address.

        The videos stay where they are, but their paths are part of the index.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        current = [f"{self.description.generation}/**", "index.json", "skipped.jsonl"]
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=self.folder,
            allow_patterns=current,
            delete_patterns="generation-*/**",
            commit_message=f"Index of {len(self)} moments",
        )
        return str(url)

    # --- searching ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The model, loaded at first use."""
        if self._encoder is None:
            encoder = Encoder.from_pretrained(self.description.model, self.device, self.description.sampling)
            builder.check_model(encoder, self.description)
            self._encoder = encoder
        return self._encoder

    @property
    def default_correction(self) -> str:
        return "none" if self.description.tau is None else "query_bank"

    def search(self, query: str, k: int = 10, **options) -> list[Hit]:
        """The k best moments for a text; takes the options of `search_vectors`.

        Raises:
            SearchError: the query is empty, or an option makes no sense.
        """
        return self.search_batch([query], k, **options)[0]

    def search_batch(self, queries: Sequence[str], k: int = 10, **options) -> list[list[Hit]]:
        """The k best moments for each text; takes the options of `search_vectors`."""
        return self.search_vectors(self.encoder.texts(list(queries)), k, **options)

    def search_like(self, clip, k: int = 10, **options) -> list[Hit]:
        """The k moments most like a video (path, bytes or `Clip`). Uncorrected: the bank is of texts."""
        return self.search_vectors(self.encoder.clip(clip), k, **options | {"correction": "none"})[0]

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
            correction: "none", "query_bank", or "dynamic" (the bank corrects only queries whose uncorrected best
                moment is a hub: two look-ups). None: query_bank if the index has a bank.
            experts: weight of each expert's share in the score, 1 where it is not named.
            path: only files whose path contains this text (upper and lower case are the same).
            min_seconds, max_seconds: only moments of such a length.

        Raises:
            SearchError: an unknown correction or expert, or a correction without a bank.
        """
        correction = self._check_correction(correction)
        if k < 1:
            raise SearchError(f"k is {k}: ask for one result or more")
        if not len(self):
            return [[] for _ in vectors]
        weights = self._expert_weights(experts)  # (K,)
        allowed = self._allowed_rows(path, min_seconds, max_seconds)
        switch = np.full((len(vectors), 1), correction == "query_bank", np.float32)
        queries = np.concatenate([vectors * weights, switch], axis=1, dtype=np.float32)  # (N,K+1)
        scores, rows = self._look_up(queries, k, allowed)
        if correction == "dynamic":
            is_corrected = self._is_hub[rows[:, 0]] & (rows[:, 0] >= 0)  # (N,)
            if is_corrected.any():
                queries[is_corrected, -1] = 1
                scores[is_corrected], rows[is_corrected] = self._look_up(queries[is_corrected], k, allowed)
        return self._hits(scores, rows)

    def expert_scores(self, vector: np.ndarray, row: int) -> dict[str, float]:
        """What each expert adds to the score of a moment for a query vector (K,)."""
        moment = np.asarray(self.moments[row]["vector"], np.float32)
        shares = (vector * moment).reshape(len(self.description.experts), -1).sum(axis=1)
        return dict(zip(self.description.experts, shares.tolist(), strict=True))

    def _look_up(self, queries: np.ndarray, k: int, allowed: np.ndarray | None):
        """(N,K+1) -> scores (N,k) and rows (N,k), best first; row -1 where there are fewer."""
        if allowed is None:
            return self._faiss.search(queries, min(k, len(self)))
        kinds = {"hnsw": faiss.SearchParametersHNSW, "ivf": faiss.SearchParametersIVF}
        selector = faiss.IDSelectorBatch(allowed)
        parameters = kinds.get(self.description.faiss, faiss.SearchParameters)(sel=selector)
        return self._faiss.search(queries, min(k, len(self)), params=parameters)

    def _hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        found = rows >= 0
        places = self._places[rows[found].tolist()]  # columns of all hits in one look-up
        values = zip(
            scores[found].tolist(), places["path"], places["start"], places["end"], rows[found].tolist(), strict=True
        )
        return [[Hit(*next(values)) for _ in range(count)] for count in found.sum(axis=1)]

    def _check_correction(self, correction: str | None) -> str:
        correction = correction or self.default_correction
        if correction not in CORRECTIONS:
            raise SearchError(f"unknown correction {correction!r}: choose from {', '.join(CORRECTIONS)}")
        if correction != "none" and self.description.tau is None:
            raise SearchError(
                f"correction {correction} needs a query bank, which this index lacks: give it one with "
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

    def _allowed_rows(self, path, min_seconds, max_seconds) -> np.ndarray | None:
        """Rows that pass the filters, None for all."""
        if path is None and min_seconds is None and max_seconds is None:
            return None
        columns = self.moments.data
        allowed = np.ones(len(self), bool)
        if path is not None:
            allowed &= np.array([path.lower() in name.lower() for name in columns.column("path").to_pylist()], bool)
        seconds = columns.column("end").to_numpy() - columns.column("start").to_numpy()
        if min_seconds is not None:
            allowed &= seconds >= min_seconds
        if max_seconds is not None:
            allowed &= seconds <= max_seconds
        return allowed.nonzero()[0]

    # --- describing --------------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """What is in the index: counts, hours, model, settings, gates, the bank, size on disk."""
        columns, description = self.moments.data, self.description
        seconds = columns.column("end").to_numpy() - columns.column("start").to_numpy()
        paths = columns.column("path").to_pylist()
        last_end = {}
        for name, end in zip(paths, columns.column("end").to_pylist(), strict=True):
            last_end[name] = max(end, last_end.get(name, 0.0))
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
            "faiss": description.faiss,
            "width": description.width,
            "mean_gates": dict(zip(description.experts, mean_gates, strict=False)),
            "query_bank": None if bank is None else {"queries": len(bank.texts), "tau": bank.tau},
            "hubs": int(self._is_hub.sum()),
            "bytes": sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()),
        }

    def export(self, path: str | os.PathLike):
        """Write all columns as .parquet or .jsonl, or without the vectors as .csv."""
        suffix = Path(path).suffix
        if suffix == ".parquet":
            self.moments.to_parquet(path)
        elif suffix == ".jsonl":
            self.moments.to_json(path)
        elif suffix == ".csv":
            self.moments.remove_columns(["vector", "gate_weights"]).to_csv(path)
        else:
            raise SearchError(f"cannot export to {path}: name it .parquet, .jsonl or .csv")


def _download(repo_id: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo_id, repo_type="dataset")
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SearchError(f"{repo_id} is neither a folder nor a data set on the Hub that can be reached") from error
