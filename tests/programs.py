# SPDX-License-Identifier: Apache-2.0
"""Runs the programs in training/ as separate processes, by a fork instead of ten seconds of imports.

A server process imports once what the programs import, and forks for each program (multiprocessing's forkserver). The
child has its own process group, random state and output files, and runs the program's file as `__main__` with its
arguments. It can be killed, interrupted and waited for like any process.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "training"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.program_imports"])


class RunningProgram:
    """A running program of training/, with methods like those of `subprocess.Popen`.

    Args:
        name: file in training/, or the path of a script. arguments: of its command line.
        code: executed before the program, in its process. environment: additional variables.
    """

    def __init__(self, name: str, *arguments, code: str | None = None, environment: dict | None = None):
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / stream for stream in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._process = _context.Process(
            target=_run, args=(TRAINING / name, [str(a) for a in arguments], code, environment or {}, *self._files)
        )
        self._process.start()
        self.args = [name, *arguments]
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal_to_group(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
        return self._process.exitcode

    def output(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return tuple(file.read_text() for file in self._files)

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def send_signal_to_group(self, number: int):
        """To the program and its workers, like a terminal on Ctrl-C and a cluster at the end of a job."""
        os.killpg(self.pid, number)


def run_program(name: str, *arguments, code: str | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a program of training/ to its end."""
    running = RunningProgram(name, *arguments, code=code)
    stdout, stderr = running.communicate(timeout)
    return subprocess.CompletedProcess(running.args, running.returncode, stdout, stderr)


def run_processes(world: int, name: str, *arguments, code: str | None = None) -> list[subprocess.CompletedProcess]:
    """Run a program as `world` processes of one distributed run on the CPU, like a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        RunningProgram(name, *arguments, code=code, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    deadline = time.monotonic() + 300
    while any(running.poll() is None for running in ranks):
        failed = time.monotonic() > deadline or any(running.poll() for running in ranks)
        for running in ranks:
            if failed and running.poll() is None:  # it would wait for the one that failed
                running.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    outputs = [running.communicate(timeout=10) for running in ranks]
    return [
        subprocess.CompletedProcess(running.args, running.returncode, *output)
        for running, output in zip(ranks, outputs, strict=True)
    ]


def wait_until(happened, running: RunningProgram, timeout: float = 120):
    """Wait for `happened()`, as long as the program runs."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert running.poll() is None, running.output()[1]
        assert time.monotonic() < deadline, running.output()[1]
        time.sleep(0.01)


def _run(path: Path, arguments: list[str], code: str | None, environment: dict, output: Path, errors: Path):
    os.environ.update(environment)
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a normal start
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for descriptor, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    sys.argv = [str(path), *arguments]
    if code is not None:
        exec(code, {"__name__": "before_the_program"})
    runpy.run_path(str(path), run_name="__main__")
