# SPDX-License-Identifier: Apache-2.0
"""The programs in training/ import the folders beside them by plain name, and so do their tests."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker begins one when the others have finished."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
