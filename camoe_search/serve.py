# SPDX-License-Identifier: Apache-2.0
"""`camoe serve`: a web page that searches an index and plays what it finds.

A Starlette application and one page of plain HTML, rather than Gradio: Gradio's video component copies the whole file
of every result into a cache, or needs whole folders opened for reading, and its file route takes paths. Here a player
fetches only the part of a file that it plays, nothing leaves the machine, and the URL of a file is its moment's key:

    GET  /                     the page, with /page.css and /page.js
    GET  /api/about            the index, its model and its settings
    POST /api/search           {"text" or "like": key, "page", "correction", "experts", "path", …} -> moments
    GET  /media/KEY            the file of a moment, with range requests
    GET  /thumbnail/KEY        a picture of a moment

A key names what a file holds and a window in it (results.py): it stays valid when the file moves. A key that is not in
the index is a 404, and so is every other address: no path is ever taken from a request. The page keeps working while
the folder is indexed again; the next search is in what there is then.
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
from .index import CORRECTIONS, VideoIndex
from .results import Hit
from .show import thumbnail


WEB = Path(__file__).parent / "web"
PAGE_SIZE = 12
MAX_PAGES = 200  # every page repeats the search for all results up to it
MAX_BODY = 1 << 20  # bytes of a request
THUMBNAIL_SLOTS = threading.BoundedSemaphore(4)  # thumbnails decoded at the same time
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# The page loads nothing from other hosts, and browsers are told not to.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class SearchService:
    """An index searched from several threads.

    Args:
        index: what is searched.
        page_size: moments per page.
    """

    def __init__(self, index: VideoIndex, page_size: int = PAGE_SIZE):
        self.index = index
        self.page_size = page_size
        self._encode_lock = threading.Lock()  # tokenizers are not thread-safe

    def about(self) -> dict:
        """What the page shows before a search."""
        index = self.index
        moments = len(index)  # also looks whether the index has changed
        has_bank = index.description.tau is not None
        return {
            "moments": moments,
            "model": os.path.basename(index.description.model.rstrip("/")),
            "experts": index.description.experts,
            "corrections": list(CORRECTIONS) if has_bank else ["none"],
            "correction": index.default_correction,
            "page_size": self.page_size,
        }

    def search(self, query: dict) -> dict:
        """A page of moments.

        Raises:
            SearchError: what is wrong with the request.
        """
        begin = time.perf_counter()
        index = self.index
        page = _number(query, "page", 0, int)
        if not 0 <= page < MAX_PAGES:
            raise SearchError(f"page {page} is not from 0 to {MAX_PAGES - 1}: narrow the search instead")
        weights = query.get("experts") or {}
        if not isinstance(weights, dict) or not all(isinstance(value, int | float) for value in weights.values()):
            raise SearchError("`experts` is not of the form {name: weight}")
        options = {
            "correction": query.get("correction"),
            "experts": weights,
            "path": query.get("path") or None,
            "min_seconds": _number(query, "min_seconds", None, float),
            "max_seconds": _number(query, "max_seconds", None, float),
        }
        k = (page + 1) * self.page_size + 1  # one more, to know whether there is a next page
        if query.get("like") is not None:
            key = self.locate(query["like"]).key
            vector, hits = index.similar_vector(key), index.search_similar(key, k, **options)
        else:
            if not isinstance(query.get("text"), str):
                raise SearchError("give a `text`, or `like`: the key of a moment")
            with self._encode_lock:
                vector = index.encode_texts([query["text"]])[0]
            hits = index.search_vectors(vector[None], k, **options)[0]
        shown = hits[page * self.page_size : k - 1]
        vectors = index.store.vectors([hit.key for hit in shown])  # without those removed since they were found
        return {
            "hits": [
                self._as_json(index, vector, vectors[hit.key], weights, hit) for hit in shown if hit.key in vectors
            ],
            "page": page,
            "more": len(hits) == k and page + 1 < MAX_PAGES,
            "milliseconds": round(1000 * (time.perf_counter() - begin)),
        }

    def _as_json(self, index: VideoIndex, text_vector, video_vector, weights: dict, hit: Hit) -> dict:
        parts = index.split_score(text_vector, video_vector)
        experts = {name: part * weights.get(name, 1.0) for name, part in parts.items()}
        return {
            "key": hit.key,
            "name": os.path.basename(hit.path),
            "folder": os.path.dirname(hit.path),
            "start": hit.start,
            "end": hit.end,
            "score": hit.score,
            "experts": experts,
            "correction": hit.score - sum(experts.values()),
        }

    def locate(self, key: str) -> Hit:
        """The file and time of a moment.

        Raises:
            SearchError: the index does not have it, or no longer has it.
        """
        try:
            return self.index.store.locate(str(key))
        except KeyError:
            raise SearchError("this moment is not in the index, or no longer: search again") from None


def _number(query: dict, name: str, default, kind):
    value = query.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise SearchError(f"`{name}` is {value!r}: give a number")
    return kind(value)


@functools.lru_cache(maxsize=512)
def _thumbnail_jpeg(path: str, start: float, end: float) -> bytes:
    """A thumbnail as JPEG, about 10 KB."""
    buffer = io.BytesIO()
    with THUMBNAIL_SLOTS:
        thumbnail(path, start, end).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def make_app(index: VideoIndex, page_size: int = PAGE_SIZE, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The application.

    Args:
        index: what is searched.
        page_size: moments per page.
        hosts: host names that a request may use ("*" for any). Others are refused, so that a web site cannot point its
            own host name here and read the answers (DNS rebinding).
    """
    service = SearchService(index, page_size)

    async def search(request: Request) -> Response:
        try:
            if int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY:
                raise SearchError("the query is too long")
            query = json.loads(await request.body())
            if not isinstance(query, dict):
                raise ValueError
        except SearchError as error:
            return _error_response(413, error)
        except ValueError:
            return _error_response(400, "the request is not a JSON object")
        return JSONResponse(await run_in_threadpool(service.search, query))

    def media(request: Request) -> Response:
        path = find_moment(request).path
        if not os.path.isfile(path):
            return _error_response(404, f"{os.path.basename(path)} no longer exists")
        kind = mimetypes.guess_type(path)[0] or ""
        # Never as HTML: a browser would run the scripts in it.
        kind = kind if kind.startswith("video/") else "video/mp4"
        return FileResponse(path, media_type=kind, headers=SECURITY_HEADERS)

    def thumbnail_response(request: Request) -> Response:
        hit = find_moment(request)
        try:
            content = _thumbnail_jpeg(hit.path, hit.start, hit.end)
        except VideoDecodingError as error:
            return _error_response(404, error)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def find_moment(request: Request) -> Hit:
        try:
            return service.locate(request.path_params["key"])
        except SearchError as error:
            raise _NotFound(error) from error

    def static(name: str, kind: str):
        content = (WEB / name).read_bytes()
        return lambda request: Response(content, media_type=kind, headers=SECURITY_HEADERS)

    routes = [
        Route("/", static("page.html", "text/html")),
        Route("/page.css", static("page.css", "text/css")),
        Route("/page.js", static("page.js", "text/javascript")),
        Route("/api/about", lambda request: JSONResponse(service.about())),
        Route("/api/search", search, methods=["POST"]),
        Route("/media/{key}", media),
        Route("/thumbnail/{key}", thumbnail_response),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            _NotFound: lambda request, error: _error_response(404, error),
            SearchError: lambda request, error: _error_response(400, error),
            404: lambda request, error: PlainTextResponse("not found", 404),
        },
    )


class _NotFound(Exception):
    """A key that is not in the index."""


def _error_response(status: int, reason) -> JSONResponse:
    return JSONResponse({"error": str(reason)}, status)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes a free one.

    Raises:
        SearchError: the port is in use, or the host is not an address of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SearchError(f"cannot serve at {host} port {port}: {error.strerror}; choose another --port") from error


def serve(index: VideoIndex, listener: socket.socket, page_size: int = PAGE_SIZE):
    """Serve until Ctrl-C.

    Args:
        listener: from `listen`.
        page_size: moments per page.
    """
    import uvicorn

    host = listener.getsockname()[0]
    app = make_app(index, page_size, LOOPBACK if host in LOOPBACK else ("*",))
    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop it
        uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listener])
