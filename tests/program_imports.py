# SPDX-License-Identifier: Apache-2.0
"""What the server of tests/programs.py imports before it forks; nothing here may start a thread."""

import sys

from tests.programs import TRAINING


sys.path.insert(0, str(TRAINING))

import evaluate_retrieval  # noqa: F401
import make_motion_clips  # noqa: F401
import run_retrieval  # noqa: F401

from modeling_camoe.captions import resolve_tagger


resolve_tagger("en_core_web_sm").tag_batch(["a dog runs"])
