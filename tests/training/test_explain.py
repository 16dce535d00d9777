# SPDX-License-Identifier: Apache-2.0
"""Explanations: an expert's contribution is exact, a frame's effect is what the score loses without it."""

import json
import sys
from dataclasses import replace

import explain
import pytest
import torch
from PIL import Image

from engine.recipe import exit_on_user_error
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


QUERY = "a red star spins clockwise on a sandy beach"


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny_model_and_processor(num_frames=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", num_frames=24)


@pytest.fixture(scope="module")
def explanation(model_and_processor, clip):
    return explain.explain(*model_and_processor, QUERY, clip)[0]


def test_contributions_are_gate_times_cosine_and_sum_to_the_models_score(model_and_processor, clip, explanation):
    model, processor = model_and_processor
    output = model(**processor(text=QUERY, videos=[clip], return_tensors="pt"))
    score = (output.logits_per_text / model.clip.logit_scale.exp()).item()
    assert explanation.score == pytest.approx(score, abs=1e-5)
    assert sum(part.contribution for part in explanation.experts) == pytest.approx(score, abs=1e-5)
    for part in explanation.experts:
        assert part.gate * part.cosine == pytest.approx(part.contribution, abs=1e-6)
    assert [part.name for part in explanation.experts] == ["fusion", "entity", "action", "scene"]
    assert [part.text for part in explanation.experts] == [QUERY, "red star", "spins clockwise", "on a sandy beach"]
    assert [part.reads_all for part in explanation.experts] == [True, False, False, False]


def test_a_frames_effect_is_what_the_score_loses_without_it(model_and_processor, clip, explanation):
    model, processor = model_and_processor
    inputs = processor(text=QUERY, videos=[clip], return_tensors="pt")
    for t in range(4):
        inputs["frame_mask"] = torch.tensor([[int(t != other) for other in range(4)]])
        without = model(**inputs, output_expert_scores=True).expert_scores[0, 0]
        effects = [part.contribution - without[e].item() for e, part in enumerate(explanation.experts)]
        assert [part.frame_effects[t] for part in explanation.experts] == pytest.approx(effects, abs=1e-6)
        assert explanation.frame_effects[t] == pytest.approx(sum(effects), abs=1e-6)


def test_frame_weights_are_given_for_experts_that_have_them(explanation):
    weighted = {part.name: part.frame_weights for part in explanation.experts}
    assert weighted["fusion"] is None and weighted["action"] is None
    assert sum(weighted["entity"]) == pytest.approx(1) and len(set(weighted["scene"])) > 1


def test_a_frame_is_named_only_if_its_effect_is_notable(explanation):
    effects = [0.001, 0.03, -0.02, 0.0]
    assert replace(explanation, score=0.5, frame_effects=effects).strongest_frame() == 1
    assert replace(explanation, score=0.5, frame_effects=[e / 10 for e in effects]).strongest_frame() is None
    assert replace(explanation, frame_effects=None).strongest_frame() is None


def test_a_clip_of_one_frame_has_no_effects_and_is_drawn(model_and_processor, tmp_path):
    still = write_video(tmp_path / "still.mp4", num_frames=1)
    explanation, frames = explain.explain(*model_and_processor, "two kids", still)
    assert explanation.frame_effects is None and len(frames) == 1
    explain.draw(explanation, frames, tmp_path / "still.png")
    assert min(Image.open(tmp_path / "still.png").size) > 300


def test_frames_are_explained_like_the_file_that_they_came_from(model_and_processor, clip, explanation, tmp_path):
    frames = model_and_processor[1].video_processor.decode(clip).frames
    for form in (frames, list(frames.permute(0, 2, 3, 1).numpy()), frames / 255):
        found, shown = explain.explain(*model_and_processor, QUERY, form)
        assert torch.equal(shown, frames) and found.times == []
        assert found.score == pytest.approx(explanation.score, abs=1e-6)
        assert found.frame_effects == pytest.approx(explanation.frame_effects, abs=1e-6)
    assert found.place(1) == "frame 2" and explanation.place(1) == f"{explanation.times[1]:.1f} s"
    assert found.video == "frames of shape (4, 3, 32, 32)"
    explain.draw(found, shown, tmp_path / "frames.png")
    assert min(Image.open(tmp_path / "frames.png").size) > 300
    rated = {"array": frames, "video_metadata": {"total_num_frames": 4, "fps": 2.0}}
    assert explain.explain(*model_and_processor, QUERY, rated)[0].times == pytest.approx([0, 0.5, 1, 1.5])


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, arguments)])
    try:
        exit_on_user_error(explain.main)
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.fixture(scope="module")
def checkpoint(model_and_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in model_and_processor:
        part.save_pretrained(folder)
    return folder


def test_the_program_draws_and_prints(checkpoint, clip, explanation, tmp_path, monkeypatch, capsys):
    arguments = "--checkpoint", checkpoint, "--query", QUERY, "--video", clip, "--out", tmp_path / "picture.png"
    assert run(monkeypatch, *arguments, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["score"] == pytest.approx(explanation.score, abs=1e-5) and len(printed["times"]) == 4
    assert printed["experts"][1]["text"] == "red star" and len(printed["experts"][1]["frame_effects"]) == 4
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50

    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert f"score {explanation.score:.3f}" in printed and "entity" in printed and "red star" in printed


def test_mistakes_are_one_line(checkpoint, clip, tmp_path, monkeypatch, capsys):
    good = {"--checkpoint": checkpoint, "--query": QUERY, "--video": clip, "--out": tmp_path / "p.png"}
    for wrong, message in (
        ({"--checkpoint": tmp_path / "none"}, "none does not exist"),
        ({"--query": "  "}, "empty"),
        ({"--video": tmp_path / "none.mp4"}, "none.mp4"),
        ({"--out": tmp_path / "none" / "p.png"}, "does not exist"),
        ({"--out": tmp_path / "p.gif"}, "name a .png"),
    ):
        assert run(monkeypatch, *(word for pair in {**good, **wrong}.items() for word in pair)) == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1] and errors[-1].startswith("error: ")
    assert not (tmp_path / "p.png").exists()
