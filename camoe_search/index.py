# SPDX-License-Identifier: Apache-2.0
"""[`VideoIndex`]: make an index of videos, change it, open it, search it (search.py).

index = VideoIndex.create_or_update(["~/videos"], "my-index", "runs/demo")
for hit in index.search("a dog catches a frisbee on the beach", k=5):
    print(f"{hit.score:.3f} {hit.path} from {hit.start:.0f} s to {hit.end:.0f} s")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .database import Description
from .errors import SearchError
from .local_store import LocalStore
from .search import IndexSearch


if TYPE_CHECKING:
    import pyarrow

    from .encoder import Encoder
    from .update import UpdateReport


class VideoIndex(IndexSearch):
    """An index of videos.

    Make one with `create_or_update`; open one with `load`, or with `connect` if it is in Milvus only.
    """

    report: UpdateReport | None = None  # of the `create_or_update` that made this object

    # --- making and changing -----------------------------------------------------------------------------------------

    @classmethod
    def create_or_update(
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
        """Index the videos under `paths`: make the index in `folder`, or bring it up to date with them.

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
