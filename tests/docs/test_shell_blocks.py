# SPDX-License-Identifier: Apache-2.0
"""The commands of README and docs run.

A block marked `bash` is run here, in a folder with small models, clips and annotation files under the names that the
pages use; programs get options that make them end in seconds. A block marked `sh` needs the network, a server, a
cluster or hours: only its options and files are checked (test_pages.py). What runs inside other blocks of a page, for
example what saves a matrix, is run in its place.
"""

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.benchmark_files import write_msrvtt, write_videos
from tests.docs.test_pages import PAGES, ROOT, blocks
from tests.hub_cards.tiny_run import write_run
from tests.programs import run_program
from tests.tiny_backbones import tiny_backbone
from tests.video_files import write_video


# Program -> options that make it small.
SMALL = {
    "make_motion_clips.py": "--num_train 8 --num_validation 4 --num_test 4 --num_workers 1",
    "run_retrieval.py": "--max_train_steps 1 --batch_size 4 --num_frames 3 --max_words 20 --num_workers 0",
    "evaluate_retrieval.py": "--num_workers 0 --bootstrap 10",
    "camoe index": "--num-workers 0 --no-text-tower",
    "camoe encode": "--num-workers 0",
}
# Run before a program: it starts in the page's folder, and a server ends when it would begin to listen.
BEFORE = """
import os, sys
os.chdir({folder!r})
sys.path.insert(0, {home!r})
if {serves}:
    import uvicorn
    uvicorn.Server.run = lambda server, sockets: print("listening")
"""
# A release is loaded in this process, not in a fresh one: tests/hub_cards does that.
LOADS_HERE = """
import json, subprocess
import check_release
check_release.check_sentence_transformer = lambda folder, vectors: None
load = lambda command: json.dumps(check_release.load_release(command[-1]))
subprocess.run = lambda command, **options: subprocess.CompletedProcess(command, 0, load(command), "")
"""
PAGES_WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A checkout with what the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for room in ("training", "hub_cards"):
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "camoe.py").write_text("from camoe_search.cli import main\n\nif __name__ == '__main__':\n    main()\n")
    for name in ("base-patch32", "base-patch16"):
        tiny_backbone(tmp_path / f"openai/clip-vit-{name}", "clip")
    write_run(tmp_path / "runs/demo", 0)
    write_videos(tmp_path / "MSRVTT_Videos", write_msrvtt(tmp_path / "msrvtt_data"))
    clips = ("Videos/a.mp4", "Videos/b.mp4", "data/motion_demo/test/test_00279.mp4")
    for name in (*clips, "videos/2024/beach.mp4", "videos/old/a.mp4", "videos/raw/b.mov"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / name, num_frames=8 + len(name))
    (tmp_path / "columns.txt").write_text("0\n1\n")
    (tmp_path / "query_log.txt").write_text("a dog on a beach\na red star\n")
    (tmp_path / "films.csv").write_text("path\nVideos/a.mp4\nVideos/b.mp4\n")
    return tmp_path


def commands(block: str) -> list[list[str]]:
    """The words of each command; `~` is the home folder."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[os.path.expanduser(word) for word in command] for command in words if command]


def run_command(words: list[str], folder: Path) -> str:
    """What a command prints."""
    program, *arguments = words
    if program == "pip":
        return check_extras(" ".join(arguments))
    if program == "make":  # what it would do: its targets are tested as commands of their own
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if program == "camoe":
        program, small = "camoe.py", SMALL.get(f"camoe {arguments[0]}", "")
    else:
        assert program == "python" or words[:2] == ["accelerate", "launch"], f"unknown command {words}"
        position = next(index for index, word in enumerate(words) if word.endswith(".py"))
        program, arguments = words[position], words[position + 1 :]
        small = SMALL.get(Path(program).name, "")
    home = str((folder / program).parent)
    code = BEFORE.format(folder=str(folder), home=home, serves=words[:2] == ["camoe", "serve"])
    code += LOADS_HERE if program.endswith("hub_cards/release.py") else ""
    done = run_program(folder / program, *arguments, *small.split(), code=code)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_extras(arguments: str) -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"(?:\.|camoe)\[([\w,]+)\]", arguments)
    assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras
    return extras


def stand_in_runs(folder: Path):
    """runs/a and runs/b are two runs that were scored."""
    scored = folder / "runs/msrvtt_7k"
    for name in ("a", "b"):
        if (scored / "eval_results.json").exists() and not (folder / "runs" / name).exists():
            shutil.copytree(scored, folder / "runs" / name)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, workplace):
    if page.name == "training.md":  # it names data that Evaluate prepares, and makes the demo itself
        shutil.rmtree(workplace / "data/motion_demo")
        shutil.rmtree(workplace / "runs/demo")
        prepare = "python training/prepare_benchmark.py msrvtt --annotations msrvtt_data --videos MSRVTT_Videos"
        run_command([*prepare.split(), "--output", "data/msrvtt"], workplace)
    if page.name == "evaluation.md":
        np.save("theirs.npy", np.eye(2, dtype=np.float32))
    printed = []
    for block in blocks(page, "bash"):
        for command in commands(block):
            stand_in_runs(workplace)
            printed.append(run_command(command, workplace))
    made = {
        "README.md": ["my-index/index.sqlite"],
        "search.md": ["found.png"],
        "scale.md": ["parts"],
        "training.md": ["runs/demo/eval_results.json", "runs/msrvtt_b16_lora/adapter/adapter_model.safetensors"],
        "evaluation.md": ["runs/msrvtt_7k/eval_ranks.safetensors", "theirs/eval_results.json"],
        "model.md": ["explain.png"],
        "publish.md": ["release/README.md", "release/model.safetensors"],
    }
    assert all((workplace / path).exists() for path in made.get(page.name, []))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_says_whether_it_is_run(page):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    command = re.compile(r"(camoe|python|pip|make|curl|accelerate) ")
    assert not [body for language, body in fences if language not in ("bash", "sh") and command.match(body)]


def test_a_command_that_is_wrong_is_found(workplace):
    for command in ("camoe index ~/Videos --modle x --index i", "python training/evaluate_retrieval.py --splits test"):
        (words,) = commands(command)
        with pytest.raises(AssertionError):
            run_command(words, workplace)
    with pytest.raises(AssertionError):
        check_extras("-e '.[serach]'")
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["make", "no_such_target"], workplace)
