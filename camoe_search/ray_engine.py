# SPDX-License-Identifier: Apache-2.0
"""`camoe encode --engine ray`: Ray Data hands parts to a pool of actors, each with the model loaded once.

A block of the data set is the rows of one part; an actor encodes and writes it, and returns a report. Parts are named
by what they hold and appear when they are complete, so a part that was in a lost worker is simply done again: Ray
starts another actor and gives it the same rows. Without a cluster (RAY_ADDRESS), Ray is started on this machine.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from .encode_parts import EncodeReport
from .errors import SearchError
from .parts import Part


if TYPE_CHECKING:
    from .encode_library import Job

NAME, KEPT = "__part", "__kept"  # columns of the rows that an actor gets


class PartEncoder:
    """An actor: encodes one part at a time.

    Args:
        job: what does not change from part to part.
    """

    def __init__(self, job: "Job"):
        self.job, self.encoder = job, None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows of a part -> its report, one row. What concerns the whole run is a `failure` in it."""
        try:
            if self.encoder is None:
                self.encoder = self.job.load()
            part = Part(rows[NAME][0].as_py(), rows.drop_columns([NAME, KEPT]), rows[KEPT][0].as_py())
            (report,) = self.job.encode([part], self.encoder)
            return _answer(json.dumps(dataclasses.asdict(report)), None)
        except SearchError as error:  # the disk is full, say: no other part would do better
            return _answer(None, str(error))


def _answer(report: str | None, failure: str | None) -> pa.Table:
    return pa.table({"report": pa.array([report], pa.string()), "failure": pa.array([failure], pa.string())})


def encode_with_ray(job: "Job", parts: list[Part]) -> Iterator[EncodeReport]:
    """Encode parts on a cluster, or on this machine.

    Yields:
        a report of each part.

    Raises:
        SearchError: a part cannot be written, or Ray gives up.
    """
    if not parts:
        return
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "camoe[cluster]"') from error
    options = job.options
    with _started(ray, options) as is_ours:
        if is_ours:
            _quiet(ray)
        tables = [
            part.rows.append_column(NAME, pa.array([part.name] * len(part.rows)))
            .append_column(KEPT, pa.array([part.kept] * len(part.rows)))
            for part in parts
        ]  # fmt: skip
        reports = ray.data.from_arrow(tables).map_batches(
            PartEncoder,
            fn_constructor_args=(job,),
            batch_size=None,  # a block, which is a part
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=options.concurrency[0], max_size=options.concurrency[1]),
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus or None,
        )
        try:
            for row in reports.iter_rows():
                if row["failure"]:
                    raise SearchError(row["failure"])
                yield EncodeReport(**json.loads(row["report"]))
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).strip().splitlines()[-1:])
            raise SearchError(f"Ray gave up: {reason}; run the same command again, finished parts are kept") from error


@contextlib.contextmanager
def _started(ray, options) -> Iterator[bool]:
    """Ray, running; whether it was started here."""
    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else the notes of its C++ part stand among ours
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 leaves workers what others do not want of a core
        # One more than the actors take, or nothing would be left for the tasks that feed them, which would wait for
        # ever. These are places in Ray's books, not cores.
        places = math.ceil(options.concurrency[1] * options.num_cpus) + 1
        ray.init(
            num_cpus=max(places, os.cpu_count() or 1), include_dashboard=False, logging_level=logging.ERROR,
            log_to_driver=False, _node_ip_address="127.0.0.1",
        )  # fmt: skip
    try:
        yield True
    finally:
        ray.shutdown()


def _quiet(ray):
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # we have our own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
