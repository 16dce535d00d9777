# SPDX-License-Identifier: Apache-2.0
"""Writing files whole or not at all: a full disk, a crash or Ctrl-C leaves the file that was there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write under a temporary name, then rename."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, values: Mapping) -> None:
    """Write indented JSON. Raises: ValueError for a number that is not finite, which JSON does not have."""
    write_whole(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())
