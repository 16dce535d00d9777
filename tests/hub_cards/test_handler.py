# SPDX-License-Identifier: Apache-2.0
"""The endpoint's handler behind a real HTTP server: what it answers, and what it refuses without failing."""

import base64
import io
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from handler import EndpointHandler
from huggingface_hub import InferenceClient
from PIL import Image
from untrusted import RequestError

from modeling_camoe import CAMoEModel, CAMoEProcessor
from tests.video_files import write_video


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(width: int, height: int, color=(200, 30, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that would decode to width * height pixels."""
    content = bytearray(png(8, 8))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def gif_that_claims(width: int, height: int) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("P", (8, 8), value) for value in (0, 1)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


@pytest.fixture(scope="module")
def endpoint(run_dir):
    return EndpointHandler(str(run_dir))


@pytest.fixture(scope="module")
def server(endpoint):
    """Reads bodies and answers as the inference toolkit does: JSON, images, sound; an exception is a 400."""

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind = self.headers["Content-Type"].split(";")[0].lower()
            try:
                status, answer = 200, endpoint(read_body(kind, body))
            except Exception as error:
                status, answer = 400, {"error": str(error), "type": type(error).__name__}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def read_body(kind: str, body: bytes) -> dict:
    """A body of a content type -> what the handler is called with. The toolkit knows no other types."""
    if kind == "application/json":
        data = json.loads(body)
        if "inputs" not in data:
            raise ValueError("Body needs to provide a inputs key")
        return data
    if kind.startswith("image/"):
        return {"inputs": Image.open(io.BytesIO(body)).convert("RGB")}
    if kind.startswith("audio/"):
        return {"inputs": bytearray(body)}
    raise ValueError(f'Content type "{kind}" not supported.')


def post(server: str, body, kind: str = "application/json") -> tuple[int, dict]:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(server, body, {"Content-Type": kind})) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4").read_bytes()


@pytest.fixture(scope="module")
def ten_hours(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", 2, times=[0.0, 36_000.0]).read_bytes()


def test_texts_and_videos_become_the_vectors_of_the_model(server, run_dir, video):
    model, processor = CAMoEModel.from_pretrained(run_dir).eval(), CAMoEProcessor.from_pretrained(run_dir)
    with torch.inference_mode():
        texts = model.get_text_features(**processor(text=["a red star spins"], return_tensors="pt")).pooler_output
        videos = model.get_video_features(**processor(videos=[video], return_tensors="pt")).pooler_output
    status, found = post(server, {"inputs": {"texts": ["a red star spins"]}})
    assert status == 200 and found == {"text_vectors": texts.tolist()}
    status, found = post(server, {"inputs": {"videos": [base64_of(video)]}})
    assert status == 200 and found == {"video_vectors": videos.tolist()}
    _, found = post(server, {"inputs": {"texts": ["a red star spins"], "videos": [base64_of(video)]}})
    assert found["scores"] == (texts @ videos.T).tolist()


def test_frames_data_urls_a_single_text_and_images_are_accepted(server, video):
    frames = [base64_of(png(40, 30)), base64_of(png(40, 30, (0, 0, 0)))]
    status, found = post(server, {"inputs": {"videos": [{"frames": frames}]}})
    assert status == 200 and len(found["video_vectors"][0]) == 64
    as_address = post(server, {"inputs": {"videos": ["data:video/mp4;base64," + base64_of(video)]}})
    assert as_address == post(server, {"inputs": {"videos": [base64_of(video)]}})
    as_text = post(server, {"inputs": "a red star spins"}, "application/json; charset=utf-8")
    assert as_text == post(server, {"inputs": {"texts": ["a red star spins"]}})
    assert post(server, png(40, 30), "image/png") == post(server, {"inputs": {"videos": [{"frames": frames[:1]}]}})


LABELS = ["a red star", "a blue ring", "a dog"]


def probabilities(run_dir, video, texts: list[str]) -> torch.Tensor:
    """What a model thinks of texts about one video, (N,): the softmax of its logits."""
    model, processor = CAMoEModel.from_pretrained(run_dir).eval(), CAMoEProcessor.from_pretrained(run_dir)
    with torch.inference_mode():
        inputs = processor(text=texts, videos=[video], return_tensors="pt")
        return model(**inputs).logits_per_text[:, 0].softmax(dim=0)


def test_the_payload_of_the_widget_for_zero_shot_image_classification_is_answered(server, run_dir):
    """The Hub's schema of the task: `inputs` is an image in base64, the answer is [{label, score}], best first."""
    image = png(40, 30)
    payload = {"inputs": base64_of(image), "parameters": {"candidate_labels": LABELS}}
    status, found = post(server, payload)
    expected = probabilities(run_dir, [Image.open(io.BytesIO(image))], LABELS)
    assert status == 200 and [set(answer) for answer in found] == [{"label", "score"}] * 3
    assert [answer["label"] for answer in found] == [LABELS[i] for i in expected.argsort(descending=True)]
    assert [answer["score"] for answer in found] == pytest.approx(expected.sort(descending=True).values.tolist())
    in_a_string = {"candidate_labels": f" {', '.join(LABELS)},"}
    assert post(server, payload | {"parameters": in_a_string}) == (200, found)
    for inputs in (payload["inputs"], "data:image/png;base64," + payload["inputs"]):  # as JavaScript posts it
        assert post(server, payload | {"inputs": {"image": inputs}}) == (200, found)


@pytest.mark.parametrize("template", [None, "this is {} on a beach"])
def test_the_hubs_own_client_classifies_an_image_and_a_video(server, run_dir, video, template, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    texts = [(template or "{}").format(label) for label in LABELS]
    image = png(40, 30)
    for content, decoded in ((image, [Image.open(io.BytesIO(image))]), (video, video)):
        found = InferenceClient(token="hf_test").zero_shot_image_classification(
            content, LABELS, model=server, hypothesis_template=template
        )
        expected = dict(zip(LABELS, probabilities(run_dir, decoded, texts).tolist(), strict=True))
        assert {answer.label: answer.score for answer in found} == pytest.approx(expected)
        assert found[0].score == pytest.approx(max(expected.values()))


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ("AAAA", {"candidate_labels": []}, "candidate_labels must be a list of 1 to 256"),
        ("AAAA", {"candidate_labels": [" "]}, "candidate_labels[0] must be a non-empty text"),
        ("AAAA", {"candidate_labels": [1]}, "candidate_labels[0] must be a non-empty text"),
        ("AAAA", {"candidate_labels": ["a"], "hypothesis_template": "this"}, "hypothesis_template"),
        ("AAAA", {"candidate_labels": ["a"], "inputs": "x"}, "unknown parameters ['inputs']"),
        ("AAAA", {"candidate_labels": ["a"], "self": 1, "top_k": 1}, "unknown parameters ['self', 'top_k']"),
        ("AAAA", {"hypothesis_template": "a {}"}, "candidate_labels must be a list of 1 to 256"),
        ("AAAA", ["a"], "parameters must be an object"),
        ("a dog", {"candidate_labels": ["a"]}, "inputs is not base64"),
        ({"url": "https://example.com/a.png"}, {"candidate_labels": ["a"]}, "inputs must be base64"),
        (None, {"candidate_labels": ["a"]}, "inputs must be base64"),
        (base64_of(png_that_claims(9000, 9000)), {"candidate_labels": ["a"]}, "9000 x 9000"),
    ],
)
def test_a_bad_classification_is_refused_with_a_message(server, inputs, parameters, message):
    status, answer = post(server, {"inputs": inputs, "parameters": parameters})
    assert status == 400 and answer["type"] == "RequestError" and message in answer["error"]


def test_several_videos_give_the_same_vectors_as_each_alone_in_order(server, video):
    other = base64_of(png(40, 30, (0, 90, 200)))
    videos = [base64_of(video), {"frames": [other] * 3}]
    together = post(server, {"inputs": {"videos": videos}})[1]["video_vectors"]
    assert together == [post(server, {"inputs": {"videos": [v]}})[1]["video_vectors"][0] for v in videos]


@pytest.mark.parametrize("kind", ["audio/mpeg", "audio/wav", "video/mp4", "text/plain", "application/octet-stream"])
def test_other_content_types_are_refused_with_a_message(server, video, kind):
    status, answer = post(server, video, kind)
    assert status == 400 and ("the body must be" in answer["error"] or "not supported" in answer["error"])
    assert post(server, {"inputs": "a red star"})[0] == 200


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1/secret.ts\n#EXT-X-ENDLIST\n"
REFUSED = {
    "a path": ({"videos": ["/etc/passwd"]}, "not base64"),
    "a path as a video": ({"videos": [base64_of(b"/etc/passwd")]}, "not a video"),
    "a file address": ({"videos": ["file:///etc/passwd"]}, "not base64"),
    "an address": ({"videos": [{"url": "https://example.com/clip.mp4"}]}, "must be base64"),
    "pixels of an image": ({"videos": [{"frames": [base64_of(png_that_claims(20_000, 20_000))]}]}, "too many pixels"),
    "pixels of a large image": ({"videos": [{"frames": [base64_of(png_that_claims(9000, 9000))]}]}, "9000 x 9000"),
    "pixels of a video": ({"videos": [base64_of(gif_that_claims(16_000, 16_000))]}, "16000 x 16000"),
    "more pixels than FFmpeg allows": ({"videos": [base64_of(gif_that_claims(20_000, 20_000))]}, "videos[0]"),
    "a playlist": ({"videos": [base64_of(PLAYLIST)]}, "not a video"),
    "a list of files": ({"videos": [base64_of(b"ffconcat version 1.0\nfile '/etc/passwd'\n")]}, "not a video"),
    "text that FFmpeg would render": ({"videos": [base64_of(b"\x1b[1;31m hello\n" * 500)]}, "not a video"),
    "no video": ({"videos": [base64_of(b"hello" * 1000)]}, "not a video"),
    "no image": ({"videos": [{"frames": [base64_of(b"hello" * 1000)]}]}, "not a JPEG, PNG or WebP"),
    "too many frames": ({"videos": [{"frames": ["AAAA"] * 65}]}, "1 to 64 images"),
    "too many videos": ({"videos": ["AAAA"] * 9}, "the limit is 8"),
    "too many texts": ({"texts": ["a"] * 257}, "texts must be a list of 1 to 256 texts"),
    "frames of different sizes": (
        {"videos": [{"frames": [base64_of(png(8, 8)), base64_of(png(9, 8))]}]},
        "the same size",
    ),
    "an empty video": ({"videos": [""]}, "is empty"),
    "an empty text": ({"texts": [" "]}, "texts[0]"),
    "a long text": ({"texts": ["a" * 2001]}, "2001 characters"),
    "a number": (7, "the body must be"),
    "a list": ([1, 2], "the body must be"),
    "an unknown key": ({"text": "a dog"}, "the body must be"),
    "nothing": ({"texts": []}, "no texts and no videos"),
    "a dict for a list": ({"texts": {"a": 1}}, "must be lists"),
    "a nested video": ({"videos": [["AAAA"]]}, "must be base64"),
    "a text that is a number": ({"texts": [3]}, "texts[0]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_has_a_message_and_the_next_request_is_served(server, name):
    inputs, message = REFUSED[name]
    status, answer = post(server, {"inputs": inputs})
    assert status == 400 and answer["type"] == "RequestError" and message in answer["error"]
    assert post(server, {"inputs": "a red star"})[0] == 200


def test_a_video_of_ten_hours_is_refused_from_its_header(server, ten_hours):
    status, answer = post(server, {"inputs": {"videos": [base64_of(ten_hours)]}})
    assert status == 400 and "the limit is 600 s" in answer["error"]
    assert post(server, {"inputs": "a red star"})[0] == 200


def test_a_few_kilobytes_cannot_decode_to_gigabytes_of_frames(server, monkeypatch):
    monkeypatch.setattr("untrusted.MAX_FRAME_PIXELS", 3 * 40 * 30)
    frames = [base64_of(png(40, 30))] * 4
    status, answer = post(server, {"inputs": {"videos": [{"frames": frames}]}})
    assert status == 400 and "pixels together" in answer["error"]
    assert post(server, {"inputs": {"videos": [{"frames": frames[:3]}]}})[0] == 200


@pytest.mark.parametrize("body", [b"[]", b"{}", b"null", b'{"instances": 1}', b"{", b"\xff", b'{"inputs": null}'])
def test_json_of_another_structure_is_refused(server, body):
    status, answer = post(server, body)
    assert status == 400 and answer["error"]
    assert post(server, {"inputs": "a red star"})[0] == 200


def test_half_a_gigabyte_of_base64_is_refused_before_decoding(endpoint, monkeypatch):
    monkeypatch.setattr("untrusted.base64.b64decode", None)
    with pytest.raises(RequestError, match="64 MiB together"):
        endpoint({"inputs": {"videos": ["A" * 500_000_000]}})


def test_the_byte_limit_is_for_all_videos_together(endpoint, video, monkeypatch):
    monkeypatch.setattr("handler.MAX_BYTES", len(video) + 10)
    endpoint({"inputs": {"videos": [base64_of(video)]}})
    with pytest.raises(RequestError, match=r"videos\[1\]"):
        endpoint({"inputs": {"videos": [base64_of(video)] * 2}})
