# SPDX-License-Identifier: Apache-2.0
"""Where users take a model: torch.compile, torch.export, PEFT, Trainer, device maps. docs/model.md shows how."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.export import Dim
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from modeling_camoe.modeling_camoe import MAX_LOGIT_SCALE
from tests.tiny_model import random_inputs, tiny_model


logging.disable_progress_bar()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.compile, torch.export -------------------------------------------------------------------------------------


class CountingBackend:
    """Runs graphs as they are and counts them: a graph break would be an error, a recompilation one graph more."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@torch.no_grad()
def test_both_feature_functions_compile_into_one_graph(fresh_dynamo):
    model, inputs = tiny_model(), random_inputs()
    backend = CountingBackend()
    get_video_features = torch.compile(model.get_video_features, fullgraph=True, backend=backend)
    get_text_features = torch.compile(model.get_text_features, fullgraph=True, backend=backend)
    video = get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"])
    text = get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert backend.graphs == 2
    expected = model(**inputs)
    torch.testing.assert_close(video.pooler_output, expected.video_model_output.pooler_output)
    torch.testing.assert_close(video.frame_weights, expected.video_model_output.frame_weights)
    torch.testing.assert_close(text.pooler_output, expected.text_model_output.pooler_output)


@torch.no_grad()
def test_texts_of_other_lengths_do_not_compile_again_and_again(fresh_dynamo):
    model, backend = tiny_model(), CountingBackend()
    get_text_features = torch.compile(model.get_text_features, fullgraph=True, backend=backend)
    for num_texts, length in ((3, 7), (2, 9), (5, 11), (4, 12), (6, 8)):
        inputs = random_inputs(num_texts=num_texts, length=length)
        get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert backend.graphs == 2  # the first sizes, then a graph for all sizes


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_training_step_has_the_gradient_of_the_eager_one(fresh_dynamo):
    inputs = random_inputs()
    gradients = []
    for compiled in (False, True):
        model = tiny_model(dual_softmax_temp=10.0).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.enable_grad():
            forward(**inputs, return_loss=True).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_torch_export_keeps_batch_frames_and_tokens_free():
    model, inputs = tiny_model(), random_inputs(num_texts=2)
    videos, frames, texts, tokens = Dim("videos"), Dim("frames", max=64), Dim("texts"), Dim("tokens", max=77)
    program = torch.export.export(
        model,
        (),
        inputs,
        dynamic_shapes={
            "input_ids": {0: texts, 2: tokens},
            "attention_mask": {0: texts, 2: tokens},
            "pixel_values_videos": {0: videos, 1: frames},
            "frame_mask": {0: videos, 1: frames},
        },
    )
    other = random_inputs(num_videos=4, num_texts=5, num_frames=7, length=9)
    torch.testing.assert_close(program.module()(**other).logits_per_text, model(**other).logits_per_text)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_lora_trains_saves_loads_and_merges(tmp_path):
    inputs = random_inputs()
    model = get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    )
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"clip", "head"}
    base = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(**inputs, return_loss=True).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in base.items())

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**inputs).logits_per_text
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**inputs).logits_per_text, expected)
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        alone = AutoModel.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(alone(**inputs).logits_per_text, expected, atol=1e-4, rtol=1e-5)


# --- Trainer ---------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """The rows of `random_inputs`, over and over."""

    def __init__(self, length: int):
        self.length, self.inputs = length, random_inputs()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {name: rows[index % 3] for name, rows in self.inputs.items()}


class ClampLogitScale(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        model.clamp_logit_scale()


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"return_loss": True}


def make_trainer(folder, model, **options):
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=3, per_device_eval_batch_size=3, learning_rate=3e-3, logging_steps=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential", max_grad_norm=1e9, report_to=[], use_cpu=True, disable_tqdm=True,
        log_level="error", **options,
    )  # fmt: skip
    rows = Pairs(3)  # one batch an epoch, the same one
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=[ClampLogitScale()]
    )


def test_trainer_trains_evaluates_and_saves_it_as_it_is(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.clip.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
    trainer = make_trainer(tmp_path, model, num_train_epochs=15, eval_strategy="no", save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.5 * before
    assert model.clip.logit_scale <= MAX_LOGIT_SCALE
    trainer.save_model(tmp_path / "model")
    loaded, inputs = AutoModel.from_pretrained(tmp_path / "model"), random_inputs()
    torch.testing.assert_close(loaded(**inputs, return_loss=True).loss.item(), after, atol=1e-4, rtol=1e-4)


def test_trainers_accumulated_gradient_is_the_mean_over_its_batches(tmp_path):
    norms = []
    for steps in (1, 4):
        trainer = make_trainer(
            tmp_path, tiny_model(), max_steps=1, gradient_accumulation_steps=steps, save_strategy="no"
        )
        trainer.train_dataset = Pairs(3 * steps)
        trainer.train()
        norms.append(next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# --- devices, dtypes, attention --------------------------------------------------------------------------------------


def test_device_map_dtype_and_attention_reach_both_towers(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.clip.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.head.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    for tower in (model.clip.text_model, model.clip.vision_model):
        assert tower.config._attn_implementation == "eager"
    inputs = random_inputs()
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    expected = tiny_model()(**inputs).logits_per_text
    torch.testing.assert_close(model(**on_device).logits_per_text.float().cpu(), expected, atol=0.3, rtol=0)


@torch.no_grad()
def test_parts_that_lie_on_disk_give_the_same_scores(tmp_path):
    model, inputs = tiny_model(), random_inputs()
    model.save_pretrained(tmp_path / "model")
    split = {
        "clip.text_model": "cpu", "clip.text_projection": "cpu", "clip.visual_projection": "cpu",
        "clip.logit_scale": "cpu", "clip.vision_model": "disk", "head": "disk",
    }  # fmt: skip
    loaded = AutoModel.from_pretrained(tmp_path / "model", device_map=split, offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for parameter in loaded.head.parameters())
    torch.testing.assert_close(loaded(**inputs).logits_per_text, model(**inputs).logits_per_text)
