# SPDX-License-Identifier: Apache-2.0
"""Several processes index together."""

import json
import os
import subprocess
import sys

import pytest

from camoe_search.index import VideoIndex
from tests.video_files import cut_off, write_video


# Each process leaves a mark for every batch that it writes.
PROGRAM = """
import os, sys
from camoe_search.cli import main
from camoe_search.writer import IndexWriter
append = IndexWriter.append
def note(self, windows, vectors, failed=None):
    with open(f"{sys.argv[1]}/process-{os.environ['RANK']}", "a") as file:
        file.write("x")
    append(self, windows, vectors, failed)
IndexWriter.append = note
main(sys.argv[2:])
"""


def test_two_processes_make_the_same_index_as_one(videos, checkpoint, encoder, tmp_path):
    cut_off(write_video(videos / "broken.mp4", 48))
    (tmp_path / "program.py").write_text(PROGRAM)
    # Without GPUs `accelerate launch` starts one process only; with GPUs it runs this.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(tmp_path / "program.py"), str(tmp_path)]
    index = ["index", str(videos), "--model", str(checkpoint), "--index", str(tmp_path / "two"), "--json"]
    options = ["--num-workers", "0", "--batch-size", "2", "--no-text-tower"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "1",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, *launch, *index, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # only one process prints
    assert (report["added"], report["moments"], len(report["skipped"])) == (6, 6, 1)
    assert [(tmp_path / f"process-{rank}").read_text() for rank in (0, 1)] == [
        "xx",
        "x",
    ]  # the broken file has no moment

    one = VideoIndex.create_or_update(
        [videos], tmp_path / "one", encoder, num_workers=0, batch_size=2, text_encoder=False
    )
    two = VideoIndex.load(tmp_path / "two", encoder).table()
    one = one.table()
    assert two["path"].to_pylist() == one["path"].to_pylist()
    for ours, theirs in zip(two["vector"].to_pylist(), one["vector"].to_pylist(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert two["bias"].to_pylist() == pytest.approx(one["bias"].to_pylist(), abs=1e-6)
    assert two["is_hub"].to_pylist() == one["is_hub"].to_pylist()
    assert len(list((tmp_path / "two").glob("segment-*"))) == 2  # one per process
