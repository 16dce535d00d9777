# SPDX-License-Identifier: Apache-2.0
"""Run a script in an environment without this project, with a Hub on loopback or none."""

import json
import os
import subprocess
from pathlib import Path

from fake_hub import FakeHub


def environment(home: Path, hub: FakeHub | None) -> dict:
    """Environment variables of a user with an empty cache; the Hub is on loopback or unreachable."""
    settings = {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
    settings["OMP_NUM_THREADS"] = "1"  # rounding depends on the number of threads
    settings |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, **settings}


def run_elsewhere(python: Path, script: str, cwd: Path, hub: FakeHub | None = None, **names) -> dict:
    """The JSON that a script prints; `names` are its variables. `-I` keeps the current folder off the path."""
    setup = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run(
        [str(python), "-I", "-c", setup + script],
        capture_output=True, text=True, timeout=900, cwd=cwd, env=environment(cwd, hub),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
