# SPDX-License-Identifier: Apache-2.0
"""Example clips: the model's answers in examples.json, the card and its widget."""

import json
import shutil
from pathlib import Path

import pytest
from card import Run, read_source, render_card
from examples import ExampleError, add_examples
from huggingface_hub import ModelCard
from PIL import Image

from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor


REPO = "org/camoe-motion"
MOTION = Path(__file__).parents[2] / "hub_cards" / "camoe-motion.md"
SENTENCES = ["a red star spins on the beach", "a blue ring moves to the left"]


@pytest.fixture(scope="module")
def retrieval(run_dir):
    model, processor = CAMoEModel.from_pretrained(run_dir).eval(), CAMoEProcessor.from_pretrained(run_dir)
    return CAMoEPipeline(model, processor=processor, device="cpu")


@pytest.fixture
def clips(clip, tmp_path):
    """Two clips with captions beside them, as in a VideoFolder."""
    rows = [
        {"file_name": "a.mp4", "captions": ["On a beach, a star spins.", "A star is spinning."]},
        {"file_name": "b.mp4", "caption": "two kids, playing"},
    ]
    for row in rows:
        shutil.copy(clip, tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "a.mp4", tmp_path / "b.mp4"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "release").mkdir()
    return tmp_path / "release"


def test_examples_hold_the_output_of_the_pipeline(retrieval, clips, folder):
    add_examples(folder, retrieval, clips, SENTENCES)
    examples = json.loads((folder / "examples.json").read_text())
    captions = ["A star is spinning", "two kids playing"]  # no commas: they separate the widget's candidates
    assert [example["caption"] for example in examples] == captions
    for example, clip in zip(examples, clips, strict=True):
        assert (folder / example["clip"]).read_bytes() == clip.read_bytes()
        expected = retrieval(str(clip), candidate_labels=captions)
        assert [c["label"] for c in example["candidates"]] == [e["label"] for e in expected]
        assert [c["score"] for c in example["candidates"]] == pytest.approx([e["score"] for e in expected], abs=1e-6)


def test_the_widget_and_the_card_show_the_examples(retrieval, clips, folder, run_dir):
    add_examples(folder, retrieval, clips, SENTENCES)
    for path in run_dir.iterdir():
        if path.suffix in (".json", ".txt", ".yaml"):
            shutil.copy(path, folder / path.name)
    examples = json.loads((folder / "examples.json").read_text())
    card = ModelCard(render_card(MOTION, Run.read(folder), REPO))
    labels = [example["caption"] for example in examples]
    for entry, example in zip(card.data.widget, examples, strict=True):
        # A file of the release that the task's widget takes, its labels as one text, and its form of an answer.
        frame = Image.open(folder / example["frame"])
        assert entry["src"] == f"https://huggingface.co/{REPO}/resolve/main/{example['frame']}"
        assert entry["candidate_labels"].split(", ") == sorted(labels)
        scores = [output["score"] for output in entry["output"]]
        assert {output["label"] for output in entry["output"]} == set(labels) and scores == sorted(scores)[::-1]
        inputs = retrieval.processor(text=labels, videos=[[frame]], return_tensors="pt")
        expected = dict(zip(labels, retrieval.model(**inputs).logits_per_video[0].softmax(dim=0), strict=True))
        assert scores == [pytest.approx(expected[output["label"]].item(), abs=1e-3) for output in entry["output"]]
    best = examples[0]["candidates"][0]
    assert f"| [example_1.mp4](example_1.mp4) | A star is spinning | {100 * best['score']:.0f} %" in card.text
    assert "measure nothing" in card.text and f'hf_hub_download("{REPO}", "example_1.mp4")' in card.text


def test_without_examples_there_is_no_widget_and_the_card_asks_for_a_clip(run_dir):
    card = ModelCard(render_card(MOTION, Run.read(run_dir), REPO))
    assert not hasattr(card.data, "widget") or card.data.widget is None
    assert "## Examples" not in card.text and 'clip = "clip.mp4"  # your own video' in card.text


def test_clips_without_captions_are_compared_with_the_example_sentences(retrieval, clip, folder):
    header, _ = read_source(MOTION)
    add_examples(folder, retrieval, [clip], [header["example"], header["other_example"]])
    [example] = json.loads((folder / "examples.json").read_text())
    assert example["caption"] is None
    assert {c["label"] for c in example["candidates"]} == {header["example"], header["other_example"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.avi", b"x", "is not a .mp4 or .webm file"),
        ("a.mp4", None, "does not exist"),
        ("a.mp4", b"hello", "no video"),
        ("a.mp4", 20 * 2**20 + 1, "larger than 20 MiB"),
    ],
)
def test_the_error_names_a_clip_that_cannot_be_an_example(retrieval, folder, tmp_path, name, content, message):
    if isinstance(content, int):
        with open(tmp_path / name, "wb") as file:
            file.truncate(content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExampleError, match=message):
        add_examples(folder, retrieval, [tmp_path / name], SENTENCES)


def test_too_many_clips_are_refused(retrieval, clip, folder):
    with pytest.raises(ExampleError, match="9 clips; a release shows at most 8"):
        add_examples(folder, retrieval, [clip] * 9, SENTENCES)
