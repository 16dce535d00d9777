# SPDX-License-Identifier: Apache-2.0
"""Which parameter learns at which rate, and the average of the weights."""

import pytest
import torch

from engine.optimizer import Average, layers_above, make_optimizer, tower_depths
from engine.options import TrainOptions
from tests.tiny_model import tiny_model


def options(**changes) -> TrainOptions:
    given = {"learning_rate": 1e-3, "clip_learning_rate": 1e-4, "weight_decay": 0.2}
    return TrainOptions("data", "runs", model_name_or_path="clip", **{**given, **changes})


def rates(model, **changes) -> dict[str, tuple[float, float]]:
    groups = make_optimizer(model, options(**changes)).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_clip_and_the_new_layers_learn_at_their_rates_and_norms_do_not_decay():
    learned = rates(tiny_model())
    assert learned["clip.visual_projection.weight"] == (1e-4, 0.2)
    assert learned["clip.logit_scale"] == (1e-4, 0.0)
    assert learned["clip.vision_model.post_layernorm.weight"] == (1e-4, 0.0)
    assert {rate for name, (rate, _) in learned.items() if name.startswith("head.")} == {1e-3}


def test_a_layer_learns_at_a_share_of_the_rate_of_the_layer_above():
    learned = rates(tiny_model(), layer_decay=0.5)

    def rate(name):
        return learned[name][0] / 1e-4

    for tower in ("vision_model", "text_model"):
        layer = f"clip.{tower}.encoder.layers.{{}}.mlp.fc1.weight"
        assert (rate(layer.format(1)), rate(layer.format(0))) == pytest.approx((0.5, 0.25))
    assert rate("clip.vision_model.embeddings.patch_embedding.weight") == pytest.approx(0.125)
    assert rate("clip.text_model.embeddings.token_embedding.weight") == pytest.approx(0.125)
    assert rate("clip.text_projection.weight") == rate("clip.logit_scale") == 1
    assert {rate for name, (rate, _) in learned.items() if name.startswith("head.")} == {1e-3}


def test_the_layers_of_other_text_towers_are_found_too():
    names = [f"clip.text_model.encoder.layer.{n}.attention.self.query.weight" for n in range(3)]
    depths = tower_depths(names)
    assert depths == {"text_model": 3} and [layers_above(name, depths) for name in names] == [3, 2, 1]
    adapted = "base_model.model.clip.text_model.encoder.layer.1.attention.self.query.lora_A.default.weight"
    assert layers_above(adapted, depths) == 2


def test_the_average_follows_the_weights_is_applied_for_a_while_and_is_restored():
    model = tiny_model()
    model.clip.requires_grad_(False)
    weight = model.head.gate.projection.weight
    start, average = weight.detach().clone(), Average(model, decay=0.75)
    with torch.no_grad():
        weight += 1
    average.update()
    with average.applied():
        torch.testing.assert_close(weight.detach(), start + 0.25)
    torch.testing.assert_close(weight.detach(), start + 1)
    other = Average(tiny_model(seed=1), decay=0.75)
    other.trained, other.average = average.trained, [torch.zeros_like(t) for t in average.average]
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(mine, saved) for mine, saved in zip(other.average, average.average, strict=True))
