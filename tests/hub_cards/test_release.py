# SPDX-License-Identifier: Apache-2.0
"""Publishing a run with the real client to a Hub on loopback. Loading it elsewhere: test_fresh_install.py."""

import json
import pickletools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_release import fingerprint
from fake_hub import FakeHub
from huggingface_hub import ModelCard, constants
from machine_paths import find_machine_paths
from release import ReleaseError, assemble, find_card, main, upload
from run_elsewhere import environment
from tiny_run import write_run

from modeling_camoe import CAMoEModel, CAMoEProcessor
from tests.tiny_backbones import KINDS, tiny_backbone


ROOT = Path(__file__).parents[2]
REPO = "org/camoe-motion"
# A repository is flat, and has only what runs a model. hubs.py is for those who evaluate and index.
NOT_RELEASED = {"__init__.py", "export_onnx.py", "hubs.py"}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the process that checks the release."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("second_run"), seed=2)


@pytest.fixture(scope="module")
def folder(second_run, clip, tmp_path_factory):
    """The release folder of the second run."""
    place = tmp_path_factory.mktemp("release")
    found = assemble(second_run, place, find_card(None, REPO), REPO, [clip])
    assert found == fingerprint(
        CAMoEModel.from_pretrained(second_run).eval(), CAMoEProcessor.from_pretrained(second_run)
    )
    return place


@pytest.fixture(scope="module")
def hub(run_dir, clip, tmp_path_factory):
    """A Hub with the first run, released from the command line."""
    home = tmp_path_factory.mktemp("home")
    with FakeHub() as hub:
        done = subprocess.run(
            [sys.executable, str(ROOT / "hub_cards" / "release.py"), str(run_dir)]
            + ["--repo_id", REPO, "--example_clips", str(clip)],
            capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment(home, hub),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        hub.shown = done.stdout
        yield hub


@pytest.fixture
def client(hub, monkeypatch):
    """The real client in this process, pointed at the Hub on loopback."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.slow
def test_a_release_is_one_commit_of_the_listed_files(hub, run_dir):
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2 and repository.messages[repository.commits[-1]] == f"Release {REPO}"
    files = hub.files(REPO)
    assert files["eval_results.json"] == (run_dir / "eval_results.json").read_bytes()
    for name in set(files) - {".gitattributes"}:
        assert re.search(rf"^ *{len(files[name]):,}  {re.escape(name)}$", hub.shown, flags=re.MULTILINE)
    needed = {"handler.py", "untrusted.py", "requirements.txt", "modules.json", "config_sentence_transformers.json"}
    needed |= {
        "example_1.mp4",
        "example_1.jpg",
        "examples.json",
        "query_bank.txt",
        "recipe.yaml",
        "eval_ranks.safetensors",
    }
    needed |= {path.name for path in (ROOT / "modeling_camoe").glob("*.py")} - NOT_RELEASED
    assert needed <= set(files) and not [request for request in hub.unknown if REPO in request]
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_camoe.CAMoEModel"


def test_the_published_numbers_equal_those_of_the_run(hub, run_dir):
    index = ModelCard(hub.files(REPO)["README.md"].decode()).data.eval_results  # parsed by the client
    results = json.loads((run_dir / "eval_results.json").read_text())["results"]
    rankings = [metrics for directions in results.values() for metrics in directions.values() if metrics]
    measured = [value for metrics in rankings for value in metrics.values() if not isinstance(value, list)]
    assert sorted(entry.metric_value for entry in index) == sorted(measured) and len(measured) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_can_be_released(kind, tmp_path):
    start, run, place = tmp_path / "start", tmp_path / "run", tmp_path / "release"
    CAMoEModel.from_pretrained(tiny_backbone(start, kind)).save_pretrained(run)
    place.mkdir()
    expected = assemble(run, place, find_card(None, REPO), REPO)
    assert fingerprint(CAMoEModel.from_pretrained(place).eval(), CAMoEProcessor.from_pretrained(place)) == expected
    kept = {path.name for path in start.iterdir() if path.suffix in (".model", ".jinja")}
    assert kept <= {path.name for path in place.iterdir()} and (kind != "siglip" or kept == {"spiece.model"})


def test_a_file_of_another_kind_is_not_released(second_run, tmp_path, monkeypatch):
    monkeypatch.setattr("release.RUN_FILES", ("weights.bin",))
    run = shutil.copytree(second_run, tmp_path / "run")
    (run / "weights.bin").write_bytes(b"?")
    (tmp_path / "release").mkdir()
    with pytest.raises(ReleaseError, match="files of an unknown kind: weights.bin"):
        assemble(run, tmp_path / "release", find_card(None, REPO), REPO)


def test_nothing_in_a_release_is_a_pickle(folder):
    starts = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".mp4": b"\0\0\0"}
    for path in folder.rglob("*"):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            assert max(end for _, end in offsets) == len(content) - 8 - int.from_bytes(content[:8], "little")
        elif path.suffix in starts:
            assert content.startswith(starts[path.suffix])
        else:
            content.decode()  # text, unlike a torch.save archive
            with pytest.raises(Exception):  # noqa: B017 — pickletools raises many kinds of errors
                list(pickletools.genops(content))


@pytest.mark.parametrize("fail_on", ["/lfs/", "/commit/"])
def test_an_interrupted_upload_leaves_the_repository_as_it_was(hub, client, folder, monkeypatch, fail_on):
    before = dict(hub.files(REPO))
    monkeypatch.setattr(hub, "fail_on", fail_on)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
    with pytest.raises(ReleaseError, match="the repository is as it was"):
        upload(folder, REPO, private=False, create_pr=False)
    assert hub.files(REPO) == before and len(hub.repositories[REPO].commits) == 2


def test_a_pull_request_does_not_change_main(hub, client, folder):
    before = dict(hub.files(REPO))
    address = upload(folder, REPO, private=False, create_pr=True)
    assert address.endswith("/discussions/1") and hub.files(REPO) == before
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_private_release_creates_a_private_repository(hub, client, folder):
    upload(folder, "org/secret", private=True, create_pr=False)
    assert hub.repositories["org/secret"].private and not hub.repositories[REPO].private


def test_a_second_release_replaces_code_weights_and_examples_and_keeps_other_files(hub, client, folder):
    repository = hub.repositories[REPO]
    stale = {"old_experts.py": b"raise SystemExit", "example_7.mp4": b"?", "notes.txt": b"the owner's"}
    repository.add_commit("by hand", dict(hub.files(REPO)) | stale)
    upload(folder, REPO, private=False, create_pr=False)
    assert set(hub.files(REPO)) == {path.name for path in folder.iterdir()} | {".gitattributes", "notes.txt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "model_name_or_path: a\ndata: {train: HERE/x}\n", "recipe.yaml: `data.train` has 'HERE/x'"),
        ("recipe.yaml", "model_name_or_path: a\nhub: [a, /home/me]\n", "recipe.yaml: `hub.1` has '/home/me'"),
        ("recipe.yaml", "model_name_or_path: a\npython: /usr/bin\n", "recipe.yaml: `python` has '/usr/bin'"),
        ("query_bank.txt", "a dog\nread HERE/bank.txt now\n", "query_bank.txt: line 2 has 'HERE/bank.txt now'"),
        ("all_results.json", '{"steps": 1, "log": "file in HERE/log"}', "all_results.json: `log` has 'HERE/log'"),
    ],
)
def test_paths_of_this_machine_are_refused_by_file_and_key(
    second_run, tmp_path, monkeypatch, capsys, name, content, message
):
    run = shutil.copytree(second_run, tmp_path / "run")
    (run / name).write_text(content.replace("HERE", str(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["release.py", str(run), "--repo_id", REPO, "--dry_run", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and message.replace("HERE", str(tmp_path)) in error and "release again" in error
    assert not (tmp_path / "new").exists()


def test_relative_paths_addresses_and_fractions_are_no_paths_of_this_machine(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: data/motion_demo/test\nurl: https://huggingface.co/usr/bin\n")
    (tmp_path / "README.md").write_text("and/or, 24/7, CLIP ViT-B/32, ~/usr/bin, runs/usr/bin, [a](docs/usr/bin)\n")
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/usr": 1, "/": 2}, "merges": ["/ /", "/usr /tmp"]}')
    assert find_machine_paths(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--repo_id", "org/other"], "no card"),
        (["RUN", "--repo_id", "a/b/c"], "--repo_id"),
        (["nowhere", "--repo_id", REPO], "the run nowhere does not exist"),
        (["EMPTY", "--repo_id", REPO], "holds no config.json"),
        (["RUN", "--repo_id", "org/camoe-msrvtt"], "the card camoe-msrvtt.md is about 'msrvtt'"),
        (["RUN", "--repo_id", REPO, "--dry_run", "EMPTY"], "exists already"),
        (["RUN", "--repo_id", REPO, "--dry_run", "EMPTY/no/where"], "does not exist"),
        (["RUN", "--repo_id", REPO, "--example_clips", "nowhere.mp4"], "nowhere.mp4 does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run_dir, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(run_dir), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["release.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and last.startswith("error: ") and message in last
