# SPDX-License-Identifier: Apache-2.0
"""`camoe encode --engine ray` on this machine: workers and the driver are killed, and every clip is there once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from camoe_search.columns import as_matrix
from camoe_search.index import VideoIndex
from tests.camoe_search.test_encode import rows_of
from tests.video_files import cut_off, write_video


pytest.importorskip("ray", reason='Ray is not installed: pip install "camoe[cluster]"')

CLIPS, BAD = 300, 6
FILES_PER_PART = 10
SECONDS = 1800  # that a run may take on a busy machine: each worker imports torch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Clips of several kinds, some of which are broken."""
    folder = tmp_path_factory.mktemp("library")
    suffixes = ("mp4", "mkv", "avi", "ts")
    for n in range(CLIPS):
        path = write_video(folder / f"clip_{n:03}.{suffixes[n % len(suffixes)]}", 12 + n % 9, size=(64, 48))
        if n % (CLIPS // BAD) == 7:
            cut_off(path, 0.02)
    return folder


def command(library, checkpoint, out) -> list[str]:
    arguments = ["encode", library, "--model", checkpoint, "--out", out, "--engine", "ray", "--concurrency", 2]
    arguments += ["--num-workers", 0, "--files-per-part", FILES_PER_PART, "--device", "cpu", "--json"]
    return [sys.executable, "-m", "camoe_search", *map(str, arguments)]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}


def descendants(process: int) -> dict[int, str]:
    """The processes that a process started, and theirs: number -> command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int(re.search(r"\nPPid:\t(\d+)", (entry / "status").read_text())[1])
                commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has just ended
    found, new = {}, {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new and child not in found}
        found |= {child: commands.get(child, "") for child in new}
    return found


def wait_for(condition, what: str):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_lost_workers_and_a_lost_driver_cost_no_clip_and_give_none_twice(library, checkpoint, encoder, tmp_path):
    out, log = tmp_path / "parts", tmp_path / "log"
    parts = lambda: len(list(out.glob("part-*")))  # noqa: E731
    with open(log, "w") as file:
        driver = subprocess.Popen(
            command(library, checkpoint, out), env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )
        started = {}
        try:
            wait_for(lambda: parts() >= 3 or driver.poll() is not None, "no part came")
            assert driver.poll() is None, log.read_text()[-3000:]
            started = descendants(driver.pid)
            workers = [number for number, name in started.items() if "MapWorker" in name]
            assert len(workers) == 2, started
            os.kill(workers[0], signal.SIGKILL)
            killed_at = parts()
            wait_for(lambda: parts() >= killed_at + 6 or driver.poll() is not None, "nothing came after the worker")
            started |= descendants(driver.pid)
            assert driver.poll() is None and parts() < CLIPS // FILES_PER_PART, log.read_text()[-3000:]
        finally:
            driver.kill()
            driver.wait()
        # Ray's own processes end with their driver.
        wait_for(lambda: not any(Path(f"/proc/{n}").exists() for n in started), "processes of Ray are left")
    before = parts()
    done = subprocess.run(
        command(library, checkpoint, out), env=os.environ | ENVIRONMENT, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["present"] == before * FILES_PER_PART
    assert report["parts"] == CLIPS // FILES_PER_PART - before

    rows = rows_of(out).sort_by("path")
    assert rows["path"].to_pylist() == sorted(map(str, library.iterdir()))  # each once
    assert len(list(out.iterdir())) == CLIPS // FILES_PER_PART
    bad = [row["path"] for row in rows.to_pylist() if row["error"] is not None]
    index = VideoIndex.create_or_update([library], tmp_path / "index", encoder, num_workers=0, text_encoder=False)
    assert len(bad) == BAD and bad == sorted(entry["path"] for entry in index.report.skipped)
    good = rows.filter(np.array([row is None for row in rows["error"].to_pylist()]))
    table = index.table()
    assert good["path"].to_pylist() == table["path"].to_pylist()
    # Batches have other clips in them, and a product of another size sums in another order.
    np.testing.assert_allclose(as_matrix(good["vector"]), as_matrix(table["vector"]), atol=1e-6)


def test_ray_that_is_not_installed_is_named(videos, checkpoint, tmp_path, capsys, monkeypatch):
    from tests.camoe_search.test_encode import mistake

    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["encode", videos, "--model", checkpoint, "--out", tmp_path / "parts", "--engine", "ray"]
    assert 'pip install "camoe[cluster]"' in mistake(capsys, *arguments)
