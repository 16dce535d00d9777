# SPDX-License-Identifier: Apache-2.0
"""Ranks of single queries, kept beside eval_results.json, and the paired test between two runs on the same queries.

At R@1 = 45 on 1,000 queries the interval of one run is 6 points wide, and this field argues about half a point: so two
runs are compared query by query. Keys bring their queries into one order; runs whose queries differ are not compared.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from data.errors import UserError
from data.files import write_whole

from .protocol import RECALL_AT, Ranks, paired_test, recalls
from .scoring import plain_table


RANKS_FILE = "eval_ranks.safetensors"


def query_key(*parts: str) -> int:
    """What a query is known by: 64 bits of a hash of, for example, its caption and its video's id."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@dataclass
class RunRanks:
    """One run, query by query."""

    ranks: dict[str, dict[str, Ranks]]  # correction -> direction -> ranks of Q queries
    groups: dict[str, np.ndarray]  # direction -> (Q,) number of a query's video; its captions are resampled together
    keys: dict[str, np.ndarray]  # direction -> (Q,) int64, what each query is known by

    def save(self, path: str | os.PathLike) -> None:
        """Write them, whole or not at all."""
        ranks = {
            name: {direction: np.stack([of.above, of.equal]) for direction, of in directions.items()}
            for name, directions in self.ranks.items()
        }
        tables = {**ranks, "groups": self.groups, "keys": self.keys}
        arrays = {f"{name}/{key}": np.ascontiguousarray(x) for name, by in tables.items() for key, x in by.items()}
        write_whole(path, save(arrays))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RunRanks":
        """What `save` wrote."""
        tables: dict[str, dict[str, np.ndarray]] = {}
        for name, array in load_file(path).items():
            table, direction = name.split("/")
            tables.setdefault(table, {})[direction] = array if table in ("groups", "keys") else Ranks(*array)
        return cls(groups=tables.pop("groups"), keys=tables.pop("keys"), ranks=tables)


def load_run(results_path: str | os.PathLike) -> RunRanks:
    """The ranks beside an eval_results.json. Raises: UserError where they cannot be read, or are of another run."""
    results_path = Path(results_path)
    try:
        results = json.loads(results_path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"cannot read the results {results_path}: {error!r}"
        raise UserError(f"{cause}; give the eval_results.json of a run") from error
    path = results_path.with_name(RANKS_FILE)
    if not path.is_file():
        remedy = f"copy it there from beside the original of {results_path.name}, or score that run again"
        raise UserError(f"{path} is missing: a paired test needs the rank of every query; {remedy}")
    try:
        run = RunRanks.load(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the ranks {path}: {error}; score that run again") from error
    for correction, directions in results.items():
        for direction, metrics in directions.items():
            ranks = run.ranks.get(correction, {}).get(direction)
            if ranks is None or not np.isclose(recalls(ranks)["MnR"], metrics["MnR"]):
                what = f"their mean ranks of {correction}, {direction} differ; score that run again"
                raise UserError(f"{path} holds the ranks of another run than {results_path}: {what}")
    return run


def compare_runs(mine: RunRanks, other: RunRanks, other_name: str = "the other run") -> dict:
    """Correction -> direction -> "R@1", ... -> a paired test of mine - other, of what both runs have.

    Raises: UserError where the queries of a direction are not the same.
    """
    tests: dict[str, dict] = {}
    for correction in (name for name in mine.ranks if name in other.ranks):
        for direction in (name for name in mine.ranks[correction] if name in other.ranks[correction]):
            keys = mine.keys[direction], other.keys[direction]
            order = [np.argsort(of_run, kind="stable") for of_run in keys]
            if not np.array_equal(keys[0][order[0]], keys[1][order[1]]):
                raise UserError(
                    f"{other_name} was scored on other queries ({direction}: {len(keys[0])} here, "
                    f"{len(keys[1])} there, {len(np.intersect1d(*keys))} in both): a paired test needs the same "
                    "split, captions and videos; score both on the same data"
                )
            ranks = mine.ranks[correction][direction][order[0]], other.ranks[correction][direction][order[1]]
            groups = mine.groups[direction][order[0]]
            by_metric = {f"R@{k}": paired_test(*ranks, groups, at=k) for k in RECALL_AT}
            tests.setdefault(correction, {})[direction] = by_metric
    return tests


def comparison_table(tests: dict) -> str:
    """Plain text, a row per correction and direction: difference [95 % interval] p-value."""
    metrics = [f"R@{k}" for k in RECALL_AT]
    rows = [("correction", "direction", *metrics)]
    for correction, directions in tests.items():
        for direction, by_metric in directions.items():
            rows.append((correction, direction.replace("_", " "), *(_cell(by_metric[name]) for name in metrics)))
    return plain_table(rows)


def _cell(test: dict) -> str:
    low, high = test["ci95"]
    return f"{test['difference']:+.1f} [{low:+.1f}, {high:+.1f}] p {test['p_value']:.4f}"
