# SPDX-License-Identifier: Apache-2.0
"""What `camoe serve` answers over HTTP, and what it refuses."""

import http.client
import json
import threading
import time

import pytest
import uvicorn

from camoe_search import serve
from camoe_search.cli import main
from camoe_search.index import VideoIndex
from modeling_camoe.frames import Clip


QUERY = "a red star spins"


class Server:
    """The application on a free port, and a client that sends requests exactly as given."""

    def __init__(self, index, **options):
        self.listener = serve.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(serve.make_app(index, **options), log_level="warning", lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.uvicorn.should_exit = True
        self.thread.join()

    def ask(self, method: str, target: str, body=None, headers=None):
        """Status, headers, content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, target, skip_host="Host" in (headers or {}))
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        for name, value in (
            (headers or {}) | ({"Content-Length": len(content)} if content is not None else {})
        ).items():
            connection.putheader(name, value)
        connection.endheaders(content)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def search(self, **asked):
        status, _, content = self.ask("POST", "/api/search", asked)
        return status, json.loads(content)


@pytest.fixture(scope="module")
def index(some_videos, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "index"
    return VideoIndex.build(
        [some_videos], folder, str(checkpoint), device="cpu", num_workers=0, window=1, stride=0.5, text_encoder=False
    )


@pytest.fixture(scope="module")
def server(index):
    with Server(index, page_size=3) as server:
        yield server


@pytest.fixture
def key(server) -> str:
    return server.search(text=QUERY)[1]["hits"][0]["key"]


def moment_of(index, key: str) -> dict:
    return next(row for row in index.table().to_pylist() if row["key"] == key)


def test_pages_split_the_results_of_one_search(server, index):
    expected = index.search(QUERY, k=8, correction="none")
    pages = [server.search(text=QUERY, correction="none", page=page)[1] for page in range(4)]
    hits = [hit for page in pages for hit in page["hits"]]
    assert [(f"{hit['folder']}/{hit['name']}", hit["start"], hit["end"]) for hit in hits] == [
        (hit.path, hit.start, hit.end) for hit in expected
    ]
    # The three overlapping windows of the longest clip are one result.
    assert [page["more"] for page in pages] == [True, False, False, False] and (len(hits), len(index)) == (6, 8)


@pytest.mark.parametrize("correction", ["none", "query_bank", "dynamic"])
def test_experts_and_correction_add_up_to_the_score(server, index, correction):
    weights = {"action": 2.0, "scene": 0.0}
    found = server.search(text=QUERY, correction=correction, experts=weights)[1]["hits"]
    expected = index.search(QUERY, k=3, correction=correction, experts=weights)
    for hit, wanted in zip(found, expected, strict=True):
        assert hit["score"] == pytest.approx(wanted.score)
        assert sum(hit["experts"].values()) + hit["correction"] == pytest.approx(hit["score"], abs=1e-6)
        assert hit["experts"]["scene"] == 0
        if correction == "query_bank":
            assert hit["correction"] == pytest.approx(-moment_of(index, wanted.key)["bias"], abs=1e-6)


def test_similar_moments_leave_out_the_query_moment(server, index, key):
    moment = moment_of(index, key)
    place = (moment["path"], moment["start"])
    is_window = moment["path"].endswith("clip_5.mp4")  # the other files are one moment each
    source = Clip(moment["path"], moment["start"], moment["end"]) if is_window else moment["path"]
    expected = [hit.score for hit in index.search_like(source, k=4) if (hit.path, hit.start) != place]
    found = server.search(like=key)[1]["hits"]
    assert [hit["score"] for hit in found] == pytest.approx(expected, abs=1e-5)
    assert len(found) == 3 and key not in [hit["key"] for hit in found]


def test_filters_narrow_the_search(server):
    assert {hit["name"] for hit in server.search(text=QUERY, path="CLIP_5")[1]["hits"]} == {"clip_5.mp4"}
    assert server.search(text=QUERY, min_seconds=5)[1]["hits"] == []


def test_the_file_of_a_moment_is_served_whole_and_in_ranges(server, index, key):
    path = moment_of(index, key)["path"]
    content = open(path, "rb").read()
    status, headers, whole = server.ask("GET", f"/media/{key}")
    assert (status, whole, headers["Content-Type"]) == (200, content, "video/mp4")
    status, headers, part = server.ask("GET", f"/media/{key}", headers={"Range": "bytes=100-199"})
    assert (status, part) == (206, content[100:200])
    assert headers["Content-Range"] == f"bytes 100-199/{len(content)}"
    status, headers, picture = server.ask("GET", f"/thumbnail/{key}")
    assert (status, headers["Content-Type"], picture[:2]) == (200, "image/jpeg", b"\xff\xd8")


@pytest.mark.parametrize(
    "target",
    [
        "/media/../../../../etc/passwd",
        "/media/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/media/%2Fetc%2Fpasswd",
        "/media//etc/passwd",
        "//etc/passwd",
        "/media/..%5c..%5cetc%5cpasswd",
        "/media/{content}.%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/media/{content}.-1",
        "/media/{content}.80",
        "/media/{content}.99999999999999999999999",
        "/media/{content}.0x1",
        "/media/{content}.1.5",
        "/media/{content}.%D9%A1",  # the digit 1 in Arabic
        "/media/{content}.%00",
        "/media/0123456789ab.0",  # another file's
        "/media/0",
        "/media/",
        "/thumbnail/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/thumbnail/{path}",
        "/media/{path}",
        "/{path}",
        "/page.html",
        "/web/page.js",
        "/../serve.py",
        "/..%2fserve.py",
        "/page.js/../../serve.py",
        "/index.json",
    ],
)
def test_nothing_but_moments_of_the_index_can_be_read(server, index, key, target):
    target = target.format(content=key.split(".")[0], path=moment_of(index, key)["path"])
    status, _, content = server.ask("GET", target)
    assert status == 404 and len(content) < 200 and b"root:" not in content


def test_requests_under_another_host_name_are_refused(server, key):
    for name, expected in (("evil.example", 400), ("localhost", 200)):
        status, _, content = server.ask("GET", f"/media/{key}", headers={"Host": f"{name}:{server.port}"})
        assert status == expected and (b"ftyp" in content) == (expected == 200)


def test_the_page_may_load_nothing_from_other_hosts(server):
    for target in ("/", "/page.css", "/page.js"):
        status, headers, content = server.ask("GET", target)
        assert status == 200 and headers["Content-Security-Policy"].startswith("default-src 'self'")
        text = content.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "http:" not in text and "https:" not in text and 'src="//' not in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": "  "}, "the query is empty"),
        ({}, "give a `text`"),
        ({"text": 3}, "give a `text`"),
        ({"text": QUERY, "correction": "dsl"}, "choose from none, query_bank, dynamic"),
        ({"text": QUERY, "experts": {"acton": 2}}, "did you mean action"),
        ({"text": QUERY, "experts": [2]}, "not of the form"),
        ({"text": QUERY, "page": -1}, "page -1"),
        ({"text": QUERY, "page": 10_000}, "narrow the search"),
        ({"text": QUERY, "page": "1"}, "give a number"),
        ({"like": "0123456789ab.0"}, "search again"),
        ({"like": ["x"]}, "search again"),
    ],
)
def test_invalid_searches_are_refused_with_the_reason(server, asked, message):
    status, answer = server.search(**asked)
    assert status == 400 and message in answer["error"]


def test_odd_requests_are_answered(server):
    for query in ("dog " * 10_000, "🐕🥏", "ein Hund fängt eine Scheibe", "<script>alert(1)</script>"):
        assert len(server.search(text=query)[1]["hits"]) == 3
    assert server.ask("POST", "/api/search", b"no JSON")[0] == 400
    assert server.ask("POST", "/api/search", b"[1]")[0] == 400
    assert server.ask("POST", "/api/search", b'{"text": "' + b"x" * serve.MAX_BODY + b'"}')[0] == 413


def test_the_next_search_opens_an_index_that_changed(videos, checkpoint, tmp_path):
    (videos / "clip_0.mp4").rename(videos / "clip_0.dat")  # not a video extension
    paths = [videos, videos / "clip_0.dat"]
    index = VideoIndex.build(
        paths, tmp_path / "index", str(checkpoint), device="cpu", num_workers=0, text_encoder=False
    )
    with Server(index, page_size=20) as server:
        before = server.search(text=QUERY)[1]["hits"]
        dat = next(hit["key"] for hit in before if hit["name"] == "clip_0.dat")
        status, headers, _ = server.ask("GET", f"/media/{dat}")
        assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "video/mp4", "nosniff")
        (videos / "clip_0.dat").unlink()
        status, _, content = server.ask("GET", f"/media/{dat}")
        assert status == 404 and "no longer exists" in json.loads(content)["error"]
        VideoIndex.load(tmp_path / "index", index.encoder).remove([videos / "clip_0.dat"])
        after = server.search(text=QUERY)[1]["hits"]
        assert len(before) == 6 and len(after) == 5
        for hit in before:
            assert server.ask("GET", f"/media/{hit['key']}")[0] == (404 if hit["key"] == dat else 200)


def test_a_key_stays_valid_when_the_file_moves(videos, checkpoint, tmp_path):
    index = VideoIndex.build(
        [videos], tmp_path / "index", str(checkpoint), device="cpu", num_workers=0, text_encoder=False
    )
    with Server(index, page_size=20) as server:
        best = server.search(text=QUERY)[1]["hits"][0]
        content = server.ask("GET", f"/media/{best['key']}")[2]
        (videos / "sub").mkdir()
        (videos / best["name"]).rename(videos / "sub" / "moved.mp4")
        VideoIndex.build([videos], tmp_path / "index", index.encoder, num_workers=0, text_encoder=False)
        assert server.ask("GET", f"/media/{best['key']}")[2] == content
        assert server.search(text=QUERY)[1]["hits"][0]["name"] == "moved.mp4"


def test_a_port_in_use_is_a_one_line_error(server, index, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--index", str(index.folder), "--port", str(server.port)])
    assert stop.value.code == 2 and "choose another --port" in capsys.readouterr().err
