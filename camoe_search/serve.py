# SPDX-License-Identifier: Apache-2.0
"""`camoe serve`: a web page that searches indexes and plays what it finds, and the same over HTTP for programs.

A FastAPI application and one page of plain HTML, rather than Gradio: Gradio's video component copies the whole file
of every result into a cache, or needs whole folders opened for reading, and its file route takes paths. Here a player
fetches only the part of a file that it plays, nothing leaves the machine, and the URL of a file is its moment's key:

    GET  /                     the page, with /page.css and /page.js
    GET  /api/about            an index, its model and its settings
    GET  /api/search?q=…       results, with the fields of schemas.SearchQuery
    POST /api/search           the same, with the fields of schemas.SearchBody as JSON
    GET  /api/browse           the newest files, folders, example queries
    POST /api/uploads          a video or picture -> a key for `like`
    GET  /api/moment/KEY       the file and time of a moment
    GET  /media/KEY            its file, with range requests
    GET  /clip/KEY             part of it as MP4, for browsers that cannot play the file
    GET  /thumbnail/KEY        a picture of it
    GET  /healthz, /metrics    is it alive; numbers for Prometheus
    GET  /openapi.json         all of this for programs
    POST /api/session          a browser that shows the token gets a cookie that stands for it

A key names what a file holds and a window in it (results.py): it stays valid when the file moves. A key that is not in
the index is a 404, and so is every other address: no path is ever taken from a request. Whatever is refused is JSON
with `error`. The server keeps working while a folder is indexed again, by another model too; the next search is in
what there is then.
"""

import asyncio
import contextlib
import ipaddress
import logging
import mimetypes
import os
import socket
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from modeling_camoe.frames import VideoDecodingError

from . import schemas
from .addresses import is_address
from .browse import place
from .clip import ClipCache
from .errors import SearchError
from .guard import COOKIE, UPLOADS, Guard, MediaFile, problem, session
from .index import VideoIndex
from .remote_media import remote_response
from .service import NoSuchMomentError, SearchService, UnavailableError


WEB = Path(__file__).parent / "web"
PAGE_SIZE = 12
MIN_TOKEN = 16  # characters
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Second = Annotated[float, Query(ge=0, allow_inf_nan=False, description="of the file")]
BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
UPLOAD_BODY = {"requestBody": {"required": True, "content": BYTES}}
REFUSED = {status: {"model": schemas.Problem} for status in (400, 401, 404, 413, 503)}


def make_app(
    indexes: dict[str, VideoIndex],
    page_size: int = PAGE_SIZE,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str | None = None,
) -> FastAPI:
    """The application.

    Args:
        indexes: what is searched, by name; requests that name none search the first.
        page_size: results per page.
        hosts: host names that a request may use ("*" for any), see `Guard`.
        token: that requests must bear.
    """
    services = {name: SearchService(name, index, page_size) for name, index in indexes.items()}
    first = next(iter(services))
    registry, clips = CollectorRegistry(), ClipCache()
    moments = Gauge("camoe_moments", "Moments that can be found.", ["index"], registry=registry)
    app = FastAPI(
        title="CAMoE search",
        description="Search videos by describing what happens in them.",
        version="1",
        docs_url=None,  # they would load scripts from another host
        redoc_url=None,
        responses=REFUSED,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(Guard, hosts=hosts, token=token, registry=registry)

    def service_of(name: str | None) -> SearchService:
        if name is not None and name not in services:
            raise SearchError(f"there is no index {name!r}: choose from {', '.join(services)}")
        return services[first if name is None else name]

    def find(look):
        """From the first index that has it: a key means the same in all of them."""
        for service in services.values():
            with contextlib.suppress(NoSuchMomentError):
                return look(service)
        raise NoSuchMomentError("this moment is not in the index, or no longer: search again")

    def static(name: str, kind: str):
        content = (WEB / name).read_bytes()
        app.add_api_route(
            "/" if name == "page.html" else f"/{name}",
            lambda: Response(content, media_type=kind),
            include_in_schema=False,
        )

    static("page.html", "text/html")
    static("page.css", "text/css")
    static("page.js", "text/javascript")

    @app.get("/api/about")
    def about(index: Annotated[str | None, Query(description="its name")] = None) -> schemas.About:
        """An index, its model and its settings."""
        return service_of(index).about(list(services))

    async def results(request: schemas.SearchQuery | schemas.SearchBody) -> Response:
        """No thread waits: hundreds of searches can be under way."""
        found = await asyncio.wrap_future(service_of(request.index).submit(request))
        return Response(found.model_dump_json(), media_type="application/json")

    @app.get("/api/search", response_model=schemas.Results)
    async def search(query: Annotated[schemas.SearchQuery, Query()]) -> Response:
        """Search with a text."""
        return await results(query)

    @app.post("/api/search", response_model=schemas.Results)
    async def search_more(body: schemas.SearchBody) -> Response:
        """Search with texts and their weights, or with a moment, and with weights of the experts."""
        return await results(body)

    @app.post("/api/session", status_code=204)
    def start_session(request: Request) -> Response:
        """For browsers: a request that bears the token gets a cookie that stands for it."""
        response = Response(status_code=204)
        if token is not None:
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, session(token), httponly=True, samesite="strict", secure=secure)
        return response

    @app.get("/api/browse")
    def browse(index: str | None = None, folder: str | None = None) -> schemas.Browse:
        """What there is to see before a search: the newest files, folders, example queries."""
        return service_of(index).browse(folder)

    @app.get("/api/moment/{key}")
    def moment(key: str, at: Second | None = None) -> schemas.Place:
        """The file and time of a moment; of one that has `at`, where the file has been cut in other places since."""
        hit = find(lambda service: service.locate(key, at))
        return place(os.path.basename(hit.path), hit.path, hit.start, hit.end, hit.key, hit.paths)

    @app.post(UPLOADS, openapi_extra=UPLOAD_BODY)
    async def upload(request: Request, index: str | None = None) -> schemas.Upload:
        """A video or picture to search with: its bytes. The server keeps no file."""
        content = await request.body()
        return await run_in_threadpool(service_of(index).upload, content)

    @app.get("/media/{key}", response_class=FileResponse)
    def media(request: Request, key: str, download: bool = False) -> Response:
        """The file of a moment; ranges can be asked for."""
        path = find(lambda service: service.locate(key)).path
        name = os.path.basename(path)
        if not is_address(path) and not os.path.isfile(path):
            raise HTTPException(404, f"{name} no longer exists")
        kind = mimetypes.guess_type(path)[0] or ""
        # Never as HTML: a browser would run the scripts in it.
        kind = kind if kind.startswith("video/") else "video/mp4"
        if is_address(path):
            return remote_response(path, request.headers.get("range"), kind, download)
        return MediaFile(path, media_type=kind, filename=name if download else None)

    @app.get("/clip/{key}", response_class=FileResponse)
    def clip(key: str, start: Second, end: Second, encode: bool = False) -> Response:
        """Part of the file of a moment as MP4 that every browser plays; at most two minutes.

        H.264 is copied, unless `encode` is true: for a browser that cannot play the copy either.
        """
        if end <= start:
            raise SearchError("the clip ends before it starts")
        hit = find(lambda service: service.locate(key))
        return MediaFile(clips.clip(hit.key, hit.path, start, end, encode), media_type="video/mp4")

    @app.get("/thumbnail/{key}", response_class=Response)
    def thumbnail(key: str) -> Response:
        """A picture of a moment, as JPEG."""
        content = find(lambda service: service.picture(key))
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    @app.get("/healthz")
    def healthz() -> schemas.Health:
        """The server is alive; needs no token."""
        return schemas.Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Numbers for Prometheus."""
        for name, service in services.items():
            with contextlib.suppress(SearchError):  # an index that is not there now keeps its last number
                moments.labels(name).set(len(service))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    handlers = {
        RequestValidationError: lambda request, error: problem(400, _first_problem(error)),
        StarletteHTTPException: lambda request, error: problem(error.status_code, error.detail),
        UnavailableError: lambda request, error: problem(503, error),
        NoSuchMomentError: lambda request, error: problem(400 if request.method == "POST" else 404, error),
        SearchError: lambda request, error: problem(400, error),
        VideoDecodingError: lambda request, error: problem(404, error),
        Exception: lambda request, error: problem(500, "a mistake of the server: its log says more"),
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    return app


def _first_problem(error: RequestValidationError) -> str:
    """Which field and what, without what was sent: that may be long, or no valid text."""
    first = error.errors()[0]
    name = first["loc"][1] if len(first["loc"]) > 1 else ""
    is_name = isinstance(name, str) and name.isascii() and name.isprintable() and 0 < len(name) <= 100
    return f"{f'`{name}`' if is_name else 'the request'}: {first['msg']}"


def read_token(path: str | os.PathLike) -> str:
    """The token in a file.

    Raises:
        SearchError: the file cannot be read, or its token can be guessed.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"cannot read the token in {path}: {error}") from error
    if len(token) < MIN_TOKEN or len(token.split()) != 1:
        raise SearchError(
            f"{path} should hold one word of {MIN_TOKEN} characters or more: make one with `openssl rand -hex 32`"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback


def listen(host: str, port: int, token: str | None = None) -> socket.socket:
    """A socket to serve on; port 0 takes a free one.

    Raises:
        SearchError: the port is in use, the host is not an address of this machine, or others could reach it without
            a token.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if token is None and not is_loopback(address[0]):
            raise SearchError(
                f"others could reach {host}, so that requests must bear a token: give one with --token-file FILE"
            )
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise SearchError(f"cannot serve at {host} port {port}: {error.strerror}; choose another --port") from error


def serve(
    indexes: dict[str, VideoIndex],
    listener: socket.socket,
    page_size: int = PAGE_SIZE,
    token: str | None = None,
    access_log: bool = False,
):
    """Serve until Ctrl-C.

    Args:
        indexes: by name.
        listener: from `listen`.
        page_size: results per page.
        token: that requests must bear.
        access_log: a line on stdout for every request.
    """
    import uvicorn

    host = listener.getsockname()[0]
    app = make_app(indexes, page_size, (*LOOPBACK, host) if is_loopback(host) else ("*",), token)
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", access_log=access_log, server_header=False, proxy_headers=False
    )
    if access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop it
        uvicorn.Server(config).run(sockets=[listener])
