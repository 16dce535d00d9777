# SPDX-License-Identifier: Apache-2.0
"""One process, two, and two under FSDP2 give the same training. Also: number formats, compiling, trackers.

torch can run FSDP2 on two CPU processes, but Accelerate enables it for GPUs only: the code in `FSDP2` enables it here.
"""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.programs import run_processes, run_program
from tests.tiny_backbones import tiny_backbone


RECIPE = """
clip_config:
  projection_dim: 16
  vision_config: {image_size: 16, patch_size: 8, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
                  num_attention_heads: 2}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}
tokenizer_vocab_size: 600
num_frames: 2
captions_per_video: one
batch_size: 8
num_train_epochs: 2
learning_rate: 1.0e-2
clip_learning_rate: 1.0e-2
adam_epsilon: 1.0e-2  # larger than the gradients: steps are then smooth in the gradient, which the comparisons need
num_workers: 0
logging_steps: 1
model: {dual_softmax_temp: 10.0}
"""

FSDP2 = """
import accelerate, os, torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
os.environ.update(FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                  FSDP_TRANSFORMER_CLS_TO_WRAP="CLIPEncoderLayer,TemporalTransformerLayer")
original = accelerate.Accelerator.__init__
def init(self, *args, **kwargs):
    original(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False)
prepare = accelerate.Accelerator.prepare
def checked(self, model, optimizer):
    model, optimizer = prepare(self, model, optimizer)
    assert isinstance(model.head.gate.projection.weight, torch.distributed.tensor.DTensor)
    return model, optimizer
accelerate.Accelerator.__init__, accelerate.Accelerator.prepare = init, checked
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sizes = ("--num_train", 24, "--num_validation", 5, "--num_test", 2, "--num_workers", 1)
    made = run_program("make_motion_clips.py", "--output", folder, *sizes)
    assert made.returncode == 0, made.stderr
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset_name: {folder}\nframe_cache: {folder / 'frames'}\n")
    return folder


def train(clips, output_dir, *options, world=1, code=None):
    if "--config" not in options:
        options = ("--config", clips / "recipe.yaml", *options)
    arguments = ("--output_dir", output_dir, *options)
    if world == 1:
        done = [run_program("run_retrieval.py", *arguments, code=code)]
    else:
        done = run_processes(world, "run_retrieval.py", *arguments, code=code)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    return output_dir


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    return train(clips, tmp_path_factory.mktemp("alone"))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def column(folder, name) -> torch.Tensor:
    return torch.tensor([line[name] for line in lines(folder) if name in line])


def assert_same_training(folder, reference, rtol=1e-3):
    for name, count in (("loss", 6), ("grad_norm", 6), ("validation_Rsum", 2), ("gate_action", 6)):
        assert len(column(folder, name)) == count
        torch.testing.assert_close(column(folder, name), column(reference, name), rtol=rtol, atol=0)
    weights, expected = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=1e-4, msg=name)


def test_a_run_without_bad_videos_has_no_list_of_them(alone):
    assert not (alone / "bad_videos.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "code"), [("null", None), (3, None), (3, FSDP2)], ids=["ddp", "chunks", "fsdp2"])
def test_two_processes_train_as_one_does(clips, alone, tmp_path, code, chunk):
    train(clips, tmp_path, "--gradient_cache_chunk", chunk, world=2, code=code)
    assert column(alone, "loss")[-1] < column(alone, "loss")[0] - 0.1
    assert_same_training(tmp_path, alone)


def test_two_processes_train_another_dual_encoder_as_one_does(clips, tmp_path):
    folder = tiny_backbone(tmp_path / "siglip", "siglip")
    recipe = {name: value for name, value in yaml.safe_load(RECIPE).items() if "tokenizer" not in name}
    del recipe["clip_config"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--config", tmp_path / "recipe.yaml", "--dataset_name", clips, "--model_name_or_path", folder)
    options += ("--max_words", 20)
    train(clips, tmp_path / "one", *options)
    code = FSDP2.replace("CLIPEncoderLayer", "SiglipEncoderLayer")
    train(clips, tmp_path / "two", *options, world=2, code=code)
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_resume(clips, alone, tmp_path, code):
    train(clips, tmp_path, "--checkpointing_steps", 2, "--save_total_limit", "null", world=2, code=code)
    for name in ("step_00000004", "step_00000006"):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    train(clips, tmp_path, "--resume_from_checkpoint", "latest", world=2, code=code)
    assert_same_training(tmp_path, alone)


COUNTED = """
import os
import data.captioned_clips as c
import datasets
datasets.config.HF_DATASETS_CACHE = FOLDER + "/cache"
original = c.caption_streams
def counted(captions, *arguments):
    with open(FOLDER + "/tagged_" + os.environ["RANK"], "a") as file:
        file.write("x" * len(captions))
    return original(captions, *arguments)
c.caption_streams = counted
"""


def test_the_first_process_tags_and_the_other_reads_what_it_wrote(clips, tmp_path):
    train(clips, tmp_path, "--max_train_steps", 1, world=2, code=f"FOLDER = {str(tmp_path)!r}\n" + COUNTED)
    assert len((tmp_path / "tagged_0").read_text()) >= 24 + 5
    assert not (tmp_path / "tagged_1").exists()


NAN = """
import modeling_camoe.modeling_camoe as m
original = m.CAMoEModel.retrieval_loss
m.CAMoEModel.retrieval_loss = lambda self, *args, **kwargs: original(self, *args, **kwargs) * float("nan")
"""


def test_every_process_stops_at_a_gradient_that_is_not_finite_and_names_the_whole_batch(clips, tmp_path):
    arguments = ("--config", clips / "recipe.yaml", "--output_dir", tmp_path)
    done = run_processes(2, "run_retrieval.py", *arguments, code=NAN)
    assert 2 in {process.returncode for process in done}
    (message, *_) = [process.stderr.strip().splitlines()[-1] for process in done if process.returncode == 2]
    names = message.split("videos: ")[1].split(";")[0].split(", ")
    assert len(set(names)) == 8 and "no checkpoint was written yet" in message


def test_accumulated_batches_are_one_large_batch_with_a_gradient_cache_and_only_then(clips, alone, tmp_path):
    halves = ("--batch_size", 4, "--gradient_accumulation_steps", 2)
    cached = train(clips, tmp_path / "cached", *halves, "--gradient_cache_chunk", 3)
    assert_same_training(cached, alone)
    plain = train(clips, tmp_path / "plain", *halves, world=2)
    small = train(clips, tmp_path / "small", "--batch_size", 4, "--max_train_steps", 2, "--learning_rate", 1e-9,
                  "--clip_learning_rate", 1e-9)  # fmt: skip
    # Six steps as well, but each loss is the mean of two batches of four, which are easier to tell apart.
    assert len(column(plain, "loss")) == 6
    torch.testing.assert_close(column(plain, "loss")[0], column(small, "loss").mean(), rtol=1e-4, atol=0)
    assert column(plain, "loss")[0] < column(alone, "loss")[0] - 0.3


def test_bf16_trains_nearly_as_float32_does(clips, alone, tmp_path):
    bf16 = 'import os; os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"'
    train(clips, tmp_path, code=bf16)
    losses, expected = column(tmp_path, "loss"), column(alone, "loss")
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0)
    assert not torch.equal(losses, expected)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


# Accelerate has no fp16 on a CPU, torch has: its scaler and its autocast, as Accelerate uses them on a GPU. The first
# scale is so large that gradients overflow, which must cost steps but not stop the run.
FP16 = """
import accelerate, torch
original = accelerate.Accelerator.__init__
def init(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000)
    self.scaler._backoff_factor = 2.0**-42
    self.state._mixed_precision = "fp16"
accelerate.Accelerator.__init__ = init
"""


def test_fp16_overflows_lower_the_scale_and_do_not_stop_the_run(clips, alone, tmp_path):
    train(clips, tmp_path, code=FP16)
    assert not column(tmp_path, "grad_norm")[0].isfinite() and column(tmp_path, "grad_norm")[-1].isfinite()
    torch.testing.assert_close(column(tmp_path, "loss")[0], column(alone, "loss")[0], rtol=0.02, atol=0)
    assert column(tmp_path, "loss")[-1] < column(tmp_path, "loss")[0]


COMPILED = """
import multiprocessing.util, sys
from torch._dynamo.utils import counters
multiprocessing.util.Finalize(None, lambda: sys.stdout.write(f"{counters['stats']['unique_graphs']} graphs"),
                              exitpriority=1)
"""


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one_and_loads_as_it(clips, alone, tmp_path):
    arguments = ("--config", clips / "recipe.yaml", "--output_dir", tmp_path, "--torch_compile", "eager")
    done = run_program("run_retrieval.py", *arguments, code=COMPILED)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("\n")[-1].removesuffix(" graphs")) > 0
    assert "does not group texts by length" in done.stderr and "13,824 tokens instead of 3,560" in done.stderr
    assert_same_training(tmp_path, alone)


def test_tensorboard_receives_loss_gate_weights_gradient_norm_and_speed(clips, alone, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(clips, tmp_path, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "camoe"))
    events.Reload()
    recorded = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    every_step = {"loss", "grad_norm", "learning_rate", "samples_per_second", "data_wait_share"}
    every_step |= {"samples_per_second_per_device", "peak_memory_gb", "hours_left", "same_captions"}
    every_step |= {f"gate_{expert}" for expert in ("fusion", "entity", "action", "scene")}
    assert all(recorded[tag] == [1, 2, 3, 4, 5, 6] for tag in every_step)
    assert recorded["validation/Rsum"] == [3, 6]
    (recipe,) = tmp_path.glob("camoe/**/hparams.yml")
    told = yaml.safe_load(recipe.read_text())
    assert (told["learning_rate"], told["model.dual_softmax_temp"], told["num_train_epochs"]) == (0.01, 10.0, 2)
    losses = torch.tensor([event.value for event in events.Scalars("loss")])
    torch.testing.assert_close(losses, column(alone, "loss"))


def test_an_unknown_tracker_is_one_line(clips, tmp_path):
    arguments = ("--config", clips / "recipe.yaml", "--output_dir", tmp_path, "--report_to", "tensorbord")
    done = run_program("run_retrieval.py", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tensorbord" in done.stderr.strip().splitlines()[-1]
