# SPDX-License-Identifier: Apache-2.0
"""The first step of an update: what is in the folders, what of it is new, and which windows want a vector.

All of it is in the database when this ends (or as far as it came): files with their content or the cause why they
cannot be read, and the windows of contents that are new.
"""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm.auto import tqdm

from .addresses import is_address
from .contents import Content, examine, probe
from .database import Description, insert_many, transaction
from .errors import SearchError
from .files import Scan, VideoFile, absolute, exists, find_videos, is_folder, is_inside, relative
from .prepare import IndexOptions
from .remove import KNOWN
from .writer import IndexWriter


READERS = 8  # threads that read files; they mostly wait for the disk
REGISTER_BATCH = 64  # files whose hashes are committed together


@dataclass
class Plan:
    """What was found. The numbers count files."""

    scan: Scan
    added: list[int] = field(default_factory=list)  # ids of files
    changed: list[int] = field(default_factory=list)
    moved: int = 0
    unchanged: int = 0
    dropped: int = 0


class Window(NamedTuple):
    """A window to encode, in one of the files that hold it."""

    id: int
    start: float  # seconds
    end: float
    whole: bool
    content: int
    hash: str  # of the content
    number: int  # of the window in it
    file: int
    video: VideoFile


def plan_update(writer: IndexWriter, paths, options: IndexOptions, progress: bool = False) -> Plan:
    """Look at the paths (none: all folders that the index knows), and register what has changed.

    Raises:
        SearchError: a path does not exist, or, with `prune`, a folder has lost all of its videos.
    """
    writer.release_lost_rows()
    plan = Plan(_scan(writer, paths, options))
    known = {path: rest for path, *rest in writer.connection.execute(KNOWN)}
    if options.retry:
        with transaction(writer.connection) as connection:
            connection.execute("UPDATE windows SET cause = NULL WHERE cause IS NOT NULL")

    def is_known(video: VideoFile) -> bool:
        if video.path not in known:
            return False
        _, size, mtime_ns, _, cause = known[video.path]
        return (size, mtime_ns) == (video.size, video.mtime_ns) and not (cause and options.retry)

    new = [video for video in plan.scan.videos if not is_known(video)]
    plan.unchanged = len(plan.scan.videos) - len(new)
    new = _follow_moved_roots(writer, new, known, plan)
    examined = _examine_files(writer, new, options.retry)
    with tqdm(total=len(new), desc="read", unit="file", disable=not progress or not new) as bar:
        for first in range(0, len(new), REGISTER_BATCH):
            part = [(video, next(examined)) for video in new[first : first + REGISTER_BATCH]]
            with transaction(writer.connection) as connection:
                roots = dict(connection.execute("SELECT path, id FROM roots").fetchall())
                for video, content in part:
                    _register(writer, roots, video, content, known.get(video.path), plan)
            bar.update(len(part))
    # Only now: a file may hold what another one held before.
    writer.remove_unheld()
    if options.prune:
        _forget_missing(writer, plan)
    return plan


def pending_windows(writer: IndexWriter) -> list[Window]:
    """All windows without a vector whose file is there, in order."""
    rows = writer.connection.execute(
        "SELECT windows.id, start, end, whole, contents.id, hash, number, files.id, roots.path, files.path, "
        "size, mtime_ns FROM windows JOIN contents ON contents.id = windows.content "
        "JOIN files ON files.content = contents.id JOIN roots ON roots.id = files.root "
        "WHERE row IS NULL AND windows.cause IS NULL ORDER BY windows.id, files.id"
    )
    there, windows = {}, {}
    for id, start, end, whole, content, digest, number, file, root, path, size, mtime_ns in rows:
        if id in windows:
            continue
        path = os.path.join(root, path)
        if path not in there:
            there[path] = exists(path)
        if there[path]:
            video = VideoFile(path, size, mtime_ns)
            windows[id] = Window(id, start, end, bool(whole), content, digest, number, file, video)
    return list(windows.values())


# --- looking ---------------------------------------------------------------------------------------------------------


def _scan(writer: IndexWriter, paths, options: IndexOptions) -> Scan:
    """The videos under the paths; the folders among them become roots of the index."""
    roots = [path for (path,) in writer.connection.execute("SELECT path FROM roots ORDER BY id")]
    paths = [absolute(path) for path in paths] or roots
    if not paths:
        raise SearchError("give folders or files of videos: the index knows none yet")
    scan = find_videos(paths, writer.description.exclude)
    folders = [path for path in paths if is_folder(path)]
    alone = [v.path for v in scan.videos if not any(is_inside(v.path, root) for root in [*folders, *roots])]
    folders += sorted({os.path.dirname(path) for path in alone if is_address(path)})
    alone = [path for path in alone if not is_address(path)]
    if alone:
        folders.append(os.path.dirname(alone[0]) if len(alone) == 1 else os.path.commonpath(alone))
    with transaction(writer.connection) as connection:
        connection.executemany("INSERT OR IGNORE INTO roots(path) VALUES(?)", [(path,) for path in folders])
    if options.prune:
        _check_mounted(writer, paths, scan)
    return dataclasses.replace(scan, paths=paths)


def _check_mounted(writer: IndexWriter, paths: list[str], scan: Scan):
    """
    Raises:
        SearchError: a folder that had videos has none at all.
    """
    known = [path for path, *_ in writer.connection.execute(KNOWN)]
    for folder in paths:
        had = sum(is_inside(path, folder) for path in known)
        if had and not any(is_inside(video.path, folder) for video in scan.videos):
            raise SearchError(
                f"{folder} has no video now, and had {had}: is it mounted? To remove them all: `camoe remove {folder}`"
            )


def _examine_files(writer: IndexWriter, videos: list[VideoFile], retry: bool) -> Iterator[Content]:
    """Hash files, and read the headers of those whose content is new, in order; threads read ahead."""
    condition = " WHERE cause IS NULL" if retry else ""
    hashes = {hash for (hash,) in writer.connection.execute("SELECT hash FROM contents" + condition)}
    windows = writer.description.windows
    with ThreadPoolExecutor(READERS) as readers:
        for first in range(0, len(videos), REGISTER_BATCH):  # a few at a time: an error must not wait for all
            part = videos[first : first + REGISTER_BATCH]
            yield from readers.map(lambda video: examine(video.path, windows, hashes), part)


def _follow_moved_roots(writer: IndexWriter, videos: list[VideoFile], known: dict, plan: Plan) -> list[VideoFile]:
    """Files that have their old relative path, size and time under another root, whose folder has gone, are the same.

    Returns the others. So a moved library costs nothing but this look.
    """
    roots = dict(writer.connection.execute("SELECT path, id FROM roots").fetchall())
    gone = {id: path for path, id in roots.items() if not is_folder(path)}
    # A web server may have files in what it does not list.
    gone = {id: path for id, path in gone.items() if not any(is_inside(video.path, path) for video in videos)}
    if not gone:
        return videos
    lost = {}
    for file, root, path, size, mtime_ns in writer.connection.execute(
        "SELECT id, root, path, size, mtime_ns FROM files WHERE cause IS NULL"
    ):
        if root in gone:
            lost[path, size, mtime_ns] = file
    rest = []
    with transaction(writer.connection) as connection:
        for video in videos:
            root, path = _relative_to_root(roots, video.path)
            file = lost.pop((path, video.size, video.mtime_ns), None) if video.path not in known else None
            if file is None:
                rest.append(video)
                continue
            connection.execute("UPDATE files SET root = ?, path = ? WHERE id = ?", (root, path, file))
            plan.moved += 1
        connection.executemany(
            "DELETE FROM roots WHERE id = ? AND id NOT IN (SELECT root FROM files)", [(id,) for id in gone]
        )
    return rest


# --- registering -----------------------------------------------------------------------------------------------------


def _relative_to_root(roots: dict[str, int], path: str) -> tuple[int, str]:
    """The root of a file, the innermost one, and its path from there."""
    root = max((root for root in roots if is_inside(path, root)), key=len)
    return roots[root], relative(path, root)


def _register(
    writer: IndexWriter, roots: dict[str, int], video: VideoFile, found: Content, known: list | None, plan: Plan
):
    """Write down what is in a new or changed file; inside a transaction."""
    connection = writer.connection
    if found.hash is not None and found.duration is None and found.cause is None:
        if not connection.execute("SELECT 1 FROM contents WHERE hash = ?", (found.hash,)).fetchone():
            # The index knew this content by another file, which this run has found to hold something else now.
            found = probe(video.path, found.hash, writer.description.windows)
    content = None if found.hash is None else _content_id(connection, found, writer.description)
    cause = found.cause if content is None else None
    if known is not None:
        file, _, _, old, _ = known
        writer.change_content(file, content, video.size, video.mtime_ns, cause, keep_old=True)
        if old == content:
            plan.unchanged += 1
        else:
            plan.changed.append(file)
        return
    values = (*_relative_to_root(roots, video.path), video.size, video.mtime_ns, content, cause)
    moved = _moved_file(connection, content)
    if moved is None:
        file = connection.execute(
            "INSERT INTO files(root, path, size, mtime_ns, content, cause) VALUES(?, ?, ?, ?, ?, ?)", values
        ).lastrowid
        plan.added.append(file)
    else:
        connection.execute(
            "UPDATE files SET root = ?, path = ?, size = ?, mtime_ns = ?, content = ?, cause = ? WHERE id = ?",
            (*values, moved),
        )
        plan.moved += 1


def _content_id(connection, found: Content, description: Description) -> int:
    """The content with a hash; a new one with its windows."""
    row = connection.execute("SELECT id, cause FROM contents WHERE hash = ?", (found.hash,)).fetchone()
    if row is not None and not (row[1] and found.duration is not None):
        return row[0]
    if row is not None:  # it could not be read before
        content = row[0]
        connection.execute("UPDATE contents SET duration = ?, cause = NULL WHERE id = ?", (found.duration, content))
    else:
        content = connection.execute(
            "INSERT INTO contents(hash, duration, cause) VALUES(?, ?, ?)", (found.hash, found.duration, found.cause)
        ).lastrowid
    if found.picture is not None:
        connection.execute("INSERT OR REPLACE INTO pictures VALUES(?, ?, ?)", (content, *found.picture))
    if found.duration is not None:
        times = found.windows(description.window, description.stride)
        insert_many(
            connection,
            "INSERT INTO windows(content, number, start, end, whole) VALUES {}",
            [(content, number, start, end, len(times) == 1) for number, (start, end) in enumerate(times)],
        )
    return content


def _moved_file(connection, content: int | None) -> int | None:
    """A file that held this content and is no longer where it was."""
    if content is None:
        return None
    files = connection.execute(
        "SELECT files.id, roots.path, files.path FROM files JOIN roots ON roots.id = root WHERE content = ?",
        (content,),
    )
    return next((file for file, root, path in files if not exists(os.path.join(root, path))), None)


def _forget_missing(writer: IndexWriter, plan: Plan):
    """Remove the files of the folders that were looked at and are no longer there.

    What could not be read, or is in a folder that could not be listed, may be there; a link to nothing is not.
    """
    found = {video.path for video in plan.scan.videos}
    unread = [entry["path"] for entry in plan.scan.skipped if not os.path.islink(entry["path"])]
    gone = [
        file
        for path, file, *_ in writer.connection.execute(KNOWN).fetchall()
        if path not in found
        and any(is_inside(path, folder) for folder in plan.scan.paths)
        and not any(is_inside(path, folder) for folder in unread)
    ]
    plan.dropped = len(gone)
    writer.remove_files(gone)
