# SPDX-License-Identifier: Apache-2.0
"""What stands before the routes of `camoe serve`: host names, the token, sizes of requests, headers, metrics."""

import hashlib
import hmac
import time

from fastapi import HTTPException
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser


MAX_BODY = 1 << 20  # bytes of a request
MAX_UPLOAD = 64 << 20  # bytes of a video or picture as a query
UPLOADS = "/api/uploads"
COOKIE = "camoe_session"
# Without a token: the page itself, which holds nothing of the index, and what says that the server is alive.
PUBLIC = ("/", "/page.css", "/page.js", "/healthz")

# The page loads nothing from other hosts, and browsers are told not to.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware around the routes.

    Args:
        app: the routes.
        hosts: host names that a request may use ("*" for any). Others are refused, so that a web site cannot point its
            own host name here and read the answers (DNS rebinding).
        token: that requests must bear; None for none.
        registry: of the metrics.
    """

    def __init__(self, app, hosts: tuple[str, ...], token: str | None, registry: CollectorRegistry):
        self.app = app
        self.hosts = hosts
        self.token = None if token is None else token.encode()
        labels = ["method", "route", "status"]
        self.requests = Counter("camoe_requests", "Requests that were answered.", labels, registry=registry)
        self.seconds = Histogram(
            "camoe_request_seconds", "From a request to the start of its answer.", ["route"], registry=registry
        )

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
                self.requests.labels(method, route, message["status"]).inc()
                self.seconds.labels(route).observe(time.perf_counter() - begin)
            await send(message)

        headers = Headers(scope=scope)
        limit = MAX_UPLOAD if scope["path"] == UPLOADS else MAX_BODY
        refusal = self._refusal(scope["path"], headers, limit)
        if refusal is not None:
            await refusal(scope, receive, send_guarded)
            return
        received = 0

        async def receive_limited():  # a body without a length comes in chunks
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, "the request is too long")
            return message

        await self.app(scope, receive_limited, send_guarded)

    def _refusal(self, path: str, headers: Headers, limit: int) -> JSONResponse | None:
        name = headers.get("host", "")
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if "*" not in self.hosts and name not in self.hosts:
            return problem(400, "this server does not answer to that host name")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length) > limit:
            return problem(413, "the request is too long")
        if path not in PUBLIC and not self.is_allowed(headers):
            refusal = problem(401, "this server needs its token: Authorization: Bearer TOKEN")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return refusal
        return None

    def is_allowed(self, headers: Headers) -> bool:
        """Whether a request bears the token, or the cookie that stands for it."""
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return hmac.compare_digest(given.strip().encode("latin-1"), self.token)
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        return hmac.compare_digest(cookie.encode(), session(self.token.decode()).encode())


def session(token: str) -> str:
    """The cookie of a browser that showed the token: players and pictures cannot send a header."""
    return hashlib.sha256(b"camoe session " + token.encode()).hexdigest()


class MediaFile(FileResponse):
    """A file of which ranges can be asked for; one that makes no sense is refused in the form of all refusals."""

    async def __call__(self, scope, receive, send):
        is_refused = False

        async def send_json(message):
            nonlocal is_refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                is_refused = True
                refusal = problem(message["status"], "the file has no such range of bytes")
                if "content-range" in (headers := Headers(raw=message["headers"])):
                    refusal.headers["Content-Range"] = headers["content-range"]
                await refusal(scope, receive, send)
            elif not is_refused:
                await send(message)

        await super().__call__(scope, receive, send_json)


def problem(status: int, reason) -> JSONResponse:
    """A refusal, always in the same form."""
    return JSONResponse({"error": " ".join(str(reason).split())}, status)
