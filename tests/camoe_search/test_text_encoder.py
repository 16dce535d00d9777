# SPDX-License-Identifier: Apache-2.0
"""Searching by text without torch: the exported tower gives the model's vectors, and nothing heavy is imported."""

import json
import logging
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from camoe_search import text_encoder
from camoe_search.index import VideoIndex
from camoe_search.text_encoder import OnnxTextEncoder, export_text_encoder
from modeling_camoe import CAMoEProcessor
from tests.tiny_backbones import tiny_backbone


QUERIES = ["a red star spins on the beach", "dog " * 500, "犬 🐕", "!!", "two kids play"]


@pytest.fixture(scope="module")
def tagged(checkpoint, tmp_path_factory):
    """The checkpoint with a tagger: its captions have streams."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("tagged") / "model")
    processor = CAMoEProcessor.from_pretrained(folder)
    processor.tagger = "en_core_web_sm"
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def index(tagged, some_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "index"
    index = VideoIndex.create_or_update([some_videos], folder, str(tagged), device="cpu", num_workers=0)
    assert index.report.text_encoder == ""
    return index


def test_vectors_are_those_of_torch(index):
    ours, theirs = OnnxTextEncoder(index.folder).encode_texts(QUERIES), index.encoder.encode_texts(QUERIES)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    alone = np.concatenate([OnnxTextEncoder(index.folder).encode_texts([query]) for query in QUERIES])
    np.testing.assert_allclose(alone, theirs, atol=1e-4)


COLD = """
import sys
from camoe_search.cli import main
main(sys.argv[1:])
print(*sorted(name for name in ("torch", "transformers", "datasets", "faiss", "av", "spacy") if name in sys.modules))
"""


def test_a_cold_search_imports_neither_torch_nor_transformers(index):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", COLD, "search", QUERIES[0], "--index", str(index.folder), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, modules = done.stdout.strip().splitlines()
    assert modules == "spacy" and done.stderr == ""
    expected = index.search(QUERIES[0])  # by the model
    found = json.loads("\n".join(rows))
    assert [row["key"] for row in found] == [hit.key for hit in expected]
    assert [row["score"] for row in found] == pytest.approx([hit.score for hit in expected], abs=1e-4)


def test_without_a_tagger_spacy_is_not_imported(checkpoint, encoder, tmp_path):
    assert export_text_encoder(encoder, tmp_path) == ""
    program = (
        "import sys, pathlib\nfrom camoe_search.text_encoder import OnnxTextEncoder\n"
        f"vectors = OnnxTextEncoder(pathlib.Path({str(tmp_path)!r})).encode_texts(['a star'])\n"
        "print(vectors.shape, 'spacy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "(1, 64) False\n", done.stderr


def test_what_the_tagger_was_loaded_without_can_be_imported_later(index):
    program = (
        "import sys, pathlib\nfrom camoe_search.text_encoder import OnnxTextEncoder\n"
        f"OnnxTextEncoder(pathlib.Path({str(index.folder)!r})).encode_texts(['a star'])\n"
        "assert 'spacy' in sys.modules and not {'torch', 'spacy.cli', 'spacy.cli.info'} & set(sys.modules)\n"
        "import torch\nfrom spacy.cli.info import info\nprint(torch.ones(1).item(), info.__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "1.0 info\n", done.stderr


def test_an_export_that_differs_is_not_kept_and_search_says_why_once(videos, encoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(text_encoder, "TOLERANCE", 0.0)
    index = VideoIndex.create_or_update([videos], tmp_path / "index", encoder, num_workers=0)
    assert "differ from PyTorch's" in index.report.text_encoder and not (tmp_path / "index" / "text").exists()
    again = VideoIndex.load(tmp_path / "index", device=None)
    with caplog.at_level(logging.WARNING):
        assert again.search(QUERIES[0]) == index.search(QUERIES[0]) == again.search(QUERIES[0])
    notes = [record.message for record in caplog.records if "text tower" in record.message]
    assert len(notes) == 1 and "differ from PyTorch's" in notes[0]
    report = VideoIndex.create_or_update([videos], tmp_path / "index", encoder, num_workers=0).report
    assert report.text_encoder == ""  # said before


def test_a_tokenizer_without_a_file_is_named_and_search_loads_the_model_after_one_note(videos, tmp_path, caplog):
    model = tiny_backbone(tmp_path / "siglip", "siglip")
    index = VideoIndex.create_or_update([videos], tmp_path / "index", str(model), device="cpu", num_workers=0)
    assert index.report.text_encoder.startswith("a SiglipTokenizer has no tokenizer.json")
    again = VideoIndex.load(tmp_path / "index", device=None)
    with caplog.at_level(logging.WARNING):
        assert again.search(QUERIES[0]) == index.search(QUERIES[0]) == again.search(QUERIES[0])
    [note] = [record.message for record in caplog.records if "text tower" in record.message]
    assert "a SiglipTokenizer has no tokenizer.json" in note and len(note.splitlines()) == 1


def test_an_encoder_that_cannot_be_exported_gives_the_reason(tmp_path):
    reason = export_text_encoder(types.SimpleNamespace(), tmp_path)
    assert "can be exported" in reason and not (tmp_path / "text").exists()
