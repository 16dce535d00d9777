# SPDX-License-Identifier: Apache-2.0
"""Taking files out of an index, and listing those that are not in it. No model is loaded, and no torch."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .database import PATH, transaction, write_lock
from .errors import SearchError
from .files import absolute, is_inside, matches, relative
from .writer import IndexWriter


# Paths of files, with what is known of them.
KNOWN = f"""
SELECT {PATH}, files.id, size, mtime_ns, content, COALESCE(files.cause, contents.cause)
FROM files JOIN roots ON roots.id = files.root LEFT JOIN contents ON contents.id = files.content
"""
# Files that fit a pattern. SQLite's GLOB is `fnmatch`; it takes milliseconds for 100,000.
MATCHING = f"""
SELECT files.id FROM files JOIN roots ON roots.id = files.root
WHERE {PATH} GLOB replace(?, '[!', '[^')
"""
# Files of a root that are a path, or are in it as in a folder.
INSIDE = "SELECT id FROM files WHERE root = ? AND (path = ? OR path > ? AND path < ?)"
# Files that are not, or not wholly, in the index, with the cause.
SKIPPED = f"""
SELECT {PATH}, windows.start, windows.end,
       COALESCE(files.cause, contents.cause, windows.cause)
FROM files JOIN roots ON roots.id = files.root LEFT JOIN contents ON contents.id = files.content
     LEFT JOIN windows ON windows.content = contents.id AND windows.cause IS NOT NULL
WHERE COALESCE(files.cause, contents.cause, windows.cause) IS NOT NULL ORDER BY 1, 2
"""


def remove_files(folder: str | os.PathLike, patterns) -> tuple[int, int]:
    """Remove files, all files under folders, and files that fit patterns. Returns the numbers of files and moments.

    Raises:
        SearchError: nothing in the index fits one of them.
    """
    folder = Path(folder)
    with write_lock(folder), IndexWriter(folder) as writer, open_copy(writer) as store:
        patterns = [os.fspath(pattern) for pattern in patterns]
        roots = dict(writer.connection.execute("SELECT path, id FROM roots").fetchall())
        files = set()
        for pattern in patterns:
            found = _find_files(writer.connection, roots, pattern)
            if not found and not any(matches(root, pattern) for root in roots):
                raise SearchError(f"no file of the index is or fits {pattern}; nothing was removed")
            files |= found
        removed = writer.remove_files(sorted(files))
        gone = [(root,) for root in roots if any(matches(root, pattern) for pattern in patterns)]
        with transaction(writer.connection) as connection:
            connection.executemany("DELETE FROM roots WHERE path = ? AND id NOT IN (SELECT root FROM files)", gone)
        writer.tidy()
        if store is not None:
            store.update(writer)
    return len(files), removed


def _find_files(connection, roots: dict[str, int], pattern: str) -> set[int]:
    """Ids of the files that are, are in, or fit a pattern."""
    wanted, found = pattern if pattern.startswith("*") else absolute(pattern), []
    for path, root in roots.items():
        if is_inside(path, wanted):
            found += connection.execute("SELECT id FROM files WHERE root = ?", (root,))
        elif is_inside(wanted, path):
            inner = relative(wanted, path)
            found += connection.execute(INSIDE, (root, inner, inner + os.sep, inner + chr(ord(os.sep) + 1)))
    if not found and any(character in wanted for character in "*?["):  # "a[1].mp4" may be a file's own name
        found += connection.execute(MATCHING, (wanted,))
    return {file for (file,) in found}


def skipped_files(connection) -> list[dict]:
    """Files, or parts of them, that could not be read: {"path", "cause"}, and "start", "end" of a part."""
    rows = []
    for path, start, end, cause in connection.execute(SKIPPED):
        rows.append({"path": path, "cause": cause} | ({} if start is None else {"start": start, "end": end}))
    return rows


@contextlib.contextmanager
def open_copy(writer: IndexWriter) -> Iterator:
    """The collection that holds a copy of the index, open; None if there is none."""
    if writer.description.milvus is None:
        yield None
        return
    from .milvus_store import open_collection

    with contextlib.closing(open_collection(writer.description)) as store:
        yield store
