# SPDX-License-Identifier: Apache-2.0
"""300 clips while workers and the driver of `camoe encode` are killed: by Ray and by one process, from a disk, from
`memory://` and from an S3 API on this machine. At the end every clip is there once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from camoe_search.columns import as_matrix
from camoe_search.encoder import CAMoEEncoder
from camoe_search.index import VideoIndex
from tests.video_files import cut_off, write_video


pytestmark = pytest.mark.slow

CLIPS, BAD = 300, 6
FILES_PER_PART = 6
PARTS = CLIPS // FILES_PER_PART
SECONDS = 900  # that a run may take on a busy machine: each worker imports torch
SUFFIXES = ("mp4", "mkv", "avi", "ts")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
RAY = ["--engine", "ray", "--concurrency", "2"]
# `memory://` is a process's own: each run fills it first.
FILL_MEMORY = """
import sys
from pathlib import Path
import fsspec
from camoe_search.cli import main
for path in Path(sys.argv[1]).iterdir():
    fsspec.filesystem("memory").pipe_file(f"/clips/{path.name}", path.read_bytes())
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Clips of several kinds, some of which are broken."""
    folder = tmp_path_factory.mktemp("library")
    for n in range(CLIPS):
        path = write_video(folder / f"clip_{n:03}.{SUFFIXES[n % len(SUFFIXES)]}", 12 + n % 9, size=(64, 48))
        if n % (CLIPS // BAD) == 7:
            cut_off(path, 0.02)
    return folder


@pytest.fixture(scope="module")
def index(library, checkpoint, tmp_path_factory):
    """What `camoe index` makes of the same clips, without a kill."""
    encoder = CAMoEEncoder.from_pretrained(str(checkpoint), device="cpu")
    folder = tmp_path_factory.mktemp("index") / "index"
    return VideoIndex.create_or_update([library], folder, encoder, num_workers=0, text_encoder=False)


# --- runs ------------------------------------------------------------------------------------------------------------


class Run:
    """A `camoe encode` in a process of its own.

    Args:
        command: all of it.
        out: a file system and the path of the parts in it.
        log: what it says goes there.
    """

    def __init__(self, command: list[str], out: tuple, log: Path):
        self.log, self.started = log, {}
        self.system, self.path = out
        with open(log, "w") as file, open(log.with_suffix(".json"), "w") as report:
            self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=report, stderr=file)

    def parts(self) -> int:
        self.system.invalidate_cache()
        there = self.system.ls(self.path, detail=False) if self.system.exists(self.path) else []
        return sum("part-" in Path(name).name and not Path(name).name.startswith(".") for name in there)

    def wait_for_parts(self, count: int):
        """Until so many are there. Then the run must not be at its end: a kill would show nothing."""
        wait_for(lambda: self.parts() >= count or self.process.poll() is not None, f"{count} parts", 0.02)
        assert self.process.poll() is None and self.parts() < PARTS - 4, self.log.read_text()[-3000:]

    def kill_worker(self):
        """One of Ray's two."""
        self.started |= descendants(self.process.pid)
        workers = [number for number, name in self.started.items() if "MapWorker" in name and is_alive(number)]
        assert len(workers) == 2, self.started
        os.kill(workers[0], signal.SIGKILL)

    def kill(self):
        """The driver. Its workers end with it."""
        self.started |= descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        workers = [number for number, name in self.started.items() if "MapWorker" in name]
        wait_for(lambda: not any(map(is_alive, workers)), "workers outlive their driver")

    def report(self) -> dict:
        """Of a run that ends by itself."""
        assert self.process.wait(SECONDS) == 0, self.log.read_text()[-3000:]
        text = self.log.with_suffix(".json").read_text()
        return json.loads(text[text.index("{") :])


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


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(condition, what: str, pause: float = 0.1):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(pause)


@pytest.fixture(scope="module")
def s3(library):
    """An S3 API on this machine with the clips; the variables of the environment by which it is found."""
    moto_server = pytest.importorskip("moto.server", reason="an S3 API on this machine: pip install moto[server] s3fs")
    s3fs = pytest.importorskip("s3fs", reason="an S3 API on this machine: pip install moto[server] s3fs")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (variables | {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "*"}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        system = fsspec.filesystem("s3")
        system.makedirs("killed", exist_ok=True)
        for path in library.iterdir():
            system.pipe_file(f"killed/clips/{path.name}", path.read_bytes())
        yield system
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module", params=["ray from a disk", "ray from s3", "local from memory"])
def killed(request, library, checkpoint, tmp_path_factory):
    """Runs that were killed, and the last, which was not: `before` parts, its `report`, all `rows`; `prefix` of paths.

    With Ray, both lose a worker in the middle, too: the last has to do that worker's part again.
    """
    by_ray, source = request.param.startswith("ray"), request.param.rpartition(" ")[2]
    if by_ray:
        pytest.importorskip("ray", reason='Ray is not installed: pip install "camoe[cluster]"')
    folder = tmp_path_factory.mktemp("killed")
    out, system, prefix = str(folder / "parts"), fsspec.filesystem("file"), f"{library}/"
    if source == "s3":
        out, system, prefix = "s3://killed/parts", request.getfixturevalue("s3"), "s3://killed/clips/"
    begin = [sys.executable, "-m", "camoe_search"]
    if source == "memory":
        begin, prefix = [sys.executable, "-c", FILL_MEMORY, str(library)], "memory://clips/"
    arguments = ["encode", prefix.rstrip("/"), "--model", checkpoint, "--out", out, "--num-workers", 0]
    arguments += ["--files-per-part", FILES_PER_PART, "--device", "cpu", "--json", *(RAY if by_ray else ())]
    command = [*begin, *map(str, arguments)]
    path = out.removeprefix("s3://")

    first = Run(command, (system, path), folder / "first.log")
    try:
        first.wait_for_parts(3)
        if by_ray:
            first.kill_worker()
            first.wait_for_parts(first.parts() + 6)
    finally:
        first.kill()
    before = first.parts()
    last = Run(command, (system, path), folder / "last.log")
    if by_ray:
        last.wait_for_parts(before + 3)
        last.kill_worker()
    report = last.report()
    system.invalidate_cache()
    names = system.ls(path, detail=False)
    rows = pa.concat_tables([pyarrow.parquet.read_table(system.open(name)) for name in names]).sort_by("path")
    yield SimpleNamespace(before=before, report=report, rows=rows, names=names, prefix=prefix)
    wait_for(lambda: not any(map(is_alive, first.started)), "processes of Ray are left", 1.0)


# --- what they leave -------------------------------------------------------------------------------------------------


def test_what_a_killed_run_finished_is_not_done_again(killed):
    assert 3 <= killed.before < PARTS
    assert killed.report["present"] == killed.before * FILES_PER_PART
    assert killed.report["parts"] == PARTS - killed.before


def test_every_clip_is_there_once(killed, library):
    assert killed.rows["path"].to_pylist() == sorted(killed.prefix + path.name for path in library.iterdir())
    assert len(killed.names) == PARTS  # and nothing unfinished


def test_what_cannot_be_read_is_listed_once(killed, index):
    bad = [row["path"].removeprefix(killed.prefix) for row in killed.rows.to_pylist() if row["error"] is not None]
    assert len(bad) == BAD
    assert bad == sorted(os.path.basename(entry["path"]) for entry in index.report.skipped)


def test_vectors_are_those_of_an_index(killed, index):
    good = killed.rows.filter(pa.compute.is_null(killed.rows["error"]))
    table = index.table().sort_by("path")
    names = [os.path.basename(path) for path in table["path"].to_pylist()]
    assert [os.path.basename(path) for path in good["path"].to_pylist()] == names
    # Batches have other clips in them, and a product of another size sums in another order.
    np.testing.assert_allclose(as_matrix(good["vector"]), as_matrix(table["vector"]), atol=1e-6)
