# SPDX-License-Identifier: Apache-2.0
"""Shared by the readers of all benchmarks: the row that they return, and file reading whose errors name the file."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass
class AnnotatedClip:
    """One row of a split: a video, or a window of one, and its captions."""

    video_id: str  # distinct within a split
    file_name: str  # as the annotations name the video, with or without its extension
    captions: list[str]  # at least one
    start: float | None = None  # seconds; None: from the beginning
    end: float | None = None  # seconds; None: to the end


Splits = dict[str, list[AnnotatedClip]]  # split name -> its rows

BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# Some lists have the names of files instead of ids.
VIDEO_SUFFIX = re.compile(r"\.(avi|mkv|mov|mp4|webm)$", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be read, or holds something else than the file that it is named after.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is --annotations the right folder?") from error
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in that clone")
    if content[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is a web page that was saved under this name: download the file itself")
    return content


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, in UTF-16 with one, or else in cp1252."""
    content = read_bytes(path)
    encodings = [name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)] or ["utf-8", "cp1252"]
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")  # takes any byte


def read_json(path: Path):
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; download it again") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """(number, stripped line) of the non-blank lines; only line feeds and carriage returns end a line."""
    lines = re.split(r"\r\n|\n|\r", read_text(path))
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file, stripped."""
    return [line for _, line in numbered_lines(path)]


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a comma-separated file with a header: the given columns, stripped.

    Raises:
        UserError: the file has no such column, or a row has nothing in it or more fields than the header.
    """
    # A quoted field may hold line ends. Strict: a quote that is never closed would swallow the lines after it.
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = {(name or "").strip(): name for name in rows.fieldnames or []}
        for column in columns:
            if column not in names:
                raise UserError(
                    f"{path} has no column {column!r}, only {list(names)}; "
                    "use the file that CLIP4Clip's releases contain, with its header"
                )
        found = []
        for row in rows:
            if None in row:  # the caption would be cut at its comma
                raise UserError(
                    f"{path}, line {rows.line_num}, has more fields than the header: put the text that has a comma "
                    "in double quotes"
                )
            values = {column: (row[names[column]] or "").strip() for column in columns}
            empty = [column for column, value in values.items() if not value]
            if empty:
                raise UserError(f"{path}, line {rows.line_num}, has no {empty[0]!r}: correct or remove the line")
            found.append(values)
    except csv.Error as error:
        line = rows.line_num + 1  # where the row begins
        raise UserError(f"{path}, line {line}, is not comma-separated text: {error}; correct its quotes") from error
    return found


def get_field(record, name: str, path: Path):
    """`record[name]` of a JSON file; if it is missing, the error names the file."""
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"{path} has a record without {name!r}: {str(record)[:80]}; is it another benchmark's file?")
    return record[name]


def get_name(record, name: str, path: Path) -> str:
    """`record[name]` of a JSON file, where it names a video: a text, or a number as a text."""
    value = get_field(record, name, path)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{path} has a record whose {name!r} is no name: {str(value)[:80]!r}; correct or remove it")
    return str(value)


def twin_in(records: Mapping, name: str) -> str | None:
    """A name as the records have it: as it is, without the suffix of a video, or with or without "v_"."""
    names = (name, re.sub(VIDEO_SUFFIX, "", name), f"v_{name}", name.removeprefix("v_"))
    return next((name for name in names if name in records), None)


def caption_list(value, where: str | Path, video_id: str) -> list[str]:
    """The captions of one video as a list of texts. A text alone is one caption; so is a list of words in the list.

    Raises:
        UserError: there is something else than texts.
    """
    captions = [value] if isinstance(value, str) else value
    if isinstance(captions, list | tuple):
        joined = [" ".join(c) if isinstance(c, list | tuple) and _are_texts(c) else c for c in captions]
        if _are_texts(joined):
            return [clean(text) for text in joined]
    raise UserError(f"{where}: the captions of video {video_id!r} are not texts: {str(value)[:80]}; correct them")


def _are_texts(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def clean(text: str) -> str:
    """One line without doubled spaces, and without half surrogate pairs, which no table can hold."""
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")


def by_video(data, path: Path, names: tuple[str, ...] = ("video_id", "video", "id")) -> dict[str, dict]:
    """The records of a JSON file by video, from {video: record} or from a list of records that name their video.

    Raises:
        UserError: it is neither.
    """
    if isinstance(data, Mapping):
        return dict(data)
    if not isinstance(data, list):
        raise UserError(f"{path} holds a {type(data).__name__}, not the records of videos; download it again")
    found = {}
    for record in data:
        name = next((name for name in names if isinstance(record, dict) and name in record), names[0])
        video_id = get_name(record, name, path)
        if video_id in found:
            raise UserError(f"{path} has two records of video {video_id!r}: keep one")
        found[video_id] = record
    return found


def check_unique(video_ids: Iterable[str], where: str | Path):
    """Raise UserError if a video appears twice; it names the first one."""
    for video_id, count in Counter(video_ids).items():
        if count > 1:
            raise UserError(f"{where} names video {video_id!r} {count} times: keep one line for each video")


def add_captions(video_ids: list[str], captions: dict[str, list[str]], listed_in: Path, described_in: Path):
    """The rows for a list of distinct videos, each with all its captions that are not blank."""
    video_ids = [twin_in(captions, name) or name for name in video_ids]
    check_unique(video_ids, listed_in)
    clips = [AnnotatedClip(name, name, [text for text in captions.get(name, []) if text]) for name in video_ids]
    for clip in clips:
        if not clip.captions:
            raise UserError(
                f"{listed_in} lists video {clip.video_id!r}, of which {described_in} has no caption: "
                "take both files from one release"
            )
    return clips
