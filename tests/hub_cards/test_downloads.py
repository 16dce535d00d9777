# SPDX-License-Identifier: Apache-2.0
"""Downloading videos: the production code, with a TLS server on loopback in place of a public host.

Three things are replaced, none of them in the code that is tested: what a name resolves to, where a connection to the
public address ends up, and which certificate authority is trusted.
"""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from handler import EndpointHandler
from untrusted import RequestError, download


HOST, PUBLIC = "videos.example", "93.184.216.34"
LIMIT = 100_000  # bytes


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of HOST, self-signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key -out cert"
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def tls_server(certificate, clip):
    content = clip.read_bytes()

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            {"/clip.mp4?x=1": self.send_clip, "/endless": self.send_endless, "/drip": self.drip}.get(
                self.path, self.send_other
            )()

        def send_clip(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def send_endless(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(10):
                self.wfile.write(bytes(LIMIT // 5))

        def drip(self):
            """One byte of a header at a time: no single wait is long."""
            for _ in range(100):
                self.wfile.write(b"H")
                time.sleep(0.05)

        def send_other(self):
            moved = {"/moved": "https://127.0.0.1/", "/to_file": "file:///etc/passwd"}.get(self.path)
            self.send_response(302 if moved else 404 if self.path == "/nothing" else 200)
            if moved:
                self.send_header("Location", moved)
            self.send_header("Content-Length", "1000" if self.path == "/broken" else "0")
            self.end_headers()
            if self.path == "/broken":
                self.wfile.write(b"x" * 10)

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client disconnected
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def internet(tls_server, certificate, monkeypatch):
    """Names resolve to the next of `answers`, the last of which is repeated. Returns it and the connections made."""
    answers, connections = [[PUBLIC]], []
    connect, look_up, trust = socket.create_connection, socket.getaddrinfo, ssl.create_default_context

    def resolve(host, port, *arguments, **options):
        if not host.endswith(".example"):
            return look_up(host, port, *arguments, **options)
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def reach(address, *arguments, **options):
        connections.append(address)
        return connect(("127.0.0.1", tls_server) if address == (PUBLIC, 443) else address, *arguments, **options)

    monkeypatch.setattr("untrusted.socket.getaddrinfo", resolve)
    monkeypatch.setattr("untrusted.socket.create_connection", reach)
    monkeypatch.setattr("untrusted.ssl.create_default_context", lambda: trust(cafile=str(certificate / "cert")))
    return answers, connections


def get(path: str, budget: int = LIMIT) -> bytes:
    return download(f"https://{HOST}{path}", "videos[0]", budget)


def test_a_video_url_gives_the_vectors_of_its_bytes(internet, run_dir, clip):
    endpoint = EndpointHandler(str(run_dir), allow_urls=True)
    found = endpoint({"inputs": {"videos": [{"url": f"https://{HOST}/clip.mp4?x=1"}]}})["video_vectors"]
    with torch.inference_mode():
        inputs = endpoint.processor(videos=[clip.read_bytes()], return_tensors="pt")
        assert found == endpoint.model.get_video_features(**inputs).pooler_output.tolist()
    with pytest.raises(RequestError, match="not a video"):
        endpoint({"inputs": {"videos": [{"url": f"https://{HOST}/empty"}]}})


def test_the_connection_goes_to_the_address_that_was_checked(internet, clip):
    answers, connections = internet
    answers[:] = [[PUBLIC], ["127.0.0.1"]]  # another answer to a second lookup
    assert get("/clip.mp4?x=1") == clip.read_bytes()
    assert connections == [(PUBLIC, 443)]


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["10.1.2.3"], ["169.254.169.254"], ["::1"], []]
)
def test_a_name_with_any_private_address_is_refused_without_connecting(internet, found):
    answers, connections = internet
    answers[:] = [found]
    with pytest.raises(RequestError, match="not on the public internet"):
        get("/clip.mp4?x=1")
    assert connections == []


@pytest.mark.parametrize("path", ["/moved", "/to_file"])
def test_redirects_are_not_followed(internet, path):
    with pytest.raises(RequestError, match="answers 302; redirects are not followed"):
        get(path)
    assert internet[1] == [(PUBLIC, 443)]


def test_a_certificate_for_another_host_is_refused(internet):
    with pytest.raises(RequestError, match="cannot be read: SSLCertVerificationError"):
        download("https://other.example/clip.mp4", "videos[0]", LIMIT)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/endless", "64 MiB together"),
        ("/nothing", "answers 404"),
        ("/broken", "is truncated|cannot be read"),
        ("/a\r\nHost: evil", "must be an https|cannot be read"),
    ],
)
def test_errors_say_what_is_too_large_missing_or_truncated(internet, path, message):
    with pytest.raises(RequestError, match=message):
        get(path)


def test_a_slow_server_is_disconnected(internet, monkeypatch):
    monkeypatch.setattr("untrusted.URL_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(RequestError, match="takes more than 0.3 s"):
        get("/drip")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/v.mp4", "must be an https"),
        ("http://169.254.169.254/latest", "must be an https"),
        ("file:///etc/passwd", "must be an https"),
        ("/etc/passwd", "must be an https"),
        ("https://user@example.com/v.mp4", "must be an https"),
        ("https://example.com:8080/v.mp4", "must be an https"),
        ("https://example.com:port/v.mp4", "must be an https"),
        ("https://[::1/v.mp4", "must be an https"),
        ("https://127.0.0.1/v.mp4", "not on the public internet"),
        ("https://2130706433/v.mp4", "not on the public internet"),
        ("https://169.254.169.254/latest", "not on the public internet"),
        ("https://localhost/v.mp4", "not on the public internet"),
        ("https://[::1]/v.mp4", "not on the public internet"),
        ("https://[::ffff:127.0.0.1]/v.mp4", "not on the public internet"),
        ("https://10.0.0.7/v.mp4", "not on the public internet"),
        (7, "must be an https"),
    ],
)
def test_private_addresses_and_other_schemes_are_refused(url, message):
    with pytest.raises(RequestError, match=message):
        download(url, "videos[0]", LIMIT)
