# SPDX-License-Identifier: Apache-2.0
"""The workers that decode for a training program, and signals."""

import multiprocessing
import os
import sys
from multiprocessing import connection, resource_sharer

import pytest

from data.workers import leave_signals_to_the_parent


CONTEXT = multiprocessing.get_context("fork")


def hand_out_a_file(file, errors, pipe):
    """A worker as a `DataLoader` has it: a batch travels as open files that the parent fetches."""
    sys.stderr = open(errors, "w", buffering=1)
    leave_signals_to_the_parent(0)
    with open(file) as opened:
        pipe.send(resource_sharer.DupFd(opened.fileno()))
    pipe.recv()


@pytest.mark.parametrize(("unknown_key", "in_errors"), [(False, ""), (True, "KeyError: 12345")])
def test_a_parent_that_disconnects_is_no_error_of_the_worker_but_others_are_shown(tmp_path, unknown_key, in_errors):
    (tmp_path / "batch").write_text("frames")
    here, there = CONTEXT.Pipe()
    worker = CONTEXT.Process(target=hand_out_a_file, args=(tmp_path / "batch", tmp_path / "errors", there))
    worker.start()
    batch = here.recv()
    with connection.Client(batch._id[0], authkey=multiprocessing.current_process().authkey) as interrupted:
        if unknown_key:
            interrupted.send((12345, os.getpid()))
    with open(batch.detach()) as received:  # the worker serves one after the other: it has seen the first to its end
        assert received.read() == "frames"
    here.send("end")
    worker.join(30)
    errors = (tmp_path / "errors").read_text()
    assert worker.exitcode == 0 and in_errors in errors and bool(errors) == unknown_key
