# SPDX-License-Identifier: Apache-2.0
"""An open index that is searched: by texts, videos and pictures, by vectors, by moments of its own.

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
from .queries import MAX_WEIGHT, encode_queries, make_query
from .results import Filters, Grouping, Hit, VectorStore


if TYPE_CHECKING:
    from .encoder import Encoder


logger = logging.getLogger(__name__)

CORRECTIONS = ("none", "query_bank", "dynamic")


class IndexSearch:
    """An open index. It sees what other processes change: every search is in the state of the last commit.

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
        asked = make_query(query, negative, like, then)
        if words and (then is not None or not asked.text.strip()):
            raise SearchError("words are looked for in one text alone: give one, without then")
        if like is not None:
            options["correction"] = options.get("correction") or "none"
        (vectors,) = encode_queries([asked], self.encode_texts, lambda clip: self.encoder.encode_clip(clip))
        if then is not None:
            return self.search_in_order(vectors, k, **options)
        if words:
            return self.search_with_words(vectors, asked.text, k, **options)
        return self.search_vectors(vectors, k, **options)[0]

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
        queries, filters, corrected, dynamic, grouping = self._read_options(vectors, k, **options)
        if not (grouping.merge or grouping.by_file or grouping.min_score is not None):
            return self.store.search(queries, k, filters, corrected, dynamic)
        return self.store.search_moments(queries, k, filters, corrected, dynamic, grouping)

    def search_in_order(self, vectors: np.ndarray, k: int = 10, **options) -> list[Hit]:
        """The k best files in which the first of two query vectors (2,K) is followed by the second: `then`."""
        queries, *settings = self._read_options(vectors, k, **options)
        return self._local("then").in_order(queries, k, *settings)

    def search_with_words(self, vector: np.ndarray, text: str, k: int = 10, **options) -> list[Hit]:
        """The k best moments by a query vector (1,K) and by the words of a text, fused: `words`."""
        query, *settings = self._read_options(vector, k, **options)
        return self._local("words").fused(query, text, k, *settings)

    def _read_options(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        correction: str | None = None,
        experts: Mapping[str, float] | None = None,
        merge: bool = True,
        group_by: str | None = None,
        min_score: float | None = None,
        **filters,
    ) -> tuple[np.ndarray, Filters, np.ndarray, bool, Grouping]:
        """The options of `search_vectors` as a store takes them, after the weighted queries (N,K)."""
        queries = np.asarray(vectors, np.float32)
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
        return queries, filters, corrected, dynamic, grouping

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
            if not abs(experts[name]) <= MAX_WEIGHT:
                raise SearchError(
                    f"the weight of the expert {name} is {experts[name]:g}: give one up to {MAX_WEIGHT:g}"
                )
        weights = [experts.get(name, 1.0) for name in names]
        return np.repeat(np.asarray(weights, np.float32), self.description.dim)
