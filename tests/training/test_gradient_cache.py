# SPDX-License-Identifier: Apache-2.0
"""Gradient caching and several processes: the gradient is that of the plain global batch, parameter by parameter."""

import json

import torch

from tests.programs import run_processes, run_program


# Single steps of a tiny model on a fixed batch of 8 pairs, one for each case; the main process writes all gradients.
STEPS = """
import json, sys, torch
from accelerate import Accelerator
from engine.gradient_cache import cached_backward
from tests.tiny_model import random_inputs, tiny_model

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # in float32, rounding alone moves small gradients by more than 1e-4
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
own = slice(rank * 8 // world, (rank + 1) * 8 // world)
ids = torch.tensor([0, 1, 2, 3, 4, 1, 5, 6])[own]  # two pairs of one video, on different ranks
results = {}
for name, (chunk, temp, dropout) in json.loads(sys.argv[2]).items():
    model = tiny_model(dual_softmax_temp=temp, expert_loss_weight=0.3, attn_implementation="eager").train().double()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    inputs = {key: value[own] for key, value in random_inputs(num_videos=8, num_texts=8).items()}
    prepared = accelerator.prepare(model)
    torch.manual_seed(0)
    if chunk:
        loss, _ = cached_backward(accelerator, prepared, inputs, ids, chunk)
    else:
        loss = prepared(**inputs, video_ids=ids, return_loss=True, gather_across_devices=True).loss
        accelerator.backward(loss)
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    results[name] = {"loss": loss.detach(), "gradients": gradients}
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
accelerator.end_training()
"""


def steps(folder, processes, cases):
    """Run the cases {name: (chunk or 0, dual softmax temperature or None, dropout)} in real processes."""
    out, script = folder / f"{processes}.pt", folder / "steps.py"
    script.write_text(STEPS)
    arguments = (script, out, json.dumps(cases))
    done = [run_program(*arguments)] if processes == 1 else run_processes(processes, *arguments)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    return torch.load(out)


def assert_same(result, reference):
    """Cosine at least 0.99999 and norm ratio within 1e-4, for every parameter."""
    assert result["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        gradient = result["gradients"][name]
        if expected is None or expected.norm() < 1e-13:  # the gradient of a key's bias is rounding only
            continue
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0, eps=1e-60)
        assert cosine > 0.99999, (name, cosine)
        assert abs(gradient.norm() / expected.norm() - 1) < 1e-4, name


def test_processes_and_chunks_do_not_change_the_gradient(tmp_path):
    plain, cached = (0, None, 0.0), (3, None, 0.0)  # chunks of 3 + 3 + 2
    dual, dual_cached = (0, 10.0, 0.0), (3, 10.0, 0.0)
    one = steps(tmp_path, 1, {"plain": plain, "cached": cached, "dual": dual, "dual_cached": dual_cached})
    two = steps(tmp_path, 2, {"plain": plain, "cached": cached, "dual": dual, "dual_cached": dual_cached})
    assert sum(gradient is not None for gradient in one["plain"]["gradients"].values()) > 100
    assert abs(one["plain"]["loss"] - one["dual"]["loss"]) > 1e-3
    torch.testing.assert_close(one["cached"]["loss"], one["plain"]["loss"])
    for kind, chunked in (("plain", "cached"), ("dual", "dual_cached")):
        reference = one[kind]
        assert_same(one[chunked], reference)
        assert_same(two[kind], reference)
        assert_same(two[chunked], reference)


def test_a_chunk_is_embedded_twice_in_the_same_random_state(tmp_path):
    # One chunk that holds the whole batch draws the same dropout masks as the plain step.
    cases = {"plain": (0, None, 0.3), "cached": (8, None, 0.3), "without": (0, None, 0.0)}
    results = steps(tmp_path, 1, cases)
    assert_same(results["cached"], results["plain"])
    assert abs(results["without"]["loss"] - results["plain"]["loss"]) > 1e-4
