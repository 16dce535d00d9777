# SPDX-License-Identifier: Apache-2.0
"""Importing the package loads nothing that only some uses need."""

import subprocess
import sys


HEAVY = (
    "av",
    "torchcodec",
    "spacy",
    "datasets",
    "faiss",
    "gradio",
    "pandas",
    "matplotlib",
    "pymilvus",
    "onnx",
    "peft",
)


def test_import_loads_no_decoder_tagger_data_sets_or_index():
    code = f"import sys, modeling_camoe; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
