# SPDX-License-Identifier: Apache-2.0
"""The files of training/cluster: Accelerate reads the configurations, the SLURM script works as its header says."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from engine.distributed import layer_classes
from tests.programs import TRAINING
from tests.tiny_model import tiny_model


CLUSTER = TRAINING / "cluster"
CONFIGURATIONS = sorted(CLUSTER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_a_configuration_and_its_header_says_how_to_launch_it(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single_gpu" else 8) and config.mixed_precision == "bf16"
    head = " ".join(line.strip("# \\\n") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file training/cluster/{path.name}" in head
    assert "training/run_retrieval.py --config" in head


def test_the_layers_that_fsdp_wraps_are_those_of_the_towers_and_the_head():
    assert layer_classes(tiny_model()) == ["CLIPEncoderLayer", "TemporalTransformerLayer"]


# Stand-ins for the commands of a cluster: srun runs its command as node 2 of 4, the launcher records its arguments.
COMMANDS = {
    "scontrol": """
        if [ "$1" = show ]; then printf 'node0\\nnode1\\n'; else echo "$@" > "$NOTES/requeued"; fi""",
    "srun": """
        shift  # --kill-on-bad-exit
        SLURM_NODEID=2 exec "$@" """,
    "accelerate": """
        printf '%s\\n' "$@" > "$NOTES/launched"
        [ -z "$STAY" ] && exit 3
        trap 'sleep 0.2; touch "$NOTES/saved"; exit 1' TERM
        while :; do sleep 0.05; done""",
}


def submit(folder: Path, *arguments, stay: str = "") -> subprocess.Popen:
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-3]", "SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(folder), "STAY": stay}
    return subprocess.Popen(["bash", CLUSTER / "slurm_multi_node.sh", *arguments], env=environment)


def test_slurm_starts_a_launcher_on_each_node_and_passes_options_on(tmp_path):
    job = submit(tmp_path, "r.yaml", "out put", "--seed", "7")
    assert job.wait(20) == 3  # a run that fails is not queued again
    words = (tmp_path / "launched").read_text().splitlines()
    options = dict(zip(words, words[1:], strict=False))
    assert (options["--num_machines"], options["--num_processes"], options["--machine_rank"]) == ("4", "32", "2")
    assert (options["--main_process_ip"], options["--config"], options["--output_dir"]) == (
        "node0",
        "r.yaml",
        "out put",
    )
    assert words[-2:] == ["--seed", "7"] and options["--resume_from_checkpoint"] == "latest"
    assert not (tmp_path / "requeued").exists()


def test_slurm_lets_the_run_save_and_queues_the_job_again_when_its_time_is_up(tmp_path):
    job = submit(tmp_path, "r.yaml", "out", stay="1")
    deadline = time.monotonic() + 20
    while not (tmp_path / "launched").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # the launcher has set its trap
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
