# SPDX-License-Identifier: Apache-2.0
"""The results of an ablation table: one JSON file, small enough to be committed, from which its page is written.

    {"queries": {TEST: {DIRECTION: {"groups": …, "keys": …}}},
     "runs": {KEY: {"row", "seed", "train", "steps", "parameters", …, "tests": {TEST: {"results", "ranks", …}}}}}

Ranks of single queries are kept for paired tests, as base64 of compressed integers: a test of 500 queries takes about
600 characters a direction and correction.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.files import write_json
from evaluation.compare_runs import RunRanks
from evaluation.protocol import Ranks


def pack(array: np.ndarray) -> str:
    """Integers as text: their type, a colon, and base64 of their compressed bytes."""
    small = np.min_scalar_type(max(int(array.max(initial=0)), -int(array.min(initial=0)) - 1))
    if array.min(initial=0) < 0:
        small = np.dtype(np.int64)
    packed = zlib.compress(np.ascontiguousarray(array, dtype=small).tobytes(), 9)
    return f"{small.name}:{base64.b64encode(packed).decode()}"


def unpack(text: str) -> np.ndarray:
    """What `pack` made text of, (Q,) int64."""
    kind, _, packed = text.partition(":")
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=kind).astype(np.int64)


def pack_ranks(ranks: dict[str, dict[str, Ranks]]) -> dict[str, dict[str, list[str]]]:
    """Correction -> direction -> `above`, and `equal` where a candidate is."""
    return {
        correction: {
            direction: [pack(each.above), *([pack(each.equal)] if each.equal.any() else [])]
            for direction, each in directions.items()
        }
        for correction, directions in ranks.items()
    }


def unpack_ranks(packed: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, Ranks]]:
    """What `pack_ranks` packed."""

    def ranks_of(texts: list[str]) -> Ranks:
        above, *equal = map(unpack, texts)
        return Ranks(above, equal[0] if equal else np.zeros_like(above))

    return {
        correction: {direction: ranks_of(texts) for direction, texts in directions.items()}
        for correction, directions in packed.items()
    }


class AblationResults:
    """One table's file.

    Args:
        path: of the file; it need not exist.

    Raises:
        UserError: it is there and cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.queries, self.runs = content["queries"], content["runs"]
        except FileNotFoundError:
            self.queries, self.runs = {}, {}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read: {error!r}; delete it, or take it from your last commit"
            ) from error

    def add(self, key: str, run: dict):
        """Keep the results of a run's training."""
        self.runs[key] = {**run, "tests": {}}
        self.save()

    def add_test(self, key: str, test: str, scores: dict, ranks: RunRanks):
        """Keep the results of a run on a test.

        Raises:
            UserError: other runs were scored on other queries under this name.
        """
        queries = {
            direction: {"groups": pack(ranks.groups[direction]), "keys": pack(keys)}
            for direction, keys in ranks.keys.items()
        }
        if self.queries.setdefault(test, queries) != queries:
            raise UserError(
                f"{self.path} has results of other queries as {test!r}: score all runs again (delete the file), or "
                "give the test another name"
            )
        self.runs[key]["tests"][test] = {**scores, "ranks": pack_ranks(ranks.ranks)}
        self.save()

    def ranks(self, key: str, test: str) -> RunRanks:
        """The ranks of a run on a test."""
        packed = self.queries[test].items()
        groups, keys = ({d: unpack(of[name]) for d, of in packed} for name in ("groups", "keys"))
        return RunRanks(unpack_ranks(self.runs[key]["tests"][test]["ranks"]), groups, keys)

    def save(self):
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"queries": self.queries, "runs": dict(sorted(self.runs.items()))})
