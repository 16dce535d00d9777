# SPDX-License-Identifier: Apache-2.0
"""The optimiser: which parameters learn at which rate, and an average of the weights.

AdamW with bias correction. CLIP4Clip's BertAdam has none: with a steady gradient its steps are 0.7 times as long at
first, 1.5 times by the fifteenth step and the same after some 200, most of it within the warm-up. It also decays
CLIP's LayerNorms, whose names it does not know; we decay no norm.
"""

import contextlib
import re

import torch

from data.errors import UserError


def make_optimizer(model, options) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained.

    Raises:
        UserError: nothing is trained.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise UserError("nothing is trained: learning_rate and clip_learning_rate are both 0")
    return torch.optim.AdamW(
        groups, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon, fused=True
    )


def parameter_groups(model, options) -> list[dict]:
    """AdamW groups: CLIP and the new layers at their own learning rates; no decay on norms, biases and logit_scale.

    With `layer_decay`, a layer of a tower learns at `clip_learning_rate` times `layer_decay` to the power of the
    number of layers from it to the top; embeddings are one layer lower, all else of CLIP counts as the top.
    """
    groups: dict[tuple[bool, float, float], list] = {}  # CLIP's apart even at the rate of the others: see resuming
    depths = tower_depths(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen because LoRA trains in its place
            continue
        is_clip, rate = ".clip." in f".{name}", options.learning_rate
        if is_clip:
            rate = options.clip_learning_rate * options.layer_decay ** layers_above(name, depths)
        if rate == 0:
            parameter.requires_grad_(False)
            continue
        decay = 0.0 if parameter.ndim < 2 else options.weight_decay
        groups.setdefault((is_clip, rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (_, rate, decay), params in groups.items()]


# "clip.vision_model.encoder.layers.3.mlp.fc1.weight" and, in other text towers, "clip.text_model.encoder.layer.3. ..."
LAYER = re.compile(r"(?:^|\.)((?:text|vision)_model)\.(?:.*\.)?layers?\.(\d+)\.")
EMBEDDINGS = re.compile(r"(?:^|\.)((?:text|vision)_model)\.(?:.*\.)?embeddings\.")


def tower_depths(names) -> dict[str, int]:
    """Tower -> its number of layers."""
    depths: dict[str, int] = {}
    for name in names:
        found = LAYER.search(name)
        if found:
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def layers_above(name: str, depths: dict[str, int]) -> int:
    """How many layers of its tower a parameter has above itself."""
    found = LAYER.search(name)
    if found:
        return depths[found[1]] - int(found[2])
    found = EMBEDDINGS.search(name)
    return depths.get(found[1], 0) + 1 if found else 0


class Average:
    """An exponential moving average of the trained weights; part of a checkpoint.

    Args:
        model: unwrapped. decay: share of the average that a step keeps.
    """

    def __init__(self, model, decay: float):
        self.decay = decay
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def update(self):
        """After an optimiser step."""
        torch._foreach_lerp_(self.average, self.trained, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self):
        """The model has the averaged weights in here."""
        current = [p.detach().clone() for p in self.trained]
        self._set(self.average)
        try:
            yield
        finally:
            self._set(current)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]):
        torch._foreach_copy_(self.trained, values)

    def state_dict(self) -> dict:
        return {"average": [tensor.cpu() for tensor in self.average]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
