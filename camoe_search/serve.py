# SPDX-License-Identifier: Apache-2.0
"""`camoe serve`: a web page that searches an index and plays what it finds.

A Starlette application and one page of plain HTML, rather than Gradio: its video component copies the whole file of
every result into a cache, or has whole folders opened for reading, and its file route takes paths. Here a player
fetches the part of a file that it shows, nothing leaves the machine, and a file's address is its moment's key:

    GET  /                     the page, with /page.css and /page.js
    GET  /api/about            what is searched, and with what
    POST /api/search           {"text" or "like": key, "page", "correction", "experts", "path", …} -> moments
    GET  /media/KEY            the file of a moment, in ranges
    GET  /thumbnail/KEY        a picture of a moment

A key is GENERATION.ROW; one that is not in the index is 404, and so is everything else: no path is ever taken from a
request. While the folder is indexed anew, the page goes on; the next search opens the new index.
"""

import contextlib
import functools
import io
import json
import mimetypes
import os
import socket
import threading
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from modeling_camoe.frames import VideoDecodingError

from .errors import SearchError
from .hits import Hit
from .index import CORRECTIONS, VideoIndex
from .show import thumbnail


WEB = Path(__file__).parent / "web"
PAGE_SIZE = 12
MAX_PAGES = 200  # a search is repeated for every page, for all results up to it
MAX_BODY = 1 << 20  # bytes of a request
DECODERS = threading.BoundedSemaphore(4)  # thumbnails made at a time
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# The page needs nothing from elsewhere, so a browser is told to load nothing from elsewhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Served:
    """An index that is looked at from several threads, and opened anew when its folder changed.

    Args:
        index: what is searched.
        page_size: moments a page.
    """

    def __init__(self, index: VideoIndex, page_size: int = PAGE_SIZE):
        self.index = index
        self.page_size = page_size
        self._encoding = threading.Lock()  # tokenizers are not for several threads
        self._opening = threading.Lock()

    def refresh(self) -> VideoIndex:
        """The index as it is now."""
        with self._opening:
            if self.index.is_outdated():
                self.index = VideoIndex(self.index.folder, self.index.encoder)
            return self.index

    def about(self) -> dict:
        """What the page shows before a search."""
        index = self.refresh()
        has_bank = index.description.tau is not None
        return {
            "moments": len(index),
            "model": os.path.basename(index.description.model.rstrip("/")),
            "experts": index.description.experts,
            "corrections": list(CORRECTIONS) if has_bank else ["none"],
            "correction": index.default_correction,
            "page_size": self.page_size,
        }

    def search(self, asked: dict) -> dict:
        """A page of moments.

        Raises:
            SearchError: naming what is wrong with the request.
        """
        begin = time.perf_counter()
        index = self.refresh()
        page = _number(asked, "page", 0, int)
        if not 0 <= page < MAX_PAGES:
            raise SearchError(f"page {page} is not from 0 to {MAX_PAGES - 1}: narrow the search instead")
        weights = asked.get("experts") or {}
        if not isinstance(weights, dict) or not all(isinstance(value, int | float) for value in weights.values()):
            raise SearchError("`experts` is not of the form {name: weight}")
        options = {
            "correction": asked.get("correction"),
            "experts": weights,
            "path": asked.get("path") or None,
            "min_seconds": _number(asked, "min_seconds", None, float),
            "max_seconds": _number(asked, "max_seconds", None, float),
        }
        k = (page + 1) * self.page_size + 1  # one more, to know whether there is a next page
        if asked.get("like") is not None:
            row = _row(index, asked["like"])
            vector, hits = index.similar_vector(row), index.search_similar(row, k, **options)
        else:
            if not isinstance(asked.get("text"), str):
                raise SearchError("give a `text`, or `like`: the key of a moment")
            with self._encoding:
                vector = index.encoder.texts([asked["text"]])[0]
            hits = index.search_vectors(vector[None], k, **options)[0]
        shown = hits[page * self.page_size : k - 1]
        return {
            "hits": [self._as_json(index, vector, weights, hit) for hit in shown],
            "page": page,
            "more": len(hits) == k and page + 1 < MAX_PAGES,
            "milliseconds": round(1000 * (time.perf_counter() - begin)),
        }

    def _as_json(self, index: VideoIndex, vector, weights: dict, hit: Hit) -> dict:
        shares = index.expert_scores(vector, hit.row)
        experts = {name: share * weights.get(name, 1.0) for name, share in shares.items()}
        return {
            "key": f"{_generation(index)}.{hit.row}",
            "name": os.path.basename(hit.path),
            "folder": os.path.dirname(hit.path),
            "start": hit.start,
            "end": hit.end,
            "score": hit.score,
            "experts": experts,
            "correction": hit.score - sum(experts.values()),
        }

    def moment(self, key: str) -> Hit:
        """Where a moment is from.

        Raises:
            SearchError: the index does not have it, or not any more.
        """
        return self.index.store.moment(_row(self.index, key))


def _generation(index: VideoIndex) -> str:
    """What tells the keys of an index from those of the next one; rows of Milvus keep theirs."""
    return index.description.generation.removeprefix("generation-") or "milvus"


def _row(index: VideoIndex, key: str) -> int | str:
    """The row of a key.

    Raises:
        SearchError: the index does not have it, or not any more.
    """
    generation, _, row = str(key).partition(".")
    if generation != _generation(index):
        raise SearchError("this moment is not in the index, or the index has changed: search again")
    try:
        return index.store.moment(int(row) if row.isdecimal() and row.isascii() and len(row) < 19 else row).row
    except KeyError:
        raise SearchError("this moment is not in the index") from None


def _number(asked: dict, name: str, default, kind):
    value = asked.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise SearchError(f"`{name}` is {value!r}: give a number")
    return kind(value)


@functools.lru_cache(maxsize=512)
def _picture(path: str, start: float, end: float) -> bytes:
    """A thumbnail as JPEG, some 10 KB."""
    buffer = io.BytesIO()
    with DECODERS:
        thumbnail(path, start, end).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def make_app(index: VideoIndex, page_size: int = PAGE_SIZE, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The application.

    Args:
        index: what is searched.
        page_size: moments a page.
        hosts: names by which a browser may call it ("*" for any); others are refused, so that a web site cannot make
            its own name point here and read along.
    """
    served = Served(index, page_size)

    async def search(request: Request) -> Response:
        try:
            if int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY:
                raise SearchError("the query is too long")
            asked = json.loads(await request.body())
            if not isinstance(asked, dict):
                raise ValueError
        except SearchError as error:
            return _refuse(413, error)
        except ValueError:
            return _refuse(400, "the request is not a JSON object")
        return JSONResponse(await run_in_threadpool(served.search, asked))

    def media(request: Request) -> Response:
        path = _moment(request).path
        if not os.path.isfile(path):
            return _refuse(404, f"{os.path.basename(path)} is not there any more")
        kind = mimetypes.guess_type(path)[0] or ""
        # Never as a page: a browser would run what is in it.
        return FileResponse(path, media_type=kind if kind.startswith("video/") else "video/mp4", headers=HEADERS)

    def picture(request: Request) -> Response:
        hit = _moment(request)
        try:
            content = _picture(hit.path, hit.start, hit.end)
        except VideoDecodingError as error:
            return _refuse(404, error)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def _moment(request: Request) -> Hit:
        try:
            return served.moment(request.path_params["key"])
        except SearchError as error:
            raise _Missing(error) from error

    def static(name: str, kind: str):
        content = (WEB / name).read_bytes()
        return lambda request: Response(content, media_type=kind, headers=HEADERS)

    routes = [
        Route("/", static("page.html", "text/html")),
        Route("/page.css", static("page.css", "text/css")),
        Route("/page.js", static("page.js", "text/javascript")),
        Route("/api/about", lambda request: JSONResponse(served.about())),
        Route("/api/search", search, methods=["POST"]),
        Route("/media/{key}", media),
        Route("/thumbnail/{key}", picture),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            _Missing: lambda request, error: _refuse(404, error),
            SearchError: lambda request, error: _refuse(400, error),
            404: lambda request, error: PlainTextResponse("not found", 404),
        },
    )


class _Missing(Exception):
    """A key that is not in the index."""


def _refuse(status: int, reason) -> JSONResponse:
    return JSONResponse({"error": str(reason)}, status)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes a free one.

    Raises:
        SearchError: the port is taken, or the host is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SearchError(f"cannot serve at {host} port {port}: {error.strerror}; choose another --port") from error


def serve(index: VideoIndex, bound: socket.socket, page_size: int = PAGE_SIZE):
    """Serve until Ctrl-C.

    Args:
        bound: from `listen`. page_size: moments a page.
    """
    import uvicorn

    host = bound.getsockname()[0]
    app = make_app(index, page_size, LOOPBACK if host in LOOPBACK else ("*",))
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[bound])
