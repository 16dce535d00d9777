# SPDX-License-Identifier: Apache-2.0
"""Every dual encoder that may stand underneath: what it says by itself is what CAMoE says, from its own files."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoProcessor,
    BlipConfig,
    CLIPModel,
    CLIPSegConfig,
    Siglip2Config,
    SiglipConfig,
    logging,
)

from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEPipeline, CAMoEProcessor, text_groups
from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.sentence_camoe import CAMoESentenceModule
from tests.tiny_backbones import KINDS, LAYOUTS, SIZE, tiny_backbone
from tests.tiny_model import tiny_clip_config
from tests.video_files import write_video


logging.disable_progress_bar()

TEXTS = ["a red star spins clockwise on a sandy beach", "Two kids", "on the brick wall, 一只狗", "kids " * 40]


@pytest.fixture(scope="module", params=[(kind, layout) for kind in KINDS for layout in LAYOUTS], ids="-".join)
def backbone(request, tmp_path_factory):
    """(kind, folder) of each kind in each layout."""
    kind, layout = request.param
    return kind, tiny_backbone(tmp_path_factory.mktemp(kind), kind, layout)


@pytest.fixture(scope="module", params=KINDS)
def one_layout(request, tmp_path_factory):
    return request.param, tiny_backbone(tmp_path_factory.mktemp(request.param), request.param)


def load(folder, **options):
    """Model and processor; a tagger is the processor's alone."""
    tagger = {"tagger": options.pop("tagger")} if "tagger" in options else {}
    return CAMoEModel.from_pretrained(folder, **options), CAMoEProcessor.from_pretrained(folder, **tagger, **options)


def some_clips():
    """Two clips of other sizes and lengths, uint8 (T,H,W,3)."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 40, 60, 3), (3, 50, 33, 3))]


@torch.no_grad()
def own_scores(folder, kind, texts, clips):
    """What the library's own processor and model say: cosine of a text and the mean of unit frame vectors."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    padding = {"padding": "max_length"} if "siglip" in kind else {"padding": True}
    inputs = processor(text=texts, truncation=True, max_length=24, return_tensors="pt", **padding)
    texts = normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    videos = []
    for clip in clips:
        frames = model.get_image_features(**processor(images=list(clip), return_tensors="pt")).pooler_output
        videos.append(normalize(normalize(frames, dim=-1).mean(dim=0), dim=0))
    return texts @ torch.stack(videos).T


# --- zero-shot -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_zero_shot_scores_are_those_of_the_models_own_processor_and_towers(backbone):
    kind, folder = backbone
    model, processor = load(folder, zero_shot=True)
    expected = own_scores(folder, kind, TEXTS, some_clips())
    assert expected.std() > 1e-3  # they differ, so that the comparison says something
    output = model(**processor(text=TEXTS, videos=some_clips(), return_tensors="pt"))
    scores = output.logits_per_text / model.clip.logit_scale.exp()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert output.text_model_output.pooler_output.shape == (4, model.config.projection_dim)  # D entries
    assert model.config.experts == ["mean"] and model.head.gate is None and processor.tagger == "none"
    as_bytes = processor(videos=some_clips(), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert torch.equal(model.get_video_features(**as_bytes).pooler_output, output.video_model_output.pooler_output)


def test_files_score_as_the_frames_that_are_read_from_them(one_layout, tmp_path):
    kind, folder = one_layout
    model, processor = load(folder, zero_shot=True)
    files = [str(write_video(tmp_path / f"{i}.mp4", 12 + 12 * i)) for i in range(2)]
    frames = [processor.video_processor.decode(file).frames.permute(0, 2, 3, 1).numpy() for file in files]
    expected = own_scores(folder, kind, TEXTS, frames)
    scores = encode_texts(model, processor, TEXTS) @ encode_videos(model, processor, files).vectors.T
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_nothing_but_the_head_is_missing_and_nothing_is_left_over(backbone):
    kind, folder = backbone
    model, info = CAMoEModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("head.") for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(model.config.experts) == 4 and model.clip.logit_scale.item() == 2.5


def test_what_is_saved_loads_again_with_the_same_scores(one_layout, tmp_path):
    kind, folder = one_layout
    model, processor = load(folder, zero_shot=True)
    inputs = processor(text=TEXTS, videos=some_clips(), return_tensors="pt")
    expected = model(**inputs).logits_per_text
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert processor.tagger == "none" and processor.max_length == 24
    inputs = processor(text=TEXTS, videos=some_clips(), return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits_per_text, expected)
    assert type(model.clip) is type(AutoModel.from_pretrained(folder))


def test_the_statistics_come_from_the_backbones_own_file(tmp_path):
    folder = tiny_backbone(tmp_path, "altclip", "v4")
    model, processor = load(folder)
    assert model.config.image_mean == list(processor.video_processor.image_mean) == [0.4, 0.45, 0.5]
    (folder / "preprocessor_config.json").unlink()
    assert CAMoEModel.from_pretrained(folder).config.image_mean[0] == pytest.approx(0.48145466)
    siglip = tiny_backbone(tmp_path / "siglip", "siglip2", "v4")
    assert load(siglip)[0].config.image_resample == 2
    (siglip / "preprocessor_config.json").unlink()
    model, processor = load(siglip)
    assert model.config.image_mean == [0.5] * 3 and processor.video_processor.size.height == SIZE


def test_one_number_is_the_statistic_of_all_channels():
    config = CAMoEConfig(clip_config=tiny_clip_config(), image_mean=0.5, image_std=0.25)
    assert (config.image_mean, config.image_std) == ([0.5] * 3, [0.25] * 3)


def test_a_clip_without_its_scale_starts_at_the_configured_one(tmp_path):
    """CLIP4Clip's video checkpoints on the Hub are plain CLIP towers."""
    folder = tiny_backbone(tmp_path / "clip", "clip")
    clip = CLIPModel.from_pretrained(folder)
    state = {name: tensor for name, tensor in clip.state_dict().items() if name != "logit_scale"}
    clip.save_pretrained(folder, state_dict=state)
    model = CAMoEModel.from_pretrained(folder)
    assert model.clip.logit_scale.item() == pytest.approx(clip.config.logit_scale_init_value)


# --- text towers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_neither_grouping_nor_the_other_texts_change_a_vector(one_layout, monkeypatch):
    kind, folder = one_layout
    model, processor = load(folder, zero_shot=True)
    texts = TEXTS + ["two kids", "Two kids", "a red star"]
    alone = torch.cat([encode_texts(model, processor, [text]) for text in texts])
    torch.testing.assert_close(encode_texts(model, processor, texts), alone, atol=1e-5, rtol=0)
    monkeypatch.setattr(text_groups, "MIN_TEXTS", 1)
    calls, encode = [], model.clip.get_text_features
    monkeypatch.setattr(model.clip, "get_text_features", lambda ids, **kw: calls.append(ids) or encode(ids, **kw))
    torch.testing.assert_close(encode_texts(model, processor, texts), alone, atol=1e-5, rtol=0)
    assert [ids.shape[1] for ids in calls] == [24] if "siglip" in kind else len(calls) == 3
    assert sum(map(len, calls)) < len(texts)  # duplicates are encoded once


@torch.no_grad()
def test_a_model_of_one_expert_takes_the_tokenizers_own_ids(one_layout):
    kind, folder = one_layout
    model, processor = load(folder, zero_shot=True)
    inputs = processor(text=TEXTS, return_tensors="pt")
    flat = {name: values[:, 0] for name, values in inputs.items()}  # (N,L)
    expected, got = model.get_text_features(**inputs), model.get_text_features(**flat)
    assert flat["input_ids"].ndim == 2 and torch.equal(got.pooler_output, expected.pooler_output)
    assert got.last_hidden_state.shape[:2] == flat["input_ids"].shape


def test_siglip_texts_keep_their_padding_whatever_is_asked_for(tmp_path):
    model, processor = load(tiny_backbone(tmp_path, "siglip"), zero_shot=True)
    inputs = processor(text=["two kids"], padding="longest", max_length=8, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 1, 24) and inputs["attention_mask"].all()
    with pytest.raises(ValueError, match="have 8 tokens.*must be padded to 24"):
        model.get_text_features(inputs["input_ids"][..., :8])


def test_a_siglip_tokenizer_that_masks_padding_has_its_mask_applied(tmp_path):
    folder = tiny_backbone(tmp_path, "siglip2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}))
    model, processor = load(folder, zero_shot=True)
    inputs = processor(text=TEXTS, videos=some_clips(), return_tensors="pt")
    assert inputs["attention_mask"].sum(-1).min() < 24
    scores = model(**inputs).logits_per_text / model.clip.logit_scale.exp()
    torch.testing.assert_close(scores, own_scores(folder, "siglip2", TEXTS, some_clips()), atol=1e-5, rtol=0)


def test_a_vocabulary_can_grow(one_layout):
    kind, folder = one_layout
    model = CAMoEModel.from_pretrained(folder, zero_shot=True)
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 3)
    assert model.get_input_embeddings().num_embeddings == model.config.get_text_config().vocab_size == size + 3


# --- what a backbone must do besides ---------------------------------------------------------------------------------


def test_every_parameter_that_trains_gets_a_gradient(one_layout):
    """DDP waits for each of them."""
    kind, folder = one_layout
    model, processor = load(folder, tagger="none")
    for parameter in model.head.parameters():  # away from the start, where some gradients are zero
        parameter.data += 0.1
    inputs = processor(text=TEXTS[:2], videos=some_clips(), return_tensors="pt")
    model.train()(**inputs, return_loss=True).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert ("clip.logit_bias" in model.state_dict()) == ("siglip" in kind)


def test_it_can_be_exported_as_a_graph(one_layout):
    kind, folder = one_layout
    model, processor = load(folder, zero_shot=True)
    inputs = dict(processor(text=TEXTS, videos=some_clips(), return_tensors="pt"))
    program = torch.export.export(model, args=(), kwargs=inputs)
    torch.testing.assert_close(
        program.module()(**inputs).logits_per_text, model(**inputs).logits_per_text, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("config", [Siglip2Config, CLIPSegConfig, BlipConfig])
def test_another_kind_of_model_is_refused_by_name(config, tmp_path):
    config().save_pretrained(tmp_path)
    message = f"is a '{config.model_type}' model; supported are clip, siglip, metaclip_2, chinese_clip, altclip"
    for cls in (CAMoEModel, CAMoEProcessor, CAMoEConfig):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path)
    with pytest.raises(Exception, match=message):
        CAMoEConfig(clip_config=config())


def test_siglip_towers_that_do_not_meet_are_refused():
    with pytest.raises(Exception, match="do not end in one space"):
        CAMoEConfig(clip_config=SiglipConfig(text_config={"projection_size": 8}))


def test_frames_of_another_size_are_refused(one_layout):
    kind, folder = one_layout
    model = CAMoEModel.from_pretrained(folder, zero_shot=True)
    with pytest.raises(ValueError, match=r"\(48, 48\) pixels, the model takes \(32, 32\)"):
        model.get_video_features(torch.zeros(1, 2, 3, 48, 48))


# --- one truth -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A CAMoE with three experts that differ, and a prior."""
    folder = tiny_backbone(tmp_path / "clip", "clip")
    experts = {"experts": ["fusion", "entity", "action"], "gate_prior": {"fusion": 2.0, "entity": 1.0, "action": 1.0}}
    model, processor = load(folder, **experts)
    for parameter in model.head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "camoe")
    processor.save_pretrained(tmp_path / "camoe")
    return tmp_path / "camoe"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_processor_says_nothing_about_experts_on_disk(checkpoint):
    written = json.loads((checkpoint / "processor_config.json").read_text())
    assert not {"experts", "streams", "config"} & set(written)
    assert CAMoEProcessor.from_pretrained(checkpoint).experts == ["fusion", "entity", "action"]


def test_an_old_processor_must_say_what_the_model_says(checkpoint):
    change_json(checkpoint / "processor_config.json", experts=["fusion", "entity", "action"], streams={})
    assert AutoProcessor.from_pretrained(checkpoint).experts == ["fusion", "entity", "action"]
    change_json(checkpoint / "processor_config.json", experts=["action", "entity", "fusion"])
    with pytest.raises(
        ValueError, match=r"`experts` \['action', 'entity', 'fusion'\].*\['fusion', 'entity', 'action'\]"
    ):
        AutoProcessor.from_pretrained(checkpoint)
    change_json(
        checkpoint / "processor_config.json", experts=["fusion", "entity", "action"], streams={"entity": "scene"}
    )
    with pytest.raises(ValueError, match="`streams`.*scene"):
        AutoProcessor.from_pretrained(checkpoint)


def test_a_processor_of_another_model_is_refused_by_name_of_the_difference(checkpoint, tmp_path):
    model = CAMoEModel.from_pretrained(checkpoint)
    video = some_clips()[0]
    for changes, name in (
        ({"experts": ["action", "entity", "fusion"], "gate_prior": None}, "experts"),
        ({"streams": {"entity": "scene"}}, "streams"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean"),
    ):
        with pytest.raises(ValueError, match=f"was trained with `{name}` .*`config=model.config`"):
            CAMoEProcessor.from_pretrained(checkpoint, **changes)
        config = CAMoEConfig.from_pretrained(checkpoint, **changes)
        processor = CAMoEProcessor.from_pretrained(checkpoint, config=config)
        with pytest.raises(ValueError, match=f"not this model's: `{name}` is .* in the processor and .* in the model"):
            encode_texts(model, processor, ["two kids"])
    file = str(write_video(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="`image_mean`"):
        encode_videos(model, processor, [file])
    with pytest.raises(ValueError, match="`image_mean`"):
        CAMoEPipeline(model=model, processor=processor)(file)
    with pytest.raises(ValueError, match="`image_mean`"):
        CAMoESentenceModule(model, processor)
    with pytest.raises(ValueError, match="`image_mean`"):
        processor(videos=[video])  # its own video processor has the checkpoint's


def test_a_processor_follows_a_model_that_was_loaded_with_other_experts(checkpoint):
    model = CAMoEModel.from_pretrained(checkpoint, experts=["action", "entity", "fusion"])
    processor = CAMoEProcessor.from_pretrained(checkpoint, config=model.config)
    whole, usual = load(checkpoint)
    caption = {"fusion": "a red star spins", "entity": "a red star", "action": "spins"}
    scores = [m(**p(text=[caption], videos=some_clips(), return_tensors="pt")).logits_per_text
              for m, p in ((model, processor), (whole, usual))]  # fmt: skip
    torch.testing.assert_close(*scores)
    with pytest.raises(ValueError, match="either `config` or"):
        CAMoEProcessor.from_pretrained(checkpoint, config=model.config, experts=["action"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("experts", ["action", "entity", "fusion"]), ("image_mean", [0.1] * 3), ("image_std", [0.9] * 3)],
)
def test_a_configuration_that_was_changed_after_loading_gives_no_wrong_scores(checkpoint, name, value):
    model, processor = load(checkpoint)
    inputs = processor(text=["a red star spins"], videos=some_clips(), return_tensors="pt")
    setattr(processor.config, name, value)
    for call in (lambda: processor(text=["a red star spins"]), lambda: processor(videos=some_clips())):
        with pytest.raises(ValueError, match=f"`{name}` was changed to .* after the processor was made for"):
            call()
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"`{name}` was changed to .* after the model was built with"):
        model(**inputs)


@pytest.mark.parametrize(("name", "value"), [("image_mean", [0.1] * 3), ("image_std", [0.9] * 3), ("resample", 2)])
def test_a_video_processor_that_was_changed_is_an_error_that_names_both_values(checkpoint, name, value):
    model, processor = load(checkpoint)
    with pytest.raises(ValueError, match=f"`{name}` is .*, the model's configuration says"):
        processor(videos=some_clips(), **{name: value})
    setattr(processor.video_processor, name, value)
    for call in (lambda: processor(videos=some_clips()), lambda: encode_texts(model, processor, ["two kids"])):
        with pytest.raises(ValueError, match=f"`{name}` is .*, the model's configuration says"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, "trained with 1/255"),
        ({"do_normalize": False}, "never normalised"),
        ({"do_rescale": False}, "rescaled already"),
    ],
)
def test_frames_that_are_scaled_in_another_way_are_refused(checkpoint, changes, message):
    model, processor = load(checkpoint)
    with pytest.raises(ValueError, match=message):
        processor(videos=some_clips(), **changes)
    for name, value in changes.items():
        setattr(processor.video_processor, name, value)
    with pytest.raises(ValueError, match=message):
        processor(videos=some_clips())


@pytest.mark.parametrize("changes", [{"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"do_rescale": False}])
def test_a_plain_folder_that_scales_pictures_in_another_way_is_refused(tmp_path, changes):
    folder = tiny_backbone(tmp_path, "clip", "v4")
    change_json(folder / "preprocessor_config.json", **changes)
    for cls in (CAMoEModel, CAMoEProcessor):
        with pytest.raises(ValueError, match=f"prepares pictures with .*'{list(changes)[0]}'"):
            cls.from_pretrained(folder)


def test_a_processor_is_not_saved_beside_another_model(checkpoint, tmp_path):
    processor = CAMoEProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="holds a 'clip' model"):
        processor.save_pretrained(tmp_path / "clip")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    change_json(other / "config.json", image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="`image_mean`"):
        processor.save_pretrained(other)


def test_experts_that_are_changed_after_loading_are_the_ones_that_are_built(checkpoint):
    config = CAMoEConfig.from_pretrained(checkpoint)
    config.experts = ["action", "scene"]
    model = CAMoEModel(config)
    assert list(model.head.experts) == ["action", "scene"] and model.config.gate_prior is None
    assert model.config.frame_aggregation == {"action": "motion", "scene": "excitation"}
    config.experts = ["fusion", "fusion"]
    with pytest.raises(Exception, match="distinct names"):
        CAMoEModel(config)


def test_permuted_experts_are_built_in_the_new_order(checkpoint):
    plain = CAMoEModel.from_pretrained(checkpoint)
    config = CAMoEConfig.from_pretrained(checkpoint)
    config.experts = ["action", "entity", "fusion"]
    permuted = CAMoEModel.from_pretrained(checkpoint, config=config)
    frames = normalize(torch.randn(2, 4, 16), dim=-1)
    one, other = (model.get_video_features(frame_embeds=frames).video_embeds for model in (plain, permuted))
    torch.testing.assert_close(other, one.flip(1))


def test_a_subset_of_experts_loads_where_the_checkpoint_has_a_prior(checkpoint):
    model = CAMoEModel.from_pretrained(checkpoint, experts=["action"], gate="uniform")
    assert list(model.head.experts) == ["action"] and model.head.gate is None
    whole = CAMoEModel.from_pretrained(checkpoint)
    assert torch.equal(model.head.experts["action"].projection.weight, whole.head.experts["action"].projection.weight)


@pytest.mark.parametrize("name", ["keys", "items", "forward", "training", "a.b", "", "two words", "1st"])
def test_names_that_cannot_be_modules_are_refused(name):
    with pytest.raises(Exception, match="`experts` has .* choose another name"):
        CAMoEConfig(clip_config=tiny_clip_config(), experts=["fusion", name])


def test_bf16_models_normalise_bytes_in_float32(checkpoint):
    model, processor = CAMoEModel.from_pretrained(checkpoint, dtype=torch.bfloat16), load(checkpoint)[1]
    as_bytes = processor(videos=some_clips(), do_rescale=False, do_normalize=False, return_tensors="pt")
    as_floats = processor(videos=some_clips(), return_tensors="pt")
    seen = []
    model.clip.vision_model.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for inputs in (as_bytes, as_floats):
        model.get_video_features(**inputs)
    real = as_bytes["frame_mask"].flatten().bool()  # a padding frame is black as bytes, and zero as floats
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0][real], seen[1][real])


def test_trainer_does_not_collect_the_towers_hidden_states(checkpoint):
    model, processor = load(checkpoint)
    output = model(**processor(text={"fusion": "two kids"}, videos=some_clips(), return_tensors="pt"))
    kept = set(output) - set(model.config.keys_to_ignore_at_inference)
    assert kept == {"text_embeds", "video_embeds", "gate_weights"}
