# SPDX-License-Identifier: Apache-2.0
"""Programs in training/ import their siblings by plain name; so do their tests."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
