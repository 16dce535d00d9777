# SPDX-License-Identifier: Apache-2.0
"""What `camoe serve` answers over HTTP, and what it refuses."""

import contextlib
import http.client
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from camoe_search import browse, clip, guard, schemas, serve
from camoe_search.cli import main
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.service import SearchService
from modeling_camoe import CAMoEConfig, CAMoEModel
from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames
from tests.camoe_search.random_index import random_index
from tests.video_files import KINDS, indices_of, write_audio, write_video


QUERY = "a red star spins"
JSON = {"Content-Type": "application/json"}


class Server:
    """The application on a free port, and a client that sends requests exactly as given."""

    def __init__(self, index, **options):
        self.listener = serve.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        indexes = index if isinstance(index, dict) else {"index": index}
        config = uvicorn.Config(serve.make_app(indexes, **options), log_level="warning", lifespan="off")
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
            ({"Content-Length": len(content)} if content is not None else {}) | (headers or {})
        ).items():
            connection.putheader(name, value)
        connection.endheaders(content)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def search(self, **asked):
        status, _, content = self.ask("POST", "/api/search", asked, JSON)
        return status, json.loads(content)


@pytest.fixture(scope="module")
def index(some_videos, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "index"
    return VideoIndex.create_or_update(
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
        ({"text": 3}, "`text`: Input should be a valid string"),
        ({"text": QUERY, "correction": "dsl"}, "`correction`: Input should be 'none', 'query_bank' or 'dynamic'"),
        ({"text": QUERY, "experts": {"acton": 2}}, "did you mean action"),
        ({"text": QUERY, "experts": [2]}, "`experts`: Input should be a valid dictionary"),
        ({"text": QUERY, "page": -1}, "`page`: Input should be greater than or equal to 0"),
        ({"text": QUERY, "page": 10_000}, "`page`: Input should be less than 200"),
        ({"text": QUERY, "page": "1"}, "`page`: Input should be a valid integer"),
        ({"like": "0123456789ab.0"}, "search again"),
        ({"like": ["x"]}, "`like`: Input should be a valid string"),
        ({"text": QUERY, "index": "other"}, "choose from index"),
        ({"text": QUERY, "after": "yesterday"}, "is not a date"),
        ({"like": "0123456789ab.0", "then": QUERY}, "search again"),
    ],
)
def test_invalid_searches_are_refused_with_the_reason(server, asked, message):
    status, answer = server.search(**asked)
    assert status == 400 and message in answer["error"]


def test_odd_requests_are_answered(server):
    for query in ("dog " * 10_000, "🐕🥏", "ein Hund fängt eine Scheibe", "<script>alert(1)</script>"):
        assert len(server.search(text=query)[1]["hits"]) == 3
    body = b'{"text": "' + b"x" * guard.MAX_BODY + b'"}'
    assert server.ask("POST", "/api/search", body, JSON)[0] == 413
    assert server.ask("POST", "/api/search", None, JSON | {"Content-Length": str(1 << 40)})[0] == 413


MALFORMED = [
    b"",
    b"no JSON",
    b"[1]",
    b"null",
    b"3",
    b'"text"',
    b"{",
    b'{"text": "a"',
    b'{"text": "a"} {}',
    b"\xff\xfe\x00",
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": "a", "path": "\\udfff"}',
    b'{"\\ud800": 1}',
    b'{"text": "a", "page": Infinity}',
    b'{"text": "a", "page": 1e999}',
    b'{"text": "a", "page": NaN}',
    b'{"text": "a", "page": 1.5}',
    b'{"text": "a", "page": true}',
    b'{"text": "a", "page": 99999999999999999999999999}',
    b'{"text": "a", "page": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "page": {}}',
    b'{"text": "a", "path": 5}',
    b'{"text": "a", "path": ["x"]}',
    b'{"text": "a", "min_seconds": "3"}',
    b'{"text": "a", "min_seconds": -Infinity}',
    b'{"text": "a", "max_seconds": -1}',
    b'{"text": "a", "min_score": NaN}',
    b'{"text": "a", "experts": {"action": Infinity}}',
    b'{"text": "a", "experts": {"action": 1e308}}',
    b'{"text": [{"text": "a", "weight": 1e308}, {"text": "b", "weight": 1e308}]}',
    b'{"text": "a", "experts": {"action": "2"}}',
    b'{"text": "a", "experts": {"action": null}}',
    b'{"text": "a", "where": ["year"]}',
    b'{"text": "a", "where": "year=1"}',
    b'{"text": "a", "where": [["year"]]}',
    b'{"text": "a", "glob": {"a": 1}}',
    b'{"text": "a", "tetx": "b"}',
    b'{"text": [], "page": 0}',
    b'{"text": [{"text": "a", "weight": -1}]}',
    b'{"text": [{"text": "a", "weight": NaN}]}',
    b'{"text": [{"txt": "a"}]}',
    b'{"text": {"text": "a"}}',
    b'{"text": "a", "not": "b"}',
    b'{"text": "a", "words": "yes"}',
    b'{"text": "a", "group_by": "folder"}',
    b'{"text": "a", "correction": 1}',
    b'{"text": "a", "after": 5}',
    b'{"like": 5}',
    b'{"like": "../../etc/passwd"}',
    b'{"text": "a", "like": "\\u0000.0"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_requests_are_refused_as_json(server, number):
    status, headers, content = server.ask("POST", "/api/search", MALFORMED[number], JSON)
    assert (status, headers["Content-Type"]) == (400, "application/json"), content
    assert list(json.loads(content)) == ["error"] and len(content) < 1000
    assert server.search(text=QUERY)[0] == 200


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/api/search", 400),
        ("GET", "/api/search?q=a&page=x", 400),
        ("GET", "/api/search?q=a&page=inf", 400),
        ("GET", "/api/search?q=a&min_score=nan", 400),
        ("GET", "/api/search?q=a&colour=red", 400),
        ("GET", "/api/search?q=a&index=other", 400),
        ("GET", "/api/about?index=other", 400),
        ("GET", "/nothing", 404),
        ("DELETE", "/api/search", 405),
        ("POST", "/media/a.0", 405),
    ],
)
def test_every_refusal_is_json(server, method, target, status):
    found, headers, content = server.ask(method, target)
    assert (found, headers["Content-Type"], list(json.loads(content))) == (status, "application/json", ["error"])


@pytest.mark.parametrize(("range", "status"), [("bytes=abc", 400), ("pounds=0-5", 400), ("bytes=99999999-", 416)])
def test_a_range_that_makes_no_sense_is_refused_as_json(server, key, range, status):
    found, headers, content = server.ask("GET", f"/media/{key}", headers={"Range": range})
    assert (found, headers["Content-Type"], list(json.loads(content))) == (status, "application/json", ["error"])
    assert int(headers["Content-Length"]) == len(content)
    assert (headers["Content-Range"] is not None) == (status == 416)  # says how long the file is
    assert server.ask("HEAD", f"/media/{key}", headers={"Range": range})[::2] == (405, b"")


def test_a_search_is_an_address_too(server, index):
    status, _, content = server.ask("GET", "/api/search?q=a+red+star+spins&correction=none&path=clip&page=1")
    expected = server.search(text=QUERY, correction="none", path="clip", page=1)[1]
    found = json.loads(content)
    assert status == 200 and [hit["key"] for hit in found["hits"]] == [hit["key"] for hit in expected["hits"]] != []


def test_texts_have_weights_and_can_be_unwanted(server, index):
    texts = [("a red star", 1.0), ("on a beach", 0.5)]
    asked = {"text": [{"text": text, "weight": weight} for text, weight in texts], "not": ["people"]}
    expected = index.search(texts, k=3, negative=["people"])
    found = server.search(**asked)[1]["hits"]
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_a_fused_search_gives_no_parts_of_its_score(server, index):
    found = server.search(text="clip", words=True)[1]["hits"]
    expected = index.search("clip", k=3, words=True)
    assert [(hit["key"], hit["experts"]) for hit in found] == [(hit.key, None) for hit in expected]


def test_files_of_the_same_name_have_different_titles():
    paths = ["/v/rome/day.mp4", "/v/oslo/day.mp4", "/w/oslo/day.mp4", "/v/night.mp4", "/v/night.mp4"]
    titles = ["rome/day.mp4", "v/oslo/day.mp4", "w/oslo/day.mp4", "night.mp4", "night.mp4"]
    assert browse.distinct_titles(paths) == titles


def test_relevance_says_how_far_a_result_is_above_the_average(server):
    hits = [hit for page in range(2) for hit in server.search(text=QUERY, page=page)[1]["hits"]]
    relevances = [hit["relevance"] for hit in hits]
    assert relevances[0] == 1 and relevances == sorted(relevances, reverse=True) and relevances[-1] == 0
    assert hits[-1]["match"] == "Weak match" != hits[0]["match"]


def test_a_thumbnail_shows_all_of_the_frame_and_is_kept_beside_the_index(server, index, key):
    content = server.ask("GET", f"/thumbnail/{key}")[2]
    assert Image.open(io.BytesIO(content)).size == (64, 48)  # as the clips
    kept = index.folder / "thumbnails" / f"{key}.jpg"
    kept.unlink()
    assert Image.open(io.BytesIO(server.ask("GET", f"/thumbnail/{key}")[2])).size == (64, 48)
    content = server.ask("GET", f"/thumbnail/{key}")[2]
    assert kept.read_bytes() == content
    kept.write_bytes(b"kept")
    assert server.ask("GET", f"/thumbnail/{key}")[2] == b"kept"
    kept.unlink()


def test_a_picture_and_a_clip_are_queries(server, index, some_videos):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(buffer, "PNG")
    for content in (buffer.getvalue(), (some_videos / "clip_3.mp4").read_bytes()):
        status, _, answer = server.ask("POST", "/api/uploads", content)
        uploaded = json.loads(answer)["key"]
        found = server.search(like=uploaded)[1]["hits"]
        expected = index.search_like(content, k=3)
        assert status == 200 and [hit["key"] for hit in found] == [hit.key for hit in expected]
    status, _, answer = server.ask("POST", "/api/uploads", b"neither")
    assert status == 400 and "neither a video nor a picture" in json.loads(answer)["error"]
    assert "send it again" in server.search(like="upload-0")[1]["error"]


def test_browsing_gives_the_newest_files_and_the_folders(server, some_videos, index):
    found = json.loads(server.ask("GET", "/api/browse")[2])
    by_time = sorted(some_videos.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
    assert [place["name"] for place in found["recent"]] == [path.name for path in by_time]
    assert found["folders"] == [{"path": str(some_videos), "depth": 0, "files": 6}] and found["examples"]
    key = found["recent"][0]["key"]
    assert json.loads(server.ask("GET", f"/api/moment/{key}")[2])["name"] == by_time[0].name
    assert json.loads(server.ask("GET", "/api/browse?folder=/else")[2])["recent"] == []


def test_folders_are_a_tree():
    files = [("/v", "a.mp4"), ("/v", "x/y/b.mp4"), ("/v", "x/c.mp4"), ("/w", "d.mp4")]
    tree = [(folder.path, folder.depth, folder.files) for folder in browse.folder_tree(files)]
    assert tree == [("/v", 0, 3), ("/v/x", 1, 2), ("/v/x/y", 2, 1), ("/w", 0, 1)]


def test_a_part_of_a_file_is_converted_for_browsers(server, key):
    status, headers, content = server.ask("GET", f"/clip/{key}?start=0.25&end=0.75")
    with av.open(io.BytesIO(content)) as video:
        frames = list(video.decode(video=0))
        assert video.streams.video[0].codec_context.name == "h264"
    assert (status, headers["Content-Type"]) == (200, "video/mp4") and 0 < len(frames) < 12
    for times in ("start=1&end=1", "start=-1&end=2", "start=nan&end=2", "start=0", "start=0&end=inf"):
        assert server.ask("GET", f"/clip/{key}?{times}")[0] == 400
    assert server.ask("GET", f"/clip/{key}?start=1000&end=1001")[0] == 404
    assert server.ask("GET", "/clip/unknown.0?start=0&end=1")[0] == 404


@pytest.mark.parametrize(
    "kind", ["avi", "mpeg4.avi", "hevc.mp4", "late.ts", "webm", "mkv", "mp4", "one_key_frame.mp4"]
)
def test_the_frames_of_a_converted_clip_are_those_asked_for(tmp_path, kind):
    """AVI has no times of reordered frames: a player shows them one frame late."""
    late = int(kind.endswith("avi"))
    path = write_video(tmp_path / (kind if "." in kind else f"film.{kind}"), **KINDS[kind])
    clip.write_clip(str(path), 0.5, 1.5, tmp_path / "clip.mp4")
    frames = sample_frames(Clip(tmp_path / "clip.mp4", 0, 1), 12, size=32).frames
    assert indices_of(frames) == list(range(6 - late, 18 - late))


@pytest.mark.parametrize(
    ("kind", "start"), [("mkv", 1.25), ("mkv", 0.0), ("mp4", 0.0), ("mp4", 1.25), ("long.mkv", 45.0)]
)
def test_pictures_that_browsers_play_are_copied_and_not_encoded_again(tmp_path, kind, start):
    """From the key frame before the clip on; a player skips what comes before the start."""
    options = {"num_frames": 200, "fps": 4, "audio": 50.0} if kind == "long.mkv" else KINDS[kind] | {"audio": 2.0}
    rate = options.get("fps", 12)
    path = write_video(tmp_path / f"film.{kind}", **options)
    for encode in (False, True):
        clip.write_clip(str(path), start, start + 0.5, tmp_path / "clip.mp4", encode)
        with av.open(str(tmp_path / "clip.mp4")) as written, av.open(str(path)) as film:
            stored = {bytes(packet) for packet in film.demux(video=0) if packet.size}
            copied = [bytes(packet) in stored for packet in written.demux(video=0) if packet.size]
            assert written.streams.audio[0].codec_context.name == "aac"
        assert not any(copied) if encode else all(copied) and len(copied) >= rate / 2
        frames = sample_frames(Clip(tmp_path / "clip.mp4", 0, 0.5), rate // 2, size=32).frames
        assert indices_of(frames) == list(range(round(rate * start), round(rate * (start + 0.5))))


def test_a_clip_is_of_the_film_and_not_of_its_cover_and_odd_tags_do_no_harm(tmp_path):
    song = write_audio(tmp_path / "song.m4a", seconds=2.0, cover=True)
    with pytest.raises(VideoDecodingError, match="song.m4a: has no video stream"):
        clip.write_clip(str(song), 0.0, 1.0, tmp_path / "clip.mp4")
    film = write_video(tmp_path / "12:30.mkv", title="TITLE-TITLE")
    film.write_bytes(film.read_bytes().replace(b"TITLE-TITLE", b"\xe9t\xe9 \xff\xfe 1998"))
    clip.write_clip(str(film), 0.5, 1.5, tmp_path / "clip.mp4")
    assert indices_of(sample_frames(Clip(tmp_path / "clip.mp4", 0, 1), 2, size=32).frames) == [9, 15]


def test_the_openapi_document_is_valid(server):
    validator = pytest.importorskip("openapi_spec_validator")
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    validator.validate(document)
    assert set(document["paths"]["/api/search"]) == {"get", "post"}
    body = document["components"]["schemas"]["SearchBody"]
    assert body["additionalProperties"] is False and "not" in body["properties"]


def test_health_and_metrics(server):
    assert server.ask("GET", "/healthz")[::2] == (200, b'{"status":"ok"}')
    server.ask("GET", "/media/unknown.0")
    status, headers, content = server.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(content.decode())}
    assert [(sample.labels, sample.value) for sample in families["camoe_moments"].samples] == [({"index": "index"}, 8)]
    labels = [sample.labels for sample in families["camoe_requests"].samples]
    assert {"method": "GET", "route": "/media/{key}", "status": "404"} in labels


def test_searches_that_wait_are_answered_together_and_as_if_alone(index):
    """Of all kinds, mistakes among them; the texts of those that waited are one batch of the model."""
    kinds = [{}, {"correction": "none"}, {"path": "clip_3"}, {"page": 1}, {"then": "a cat"}, {"words": True}]
    kinds += [{"not": ["people"]}, {"experts": {"action": 2.0}}, {"group_by": "file"}, {"where": ["year>2000"]}]
    requests = [schemas.SearchBody(text=f"a star {n}", **kinds[n % len(kinds)]) for n in range(40)]
    requests += [schemas.SearchBody(text=" "), schemas.SearchBody(text="a", index="index", like="unknown.0")]
    service, sizes = SearchService("index", index, page_size=3), []
    alone = [outcome(service.submit(request)) for request in requests]
    encode, begun, go_on = index.encoder.encode_texts, threading.Event(), threading.Event()

    def counting(texts):
        sizes.append(len(texts))
        begun.set()
        assert go_on.wait(30)
        return encode(texts)

    with mock.patch.object(index.encoder, "encode_texts", counting):
        first = service.submit(requests[0])
        begun.wait(30)
        futures = [service.submit(request) for request in requests]
        go_on.set()
        together = [outcome(future) for future in futures]
        first.result()
    assert sizes == [1, 40 + 1 + 1]  # 40 texts, and what comes then and is not wanted, each once
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, str):
            assert one == other
            continue
        assert [hit.key for hit in one.hits] == [hit.key for hit in other.hits] and one.more == other.more
        for name in ("score", "relevance", "correction", "experts"):
            for mine, its in zip(one.hits, other.hits, strict=True):
                assert getattr(mine, name) == pytest.approx(getattr(its, name), abs=1e-5)
    assert len({str(each) for each in alone if isinstance(each, str)}) == 3


def outcome(future):
    """The results, or the message of the refusal."""
    try:
        return future.result(30)
    except SearchError as error:
        return str(error)


def test_two_hundred_searches_at_once_are_answered(server):
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda page: server.search(text=QUERY, page=page % 2), range(200)))
    assert {(status, len(answer["hits"])) for status, answer in answers} == {(200, 3)}


def test_several_indexes_are_chosen_by_name(index, tmp_path):
    with Server({"films": index, "random": with_encoder(random_index(tmp_path / "random"), 24)}) as server:
        about = json.loads(server.ask("GET", "/api/about?index=random")[2])
        assert (about["index"], about["indexes"], about["moments"]) == ("random", ["films", "random"], 40)
        names = {name: server.search(text=QUERY, index=name)[1]["hits"] for name in ("films", "random")}
        assert names["films"][0]["name"].startswith("clip_") and not names["random"][0]["name"].startswith("clip_")
        assert server.search(text=QUERY)[1]["index"] == "films"
        assert server.ask("GET", f"/media/{names['films'][0]['key']}")[0] == 200


def with_encoder(index: VideoIndex, width: int, weights: str = "no weights") -> VideoIndex:
    """A model that turns any text into the same vector."""
    encode = lambda texts: np.ones((len(texts), width), np.float32)  # noqa: E731
    index._encoder = SimpleNamespace(encode_texts=encode, weights=weights)
    return index


TOKEN = "0123456789abcdef"


def test_a_token_is_asked_of_all_but_the_page_and_its_health(index):
    with Server(index, token=TOKEN) as server:
        for target in ("/api/about", "/api/search?q=a", "/media/a.0", "/thumbnail/a.0", "/metrics", "/openapi.json"):
            for headers in ({}, {"Authorization": f"Bearer {TOKEN}0"}, {"Authorization": TOKEN}, {"Cookie": "a=b"}):
                status, answer, content = server.ask("GET", target, headers=headers)
                assert (status, answer["WWW-Authenticate"]) == (401, "Bearer") and list(json.loads(content)) == [
                    "error"
                ]
            assert server.ask("GET", target, headers={"Authorization": f"Bearer {TOKEN}"})[0] in (200, 404)
        assert [server.ask("GET", target)[0] for target in ("/", "/page.js", "/page.css", "/healthz")] == [200] * 4
        assert server.ask("POST", "/api/session")[0] == 401
        status, headers, _ = server.ask("POST", "/api/session", headers={"Authorization": f"Bearer {TOKEN}"})
        cookie = headers["Set-Cookie"]
        assert status == 204 and "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        assert server.ask("GET", "/api/about", headers={"Cookie": cookie.partition(";")[0]})[0] == 200


def test_without_a_token_only_this_machine_is_served(index, tmp_path, capsys):
    token = tmp_path / "token"
    for text, options in (("short", ["--token-file", str(token)]), ("", [])):
        token.write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["serve", "--index", str(index.folder), "--host", "0.0.0.0", "--port", "0", *options])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert "openssl rand" in message if text else "--token-file" in message
    token.write_text(TOKEN + "\n")
    assert serve.read_token(token) == TOKEN
    with contextlib.closing(serve.listen("0.0.0.0", 0, TOKEN)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_new_model_under_a_running_server_is_picked_up(videos, checkpoint, tmp_path):
    """Also one with vectors of another length; searches go on meanwhile and see the old index or the new one."""
    folder = tmp_path / "index"
    options = {"num_workers": 0, "text_encoder": False}
    VideoIndex.create_or_update([videos], folder, str(checkpoint), device="cpu", **options)
    other = changed_checkpoint(checkpoint, tmp_path / "other", projection_dim=8)
    with Server(VideoIndex.load(folder, device="cpu")) as server:
        assert json.loads(server.ask("GET", "/api/about")[2])["model"] == checkpoint.name
        answers, stop = [], threading.Event()

        def go_on():
            while not stop.is_set():
                answers.append(server.search(text=QUERY, correction="none"))

        thread = threading.Thread(target=go_on)
        thread.start()
        VideoIndex.create_or_update([videos], folder, str(other), device="cpu", rebuild=True, **options)
        stop.set()
        thread.join()
        assert {status for status, _ in answers} == {200}, answers
        expected = VideoIndex.load(folder, device="cpu").search(QUERY, k=12)
        found = server.search(text=QUERY)[1]["hits"]
        assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
        assert json.loads(server.ask("GET", "/api/about")[2])["model"] == "other"
        shutil.rmtree(folder)
        assert server.search(text=QUERY)[0] == 503 and server.ask("GET", "/healthz")[0] == 200
        VideoIndex.create_or_update([videos], folder, str(checkpoint), device="cpu", **options)
        assert len(server.search(text=QUERY)[1]["hits"]) == 6


def changed_checkpoint(checkpoint, folder, **changes):
    """A model of another width, with new weights."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["clip_config"] |= changes
    torch.manual_seed(1)
    CAMoEModel(CAMoEConfig.from_dict(config)).save_pretrained(folder)
    return folder


def test_the_next_search_opens_an_index_that_changed(videos, checkpoint, tmp_path):
    (videos / "clip_0.mp4").rename(videos / "clip_0.dat")  # not a video extension
    paths = [videos, videos / "clip_0.dat"]
    index = VideoIndex.create_or_update(
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
    index = VideoIndex.create_or_update(
        [videos], tmp_path / "index", str(checkpoint), device="cpu", num_workers=0, text_encoder=False
    )
    with Server(index, page_size=20) as server:
        best = server.search(text=QUERY)[1]["hits"][0]
        content = server.ask("GET", f"/media/{best['key']}")[2]
        (videos / "sub").mkdir()
        (videos / best["name"]).rename(videos / "sub" / "moved.mp4")
        VideoIndex.create_or_update([videos], tmp_path / "index", index.encoder, num_workers=0, text_encoder=False)
        assert server.ask("GET", f"/media/{best['key']}")[2] == content
        assert server.search(text=QUERY)[1]["hits"][0]["name"] == "moved.mp4"


def test_a_link_to_a_moment_stays_valid_when_the_film_is_cut_anew(checkpoint, tmp_path):
    film, folder = write_video(tmp_path / "film.mp4", 96, 12), tmp_path / "index"
    options = {"device": "cpu", "num_workers": 0, "text_encoder": False}
    index = VideoIndex.create_or_update([film], folder, str(checkpoint), window=1, stride=1, **options)
    last = next(key for key in index.table()["key"].to_pylist() if key.endswith(".7"))
    second = last.replace(".7", ".1")
    with Server(index) as server:
        VideoIndex.create_or_update([film], folder, str(checkpoint), window=4, stride=4, rebuild=True, **options)

        def span(address: str):
            status, _, content = server.ask("GET", f"/api/moment/{address}")
            return (json.loads(content)["start"], json.loads(content)["end"]) if status == 200 else status

        assert span(last) == 404 and span(f"{last}?at=7.5") == (4, 8)  # there is no eighth moment any more
        assert span(second) == (4, 8) and span(f"{second}?at=1.5") == (0, 4)  # the second one is another
        assert span(f"{'0' * 32}.1?at=1.5") == 404 and span(f"{last}?at=-1") == 400


def test_a_port_in_use_is_a_one_line_error(server, index, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--index", str(index.folder), "--port", str(server.port)])
    assert stop.value.code == 2 and "choose another --port" in capsys.readouterr().err
