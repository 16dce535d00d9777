# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a SentenceTransformer: the same vectors, from texts and from videos."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames


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
    frames = sample_frames(paths[0], 2, size=32).frames  # (T,3,H,W)
    content = open(paths[0], "rb").read()
    forms = [{"video": paths[0]}, content, frames, {"array": frames, "video_metadata": None}]
    vectors = [sentence_model.encode_document([form])[0] for form in [*forms, window]]
    expected = encode_videos(model, processor, [paths[0]] * len(forms) + [window]).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


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
