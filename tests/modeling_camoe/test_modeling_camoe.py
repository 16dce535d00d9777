# SPDX-License-Identifier: Apache-2.0
"""CAMoEModel: the common checks of the transformers library in miniature, and properties of our own."""

import copy
import json
import math
import tempfile

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, CLIPModel
from transformers.utils import logging

from modeling_camoe import CAMoEConfig, CAMoEModel
from modeling_camoe.losses import contrastive_loss
from tests.tiny_model import EOS, random_inputs, tiny_clip_config, tiny_config, tiny_model


logging.disable_progress_bar()


def save_and_load(model, cls=AutoModel, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return cls.from_pretrained(folder, output_loading_info=True, **kwargs)


# --- saving, loading, initialising -----------------------------------------------------------------------------------


def test_saving_and_loading_twice_gives_the_same_outputs():
    model, inputs = tiny_model(), random_inputs()
    loaded, info = save_and_load(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again, _ = save_and_load(loaded)
    assert type(again) is CAMoEModel and not again.training
    assert torch.equal(again(**inputs).logits_per_text, model(**inputs).logits_per_text)


def test_a_plain_clip_checkpoint_loads_and_only_the_head_is_new():
    clip = CLIPModel(tiny_clip_config())
    model, info = save_and_load(clip, CAMoEModel)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"head"}
    assert not info["unexpected_keys"]
    for name, parameter in clip.named_parameters():
        assert torch.equal(model.clip.get_parameter(name), parameter), name


def test_a_fresh_camoe_gives_every_expert_exactly_the_mean_pooled_clip_embedding():
    clip = CLIPModel(tiny_clip_config()).eval()
    model, _ = save_and_load(clip, CAMoEModel)
    inputs = random_inputs()
    pixels, mask = inputs["pixel_values_videos"], inputs["frame_mask"]
    output = model.get_video_features(pixels, mask)
    frames = F.normalize(clip.get_image_features(pixels.flatten(0, 1)).pooler_output, dim=-1).unflatten(0, (3, 5))
    pooled = (frames * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    for expert in range(4):
        assert torch.equal(output.video_embeds[:, expert], F.normalize(pooled, dim=-1))
    torch.testing.assert_close(output.gate_weights, torch.full((3, 4), 0.25))


def test_options_beside_a_clip_checkpoint_change_the_head_and_are_checked():
    clip = CLIPModel(tiny_clip_config())
    model, _ = save_and_load(clip, CAMoEModel, experts=["fusion", "action"], gate="uniform")
    assert list(model.head.experts) == ["fusion", "action"] and model.head.gate is None
    with pytest.raises(Exception, match="which `experts` .* does not have"):
        save_and_load(clip, CAMoEModel, experts=["fusion"], frame_aggregation={"acton": "mean"})


def test_an_expert_can_be_taken_out_of_a_camoe_checkpoint():
    model = tiny_model(frame_aggregation={"action": "transformer"})
    loaded, _ = save_and_load(model, CAMoEModel, experts=["action"], gate="uniform")
    assert loaded.config.frame_aggregation == {"action": "transformer"}
    inputs = random_inputs()
    videos = inputs["pixel_values_videos"], inputs["frame_mask"]
    taken = loaded.eval().get_video_features(*videos).video_embeds[:, 0]
    torch.testing.assert_close(taken, model.get_video_features(*videos).video_embeds[:, 2])


def named_gates(model) -> dict[str, torch.Tensor]:
    """Each expert's unnormalised gate weights over three clips, relative to those of "action"."""
    inputs = random_inputs()
    gates = model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).gate_weights
    named = dict(zip(model.head.experts, gates.T, strict=True))
    return {name: gate / named["action"] for name, gate in named.items()}


@pytest.mark.parametrize(
    "experts",
    [
        ["scene", "action", "entity", "fusion"],
        ["action", "fusion"],
        ["mood", "action", "scene"],
        ["a", "action", "b", "scene"],
    ],
)
def test_a_gate_row_follows_its_expert_by_name(experts):
    model = tiny_model()
    loaded, info = save_and_load(model, CAMoEModel, experts=experts)
    assert not [key for key in info["missing_keys"] if "gate" in key] and not info["mismatched_keys"]
    before, after = named_gates(model), named_gates(loaded)
    for name in set(experts) & set(before):
        torch.testing.assert_close(after[name], before[name], msg=name)
    gate = loaded.head.gate.projection
    for row, name in enumerate(experts):
        if name not in before:
            assert not gate.weight[row].any() and gate.bias[row].item() == pytest.approx(-math.log(len(experts)))
    again, _ = save_and_load(loaded)  # in the order in which it was built
    assert again.config.experts == experts
    assert torch.equal(again.head.gate.projection.weight, gate.weight)


def test_experts_with_new_names_do_not_inherit_a_gate():
    model = tiny_model()
    loaded, _ = save_and_load(model, CAMoEModel, experts=["a", "b", "c", "d"])
    inputs = random_inputs()
    gates = loaded.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).gate_weights
    torch.testing.assert_close(gates, torch.full((3, 4), 0.25))


def test_experts_changed_after_building_are_not_saved(tmp_path):
    model = tiny_model()
    model.config.experts = ["scene", "action", "entity", "fusion"]
    with pytest.raises(ValueError, match="`experts` was changed to .* after the model was built"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_weights_are_initialised_as_in_init():
    config = tiny_config(gate_prior={"fusion": 4, "entity": 1, "action": 1, "scene": 1})
    torch.manual_seed(0)
    built = CAMoEModel(config)
    torch.manual_seed(0)
    loaded = CAMoEModel.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    constant = 0
    for name, parameter in built.named_parameters():
        other = loaded.get_parameter(name)
        assert not other.is_meta and torch.isfinite(other).all(), name
        torch.testing.assert_close(other.std(correction=0), parameter.std(correction=0), atol=0.02, rtol=0.3, msg=name)
        constant += torch.equal(other, parameter)
    assert constant > 50  # norms, biases, the zero layers, the identities, the gate, logit_scale
    assert loaded.clip.logit_scale.item() == pytest.approx(config.clip_config.logit_scale_init_value)
    for name, buffer in built.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


def test_every_tensor_is_a_parameter_or_a_buffer_and_the_model_builds_on_meta():
    model = tiny_model()
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not loose, (name, loose)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in CAMoEModel(tiny_config()).parameters())


def test_config_round_trips_and_auto_config_knows_it():
    config = tiny_config(
        experts=["fusion", "action", "mood"],
        frame_aggregation={"mood": "mean"},
        gate_prior={"fusion": 2.0, "action": 1.0, "mood": 1.0},
        dual_softmax_temp=10.0,
        expert_loss_weight=0.5,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is CAMoEConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.frame_aggregation == {"fusion": "transformer", "action": "motion", "mood": "mean"}


def test_a_saved_configuration_names_every_aggregation_so_that_no_later_default_changes_it(tmp_path):
    tiny_config(frame_aggregation={"action": "transformer"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["frame_aggregation"]
    assert written == {
        "fusion": "transformer", "entity": "excitation", "action": "transformer", "scene": "excitation"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": []}, "non-empty list of distinct names"),
        ({"experts": ["fusion", "fusion"]}, "non-empty list of distinct names"),
        ({"frame_aggregation": {"fusion": "lstm"}}, "'lstm'; choose from"),
        ({"gate": "double"}, "'double'; choose from"),
        ({"gate_prior": {"fusion": 1.0}}, "positive weight for every expert"),
        ({"dual_softmax_temp": 0.0}, "must be positive"),
        ({"dual_softmax_prior": "none"}, "`dual_softmax_prior` is 'none'; choose from"),
        ({"max_frames": "many"}, "max_frames"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_field(wrong, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**wrong)


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_feature_outputs_have_the_shapes_of_the_contract():
    model, inputs = tiny_model(), random_inputs(num_texts=2)
    video = model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"])
    assert video.last_hidden_state.shape == (3, 5 * 17, 32)
    assert video.pooler_output.shape == (3, 4 * 16) and video.video_embeds.shape == (3, 4, 16)
    assert video.gate_weights.shape == (3, 4) and video.frame_weights.shape == (3, 4, 5)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert text.last_hidden_state.shape == (2, 4 * 7, 32)
    assert text.pooler_output.shape == (2, 4 * 16) and text.text_embeds.shape == (2, 4, 16)


def test_the_inner_product_of_the_pooler_outputs_is_the_score():
    model, inputs = tiny_model(), random_inputs(num_texts=2)
    output = model(**inputs)
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    videos = model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).pooler_output
    scores = output.logits_per_text / model.clip.logit_scale.exp()
    torch.testing.assert_close(texts @ videos.T, scores, atol=1e-5, rtol=0)
    assert scores.abs().max() <= 1
    assert torch.equal(output.logits_per_video, output.logits_per_text.T)


def test_tuples_and_dictionaries_hold_the_same():
    model, inputs = tiny_model(), random_inputs()
    as_dict = model(**inputs, return_loss=True)
    as_tuple = model(**inputs, return_loss=True, return_dict=False)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits_per_text)
    pixels = inputs["pixel_values_videos"]
    as_tuple = model.get_video_features(pixels, return_dict=False)
    assert torch.equal(as_tuple[1], model.get_video_features(pixels).pooler_output)


def test_hidden_states_and_attentions_come_on_request():
    model, inputs = tiny_model(attn_implementation="eager"), random_inputs()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.video_model_output.hidden_states) == 3
    assert output.video_model_output.hidden_states[0].shape == (3 * 5, 17, 32)
    assert output.text_model_output.attentions[0].shape == (3 * 4, 4, 7, 7)
    assert model(**inputs).video_model_output.hidden_states is None


def test_eager_and_sdpa_agree():
    model, inputs = tiny_model(), random_inputs()
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for tower in (model.clip.text_model, model.clip.vision_model):
            assert tower.config._attn_implementation == implementation
        logits[implementation] = model(**inputs).logits_per_text
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=1e-5)


# --- properties ------------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_its_members_give_alone():
    model, inputs = tiny_model(), random_inputs()
    together = model(**inputs).logits_per_text
    for n in range(3):
        for b in range(3):
            alone = model(
                inputs["input_ids"][n : n + 1], inputs["pixel_values_videos"][b : b + 1],
                inputs["attention_mask"][n : n + 1], inputs["frame_mask"][b : b + 1],
            ).logits_per_text  # fmt: skip
            torch.testing.assert_close(alone[0, 0], together[n, b], atol=1e-4, rtol=1e-5)


def test_padding_frames_do_not_change_the_embedding():
    model, inputs = tiny_model(), random_inputs()
    pixels, mask = inputs["pixel_values_videos"], inputs["frame_mask"]
    expected = model.get_video_features(pixels, mask).pooler_output
    noisy = torch.where(mask[..., None, None, None], pixels, torch.full_like(pixels, 3.0))
    torch.testing.assert_close(model.get_video_features(noisy, mask).pooler_output, expected)
    short = model.get_video_features(pixels[2:, :3]).pooler_output
    torch.testing.assert_close(short, expected[2:], atol=1e-5, rtol=1e-5)


def test_trimmed_text_equals_text_padded_to_77():
    model, inputs = tiny_model(), random_inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded_ids = F.pad(ids, (0, 77 - 7), value=EOS)
    trimmed = model.get_text_features(ids, mask).pooler_output
    padded = model.get_text_features(padded_ids, F.pad(mask, (0, 77 - 7))).pooler_output
    torch.testing.assert_close(padded, trimmed, atol=1e-5, rtol=1e-5)


def test_uint8_frames_equal_processed_float_frames():
    model = tiny_model()
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.image_mean, model.config.image_std))
    floats = (frames.float() / 255 - mean) / std
    torch.testing.assert_close(
        model.get_video_features(frames).pooler_output, model.get_video_features(floats).pooler_output
    )


@pytest.mark.parametrize("num_experts", range(1, 7))
def test_every_number_of_experts_from_one_to_six_works(num_experts):
    names = ["fusion", "entity", "action", "scene", "detail", "mood"][:num_experts]
    model, inputs = tiny_model(experts=names), random_inputs(num_experts=num_experts)
    output = model(**inputs, return_loss=True)
    assert output.video_embeds.shape == (3, num_experts, 16) and torch.isfinite(output.loss)
    torch.testing.assert_close(output.gate_weights.sum(dim=1), torch.ones(3))


def test_text_for_another_number_of_experts_is_an_error():
    with pytest.raises(ValueError, match=r"must be \(texts, 4 experts, tokens\), got \(3, 2, 7\)"):
        tiny_model()(**random_inputs(num_experts=2))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing):
    model, inputs = tiny_model(expert_loss_weight=0.5, dual_softmax_temp=10.0).train(), random_inputs()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(**inputs, video_ids=torch.arange(3), return_loss=True).loss.backward()
    # CLIP's patches beyond the class token of the last layer's output norm have no way into the loss.
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all of a query's attention logits alike: its gradient is zero by nature.
    assert [name for name in missing if not name.endswith("k_proj.bias")] == []


def test_activation_checkpointing_does_not_change_the_gradient():
    inputs = random_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, return_loss=True).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_eight_clips_are_overfitted():
    model = tiny_model(trained=False).train()
    inputs = random_inputs(num_videos=8, num_texts=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()
    assert loss < 0.05
    assert model(**inputs).logits_per_text.argmax(dim=1).tolist() == list(range(8))


def test_the_loss_of_the_configuration_is_used():
    inputs = random_inputs()
    plain = tiny_model(dual_softmax_temp=None)(**inputs, return_loss=True).loss
    dual = tiny_model(dual_softmax_temp=10.0)(**inputs, return_loss=True).loss
    with_experts = tiny_model(dual_softmax_temp=None, expert_loss_weight=1.0)(**inputs, return_loss=True).loss
    assert (dual - plain).abs() > 1e-3 and with_experts > plain + 0.5
    own_axis = tiny_model(dual_softmax_temp=10.0, dual_softmax_prior="own_axis")(**inputs, return_loss=True).loss
    assert (own_axis - dual).abs() > 1e-3
    default = tiny_model(dual_softmax_temp=100.0)(**inputs, return_loss=True).loss
    assert torch.equal(tiny_model()(**inputs, return_loss=True).loss, default) and not torch.equal(default, plain)


def test_embeddings_of_an_earlier_call_stand_in_for_pixels_and_ids():
    model, inputs = tiny_model(), random_inputs()
    full = model(**inputs)
    frames, mask = full.video_model_output.frame_embeds, inputs["frame_mask"]
    again = model(frame_embeds=frames, frame_mask=mask, text_embeds=full.text_embeds)
    assert torch.equal(again.logits_per_text, full.logits_per_text)
    assert again.video_model_output.last_hidden_state is None
    with pytest.raises(ValueError, match="either `pixel_values_videos` or `frame_embeds`"):
        model.get_video_features(inputs["pixel_values_videos"], frame_embeds=frames)
    with pytest.raises(ValueError, match="either `input_ids` or `text_embeds`"):
        model.get_text_features()


def test_under_autocast_the_loss_is_computed_in_float32():
    model, inputs = tiny_model(), random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, return_loss=True)
        text, video = output.text_model_output, output.video_model_output
        assert output.logits_per_text.dtype == torch.bfloat16  # a product: it was in force
    embeds, scale = (text.pooler_output.float(), video.pooler_output.float()), model.clip.logit_scale.exp()
    expected = contrastive_loss(*embeds, scale, dual_softmax_temp=model.config.dual_softmax_temp)
    assert output.loss.dtype == torch.float32 and torch.equal(output.loss, expected)


def test_logit_scale_is_clamped_at_100():
    model = tiny_model()
    with torch.no_grad():
        model.clip.logit_scale.fill_(7.0)
    model.clamp_logit_scale()
    assert model.clip.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frame_weights_near_0_cost_no_precision(dtype):
    """Only ratios of an excitation's weights count, and training may drive all of them towards 0."""
    model, inputs = tiny_model(), random_inputs()
    model.head.experts["entity"].residual.output.bias.data.fill_(-12.0)
    expected = model(**inputs).video_embeds[:, 1]
    half, _ = save_and_load(model, dtype=dtype)
    for each in half, tiny_model(seed=0).to(dtype):  # loaded, and turned into half precision as a whole
        each.head.load_state_dict(model.head.state_dict())
        cosines = torch.nn.functional.cosine_similarity(each(**inputs).video_embeds[:, 1].float(), expected, dim=-1)
        assert cosines.min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    model, inputs = tiny_model(), random_inputs()
    expected = model(**inputs).logits_per_text
    half, _ = save_and_load(model, dtype=dtype)
    assert half.clip.text_model.dtype == half.clip.vision_model.dtype == dtype
    assert half.head.gate.projection.weight.dtype == torch.float32
    output = half(**inputs, return_loss=True)
    assert output.loss.dtype == torch.float32
    # exp(logit_scale) is 14: an error of 0.3 is 0.02 in the score, what eight bits of mantissa leave.
    torch.testing.assert_close(output.logits_per_text.float(), expected, atol=0.3, rtol=0)
