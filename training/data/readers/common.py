# SPDX-License-Identifier: Apache-2.0
"""Shared by the readers of all benchmarks: the row that they return, and file reading whose errors name the file."""

import csv
import json
from collections import Counter
from collections.abc import Iterable
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


def read_json(path: Path):
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is --annotations the right folder?") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; download it again") from error


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file, stripped."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is --annotations the right folder?") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a comma-separated file with a header.

    Raises:
        UserError: the file has no such column.
    """
    rows = csv.DictReader(read_lines(path))
    for column in columns:
        if column not in (rows.fieldnames or []):
            raise UserError(
                f"{path} has no column {column!r}, only {rows.fieldnames or []}; "
                "use the file that CLIP4Clip's releases contain, with its header"
            )
    return list(rows)


def get_field(record, name: str, path: Path):
    """`record[name]` of a JSON file; if it is missing, the error names the file."""
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"{path} has a record without {name!r}: {str(record)[:80]}; is it another benchmark's file?")
    return record[name]


def check_unique(video_ids: Iterable[str], where: str | Path):
    """Raise UserError if a video appears twice; it names the first one."""
    for video_id, count in Counter(video_ids).items():
        if count > 1:
            raise UserError(f"{where} names video {video_id!r} {count} times: leave one line for each video")


def add_captions(video_ids: list[str], captions: dict[str, list[str]], listed_in: Path, described_in: Path):
    """The rows for a list of distinct videos, each with all its captions."""
    check_unique(video_ids, listed_in)
    for video_id in video_ids:
        if not captions.get(video_id):
            raise UserError(
                f"{listed_in} lists video {video_id!r}, of which {described_in} has no caption: "
                "take both files from one release"
            )
    return [AnnotatedClip(video_id, video_id, captions[video_id]) for video_id in video_ids]
