# SPDX-License-Identifier: Apache-2.0
"""Whatever is saved is a release: it loads where this project is not installed, and can be saved again."""

import json

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from run_elsewhere import run_elsewhere
from transformers import Trainer, TrainingArguments

from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor
from tests.tiny_backbones import tiny_backbone
from tests.tiny_model import tiny_model


# What makes a folder a release, beside weights and code.
FILES = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"modules.json", "config_sentence_transformers.json", "model.safetensors"}
CLASSES = {
    "AutoConfig": "configuration_camoe.CAMoEConfig",
    "AutoModel": "modeling_camoe.CAMoEModel",
    "AutoProcessor": "processing_camoe.CAMoEProcessor",
    "AutoVideoProcessor": "video_processing_camoe.CAMoEVideoProcessor",
}
REORDERED = ["scene", "action", "entity", "fusion"]
TASKS = {"video-text-retrieval", "zero-shot-image-classification"}

# Loads FOLDER as a model, a pipeline and a SentenceTransformer, saves each of them, and loads and saves these again:
# every folder gives the vectors of the first.
LOAD_AND_SAVE = """
import hashlib, importlib.util, json
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor, pipeline
assert importlib.util.find_spec("modeling_camoe") is None
videos = list(torch.randint(0, 256, (2, 3, 96, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
def digest(vectors):
    return hashlib.sha256(torch.as_tensor(vectors).float().numpy().tobytes()).hexdigest()
def save_model(folder, place):
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(place)
def save_model_then_processor(folder, place):
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(place)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(place)
def save_pipeline(folder, place):
    pipeline("video-text-retrieval", model=folder, trust_remote_code=True, device="cpu").save_pretrained(place)
def save_sentence_transformer(folder, place):
    SentenceTransformer(folder, trust_remote_code=True, device="cpu").save(place)
def use(folder):
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        by_model = model.get_video_features(**processor(videos=videos, return_tensors="pt")).pooler_output
    found = [digest(by_model)]
    for task in ("video-text-retrieval", "zero-shot-image-classification"):
        found.append(digest(pipeline(task, model=folder, trust_remote_code=True, device="cpu")(videos)))
    by_sentences = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode_document(videos)
    assert torch.allclose(torch.as_tensor(by_sentences), by_model, atol=1e-5)
    return found
vectors, files = {"first": use(FOLDER)}, {}
import os
for save in (save_model, save_model_then_processor, save_pipeline, save_sentence_transformer):
    folder = FOLDER
    for generation in ("second", "third"):
        place = f"{save.__name__} {generation}"
        save(folder, place)
        files[place] = sorted(os.listdir(place))
        folder = place
    vectors[place] = use(place)
print(json.dumps({"vectors": vectors, "files": files}))
"""


def release_files(folder) -> set[str]:
    """Names of the files in a folder that is a release; fails if it is none."""
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == CLASSES
    assert set(config["custom_pipelines"]) == TASKS
    assert all(info == {"impl": "pipeline_camoe.CAMoEPipeline", "pt": ["AutoModel"]}
               for info in config["custom_pipelines"].values())  # fmt: skip
    names = {path.name for path in folder.iterdir()}
    assert FILES <= names and {f"{name.split('.')[0]}.py" for name in CLASSES.values()} <= names
    return names


@pytest.fixture
def model(run_dir):
    return CAMoEModel.from_pretrained(run_dir).eval()


@pytest.fixture
def processor(run_dir):
    return CAMoEProcessor.from_pretrained(run_dir)


@pytest.mark.slow
def test_saving_and_loading_twice_without_this_project_gives_the_same_release(model, fresh_python, tmp_path):
    model.save_pretrained(tmp_path / "first")
    names = release_files(tmp_path / "first")
    found = run_elsewhere(fresh_python, LOAD_AND_SAVE, tmp_path, FOLDER=str(tmp_path / "first"))
    assert len(found["vectors"]) == 5
    assert all(vectors == found["vectors"]["first"] for vectors in found["vectors"].values())
    for place, files in found["files"].items():
        extra = {"README.md"} if "sentence" in place else set()  # written by sentence-transformers
        assert set(files) == names | extra == release_files(tmp_path / place)


def test_a_pipeline_saves_its_own_processor(model, processor, tmp_path):
    processor.max_length = 7
    CAMoEPipeline(model, processor=processor, device="cpu").save_pretrained(tmp_path)
    release_files(tmp_path)
    assert CAMoEProcessor.from_pretrained(tmp_path).max_length == 7


def test_a_trainer_saves_a_release(model, tmp_path):
    Trainer(model, TrainingArguments(tmp_path / "run", report_to="none")).save_model(tmp_path / "saved")
    release_files(tmp_path / "saved")


def test_a_model_that_was_not_loaded_says_what_is_missing_and_how_to_add_it(tmp_path, caplog, processor):
    tiny_model(0).save_pretrained(tmp_path)
    [record] = [record for record in caplog.records if "no processor" in record.getMessage()]
    assert f"processor.save_pretrained({str(tmp_path)!r})" in record.getMessage()
    assert not (tmp_path / "processor_config.json").exists()
    processor.save_pretrained(tmp_path)
    release_files(tmp_path)


def test_a_processor_beside_the_model_is_kept(model, processor, tmp_path):
    processor.max_length = 7
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert CAMoEProcessor.from_pretrained(tmp_path).max_length == 7


def test_a_processor_alone_saves_the_configuration_it_was_made_from(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == CLASSES
    assert CAMoEProcessor.from_pretrained(tmp_path).experts == processor.experts


def test_a_model_with_experts_chosen_later_saves_a_processor_for_these(run_dir, tmp_path):
    CAMoEModel.from_pretrained(run_dir, experts=REORDERED).save_pretrained(tmp_path)
    assert CAMoEProcessor.from_pretrained(tmp_path).experts == REORDERED
    release_files(tmp_path)


def test_a_model_with_an_expert_that_no_tagger_knows_saves_a_processor_without_one(tmp_path, caplog):
    clip = tiny_backbone(tmp_path / "clip", "clip")
    model = CAMoEModel.from_pretrained(clip, experts=["mean"])
    model.save_pretrained(tmp_path / "saved")
    release_files(tmp_path / "saved")
    processor = CAMoEProcessor.from_pretrained(tmp_path / "saved")
    assert (processor.experts, processor.tagger) == (["mean"], "none")
    assert processor.streams_of(["a dog runs"]) == [["a dog runs"]]
    assert "makes no stream mean" in caplog.text


def test_an_error_while_the_processor_is_saved_is_not_hidden(model, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(CAMoEProcessor, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["folder", "repository"])
def test_a_processor_does_not_take_the_place_of_another_models(hub, run_dir, processor, tmp_path, place):
    other = CAMoEModel.from_pretrained(run_dir, experts=REORDERED)
    with pytest.raises(ValueError, match="The processor is not this model's: `experts`"):
        if place == "folder":
            other.save_pretrained(tmp_path)
            processor.save_pretrained(tmp_path)
        else:
            other.push_to_hub("org/other")
            processor.push_to_hub("org/other")


def test_a_pushed_processor_leaves_the_models_configuration_as_it_is(hub, model, processor):
    model.config.dual_softmax_temp = 7.0
    model.push_to_hub("org/both")
    before = hub.files("org/both")["config.json"]
    processor.push_to_hub("org/both")
    assert hub.files("org/both")["config.json"] == before and b"7.0" in before
    processor.push_to_hub("org/alone")
    assert json.loads(hub.files("org/alone")["config.json"])["auto_map"] == CLASSES


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # transformers keeps the client of the last hub
        yield hub


def write_repository(hub, repo_id, folder) -> set[str]:
    """Write what a repository holds into a folder; returns the names."""
    folder.mkdir()
    for name, content in hub.files(repo_id).items():
        (folder / name).write_bytes(content)
    return release_files(folder)


def test_a_pushed_model_is_a_release(hub, model, tmp_path):
    model.push_to_hub("org/pushed")
    assert "README.md" in write_repository(hub, "org/pushed", tmp_path / "pushed")


def test_a_processor_uploads_all_that_it_saves(hub, model, processor, tmp_path):
    processor.save_pretrained(str(tmp_path / "both"))
    processor.save_pretrained(str(tmp_path / "both"), push_to_hub=True, repo_id="org/both")
    saved = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"modules.json", "config_sentence_transformers.json"} < saved
    assert set(hub.files("org/both")) == saved | {".gitattributes"}


def test_a_model_pushed_from_a_folder_with_a_processor_uploads_both(hub, model, processor, tmp_path):
    processor.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "both", push_to_hub=True, repo_id="org/both")
    write_repository(hub, "org/both", tmp_path / "pushed")


def test_a_pushed_pipeline_is_a_release(hub, model, processor, tmp_path):
    CAMoEPipeline(model, processor=processor, device="cpu").push_to_hub("org/pipeline")
    write_repository(hub, "org/pipeline", tmp_path / "pushed")
