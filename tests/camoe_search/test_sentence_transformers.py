# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a SentenceTransformer: the same vectors, from texts and from videos."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from camoe_search.encoder import SentenceEncoder
from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.frames import Clip, VideoDecodingError


QUERIES = ["a red star spins", "two kids are playing basketball in a gym", "a disc"]


@pytest.fixture(scope="module")
def sentence_model(checkpoint):
    return SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def paths(some_videos):
    return sorted(map(str, some_videos.iterdir()))


def test_queries_and_documents_are_the_folded_vectors(sentence_model, encoder, paths):
    texts, videos = sentence_model.encode_query(QUERIES), sentence_model.encode_document(paths, batch_size=4)
    np.testing.assert_allclose(texts, encode_texts(encoder.model, encoder.processor, QUERIES), atol=1e-6)
    expected = encode_videos(encoder.model, encoder.processor, paths).vectors
    np.testing.assert_allclose(videos, expected, atol=1e-6)
    assert sentence_model.get_embedding_dimension() == videos.shape[1]
    np.testing.assert_allclose(sentence_model.similarity(texts, videos), texts @ expected.numpy().T, atol=1e-6)


def test_every_form_of_video_gives_the_same_vectors(sentence_model, encoder, paths):
    model, processor = encoder.model, encoder.processor
    window = Clip(paths[5], 0.5, 1.5)
    decoded = processor.video_processor.decode(paths[0])
    frames = decoded.frames  # (T,3,H,W)
    content = open(paths[0], "rb").read()
    rows = Dataset.from_dict({"video": [paths[0]]}).cast_column("video", Video(decode=False))
    forms = [{"video": paths[0]}, content, Path(paths[0]), rows[0]["video"], open(paths[0], "rb"), decoded, frames]
    forms += [frames.numpy(), frames.permute(0, 2, 3, 1), {"array": frames, "video_metadata": None}]
    forms += [frames.float(), frames.double() / 255, frames.long(), (frames / 255).half(), {"video": frames / 255}]
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    forms += [images, {"video": images}, {"array": images, "video_metadata": None}]
    vectors = [sentence_model.encode_document([form])[0] for form in [*forms, window]]
    expected = encode_videos(model, processor, [paths[0]] * len(forms) + [window]).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(sentence_model.encode_document(rows["video"]), expected[:1], atol=1e-6)
    together = sentence_model.encode_document([paths[0], frames.double() / 255, content])
    np.testing.assert_allclose(together, expected[:3], atol=1e-6)
    np.testing.assert_allclose(sentence_model.encode(paths[:1]), expected[:1], atol=1e-6)


def test_decoders_of_a_data_set_are_videos(sentence_model, encoder, paths):
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError))
    rows = Dataset.from_dict({"video": paths[:2]}).cast_column("video", Video())
    expected = encode_videos(encoder.model, encoder.processor, paths[:2]).vectors
    np.testing.assert_allclose(sentence_model.encode_document(rows["video"]), expected, atol=1e-6)
    np.testing.assert_allclose(sentence_model.encode_document(rows[1]["video"]), expected[1], atol=1e-6)


def test_a_picture_is_a_clip_of_one_frame(sentence_model, encoder, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    expected = encode_videos(encoder.model, encoder.processor, [picture]).vectors
    for form in (picture, str(tmp_path / "a.png"), {"image": picture}, np.array(picture)):
        np.testing.assert_allclose(sentence_model.encode_document([form]), expected, atol=1e-6)


def test_an_address_is_a_video_and_a_sentence_about_one_is_a_text(sentence_model, encoder, paths, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        sys.modules[type(sentence_model[0].processor.video_processor).__module__.rpartition(".")[0] + ".video_inputs"],
        "_download",
        lambda address: fetched.append(address) or open(paths[0], "rb").read(),
    )
    expected = encode_videos(encoder.model, encoder.processor, paths[:1]).vectors[0]
    address = "https://example.org/clip.mp4?size=large"
    for encode in (sentence_model.encode, sentence_model.encode_document):
        np.testing.assert_allclose(encode(address), expected, atol=1e-6)
    assert fetched == [address, address]
    text = encode_texts(encoder.model, encoder.processor, [address])[0]
    np.testing.assert_allclose(sentence_model.encode({"text": address}), text, atol=1e-6)
    assert fetched == [address, address]
    text = "a star spins in https://example.org/clip.mp4"
    np.testing.assert_allclose(
        sentence_model.encode(text), encode_texts(encoder.model, encoder.processor, [text])[0], atol=1e-6
    )


def test_a_query_that_is_an_address_or_a_file_is_read_as_a_text(sentence_model, encoder, paths):
    requests = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    queries = [f"http://127.0.0.1:{server.server_port}/secret.mp4", paths[0]]
    vectors = [SentenceEncoder("other", sentence_model).encode_texts([query])[0] for query in queries]
    server.shutdown()
    server.server_close()
    assert not requests
    expected = encode_texts(encoder.model, encoder.processor, queries).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_it_is_an_input_module_with_the_librarys_options(sentence_model, encoder, paths):
    module = sentence_model[0]
    assert isinstance(module, InputModule) and sentence_model.modalities == ["text", "image", "video"]
    assert sentence_model.supports("video") and not sentence_model.supports("audio")
    assert sentence_model.max_seq_length == encoder.processor.max_length
    prompted = sentence_model.encode_query(QUERIES, prompt="a video of ")
    expected = encode_texts(encoder.model, encoder.processor, [f"a video of {query}" for query in QUERIES])
    np.testing.assert_allclose(prompted, expected, atol=1e-6)
    np.testing.assert_allclose(
        sentence_model.encode({"text": QUERIES[0]}), sentence_model.encode(QUERIES[0]), atol=1e-6
    )
    short = sentence_model.encode_document(paths[:2], truncate_dim=8, prompt="not for videos")
    np.testing.assert_allclose(
        short, encode_videos(encoder.model, encoder.processor, paths[:2]).vectors[:, :8], atol=1e-6
    )


def test_the_error_names_a_document_that_is_not_a_video(sentence_model, tmp_path):
    with pytest.raises(VideoDecodingError, match="missing.mp4"):
        sentence_model.encode_document([str(tmp_path / "missing.mp4")])
    (tmp_path / "broken.webm").write_bytes(b"no video")
    with pytest.raises(VideoDecodingError, match="broken.webm"):
        sentence_model.encode_document([str(tmp_path / "broken.webm")])


def test_a_mixed_batch_and_an_empty_text_are_errors(sentence_model, paths):
    with pytest.raises(ValueError, match="video"):
        sentence_model.encode_document(["a red star", paths[0]])
    with pytest.raises(ValueError, match="texts and videos cannot share a batch"):
        sentence_model.encode_document(["a red star", torch.zeros(2, 3, 32, 32, dtype=torch.uint8).numpy().tobytes()])
    with pytest.raises(ValueError, match="empty"):
        sentence_model.encode_query([" "])


WITHOUT_PROJECT = """
import json, sys
class HideProject:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("modeling_camoe", "camoe_search"):
            raise ModuleNotFoundError(fullname, name=fullname)
sys.meta_path.insert(0, HideProject())
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
model.save(sys.argv[3])
again = SentenceTransformer(sys.argv[3], trust_remote_code=True, device="cpu")
for each in (model, again):
    print(json.dumps([each.encode_query("a red star spins").tolist(), each.encode_document(sys.argv[2]).tolist()]))
"""


@pytest.mark.slow
def test_it_loads_and_saves_where_this_project_is_not_installed(checkpoint, encoder, paths, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", WITHOUT_PROJECT, str(checkpoint), paths[0], str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        encode_texts(encoder.model, encoder.processor, ["a red star spins"])[0],
        encode_videos(encoder.model, encoder.processor, [paths[0]]).vectors[0],
    ]
    for line in done.stdout.splitlines()[-2:]:
        np.testing.assert_allclose(json.loads(line), torch.stack(expected), atol=1e-6)
