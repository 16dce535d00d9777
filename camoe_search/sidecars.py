# SPDX-License-Identifier: Apache-2.0
"""What lies beside the videos: `metadata.jsonl` as in a VideoFolder, and subtitles (`film.srt`, `film.en.vtt`).

Each file's metadata and texts are in the database (database.py), with a stamp that names the files from which they
were read, their sizes and times: what has not changed is not read again. A `metadata.jsonl` speaks of the files below
its folder, by their `file_name`; where several do, the innermost has the last word.
"""

import html
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache

from .database import transaction
from .files import is_inside


logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"
SUBTITLES = (".srt", ".vtt")
MAX_SUBTITLE_BYTES = 16 << 20  # a film's have 100 KB
BATCH = 500  # files that are written together
READERS = 8  # threads that read the headers of videos
TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
CUE_TIMES = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}")
MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")  # <i>, <c.yellow>, {\an8}


def refresh_sidecars(writer, paths: list[str]):
    """Bring metadata and texts of the files under `paths` up to date, and of those that have none yet."""
    known = writer.connection.execute(
        "SELECT files.id, roots.path, files.path, stamp FROM files JOIN roots ON roots.id = root "
        "LEFT JOIN sidecars ON sidecars.file = files.id ORDER BY files.root, files.path"
    ).fetchall()
    folders: dict[str, _Folder] = {}
    changed = []
    for file, root, path, stamp in known:
        whole = os.path.join(root, path)
        if stamp is not None and not any(is_inside(whole, each) for each in paths):
            continue
        if not os.path.isdir(root):
            continue  # not mounted: keep what is known
        metadata, subtitles = _sidecars_of(root, path, folders)
        now = json.dumps([whole, *([str(each) for each in sidecar] for sidecar in [*metadata, *subtitles])])
        if now != stamp:
            changed.append((file, root, path, now, metadata, subtitles))
    for first in range(0, len(changed), BATCH):
        with transaction(writer.connection) as connection:
            for file, root, path, stamp, metadata, subtitles in changed[first : first + BATCH]:
                values = list(_metadata_of(os.path.join(root, path), metadata))
                texts = list(_texts_of(path, values, subtitles))
                for table in ("metadata", "texts"):
                    connection.execute(f"DELETE FROM {table} WHERE file = ?", (file,))
                connection.executemany("INSERT INTO metadata VALUES(?, ?, ?)", [(file, *value) for value in values])
                connection.executemany(
                    "INSERT INTO texts(file, kind, start, end, text) VALUES(?, ?, ?, ?, ?)",
                    [(file, *text) for text in texts],
                )
                connection.execute("INSERT OR REPLACE INTO sidecars VALUES(?, ?)", (file, stamp))


def refresh_pictures(writer):
    """Note the size of the picture of contents that have none, from the headers of their files."""
    from modeling_camoe.frames import VideoDecodingError, probe_video

    missing: dict[int, str] = {}
    for content, root, path in writer.connection.execute(
        "SELECT contents.id, roots.path, files.path FROM contents JOIN files ON files.content = contents.id "
        "JOIN roots ON roots.id = root WHERE contents.cause IS NULL AND contents.id NOT IN "
        "(SELECT content FROM pictures)"
    ):
        missing.setdefault(content, os.path.join(root, path))

    def probe(item: tuple[int, str]):
        try:
            info = probe_video(item[1])
        except VideoDecodingError:
            return None  # gone, or not mounted: another time
        return item[0], info.width, info.height

    with ThreadPoolExecutor(READERS) as readers:
        items = list(missing.items())
        for first in range(0, len(items), BATCH):
            found = [each for each in readers.map(probe, items[first : first + BATCH]) if each is not None]
            if found:
                with transaction(writer.connection) as connection:
                    connection.executemany("INSERT OR REPLACE INTO pictures VALUES(?, ?, ?)", found)


# --- which files -----------------------------------------------------------------------------------------------------


Sidecar = tuple[str, int, int]  # path, size, mtime_ns


class _Folder:
    """What lies in a folder beside its videos."""

    def __init__(self, path: str):
        self.metadata: list[Sidecar] = []
        self.subtitles: dict[str, list[Sidecar]] = {}  # file name without extension and language -> files
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            is_subtitle = extension.lower() in SUBTITLES
            if not is_subtitle and entry.name != METADATA_FILE:
                continue
            try:
                status = entry.stat()
            except OSError:
                continue
            sidecar = (entry.path, status.st_size, status.st_mtime_ns)
            if is_subtitle:
                self.subtitles.setdefault(stem, []).append(sidecar)
                if "." in stem:  # film.en.srt
                    self.subtitles.setdefault(stem.rpartition(".")[0], []).append(sidecar)
            else:
                self.metadata.append(sidecar)


def _sidecars_of(root: str, path: str, folders: dict[str, _Folder]) -> tuple[list[Sidecar], list[Sidecar]]:
    """The metadata files, outermost first, and the subtitles of a video."""
    metadata, folder = [], root
    for part in ["", *path.split(os.sep)[:-1]]:
        folder = os.path.join(folder, part) if part else folder
        if folder not in folders:
            folders[folder] = _Folder(folder)
        metadata += folders[folder].metadata
    return metadata, folders[folder].subtitles.get(os.path.splitext(os.path.basename(path))[0], [])


# --- what they say ---------------------------------------------------------------------------------------------------


class _Metadata:
    """The lines of a metadata.jsonl by the file that they speak of."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def rows(self) -> dict[str, dict]:
        rows, bad = {}, 0
        try:
            with open(self.path, encoding="utf-8-sig", errors="replace") as lines:
                for line in lines:
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        name = row["file_name"] if isinstance(row.get("file_name"), str) else row["video_file_name"]
                        rows[os.path.normpath(name)] = row
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        bad += 1
        except OSError as error:
            logger.warning("%s: %s", self.path, error.strerror)
        if bad:
            logger.warning("%s: %d lines are not JSON objects with a file_name; they were left out", self.path, bad)
        return rows


@lru_cache(maxsize=8)  # one is used for many files one after the other
def _read_metadata(sidecar: Sidecar) -> _Metadata:
    return _Metadata(sidecar[0])


def _metadata_of(path: str, sidecars: list[Sidecar]) -> Iterator[tuple[str, str | int | float]]:
    """Names and values; a list has its name once per element."""
    row = {}
    for sidecar in sidecars:
        relative = os.path.relpath(path, os.path.dirname(sidecar[0]))
        row |= _read_metadata(sidecar).rows.get(relative, {})
    for name in ("file_name", "video_file_name"):
        row.pop(name, None)
    yield from _flat(row)


def _flat(value, name: str = "") -> Iterator[tuple[str, str | int | float]]:
    """JSON -> names, with dots where objects are nested, and plain values."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _flat(part, name)
    elif isinstance(value, bool):
        yield _text(name), str(value).lower()
    elif isinstance(value, int | float):
        yield _text(name), value if abs(value) < 2**63 else str(value)
    elif isinstance(value, str):
        yield _text(name), _text(value)


def _text(text: str) -> str:
    """Half a surrogate pair, which JSON allows, is no text that a database keeps."""
    return text.encode("utf-8", "replace").decode()


def _texts_of(path: str, metadata: list, subtitles: list[Sidecar]) -> Iterator[tuple]:
    """Kind, start, end, text."""
    yield "name", None, None, os.path.splitext(path)[0]
    for _, value in metadata:
        if isinstance(value, str):
            yield "caption", None, None, value
    for sidecar in subtitles:
        for start, end, text in read_subtitles(sidecar[0]):
            yield "subtitle", start, end, text


def read_subtitles(path: str | os.PathLike) -> list[tuple[float, float, str]]:
    """The cues of an .srt or .vtt file: start and end in seconds, text without markup. What is neither has none."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SUBTITLE_BYTES)
    except OSError as error:
        logger.warning("%s: %s", path, error.strerror)
        return []
    cues, times, lines = [], None, []
    for line in [*_decode(content).splitlines(), ""]:
        found = CUE_TIMES.match(line)
        if (found or not line.strip()) and times is not None:
            text = " ".join(html.unescape(MARKUP.sub("", " ".join(lines))).split())
            if text and times[1] > times[0]:
                cues.append((*times, text))
            times, lines = None, []
        if found:
            times = _seconds(*found.groups()[:4]), _seconds(*found.groups()[4:])
        elif times is not None:
            lines.append(line)
    return cues


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def _decode(content: bytes) -> str:
    """Subtitles are UTF-8 mostly, and else what Windows wrote in western Europe."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")
