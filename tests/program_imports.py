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
"""What the server of tests/programs.py imports before it forks; nothing here may start a thread."""

import sys

from tests.programs import TRAINING


sys.path.insert(0, str(TRAINING))

import evaluate_retrieval  # noqa: F401
import make_motion_clips  # noqa: F401
import run_retrieval  # noqa: F401

from modeling_camoe.captions import resolve_tagger


resolve_tagger("en_core_web_sm").tag_batch(["a dog runs"])
