# SPDX-License-Identifier: Apache-2.0
"""Signals in the workers of a `DataLoader`: the main process decides what a signal means, its workers run on.

Ctrl-C and a cluster's SIGTERM reach every process of a program. A worker that died of one would break the step that
the main process is about to finish and save.
"""

import os
import signal
import sys
import threading


def leave_signals_to_the_parent(worker: int) -> None:
    """A `worker_init_fn`: this worker ignores SIGINT, and SIGTERM unless its parent sends it (as a `DataLoader` does).

    A parent that is interrupted while it receives a batch disconnects. That is no error of the worker: it prints no
    traceback then.

    Args:
        worker: its number, not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _print_unless_disconnected
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_terminated_by, args=(os.getppid(),), daemon=True).start()


def _print_unless_disconnected(kind, error, traceback) -> None:
    # Errors of the data set travel to the parent. Only the thread that hands batches over (multiprocessing's resource
    # sharer) ends here.
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _exit_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # from a thread, only this ends the process
