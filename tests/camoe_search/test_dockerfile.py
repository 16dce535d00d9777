# SPDX-License-Identifier: Apache-2.0
"""The steps of the Dockerfile, outside of Docker: what it copies, installs, starts and asks for its health."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from camoe_search.index import VideoIndex
from camoe_search.serve import listen


ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef"


def steps(instruction: str) -> list[str]:
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(instruction + " ")]


@pytest.fixture
def source(tmp_path) -> Path:
    """What COPY puts into the image."""
    folder = tmp_path / "src"
    folder.mkdir()
    for step in steps("COPY"):
        *names, target = step.split()
        for name in names:
            place = folder / target / name if target == "./" else folder / target
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, place)
    return folder


def test_what_is_copied_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {name for step in steps("COPY") for name in step.split()[:-1]}


def test_the_copied_files_make_a_package_with_the_extra_and_the_page(source, tmp_path):
    (install,) = [step for step in steps("RUN") if step.startswith("pip install")]
    assert shlex.split(install)[-1] == ".[search]"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("camoe-*.whl")
    with zipfile.ZipFile(wheel) as package:
        names = package.namelist()
        (metadata,) = [package.read(name).decode() for name in names if name.endswith("METADATA")]
    assert {"camoe_search/web/page.html", "camoe_search/web/page.js", "camoe_search/serve.py"} <= set(names)
    assert "Provides-Extra: search" in metadata
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        assert re.search(rf'Requires-Dist: {name}>=.*extra == "search"', metadata)


def test_the_container_s_command_serves_and_is_healthy(some_videos, checkpoint, tmp_path):
    index = VideoIndex.create_or_update(
        [some_videos], tmp_path / "index", str(checkpoint), device="cpu", num_workers=0
    )
    (tmp_path / "token").write_text(TOKEN)
    with listen("127.0.0.1", 0) as listener:  # a port that is free, instead of the container's
        port = str(listener.getsockname()[1])
    replaced = {"/index": str(index.folder), "/token": str(tmp_path / "token"), "7860": port}
    (exposed,) = steps("EXPOSE")
    (line,) = [step for step in steps("CMD")]
    program, *arguments = json.loads(line)
    assert (program, exposed) == ("camoe", "7860") and "7860" in arguments
    command = [sys.executable, "-m", "camoe_search", *(replaced.get(argument, argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    health = json.loads(steps("HEALTHCHECK")[0].removeprefix("CMD "))
    health = [sys.executable, *(part.replace("7860", port) for part in health[1:])]
    assert subprocess.run(health, capture_output=True).returncode != 0
    log = tmp_path / "log"
    with log.open("w") as output:
        serving = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        while "serving" not in log.read_text():
            assert serving.poll() is None, log.read_text()
            time.sleep(0.1)
        end = time.monotonic() + 30
        while subprocess.run(health, capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.1)
        assert subprocess.run(health).returncode == 0
        request = Request(f"http://127.0.0.1:{port}/api/search?q=a+star", headers={"Authorization": f"Bearer {TOKEN}"})
        assert len(json.load(urlopen(request))["hits"]) == 6
    finally:
        serving.terminate()
        serving.wait(timeout=30)
    assert re.search(r'"GET /healthz HTTP/1\.1" 200', log.read_text()) and TOKEN not in log.read_text()
