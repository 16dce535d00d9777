# SPDX-License-Identifier: Apache-2.0
"""Find paths of this machine in what is about to be published: they tell strangers about it and lead them nowhere."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml


TEXT_SUFFIXES = (".json", ".md", ".py", ".txt", ".yaml")
CHECKOUT = Path(__file__).resolve().parents[1]
# At least two names, and nothing before it that would make it a URL, a fraction or the end of a relative path.
PATH = re.compile(r"(?<![\w.:/~$}>-])/[\w.+@-]+(?:/[\w.+@ -]+)+")


def find_machine_paths(folder: Path) -> list[str]:
    """Where text files of a folder name a path of this machine, as "file: `key` is 'path'", sorted."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXT_SUFFIXES:
            for where, text in _strings(file):
                found += [f"{file.name}: {where} has {path!r}" for path in PATH.findall(text) if _is_here(path)]
    return found


def _is_here(path: str) -> bool:
    """Whether a path exists, or lies where only this machine has something."""
    path = Path(path.rstrip(" ."))
    places = (Path.home(), CHECKOUT, Path(tempfile.gettempdir()), Path("/tmp"), Path("/home"), Path("/Users"))
    return any(path.is_relative_to(place) for place in places if len(place.parts) > 1) or path.exists()


def _strings(file: Path) -> Iterator[tuple[str, str]]:
    """The texts in a file, each with its key or line."""
    content = file.read_text(encoding="utf-8")
    if file.suffix in (".json", ".yaml"):
        yield from _values(json.loads(content) if file.suffix == ".json" else yaml.safe_load(content), "")
    else:
        for number, line in enumerate(content.splitlines(), start=1):
            yield f"line {number}", line


def _values(value, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield f"`{key}`", value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values(item, f"{key}.{name}" if key else str(name))
