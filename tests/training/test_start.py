# SPDX-License-Identifier: Apache-2.0
"""Starting from a CAMoE checkpoint: what the options say is what the run does."""

import pytest
import torch

from data.errors import UserError
from engine.options import TrainOptions
from engine.start import build_model, build_processor
from tests.tiny_processor import tiny_model_and_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = tiny_model_and_processor(num_frames=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def start(checkpoint, **changes):
    options = TrainOptions("data", "runs", model_name_or_path=checkpoint, **changes)
    processor = build_processor(options, [])
    return processor, build_model(options, processor)


def test_frames_tokens_tagger_and_streams_are_those_of_the_options(checkpoint):
    streams = {"action": "entity"}
    processor, _ = start(checkpoint, num_frames=5, max_words=20, tagger="none", streams=streams)
    assert processor.video_processor.num_frames == 5 and processor.max_length == 20
    assert processor.tagger == "none" and processor.streams["action"] == "entity"
    assert processor.video_processor.crop_size["height"] == 32  # what no option says is the checkpoint's


def test_experts_may_be_taken_out_of_a_checkpoint(checkpoint):
    processor, model = start(checkpoint, model={"experts": ["fusion"]}, tagger=None, max_words=20)
    assert processor.experts == model.config.experts == ["fusion"]
    assert processor(text=["a dog"], return_tensors="pt")["input_ids"].shape[:2] == (1, 1)


def test_experts_of_a_checkpoint_keep_their_gates_in_another_order(checkpoint):
    _, whole = start(checkpoint, max_words=20)
    names = ["scene", "fusion"]
    processor, model = start(checkpoint, model={"experts": names}, max_words=20)
    assert processor.experts == names
    kept = [whole.config.experts.index(name) for name in names]
    assert torch.equal(model.head.gate.projection.weight, whole.head.gate.projection.weight[kept])


def test_more_frames_than_the_checkpoint_has_positions_for_are_an_error_of_one_line(checkpoint):
    with pytest.raises(UserError, match="cannot load"):
        start(checkpoint, num_frames=100, max_words=20)


def test_a_checkpoint_of_more_frames_than_the_run_takes_keeps_its_positions(tmp_path):
    model, processor = tiny_model_and_processor(num_frames=3, max_frames=100)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    processor, model = start(str(tmp_path), num_frames=5, max_words=20)
    assert processor.video_processor.num_frames == 5 and model.config.max_frames == 100


def test_an_expert_without_a_stream_is_an_error_of_one_line(checkpoint):
    with pytest.raises(UserError, match="Unknown expert 'colour'"):
        start(checkpoint, model={"experts": ["colour"]}, max_words=20)
