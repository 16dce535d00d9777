# SPDX-License-Identifier: Apache-2.0
"""An index that a server searches: from several threads, for as long as it runs, whatever happens to the folder."""

import hashlib
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from modeling_camoe.frames import VideoDecodingError

from . import schemas
from .batching import Batcher
from .browse import browse, distinct_titles
from .database import FILE
from .errors import SearchError
from .index import VideoIndex
from .local_store import LocalStore
from .queries import Query, encode_queries, make_query
from .relevance import Relevance
from .results import FILTER_NAMES, Hit
from .search import CORRECTIONS
from .show import thumbnail
from .thumbnails import SIZE, encode_jpeg, keep_thumbnail, thumbnail_path


BATCH = 256  # searches that are answered together at most
THUMBNAIL_SLOTS = threading.BoundedSemaphore(4)  # thumbnails decoded at the same time
UPLOAD, MAX_UPLOADS = "upload-", 64  # vectors that are kept
TRIES = 3  # of a search during which the index is rebuilt


class UnavailableError(SearchError):
    """The index cannot be searched now, perhaps later."""


class NoSuchMomentError(SearchError):
    """The index does not have this moment, or no longer has it."""


@dataclass(frozen=True)
class Asked:
    """A request for results as an index is asked for them."""

    request: schemas.SearchQuery | schemas.SearchBody
    query: Query
    k: int  # results up to the end of the page, and one more to know whether there is a next page
    options: dict  # of `VideoIndex.search_vectors`

    @property
    def is_fused(self) -> bool:
        """Scores are not the similarity of one moment."""
        return self.request.words or self.query.then is not None

    @property
    def likewise(self) -> str:
        """The same for requests that one search of several vectors answers."""
        return repr((self.k, sorted(self.options.items())))


class SearchService:
    """An index searched from several threads.

    An index that is emptied, made by another model, or replaced by another folder of that name is opened again.

    Args:
        name: by which requests choose it.
        index: what is searched.
        page_size: results per page.
    """

    def __init__(self, name: str, index: VideoIndex, page_size: int):
        self.name = name
        self.page_size = page_size
        self._index = index
        self._weights, self._inode = index.description.weights, self._current_inode()
        self._open_lock = threading.Lock()
        self._encode_lock = threading.Lock()  # tokenizers are not thread-safe
        self._relevance = Relevance()
        self._batches = Batcher(self._answer, BATCH)
        self._uploads: dict[tuple[str, str], np.ndarray] = {}  # by weights and key

    @property
    def index(self) -> VideoIndex:
        """The index as it is now."""
        return self._open()[0]

    def _open(self) -> tuple[VideoIndex, str]:
        """The index as it is now, and the hash of the weights that it was opened for.

        Raises:
            UnavailableError: its folder has gone, or holds none that can be opened.
        """
        with self._open_lock:
            inode, index = self._current_inode(), self._index
            if inode != self._inode or index.description.weights != self._weights:
                try:
                    index = VideoIndex(
                        index.folder, device=index.device, trust_remote_code=index.trust_remote_code
                    )  # its model is loaded by the next search
                except SearchError as error:
                    raise UnavailableError(f"the index {self.name} cannot be opened now: {error}") from error
                self._index, self._inode, self._weights = index, inode, index.description.weights
            return index, self._weights

    def _current_inode(self) -> int | None:
        if not isinstance(self._index.store, LocalStore):
            return None
        try:
            return os.stat(self._index.folder / FILE).st_ino
        except OSError as error:
            raise UnavailableError(f"the index {self.name} is not there now: {error.strerror}") from error

    def _unchanged(self, work):
        """`work(index)`, once more where a new model came meanwhile: its vectors are not those of the old one."""
        for _ in range(TRIES):
            index, weights = self._open()
            answer = problem = None
            try:
                answer = work(index)
            except (ValueError, LookupError) as error:  # of other shapes, or with other experts
                problem = error
            index.store.refresh()
            if index.description.weights == weights:
                if problem is not None:
                    raise problem
                return answer
        raise UnavailableError(f"the index {self.name} is being rebuilt: search again")

    # --- what it answers ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.index)

    def about(self, names: list[str]) -> schemas.About:
        """What the page shows before a search. `names`: of all indexes."""
        index = self.index
        moments = len(index)  # also looks whether the index has changed
        description = index.description
        return schemas.About(
            index=self.name,
            indexes=names,
            moments=moments,
            model=os.path.basename(description.model.rstrip("/")),
            experts=description.experts,
            corrections=list(CORRECTIONS) if description.tau is not None else ["none"],
            correction=index.default_correction,
            page_size=self.page_size,
        )

    def search(self, request: schemas.SearchQuery | schemas.SearchBody) -> schemas.Results:
        """A page of results.

        Raises:
            SearchError: what is wrong with the request.
        """
        return self.submit(request).result()

    def submit(self, request: schemas.SearchQuery | schemas.SearchBody) -> Future:
        """A page of results, as `search`. Requests that wait are answered together, by one pass over the index."""
        return self._batches.submit((request, time.perf_counter()))

    def _answer(self, requests: list[tuple]) -> list[schemas.Results | Exception]:
        """(request, when it came) -> their answers."""
        answers = self._unchanged(lambda index: self._pages(index, [request for request, _ in requests]))
        now = time.perf_counter()
        for answer, (_, begin) in zip(answers, requests, strict=True):
            if isinstance(answer, schemas.Results):
                answer.milliseconds = round(1000 * (now - begin))
        return answers

    def _pages(self, index: VideoIndex, requests: list) -> list[schemas.Results | Exception]:
        """One batch encodes all texts, and one search each answers all requests that have the same options.

        An exception is the answer of the requests that caused it.
        """
        answers: list = [None] * len(requests)
        asked: dict[int, Asked] = {}
        for n, request in enumerate(requests):
            try:
                asked[n] = self._read(index, request)
            except SearchError as error:
                answers[n] = error
        queries = [each.query for each in asked.values()]
        with self._encode_lock:
            encoded = encode_queries(queries, index.encode_texts, lambda known: known[None])
        vectors = dict(zip(asked, encoded, strict=True))  # (1,K) or (2,K)
        groups: dict[str | int, list[int]] = {}
        for n, each in asked.items():
            groups.setdefault(n if each.is_fused else each.likewise, []).append(n)
        for numbers in groups.values():
            try:
                pages = self._pages_of_group(index, [asked[n] for n in numbers], [vectors[n] for n in numbers])
            except Exception as error:
                pages = [error] * len(numbers)
            for n, page in zip(numbers, pages, strict=True):
                answers[n] = page
        return answers

    def _pages_of_group(self, index: VideoIndex, asked: list[Asked], vectors: list) -> list[schemas.Results]:
        """The same options and number of results for all; `vectors` (1,K) or (2,K) of each."""
        first, queries = asked[0], np.stack([vector[0] for vector in vectors])
        lists = [
            [hit for hit in hits if hit.key != each.request.like]
            for each, hits in zip(asked, self._find(index, first, vectors), strict=True)
        ]
        starts = [self.page_size * each.request.page for each in asked]
        shown = [hits[start : start + self.page_size] for start, hits in zip(starts, lists, strict=True)]
        # Without those that were removed since they were found.
        found = index.store.vectors([hit.key for hits in shown for hit in hits])
        judges = self._relevance.judges(index, queries, first.request.experts, first.options["correction"])
        return [
            self._page(index, each, query, found, [hit for hit in page if hit.key in found], hits, judge)
            for each, query, page, hits, judge in zip(asked, queries, shown, lists, judges, strict=True)
        ]

    def _read(self, index: VideoIndex, request) -> Asked:
        if not request.texts and request.like is None:
            raise SearchError("give a `text`, or `like`: the key of a moment")
        correction = request.correction or ("none" if request.like is not None else index.default_correction)
        if not request.texts:
            correction = "none"  # the bank holds texts
        options = {name: getattr(request, name) or None for name in FILTER_NAMES} | {
            "correction": correction,
            "group_by": request.group_by,
            "min_score": request.min_score,
            "experts": request.experts,
        }
        like = None if request.like is None else self._vector_like(index, request.like)
        query = make_query(request.texts, request.negative, like, request.then)
        if like is not None and (request.words or request.then is not None):
            raise SearchError("`then` and `words` go with texts, not with `like`")
        if request.words and request.then is not None:
            raise SearchError("`words` are looked for in one text alone: give it without `then`")
        return Asked(request, query, (request.page + 1) * self.page_size + 1, options)

    def _find(self, index: VideoIndex, asked: Asked, vectors: list[np.ndarray]) -> list[list[Hit]]:
        """All results up to the end of the page and one more, for each query of a group."""
        if asked.query.then is not None:
            return [index.search_in_order(vectors[0], asked.k, **asked.options)]
        if asked.request.words:
            return [index.search_with_words(vectors[0], asked.query.text, asked.k, **asked.options)]
        # One more: a moment that results resemble is left out.
        return index.search_vectors(np.concatenate(vectors), asked.k + 1, **asked.options)

    def _page(self, index, asked: Asked, query, found: dict, shown: list[Hit], hits: list[Hit], judge):
        """What is `shown` of all `hits` for a query vector (K,); `found` has the vectors of what is shown."""
        request = asked.request
        scores = [float(query @ found[hit.key]) for hit in shown] if asked.is_fused else [hit.score for hit in hits]
        best = max(scores, default=0.0)
        titles = distinct_titles([hit.path for hit in shown])
        results = []
        for hit, title in zip(shown, titles, strict=True):
            parts = index.split_score(query, found[hit.key])
            experts = {name: part * request.experts.get(name, 1.0) for name, part in parts.items()}
            total = sum(experts.values())
            relevance, match = judge(total if asked.is_fused else hit.score, best)
            results.append(
                schemas.Result(
                    **span(hit).model_dump(),
                    name=os.path.basename(hit.path),
                    folder=os.path.dirname(hit.path),
                    title=title,
                    paths=list(hit.paths or (hit.path,)),
                    relevance=relevance,
                    match=match,
                    experts=None if asked.is_fused else experts,
                    correction=None if asked.is_fused else hit.score - total,
                    moments=[span(each) for each in hit.moments],
                )
            )
        more = len(hits) > self.page_size * (request.page + 1) and request.page + 1 < schemas.MAX_PAGES
        return schemas.Results(index=self.name, hits=results, page=request.page, more=more, milliseconds=0)

    def _vector_like(self, index: VideoIndex, key: str) -> np.ndarray:
        if key.startswith(UPLOAD):
            vector = self._uploads.get((index.description.weights, key))
            if vector is None:
                raise NoSuchMomentError("the server no longer has that video or picture: send it again")
            return vector
        try:
            return index.similar_vector(key)
        except KeyError:
            raise NoSuchMomentError("this moment is not in the index, or no longer: search again") from None

    # --- a video or picture as the query -----------------------------------------------------------------------------

    def upload(self, content: bytes) -> schemas.Upload:
        """Encode a video or picture; its key can be searched with as long as the server keeps it.

        Raises:
            SearchError: it is neither.
        """
        key = UPLOAD + hashlib.sha256(content).hexdigest()[:32]

        def encode(index: VideoIndex):
            with self._encode_lock:
                return index.description.weights, index.encoder.encode_clip(content)[0]

        try:
            weights, vector = self._unchanged(encode)
        except VideoDecodingError as error:
            raise SearchError("that file is neither a video nor a picture that can be read") from error
        self._uploads[weights, key] = vector
        while len(self._uploads) > MAX_UPLOADS:
            self._uploads.pop(next(iter(self._uploads)))
        return schemas.Upload(key=key)

    # --- before a search ---------------------------------------------------------------------------------------------

    def browse(self, folder: str | None) -> schemas.Browse:
        """The newest files, the folders, and queries to begin with; nothing of an index that is in Milvus only."""
        return browse(self.index.store, folder)

    # --- one moment --------------------------------------------------------------------------------------------------

    def picture(self, key: str) -> bytes:
        """A thumbnail as JPEG: that of the index's folder, or made now, and kept there if that can be written.

        Raises:
            NoSuchMomentError: there is no such moment.
            VideoDecodingError: its file cannot be read.
        """
        hit = self.locate(key)
        store = self.index.store
        folder = store.folder if isinstance(store, LocalStore) else None
        if folder is not None and (kept := thumbnail_path(folder, hit.key)).is_file():
            return kept.read_bytes()
        with THUMBNAIL_SLOTS:
            content = encode_jpeg(thumbnail(hit.path, hit.start, hit.end, SIZE))
        if folder is not None and self.locate(key) == hit:  # it is still the moment of that name
            keep_thumbnail(folder, hit.key, content)
        return content

    def locate(self, key: str, at: float | None = None) -> Hit:
        """The file and time of a moment.

        Args:
            at: a second in it. If that is not so, the moment of the same content that has it is meant.

        Raises:
            NoSuchMomentError: the index does not have it, or no longer has it.
        """
        store = self.index.store
        try:
            if at is not None and isinstance(store, LocalStore):
                key = store.key_at(key, at)
            return store.locate(key)
        except KeyError:
            raise NoSuchMomentError("this moment is not in the index, or no longer: search again") from None


def span(hit: Hit) -> schemas.Span:
    """The times of a moment."""
    peak = hit.peak or (hit.start, hit.end)
    return schemas.Span(key=hit.key, start=hit.start, end=hit.end, peak=peak, score=hit.score)
