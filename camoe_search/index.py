# SPDX-License-Identifier: Apache-2.0
"""[`VideoIndex`]: build an index of videos, open it, search it.

    index = VideoIndex.build(["~/videos"], "my-index", "runs/demo")
    for hit in index.search("a dog catches a frisbee on the beach", k=5):
        print(f"{hit.score:.3f} {hit.path} from {hit.start:.0f} s to {hit.end:.0f} s")

N queries, B moments (rows), E experts, D dims, K = E*D entries a folded vector. A score is s of retrieval.py, in
[-1, 1], minus the moment's bias where the query bank corrects it. Torch is imported when a model has to be loaded:
searching by text needs none where the index holds its text tower (text_encoder.py).
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .database import Description
from .errors import SearchError
from .filters import make_filters
from .local_store import LocalStore
from .queries import as_negative, as_weighted, query_vector
from .results import Grouping, Hit, VectorStore


if TYPE_CHECKING:
    import pyarrow

    from .encoder import Encoder
    from .update import UpdateReport


logger = logging.getLogger(__name__)

CORRECTIONS = ("none", "query_bank", "dynamic")


class VideoIndex:
    """An index of videos. Make one with `build`, open one with `load`, or with `connect` if it is in Milvus only.

    An open index sees what other processes change: every search is in the state of the last commit.

    Args:
        folder: of the index; vectors are memory-mapped. None: there is only `store`.
        encoder: the model that made it; None loads it when it is needed.
        device: for a model that is loaded later.
        store: an open `MilvusStore`; None searches the folder.
        trust_remote_code: for a SentenceTransformer that is loaded later.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        encoder: Encoder | None = None,
        device: str | None = None,
        store: VectorStore | None = None,
        trust_remote_code: bool = False,
    ):
        self._folder = None if folder is None else Path(folder)
        self.device, self.trust_remote_code = device, trust_remote_code
        self.store = store or LocalStore(self.folder)
        self._encoder = encoder
        self._text_encoder = None
        self.report: UpdateReport | None = None  # of the `build` that made this object
        if encoder is not None:
            self._check_model(encoder)

    @property
    def description(self) -> Description:
        """What the index is, as of the last look at it."""
        return self.store.description

    @property
    def folder(self) -> Path:
        """
        Raises:
            SearchError: the index was opened with `connect`, without a folder.
        """
        if self._folder is None:
            raise SearchError(
                f"only {self.store.uri} is open: this needs the folder where the index was made: give it as --index"
            )
        return self._folder

    def __len__(self) -> int:
        return len(self.store)

    def close(self):
        """Close the database. The object cannot be used afterwards."""
        self.store.close()

    # --- making and changing -----------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        paths: Sequence[str | os.PathLike],
        folder: str | os.PathLike,
        model: str | Encoder | None = None,
        *,
        sampling: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options,
    ) -> VideoIndex:
        """Index the videos under `paths`, or bring the index in `folder` up to date with them.

        Args:
            paths: folders and files; none: the folders that the index knows.
            folder: of the index.
            model: checkpoint folder, Hub id or `Encoder`; None: the one that the index was made with.
            sampling: "uniform" or "keyframe" (faster, less exact); None: the index's, or the model's for a new one.
            device: for the model.
            trust_remote_code: let a SentenceTransformer run code from its repository.
            options: the fields of `update.IndexOptions`.

        Returns:
            The open index; its attribute `report` says what was done.

        Raises:
            SearchError: saying what is wrong and what to do.
        """
        from .encoder import load_encoder
        from .update import IndexOptions, update_index

        if model is None or isinstance(model, str | os.PathLike):
            old = None
            if model is None or (_is_index(folder) and not options.get("rebuild")):
                old = read_folder(folder)
            sampling = sampling or (None if old is None or options.get("rebuild") else old.sampling)
            model = load_encoder(str(model or old.model), device, sampling, trust_remote_code)
        report = update_index(paths, folder, model, IndexOptions(**options))
        index = cls(folder, model)
        index.report = report
        return index

    @classmethod
    def load(
        cls,
        folder_or_repo: str | os.PathLike,
        model: str | Encoder | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> VideoIndex:
        """Open an index: a folder, or a data set on the Hub made by `push_to_hub`.

        Args:
            model: the model that made it, if it has moved. Its weights are compared.
        """
        if not Path(folder_or_repo).is_dir():
            from .hub import download

            folder_or_repo = download(str(folder_or_repo))
        return cls(folder_or_repo, device=device, trust_remote_code=trust_remote_code)._with_model(model)

    @classmethod
    def connect(
        cls,
        uri: str,
        collection: str | None = None,
        model: str | Encoder | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> VideoIndex:
        """Search what one or many index folders put into Milvus. No folder is needed.

        Args:
            uri: a server's address, or the file name of an embedded database.
            collection: by default "camoe".
            model: as for `load`.
        """
        from .milvus_store import DEFAULT_COLLECTION, MilvusStore

        store = MilvusStore(uri, collection or DEFAULT_COLLECTION)
        if store.description is None:
            raise SearchError(
                f"{uri} has no collection {store.collection} made by `camoe index … --store milvus --uri {uri}`"
            )
        index = cls(None, device=device, store=store, trust_remote_code=trust_remote_code)
        return index._with_model(model)

    def _with_model(self, model: str | Encoder | None) -> VideoIndex:
        if isinstance(model, str | os.PathLike):
            from .encoder import load_encoder

            model = load_encoder(str(model), self.device, self.description.sampling, self.trust_remote_code)
        if model is not None:
            self._check_model(model)
            self._encoder = model
        return self

    def add(self, paths: Sequence[str | os.PathLike], **options) -> UpdateReport:
        """Index more files or folders; takes the fields of `update.IndexOptions` as options."""
        from .update import IndexOptions, update_index

        return update_index(paths, self.folder, self.encoder, IndexOptions(**options))

    def remove(self, patterns: Sequence[str | os.PathLike]) -> int:
        """Remove files, all files under folders, and files that fit patterns. Returns how many moments went."""
        from .remove import remove_files

        return remove_files(self.folder, patterns)[1]

    def calibrate(self, queries: list[str], tau: float | None = None):
        """Replace the query bank by these texts, for example a log of what users asked. No video is encoded again.

        Args:
            queries: at most 1000 are used, evenly spaced over the list.
            tau: temperature in units of the score; None keeps the current one.
        """
        from .update import replace_bank

        replace_bank(self.folder, self.encoder, queries, tau)
        self.store.refresh()

    def optimize(self, kind: str | None) -> float | None:
        """Make an approximate index ("ivf" or "hnsw") as a cache, or remove it (None): approximate.py.

        Returns:
            The share of exact search's first ten that it finds, for up to 200 queries of the bank, or rows of the
            index where it has none; None where a cache was removed.
        """
        from .approximate import build_cache, delete_caches, measure_recall, open_cache
        from .bank import read_bank
        from .database import write_lock
        from .writer import IndexWriter

        with write_lock(self.folder), IndexWriter(self.folder) as writer:
            recall = None
            if kind is None:
                writer.describe(cache=None)
            else:
                with LocalStore(self.folder).state() as rows:
                    writer.describe(cache=build_cache(self.folder, rows, kind))
                    bank = read_bank(writer.connection, writer.description.tau)
                    cache = open_cache(self.folder, writer.description, None)
                    recall = measure_recall(cache, rows, None if bank is None else bank.vectors)
                writer.describe(cache=writer.description.cache | {"recall": recall})
            delete_caches(self.folder, writer.description.cache and writer.description.cache["file"])
        self.store.refresh()
        return recall

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload the index as a data set; `VideoIndex.load(repo_id)` opens it. Returns its URL.

        The videos are not uploaded, but their paths, metadata and subtitles are part of the index.
        """
        from .hub import upload

        return upload(self.folder, repo_id, private)

    # --- searching ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The model, loaded on first use."""
        if self._encoder is None:
            from .encoder import load_encoder

            description = self.description
            encoder = load_encoder(description.model, self.device, description.sampling, self.trust_remote_code)
            self._check_model(encoder)
            self._encoder = encoder
        return self._encoder

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Queries -> folded vectors (N,K): by the model where it is loaded, else by the index's own text tower.

        Raises:
            SearchError: a query is empty.
        """
        if self._encoder is None and self._text_encoder is None:
            self._text_encoder = self._open_text_encoder()
        return (self._encoder or self._text_encoder or self.encoder).encode_texts(texts)

    def _open_text_encoder(self):
        """The text tower beside the vectors; None, and a note why, where there is none that can be used."""
        from .text_encoder import OnnxTextEncoder

        if self._folder is None or self.device is not None:
            return None
        reason = self.description.text_encoder
        if not reason:
            try:
                encoder = OnnxTextEncoder(self._folder)
                if encoder.weights == self.description.weights:
                    return encoder
                reason = "it is of another model"
            except FileNotFoundError:
                reason = "the index was made without it"
            except ImportError as error:
                reason = str(error)
        logger.warning(
            "searching with the whole model, which takes seconds to load; the index's text tower: %s", reason
        )
        return None

    def _check_model(self, encoder: Encoder):
        from .update import check_model

        check_model(encoder, self.description)

    @property
    def default_correction(self) -> str:
        return "none" if self.description.tau is None else "query_bank"

    def search(
        self,
        query: str | Sequence[str | tuple[str, float]] | None = None,
        k: int = 10,
        *,
        like: Any = None,
        negative: str | Sequence[str | tuple[str, float]] = (),
        then: str | Sequence[str | tuple[str, float]] | None = None,
        words: bool = False,
        **options,
    ) -> list[Hit]:
        """The k best moments.

            index.search("a dog catches a frisbee")
            index.search([("a dog", 1.0), ("on a beach", 0.5)], negative="people")
            index.search(like="film.mp4@12.5-15")
            index.search("a man opens a door", then="he sits down", group_by="file")

        Args:
            query: a text, or several: texts or (text, weight).
            k: how many.
            like: a video or picture that results resemble: path, "path@12.5-15" (seconds), bytes, `Clip` or image.
                Alone or together with texts; uncorrected unless `correction` is given, as the bank holds texts.
            negative: texts that results should not fit; their weight is 0.5 unless given.
            then: what comes later in the same file. A result spans both moments, which are its `moments`; its score
                is the mean of theirs. The two do not overlap. One result per file; needs an index folder.
            words: look for the words of the texts in file names, captions and subtitles as well, and fuse the two
                rankings by reciprocal rank: 1 / (60 + rank), summed, is then the score. Needs an index folder.
            options: those of `search_vectors`.

        Raises:
            SearchError: the query is empty, or an option is invalid.
        """
        wanted, later = as_weighted(query), as_weighted(then)
        text = " ".join(text for text, _ in wanted)
        if words and (then is not None or not text.strip()):
            raise SearchError("words are looked for in one text alone: give one, without then")
        if like is not None:
            options["correction"] = options.get("correction") or "none"
        encoders = self.encode_texts, lambda clip: self.encoder.encode_clip(clip)
        vectors = [query_vector(wanted, as_negative(negative), like, *encoders)]
        if then is not None:
            vectors.append(query_vector(later, (), None, *encoders))
        return self._search(np.stack(vectors), k, then is not None, text if words else None, **options)[0]

    def search_batch(self, queries: Sequence[str], k: int = 10, **options) -> list[list[Hit]]:
        """The k best moments for each text; takes the options of `search_vectors`."""
        return self.search_vectors(self.encode_texts(list(queries)), k, **options)

    def search_like(self, clip, k: int = 10, **options) -> list[Hit]:
        """The k moments most like a video or picture: `search` with `like`. Uncorrected: the bank holds texts."""
        return self.search(like=clip, k=k, **options | {"correction": "none"})

    def search_similar(self, key: str, k: int = 10, **options) -> list[Hit]:
        """The k moments most like one of the index, without itself. Needs no model. Uncorrected, as `search_like`."""
        hits = self.search_vectors(self.similar_vector(key)[None], k + 1, **options | {"correction": "none"})[0]
        return [hit for hit in hits if hit.key != key][:k]

    def similar_vector(self, key: str) -> np.ndarray:
        """The query vector (K,) that finds moments like one of the index: its experts, each of length 1."""
        experts = self._vector(key).reshape(len(self.description.experts), -1)  # (E,D), gated
        lengths = np.linalg.norm(experts, axis=1, keepdims=True)
        return (experts / np.maximum(lengths, 1e-12)).reshape(-1)

    def search_vectors(self, vectors: np.ndarray, k: int = 10, **options) -> list[list[Hit]]:
        """The k best moments for each query vector.

        Args:
            vectors: (N,K) folded text vectors.
            k: how many.
            correction: "none", "query_bank", or "dynamic" (corrects only queries whose best uncorrected moment is a
                hub: two searches). None: query_bank if the index has a bank.
            experts: expert -> weight of its part of the score; 1 for those not given.
            merge: overlapping windows of a file are one moment, and files of the same content one result (default).
                False: a result per window and file.
            group_by: "file": the best moment of each file; the others that stand out are its `moments`.
            min_score: only results whose best window has at least this score.
            filters: the fields of `results.Filters` as keywords: path, min_seconds, glob, after, where and so on.

        Raises:
            SearchError: an unknown correction, expert or filter, or a correction without a bank.
        """
        return self._search(np.asarray(vectors, np.float32), k, **options)

    def _search(
        self,
        queries: np.ndarray,
        k: int,
        in_order: bool = False,
        words: str | None = None,
        *,
        correction: str | None = None,
        experts: Mapping[str, float] | None = None,
        merge: bool = True,
        group_by: str | None = None,
        min_score: float | None = None,
        **filters,
    ) -> list[list[Hit]]:
        """`in_order`: the two queries are one after the other in a file; `words`: also a search for these."""
        correction = self._check_correction(correction)
        if k < 1:
            raise SearchError(f"k is {k}: ask for one result or more")
        if group_by not in (None, "file"):
            raise SearchError(f"group_by is {group_by!r}: results can be grouped by file, or not at all (None)")
        if experts:
            queries = queries * self._expert_weights(experts)
        filters = make_filters(**filters)
        grouping = Grouping(merge, group_by == "file", min_score)
        corrected, dynamic = np.full(len(queries), correction == "query_bank"), correction == "dynamic"
        if in_order:
            return [self._local("then").in_order(queries, k, filters, corrected, dynamic, grouping)]
        if words is not None:
            return [self._local("words").fused(queries, words, k, filters, corrected, dynamic, grouping)]
        if not (merge or grouping.by_file or min_score is not None):
            return self.store.search(queries, k, filters, corrected, dynamic)
        return self.store.moments(queries, k, filters, corrected, dynamic, grouping)

    def _local(self, option: str) -> LocalStore:
        """
        Raises:
            SearchError: the index is in Milvus only.
        """
        if not isinstance(self.store, LocalStore):
            raise SearchError(f"{option} needs the folder of the index: what is in Milvus cannot be searched that way")
        return self.store

    def expert_scores(self, vector: np.ndarray, key: str) -> dict[str, float]:
        """What each expert adds to the uncorrected score of a moment for a query vector (K,).

        Raises:
            KeyError: there is no such moment.
        """
        return self.split_score(vector, self._vector(key))

    def split_score(self, text_vector: np.ndarray, video_vector: np.ndarray) -> dict[str, float]:
        """The inner product of two folded vectors (K,), by expert."""
        parts = (text_vector * video_vector).reshape(len(self.description.experts), -1).sum(axis=1)
        return dict(zip(self.description.experts, parts.tolist(), strict=True))

    def _vector(self, key: str) -> np.ndarray:
        found = self.store.vectors([key])
        if key not in found:
            raise KeyError(key)
        return found[key]

    def _check_correction(self, correction: str | None) -> str:
        correction = correction or self.default_correction
        if correction not in CORRECTIONS:
            raise SearchError(f"unknown correction {correction!r}: choose from {', '.join(CORRECTIONS)}")
        if correction != "none" and self.description.tau is None:
            raise SearchError(
                f"correction {correction} needs a query bank, which this index does not have: add one with "
                "`camoe calibrate --bank FILE`, or search with correction none"
            )
        return correction

    def _expert_weights(self, experts: Mapping[str, float]) -> np.ndarray:
        names = self.description.experts
        for name in experts:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the model has {', '.join(names)}"
                raise SearchError(f"unknown expert {name!r}: {hint}")
        weights = [experts.get(name, 1.0) for name in names]
        return np.repeat(np.asarray(weights, np.float32), self.description.dim)

    # --- describing --------------------------------------------------------------------------------------------------

    def info(self) -> dict:
        """What is in the index: counts, hours, model, settings, mean gates, query bank, size on disk."""
        from .describe import info

        return info(self.folder, self.store)

    def skipped(self) -> list[dict]:
        """Files, or parts of them, that could not be read: {"path", "cause"}, and "start", "end" of a part."""
        from .remove import skipped_files

        with self.store.state():
            return skipped_files(self.store.connection)

    def table(self) -> pyarrow.Table:
        """One row per moment and file: key, path, start, end (seconds), size, mtime_ns, content_hash, vector (K),
        gate_weights (E), bias, is_hub."""
        from .describe import table

        return table(self.store)

    def export(self, path: str | os.PathLike):
        """Write all columns as .parquet or .jsonl, or all but the vectors as .csv."""
        from .describe import export

        export(self.store, path)


def _is_index(folder: str | os.PathLike) -> bool:
    from .database import exists

    return exists(folder)


def read_folder(folder: str | os.PathLike) -> Description:
    """What the index in a folder is.

    Raises:
        SearchError: there is none.
    """
    store = LocalStore(Path(folder))
    store.close()
    return store.description
