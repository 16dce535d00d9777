# SPDX-License-Identifier: Apache-2.0
"""What there is to see before a search: the newest files, the folders, queries to begin with."""

import itertools
import os
from collections import Counter

from . import schemas
from .filters import PATH
from .local_store import LocalStore


RECENT_COUNT, EXAMPLE_COUNT, FOLDER_COUNT = 12, 4, 300
# The newest files, and those in folders whose path begins as given.
NEWEST = "SELECT id FROM files WHERE content IS NOT NULL ORDER BY mtime_ns DESC, id"
NEWEST_INSIDE = f"""
SELECT files.id FROM files JOIN roots ON roots.id = files.root
WHERE content IS NOT NULL AND substr({PATH}, 1, length(?)) = ? ORDER BY mtime_ns DESC, files.id"""
# The first moment of a file, if it has one: path, start, end, key.
FIRST = f"""
SELECT {PATH}, windows.start, windows.end, contents.hash || '.' || windows.number
FROM files JOIN contents ON contents.id = files.content JOIN roots ON roots.id = files.root
     JOIN windows ON windows.content = contents.id
WHERE files.id = ? AND windows.row IS NOT NULL ORDER BY windows.id LIMIT 1"""
FILES = "SELECT roots.path, files.path FROM files JOIN roots ON roots.id = files.root WHERE files.content IS NOT NULL"
EXAMPLES = "SELECT DISTINCT text FROM bank WHERE length(text) BETWEEN 8 AND 60 ORDER BY query LIMIT ?"


def browse(store, folder: str | None) -> schemas.Browse:
    """Of a store; nothing of one that is in Milvus only.

    Args:
        folder: whose newest files are wanted; None: all.
    """
    if not isinstance(store, LocalStore):
        return schemas.Browse(recent=[], folders=[], examples=[])
    inside = folder.rstrip(os.sep) + os.sep if folder else None
    files = store.select(NEWEST) if inside is None else store.select(NEWEST_INSIDE, inside, inside)
    first = (moment for (file,) in files for moment in store.select(FIRST, file))
    found = list(itertools.islice(first, RECENT_COUNT))
    titles = distinct_titles([path for path, *_ in found])
    recent = [place(title, *row) for title, row in zip(titles, found, strict=True)]
    examples = [text for (text,) in store.select(EXAMPLES, EXAMPLE_COUNT)]
    return schemas.Browse(recent=recent, folders=folder_tree(store.select(FILES)), examples=examples)


def place(title: str, path: str, start: float, end: float, key: str, paths: tuple[str, ...] = ()) -> schemas.Place:
    """A moment of a file, for the page."""
    folder, name = os.path.split(path)
    paths = list(paths or (path,))
    return schemas.Place(key=key, name=name, folder=folder, title=title, start=start, end=end, paths=paths)


def folder_tree(files: list[tuple[str, str]]) -> list[schemas.Folder]:
    """(root, path in it) of all files -> folders below the roots with their counts, at most FOLDER_COUNT."""
    counts: Counter = Counter()
    # Folder by folder, since there are far fewer than files.
    for (root, folder), count in Counter((root, path.rpartition(os.sep)[0]) for root, path in files).items():
        parts = folder.split(os.sep) if folder else []
        for depth in range(len(parts) + 1):
            counts[(root, *parts[:depth])] += count
    return [
        schemas.Folder(path=os.sep.join(parts), depth=len(parts) - 1, files=count)
        for parts, count in sorted(counts.items())[:FOLDER_COUNT]
    ]


def distinct_titles(paths: list[str]) -> list[str]:
    """File names; where several files have the same one, with as many folders as tell them apart."""
    parts = [path.split(os.sep) for path in paths]
    titles = []
    for own in parts:
        for count in range(1, len(own) + 1):
            if all(other == own or other[-count:] != own[-count:] for other in parts):
                break
        titles.append("/".join(own[-count:]))
    return titles
