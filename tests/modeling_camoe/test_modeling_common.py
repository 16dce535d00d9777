# SPDX-License-Identifier: Apache-2.0
"""Checks that the transformers library makes of every model of its own, in miniature: its suite is not shipped."""

import inspect

import pytest
import torch
from transformers import AutoModel, CLIPModel
from transformers.utils import ModelOutput, logging

from modeling_camoe import CAMoEModel
from tests.tiny_model import random_inputs, tiny_clip_config, tiny_config, tiny_model


logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def feature_calls(model):
    """Both feature functions, each with inputs, as calls that take options."""
    inputs = random_inputs()
    return (
        lambda **options: model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"], **options),
        lambda **options: model.get_text_features(inputs["input_ids"], inputs["attention_mask"], **options),
    )


def assert_same(left, right):
    """Tuples and outputs hold equal tensors in the same order, however deep."""
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
        return
    left, right = (x.to_tuple() if isinstance(x, ModelOutput) else x for x in (left, right))
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert_same(one, other)


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_a_tuple_holds_what_the_output_holds_at_every_depth(options):
    model, inputs = tiny_model(), random_inputs()
    model.set_attn_implementation("eager")  # sdpa gives no attentions
    options |= {"return_loss": True, "output_expert_scores": True}
    as_tuple = model(**inputs, **options, return_dict=False)
    assert type(as_tuple) is tuple and type(as_tuple[-1]) is tuple
    assert_same(as_tuple, model(**inputs, **options))


def test_feature_functions_keep_the_librarys_contract(model):
    hidden = model.config.clip_config.vision_config.hidden_size
    for call in feature_calls(model):
        for return_dict in (True, None):
            output = call(return_dict=return_dict)
            assert isinstance(output, ModelOutput)
            assert output.last_hidden_state.shape[0] == len(output.pooler_output) == 3
            assert output.last_hidden_state.shape[-1] == hidden
        assert_same(call(return_dict=False), output)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions_have_one_entry_a_layer(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    sizes = ((3 * 5, 17), (3 * 4, 7))  # frames and their patches, texts and their tokens
    for call, (rows, length) in zip(feature_calls(model), sizes, strict=True):
        plain, states = call(), call(output_hidden_states=True)
        assert plain.hidden_states is None and plain.attentions is None
        assert [tuple(state.shape) for state in states.hidden_states] == [(rows, length, 32)] * 3
        assert_same(states.pooler_output, plain.pooler_output)
        if attention == "eager":
            maps = call(output_attentions=True).attentions
            assert [tuple(map_.shape) for map_ in maps] == [(rows, 4, length, length)] * 2
            torch.testing.assert_close(maps[0].sum(-1), torch.ones(rows, 4, length))


def test_hidden_states_can_be_asked_for_in_the_configuration():
    model = tiny_model()
    model.config.output_hidden_states = True
    for call in feature_calls(model):
        assert len(call().hidden_states) == 3


def test_the_same_input_gives_the_same_output():
    model, inputs = tiny_model().train(), random_inputs()  # nothing in it is random, in training neither
    assert torch.equal(model(**inputs).logits_per_text, model(**inputs).logits_per_text)


def test_experts_scores_come_on_request_and_sum_to_the_score(model):
    inputs = random_inputs(num_texts=2)
    output = model(**inputs, output_expert_scores=True)
    assert output.expert_scores.shape == (2, 3, 4) and model(**inputs).expert_scores is None
    scores = output.logits_per_text / model.clip.logit_scale.exp()
    torch.testing.assert_close(output.expert_scores.sum(-1), scores, atol=1e-6, rtol=1e-5)
    cosine = output.text_embeds[1, 2] @ output.video_embeds[0, 2]
    torch.testing.assert_close(output.expert_scores[1, 0, 2], output.gate_weights[0, 2] * cosine)


def test_frame_weights_are_even_but_for_experts_that_weigh_frames(model):
    mask = random_inputs()["frame_mask"]
    frames = torch.nn.functional.normalize(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = model.get_video_features(frame_embeds=frames, frame_mask=mask).frame_weights  # (B,E,T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))
    even = mask / mask.sum(1, keepdim=True)
    for expert, aggregation in enumerate(model.config.frame_aggregation.values()):
        is_even = torch.allclose(weights[:, expert], even)
        assert is_even == (aggregation != "excitation")
        assert (weights[:, expert][~mask] == 0).all()


def test_the_main_input_is_the_first_argument_of_forward():
    assert list(inspect.signature(CAMoEModel.forward).parameters)[1] == CAMoEModel.main_input_name


# --- saving, loading, changing ---------------------------------------------------------------------------------------


def test_shards_load_as_one_file_does(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inputs = random_inputs()
    assert_same(AutoModel.from_pretrained(tmp_path)(**inputs), model(**inputs))


def test_the_tuned_clip_can_be_taken_out_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    clip, info = CLIPModel.from_pretrained(tmp_path, config=tiny_clip_config(), output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith("head.") for key in info["unexpected_keys"])
    for name, parameter in model.clip.named_parameters():
        assert torch.equal(clip.get_parameter(name), parameter), name


def test_a_vocabulary_can_grow(tmp_path):
    model, inputs = tiny_model(), random_inputs()
    expected = model(**inputs)
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    loaded = CAMoEModel.from_pretrained(tmp_path)
    assert loaded.config.clip_config.text_config.vocab_size == loaded.get_input_embeddings().num_embeddings == 120
    assert_same(loaded(**inputs), expected)
    inputs["input_ids"][0, 0, 1] = 110
    assert not torch.equal(loaded(**inputs).logits_per_text, expected.logits_per_text)


def test_parts_that_are_frozen_stay_as_they_are():
    model, inputs = tiny_model().train(), random_inputs()
    model.clip.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, return_loss=True).loss.backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head"}


# --- what is wrong gets a name ---------------------------------------------------------------------------------------


def test_frames_of_another_rank_or_size_are_errors_that_name_them(model):
    with pytest.raises(ValueError, match=r"must be \(videos, frames, 3, H, W\), got \(5, 3, 32, 32\)"):
        model.get_video_features(torch.zeros(5, 3, 32, 32))
    with pytest.raises(ValueError, match="48"):
        model.get_video_features(torch.zeros(1, 5, 3, 48, 48))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temporal_num_layers": 0}, "`temporal_num_layers` must be at least 1, got 0"),
        ({"max_frames": 0}, "`max_frames` must be at least 1"),
        ({"excitation_reduction": -1}, "`excitation_reduction` must be at least 1"),
        ({"expert_loss_weight": -0.5}, "`expert_loss_weight` must not be negative"),
        ({"temporal_num_attention_heads": 3}, "16 is not a multiple of `temporal_num_attention_heads` 3"),
        ({"temporal_num_attention_heads": 0}, "is not a multiple of `temporal_num_attention_heads` 0"),
    ],
)
def test_numbers_that_make_no_model_are_errors(wrong, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**wrong)
