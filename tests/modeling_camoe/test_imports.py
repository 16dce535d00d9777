# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
