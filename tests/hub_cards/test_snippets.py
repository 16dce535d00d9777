# SPDX-License-Identifier: Apache-2.0
"""The code that the Hub shows for a release ("Use this model") runs where this project is not installed.

The snippets are formed from the card's metadata as huggingface.js does (tasks/src/model-libraries-snippets.ts).
"""

import io
import json

import pytest
import torch
from fake_hub import FakeHub, Repository
from huggingface_hub import ModelCard, constants
from PIL import Image
from release import assemble, find_card, upload
from run_elsewhere import run_elsewhere

from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor


REPO = "org/camoe-motion"
PARROTS = "huggingface/documentation-images/resolve/main/hub/parrots.png"
LABELS = ["animals", "humans", "landscape"]

RUN = """
import importlib.util, json
assert importlib.util.find_spec("modeling_camoe") is None
names = [{} for snippet in SNIPPETS]
for snippet, space in zip(SNIPPETS, names):
    exec(snippet.replace("https://huggingface.co", HUB).replace("\\npipe(", "\\nanswer = pipe("), space)
by_pipeline, by_classes, by_class, by_sentences = names
print(json.dumps({
    "answer": by_pipeline["answer"],
    "processor": type(by_classes["processor"]).__name__,
    "models": [type(space["model"]).__name__ for space in (by_classes, by_class)],
    "similarities": list(by_sentences["similarities"].shape),
    "width": by_sentences["embeddings"].shape[1],
}))
"""


def transformers_snippets(repo_id: str, card: ModelCard) -> list[str]:
    """The pipeline, and the classes with and without a processor (the Hub finds out itself whether there is one)."""
    remote_code = ", trust_remote_code=True" if "custom_code" in card.data.tags else ""
    tag = card.data.pipeline_tag
    pipe = ["# Use a pipeline as a high-level helper", "from transformers import pipeline", ""]
    pipe += [f'pipe = pipeline("{tag}", model="{repo_id}"{remote_code})']
    if tag == "zero-shot-image-classification":
        pipe += ["pipe(", f'    "https://huggingface.co/datasets/{PARROTS}",']
        pipe += [f"    candidate_labels={json.dumps(LABELS)},", ")"]
    model = f'model = AutoModel.from_pretrained("{repo_id}"{remote_code}, device_map="auto")'
    classes = ["# Load model directly", "from transformers import AutoProcessor, AutoModel", ""]
    classes += [f'processor = AutoProcessor.from_pretrained("{repo_id}"{remote_code})', model]
    only_model = ["# Load model directly", "from transformers import AutoModel", model]
    return ["\n".join(lines) for lines in (pipe, classes, only_model)]


def sentence_transformers_snippet(repo_id: str, card: ModelCard) -> str:
    remote_code = ", trust_remote_code=True" if "custom_code" in card.data.tags else ""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    return f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo_id}"{remote_code})

sentences = {json.dumps(sentences, indent=4)}
embeddings = model.encode(sentences)

similarities = model.similarity(embeddings, embeddings)
print(similarities.shape)
# [3, 3]"""


@pytest.fixture
def hub(run_dir, tmp_path, monkeypatch):
    """A Hub with a release and the picture of the snippet."""
    folder = tmp_path / "release"
    folder.mkdir()
    assemble(run_dir, folder, find_card(None, REPO), REPO)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        upload(folder, REPO, private=False, create_pr=False)
        picture = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").save(picture, "PNG")
        images = hub.repositories["datasets/huggingface/documentation-images"] = Repository()
        images.add_commit("pictures", {"hub/parrots.png": picture.getvalue()})
        yield hub


def test_the_snippets_of_the_hub_run_for_both_libraries(hub, run_dir, fresh_python, tmp_path):
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "transformers" and "sentence-transformers" in card.data.tags
    snippets = [*transformers_snippets(REPO, card), sentence_transformers_snippet(REPO, card)]
    found = run_elsewhere(fresh_python, RUN, tmp_path, hub, SNIPPETS=snippets, HUB=hub.url)

    model, processor = CAMoEModel.from_pretrained(run_dir), CAMoEProcessor.from_pretrained(run_dir)
    pipe = CAMoEPipeline(model, processor=processor, device="cpu")
    picture = Image.open(io.BytesIO(hub.files("datasets/huggingface/documentation-images")["hub/parrots.png"]))
    expected = pipe(picture, candidate_labels=LABELS)
    assert [answer["label"] for answer in found["answer"]] == [answer["label"] for answer in expected]
    scores = torch.tensor([[answer["score"] for answer in answers] for answers in (found["answer"], expected)])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)
    assert found["processor"] == "CAMoEProcessor" and found["models"] == ["CAMoEModel"] * 2
    assert found["similarities"] == [3, 3] and found["width"] == pipe(texts=["a dog"]).shape[1]
