# SPDX-License-Identifier: Apache-2.0
"""Texts -> vectors without torch and transformers: what a cold `camoe search` needs.

`camoe index` exports the text tower into INDEX/text (export_onnx.py); onnxruntime and the `tokenizers` file then give
the same vectors to 1e-4, which is checked before the export is kept. N texts, E experts, K entries a folded vector.
"""

import contextlib
import importlib
import importlib.util
import json
import shutil
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .errors import SearchError


FOLDER = "text"
TOLERANCE = 1e-4
BATCH = 32  # texts per call of the tower
# What is compared with torch: short and long, odd characters, other scripts, no words.
SAMPLES = [
    "a red star spins on the beach",
    "A",
    "two kids are playing basketball, while their mother watches: 'well done!' -- she says",
    "dog " * 200,
    "ein Hund fängt eine Scheibe",
    "犬がフリスビーを取る 🐕🥏",
    "!?...",
    "  tabs\tand\nnew lines  ",
]


def check_texts(texts: Sequence[str]):
    """
    Raises:
        SearchError: a query is empty.
    """
    if not all(text.strip() for text in texts):
        raise SearchError("the query is empty: describe what happens in the video")


class OnnxTextEncoder:
    """The exported text tower of an index.

    Args:
        folder: of the index.

    Raises:
        ImportError: onnxruntime or tokenizers is not installed.
        OSError: the index has no export.
    """

    def __init__(self, folder: Path):
        import onnxruntime
        from tokenizers import Tokenizer

        folder = folder / FOLDER
        self.config = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
        self.weights = self.config["weights"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.config["max_length"])
        self._tokenizer.enable_padding(pad_id=self.config["pad_token_id"], length=self.config["padded_length"])
        self._tagger = threading.Thread(target=self._load_tagger)  # while the tower loads, which holds no lock
        self._tagger.start()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            folder / "text_encoder.onnx", options, providers=["CPUExecutionProvider"]
        )

    def _load_tagger(self):
        with contextlib.suppress(Exception):  # the first query says what is wrong
            self._streams(["ready"])

    def _streams(self, texts: Sequence[str]) -> list[list[str]]:
        """The text of each expert, (N,E)."""
        captions = _captions_module()
        with _light_spacy():
            return captions.caption_streams(
                list(texts), self.config["experts"], self.config["tagger"], self.config["streams"]
            )

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Queries -> (N,K) float32.

        Raises:
            SearchError: a query is empty.
        """
        check_texts(texts)
        self._tagger.join()
        streams = self._streams(texts)
        vectors = [self._encode(streams[first : first + BATCH]) for first in range(0, len(streams), BATCH)]
        return np.concatenate(vectors)

    def _encode(self, streams: list[list[str]]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch([text for row in streams for text in row])
        shape = (len(streams), len(self.config["experts"]), -1)
        inputs = {
            "input_ids": np.array([text.ids for text in encoded], np.int64).reshape(shape),
            "attention_mask": np.array([text.attention_mask for text in encoded], np.int64).reshape(shape),
        }
        if not self.config["masks_padding"]:  # the tower reads its padding, as SigLIP's does
            inputs["attention_mask"][:] = 1
        return self._session.run(None, inputs)[0]


def exported_weights(folder: Path) -> str | None:
    """The hash of the weights of the export in the folder of an index; None if there is none."""
    try:
        return json.loads((folder / FOLDER / "onnx_config.json").read_text(encoding="utf-8"))["weights"]
    except FileNotFoundError:
        return None


def export_text_encoder(encoder, folder: Path) -> str:
    """Export the text tower of an encoder into the folder of an index, if it can be done.

    Returns:
        "" where it is there and gives torch's vectors; otherwise why not: then `camoe search` loads the whole model.
    """
    final, temporary = folder / FOLDER, folder / f".{FOLDER}"
    if not hasattr(encoder, "processor"):
        return "only CAMoE checkpoints and plain dual encoders can be exported"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        from modeling_camoe.export_onnx import export_text_encoder as export

        made = temporary / FOLDER
        made.mkdir(parents=True)
        config = export(encoder.model, encoder.processor, made)
        config["weights"] = encoder.weights
        (made / "onnx_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        vectors = OnnxTextEncoder(temporary).encode_texts(SAMPLES)
        difference = float(np.abs(vectors - encoder.encode_texts(SAMPLES)).max())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"its vectors differ from PyTorch's by {difference:.1e}")
        shutil.rmtree(final, ignore_errors=True)
        made.rename(final)
    except ValueError as error:  # the model's tokenizer has no file
        return str(error)
    # An exporter may fail in any way that torch or ONNX can: the index works without it, and says why.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {reason}"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ""


def _captions_module() -> types.ModuleType:
    """modeling_camoe.captions, without running modeling_camoe/__init__.py, which imports torch and transformers.

    Its modules are then those of a package of another name, made of the same folder.
    """
    if "modeling_camoe" in sys.modules:
        return importlib.import_module("modeling_camoe.captions")
    name = "_camoe_captions"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = list(importlib.util.find_spec("modeling_camoe").submodule_search_locations)
        sys.modules[name] = package
    return importlib.import_module(f"{name}.captions")


# What `import spacy` loads beside the tagger: thinc looks for torch, which takes seconds, and spacy/__init__.py takes
# one function from its command line, which takes a third of the rest.
UNUSED_BY_TAGGER = {"torch": None, "spacy.cli.info": types.SimpleNamespace(info=None)}


@contextlib.contextmanager
def _light_spacy() -> Iterator[None]:
    """Lets spaCy be imported without what the tagger does not use. Both can be imported afterwards."""
    hidden = {name: module for name, module in UNUSED_BY_TAGGER.items() if name not in sys.modules}
    if "torch" not in hidden or "spacy" in sys.modules:
        yield
        return
    sys.modules.update(hidden)  # None raises ImportError, as where it is not installed
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
