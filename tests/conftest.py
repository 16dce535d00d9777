# SPDX-License-Identifier: Apache-2.0
"""The programs in training/ import the folders beside them by plain name, and so do their tests."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
