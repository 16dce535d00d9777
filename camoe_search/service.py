# SPDX-License-Identifier: Apache-2.0
"""An index that a server searches: from several threads, for as long as it runs, whatever happens to the folder."""

import contextlib
import hashlib
import io
import os
import threading
import time
from collections import Counter

import numpy as np

from modeling_camoe.frames import VideoDecodingError

from . import schemas
from .database import FILE
from .errors import SearchError
from .filters import PATH
from .index import CORRECTIONS, VideoIndex
from .local_store import LocalStore
from .queries import as_negative, as_weighted, query_vector
from .results import Hit
from .show import thumbnail


SAMPLE = 256  # windows whose scores say what an average moment of the index scores
# Standard deviations above the average moment -> words. Our choice: scores are not calibrated across models.
WORDS = ((3.0, "Strong match"), (2.0, "Good match"), (1.0, "Fair match"))
WEAK = "Weak match"
THUMBNAILS = "thumbnails"  # folder beside the vectors
THUMBNAIL_SIZE = 320  # pixels of the long side
THUMBNAIL_SLOTS = threading.BoundedSemaphore(4)  # thumbnails decoded at the same time
RECENT_COUNT, EXAMPLE_COUNT, FOLDER_COUNT = 12, 4, 300
UPLOAD, MAX_UPLOADS = "upload-", 64  # vectors that are kept
# The newest files that have a moment, in folders whose path begins as given: path, start, end, key.
RECENT = f"""
SELECT {PATH}, windows.start, windows.end, contents.hash || '.' || windows.number
FROM files JOIN contents ON contents.id = files.content JOIN roots ON roots.id = files.root
     JOIN windows ON windows.id = (
         SELECT min(id) FROM windows AS other WHERE other.content = contents.id AND other.row IS NOT NULL)
WHERE substr({PATH}, 1, length(?)) = ? ORDER BY files.mtime_ns DESC, files.id LIMIT ?"""
FILES = "SELECT roots.path, files.path FROM files JOIN roots ON roots.id = files.root WHERE files.content IS NOT NULL"
EXAMPLES = "SELECT DISTINCT text FROM bank WHERE length(text) BETWEEN 8 AND 60 ORDER BY query LIMIT ?"
TRIES = 3  # of a search during which the index is made anew
FILTERS = (
    "path glob min_seconds max_seconds min_duration max_duration after before min_resolution max_resolution where"
).split()


class UnavailableError(SearchError):
    """The index cannot be searched now, perhaps later."""


class NoSuchMomentError(SearchError):
    """The index does not have this moment, or no longer has it."""


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
        self._sample: tuple = (None,)
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
        raise UnavailableError(f"the index {self.name} is being made anew: search again")

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

    def search(self, query: schemas.SearchQuery | schemas.SearchBody) -> schemas.Results:
        """A page of results.

        Raises:
            SearchError: what is wrong with the request.
        """
        begin = time.perf_counter()
        hits, more = self._unchanged(lambda index: self._page(index, query))
        return schemas.Results(
            index=self.name,
            hits=hits,
            page=query.page,
            more=more and query.page + 1 < schemas.MAX_PAGES,
            milliseconds=round(1000 * (time.perf_counter() - begin)),
        )

    def _page(self, index: VideoIndex, query) -> tuple[list[schemas.Result], bool]:
        """The results of the page, and whether there are more."""
        hits, vector, correction = self._find(index, query)
        first = query.page * self.page_size
        shown = hits[first : first + self.page_size]
        vectors = index.store.vectors([hit.key for hit in shown])  # without those removed since they were found
        shown = [hit for hit in shown if hit.key in vectors]
        is_fused = query.words or query.then is not None
        totals = [float(vector @ vectors[hit.key]) for hit in shown] if is_fused else [hit.score for hit in hits]
        judge = self._judge(index, vector, query.experts, correction, max(totals, default=0.0))
        titles = distinct_titles([hit.path for hit in shown])
        results = [
            self._result(index, hit, title, vector, vectors[hit.key], query.experts, judge, is_fused)
            for hit, title in zip(shown, titles, strict=True)
        ]
        return results, len(hits) > first + self.page_size

    def _find(self, index: VideoIndex, query) -> tuple[list[Hit], np.ndarray, str]:
        """All results up to the end of the page and one more, the query's vector (K,), the correction."""
        if not query.texts and query.like is None:
            raise SearchError("give a `text`, or `like`: the key of a moment")
        k = (query.page + 1) * self.page_size + 1  # one more, to know whether there is a next page
        correction = query.correction or ("none" if query.like is not None else index.default_correction)
        if not query.texts:
            correction = "none"  # the bank holds texts
        options = {name: getattr(query, name) or None for name in FILTERS} | {
            "correction": correction,
            "group_by": query.group_by,
            "min_score": query.min_score,
            "experts": query.experts,
        }
        like = None if query.like is None else self._vector_like(index, query.like)
        with self._encode_lock:
            vector = query_vector(
                as_weighted(query.texts),
                as_negative(query.negative),
                like,
                index.encode_texts,
                lambda known: known[None],
            )
            if query.then is not None or query.words:
                if like is not None:
                    raise SearchError("`then` and `words` go with texts, not with `like`")
                order = {"then": query.then, "words": query.words}
                return index.search(query.texts, k, negative=query.negative, **order, **options), vector, correction
        hits = index.search_vectors(vector[None], k + (like is not None), **options)[0]
        return [hit for hit in hits if hit.key != query.like][:k], vector, correction

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

    def _result(self, index, hit: Hit, title: str, vector, video_vector, weights: dict, judge, is_fused: bool):
        parts = index.split_score(vector, video_vector)
        experts = {name: part * weights.get(name, 1.0) for name, part in parts.items()}
        total = sum(experts.values())
        relevance, match = judge(total if is_fused else hit.score)
        return schemas.Result(
            **span(hit).model_dump(),
            name=os.path.basename(hit.path),
            folder=os.path.dirname(hit.path),
            title=title,
            paths=list(hit.paths or (hit.path,)),
            relevance=relevance,
            match=match,
            experts=None if is_fused else experts,
            correction=None if is_fused else hit.score - total,
            moments=[span(each) for each in hit.moments],
        )

    # --- relevance ---------------------------------------------------------------------------------------------------

    def _judge(self, index: VideoIndex, vector: np.ndarray, weights: dict, correction: str, best: float):
        """A function: score -> (relevance from 0 to 1, the same in words).

        Measured against what windows of the index score on average, so that a weak first result does not look strong.
        """
        if weights:
            vector = vector * np.repeat(
                np.array([weights.get(name, 1.0) for name in index.description.experts], np.float32),
                index.description.dim,
            )
        vectors, bias = self._sampled(index)
        scores = vectors @ vector - (0 if correction == "none" else bias)
        mean, deviation = (float(scores.mean()), float(scores.std())) if len(scores) else (0.0, 0.0)

        def judge(score: float) -> tuple[float, str]:
            distance = (score - mean) / max(deviation, 1e-6)
            word = next((word for least, word in WORDS if distance >= least), WEAK)
            return min(1.0, max(0.0, (score - mean) / max(best - mean, 1e-6))), word

        return judge

    def _sampled(self, index: VideoIndex) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (s,K) and biases (s,) of windows spread evenly over the index; none of an index in Milvus only."""
        if not isinstance(index.store, LocalStore):
            return np.empty((0, index.description.width), np.float32), np.empty(0, np.float32)
        with index.store.state() as rows:
            known, *sample = self._sample
            if known is not rows:
                step = max(1, -(-sum(len(part.vectors) for part in rows.parts) // SAMPLE))
                vectors = [np.asarray(part.vectors[::step], np.float32) for part in rows.parts]
                biases = [part.bias[::step] for part in rows.parts]
                empty = np.empty((0, index.description.width), np.float32)
                sample = np.concatenate([empty, *vectors]), np.concatenate([empty[:, 0], *biases])
                self._sample = (rows, *sample)
            return tuple(sample)

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
        store = self.index.store
        if not isinstance(store, LocalStore):
            return schemas.Browse(recent=[], folders=[], examples=[])
        inside = "" if not folder else folder.rstrip(os.sep) + os.sep
        found = store.select(RECENT, inside, inside, RECENT_COUNT)
        titles = distinct_titles([path for path, *_ in found])
        recent = [place(title, *row) for title, row in zip(titles, found, strict=True)]
        examples = [text for (text,) in store.select(EXAMPLES, EXAMPLE_COUNT)]
        return schemas.Browse(recent=recent, folders=folder_tree(store.select(FILES)), examples=examples)

    # --- one moment --------------------------------------------------------------------------------------------------

    def picture(self, key: str) -> bytes:
        """A thumbnail as JPEG: made once, and kept in the folder of the index where that can be written.

        Raises:
            NoSuchMomentError: there is no such moment.
            VideoDecodingError: its file cannot be read.
        """
        hit = self.locate(key)
        store = self.index.store
        kept = store.folder / THUMBNAILS / f"{hit.key}.jpg" if isinstance(store, LocalStore) else None
        if kept is not None and kept.is_file():
            return kept.read_bytes()
        buffer = io.BytesIO()
        with THUMBNAIL_SLOTS:
            thumbnail(hit.path, hit.start, hit.end, THUMBNAIL_SIZE).save(buffer, format="JPEG", quality=85)
        if kept is not None:
            with contextlib.suppress(OSError):  # a folder that may only be read, or a full disk
                kept.parent.mkdir(exist_ok=True)
                partial = kept.with_suffix(f".{threading.get_ident()}.part")
                partial.write_bytes(buffer.getvalue())
                partial.replace(kept)
        return buffer.getvalue()

    def locate(self, key: str) -> Hit:
        """The file and time of a moment.

        Raises:
            NoSuchMomentError: the index does not have it, or no longer has it.
        """
        try:
            return self.index.store.locate(key)
        except KeyError:
            raise NoSuchMomentError("this moment is not in the index, or no longer: search again") from None


def span(hit: Hit) -> schemas.Span:
    """The times of a moment."""
    peak = hit.peak or (hit.start, hit.end)
    return schemas.Span(key=hit.key, start=hit.start, end=hit.end, peak=peak, score=hit.score)


def place(title: str, path: str, start: float, end: float, key: str, paths: tuple[str, ...] = ()) -> schemas.Place:
    """A moment of a file, for the page."""
    folder, name = os.path.split(path)
    paths = list(paths or (path,))
    return schemas.Place(key=key, name=name, folder=folder, title=title, start=start, end=end, paths=paths)


def folder_tree(files: list[tuple[str, str]]) -> list[schemas.Folder]:
    """(root, path in it) of all files -> folders below the roots with their counts, at most FOLDER_COUNT."""
    counts: Counter = Counter()
    for root, path in files:
        parts = os.path.dirname(path).split(os.sep) if os.path.dirname(path) else []
        for depth in range(len(parts) + 1):
            counts[(root, *parts[:depth])] += 1
    return [
        schemas.Folder(path=os.sep.join(parts), depth=len(parts) - 1, files=count)
        for parts, count in sorted(counts.items())[:FOLDER_COUNT]
    ]


def distinct_titles(paths: list[str]) -> list[str]:
    """File names; where several files have the same one, with as many folders as tell them apart."""
    parts = [path.split(os.sep) for path in paths]
    titles = []
    for own in parts:
        for count in range(1, len(own) + 1):
            if all(other == own or other[-count:] != own[-count:] for other in parts):
                break
        titles.append("/".join(own[-count:]))
    return titles
