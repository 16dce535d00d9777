# SPDX-License-Identifier: Apache-2.0
"""Filters as people give them, and as SQL.

Conditions are on windows, contents, files and roots, joined as in `local_store.PLACES`.
"""

import difflib
import os
import sqlite3
from collections.abc import Mapping
from datetime import date, datetime

from .addresses import is_address
from .database import PATH, has_table
from .errors import SearchError
from .queries import parse_condition
from .results import FILTER_NAMES, Condition, Filters


SHORT_SIDE = "(SELECT min(width, height) FROM pictures WHERE pictures.content = windows.content)"
CONDITIONS = {
    "path": f"instr(lower({PATH}), lower(?))",  # `lower` is Python's, see database.py
    "glob": f"{PATH} GLOB ?",
    "min_seconds": "windows.end - windows.start >= ?",
    "max_seconds": "windows.end - windows.start <= ?",
    "min_duration": "contents.duration >= ?",
    "max_duration": "contents.duration <= ?",
    "after": "files.mtime_ns >= ? * 1e9",
    "before": "files.mtime_ns < ? * 1e9",
    "min_resolution": SHORT_SIDE + " >= ?",
    "max_resolution": SHORT_SIDE + " <= ?",
}
METADATA = "SELECT 1 FROM metadata WHERE metadata.file = files.id AND metadata.name = ?"
OPERATORS = ("=", "!=", "<", "<=", ">", ">=")


def make_filters(**options) -> Filters:
    """Filters from the keywords of a search; those that are None are left out.

    `after` and `before` also take a date: a `date`, a `datetime`, or ISO text such as "2024-05-01" (local time).
    `where` takes conditions as text ("year>=2020"), as `Condition`, or a mapping of names to wanted values.

    Raises:
        SearchError: a filter is unknown or has no such form.
    """
    for name in options:
        if name not in FILTER_NAMES:
            near = difflib.get_close_matches(name, FILTER_NAMES, n=1)
            raise SearchError(f"unknown option {name!r}" + (f": did you mean {near[0]}?" if near else ""))
    for name in ("after", "before"):
        if options.get(name) is not None:
            options[name] = _timestamp(options[name])
    if options.get("glob") is not None:
        options["glob"] = _whole_pattern(os.fspath(options["glob"]))
    where = options.get("where") or ()
    if isinstance(where, Mapping):
        where = [Condition(name, "=", str(value)) for name, value in where.items()]
    elif isinstance(where, str):
        where = [where]
    options["where"] = tuple(parse_condition(each) if isinstance(each, str) else each for each in where)
    for condition in options["where"]:
        if condition.operator not in OPERATORS:
            raise SearchError(f"unknown operator {condition.operator!r}: choose from {' '.join(OPERATORS)}")
    return Filters(**options)


def _timestamp(value) -> float:
    if isinstance(value, int | float):
        return float(value)
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif not isinstance(value, datetime):
            value = datetime(*date(value.year, value.month, value.day).timetuple()[:3])
        return value.timestamp()
    except (ValueError, AttributeError, OverflowError, OSError) as error:
        raise SearchError(f"{value!r} is not a date such as 2024-05-01 or 2024-05-01T18:30") from error


def _whole_pattern(pattern: str) -> str:
    """As SQLite's GLOB compares it with whole paths."""
    if pattern.startswith("~"):
        pattern = os.path.expanduser(pattern)
    if not pattern.startswith(("*", os.sep)) and not is_address(pattern):
        pattern = "*" + os.sep + pattern
    return pattern.replace("[!", "[^")


def filter_sql(connection: sqlite3.Connection, filters: Filters) -> tuple[str, list]:
    """A condition and its parameters.

    Raises:
        SearchError: the index was made before it kept what is asked for, or no video has such metadata.
    """
    conditions, values = ["windows.row IS NOT NULL"], []
    for name in filters.names:
        if name == "where":
            continue
        if name.endswith("resolution"):
            _check_table(connection, "pictures", "resolution")
        conditions.append(CONDITIONS[name])
        values.append(getattr(filters, name))
    if filters.where:
        _check_table(connection, "metadata", "metadata")
        _check_names(connection, filters.where)
    for condition in filters.where:
        comparison, compared = _comparison(condition)
        if condition.operator == "!=":
            conditions.append(f"EXISTS ({METADATA}) AND NOT EXISTS ({METADATA} AND {comparison})")
            values += [condition.name, condition.name, *compared]
        else:
            conditions.append(f"EXISTS ({METADATA} AND {comparison})")
            values += [condition.name, *compared]
    return " AND ".join(conditions), values


def _comparison(condition: Condition) -> tuple[str, list]:
    """Numbers with numbers, anything else as text, case-insensitive."""
    operator = "=" if condition.operator == "!=" else condition.operator
    text, parameters = f"lower(value) {operator} ?", [condition.value.lower()]
    try:
        number = float(condition.value)
    except ValueError:
        return f"(typeof(value) = 'text' AND {text})", parameters
    return f"(CASE typeof(value) WHEN 'text' THEN {text} ELSE value {operator} ? END)", [*parameters, number]


def _check_table(connection: sqlite3.Connection, table: str, what: str):
    if not has_table(connection, table):
        raise SearchError(f"this index has no {what} yet: `camoe index --index DIR` adds it; nothing is encoded again")


def _check_names(connection: sqlite3.Connection, where: tuple[Condition, ...]):
    for name in {condition.name for condition in where}:
        if connection.execute("SELECT 1 FROM metadata WHERE name = ? LIMIT 1", (name,)).fetchone():
            continue
        names = [known for (known,) in connection.execute("SELECT DISTINCT name FROM metadata ORDER BY name")]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names[:20]) or 'no metadata.jsonl'}"
        raise SearchError(f"no video has the metadata {name!r}: {hint}")
