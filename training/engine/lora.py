# SPDX-License-Identifier: Apache-2.0
"""LoRA on CLIP, with the experts and the gate trained in full (peft; Hu et al., arXiv 2106.09685).

What is published is a plain CAMoE checkpoint, the LoRA matrices merged into CLIP's, and beside it `adapter/`: the
matrices and the head alone, some megabytes, which peft puts on the CLIP that the run started from:

    model = PeftModel.from_pretrained(CAMoEModel.from_pretrained("openai/clip-vit-base-patch32"), "runs/x/adapter")
"""

import copy

from torch import nn

from data.errors import UserError


# CLIP's attention, in both towers; the head's own attention is one matrix `qkv`, so that these names are CLIP's only.
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(model, fields: dict) -> nn.Module:
    """[`CAMoEModel`] -> peft model of it, in which only the LoRA matrices and the head are trained.

    Args:
        model: changed in place. fields: of peft's LoraConfig; rank 16 on the attention of both towers by default.

    Raises:
        UserError: peft is not installed, or rejects the fields.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("option 'lora' needs peft: pip install peft") from error
    fields = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS, "modules_to_save": ["head"], **fields}
    try:
        return get_peft_model(model, LoraConfig(**fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"option 'lora' is wrong: {error}") from error


def camoe_of(model: nn.Module) -> nn.Module:
    """The [`CAMoEModel`] inside a peft model; any other model is returned as it is."""
    return model.get_base_model() if has_adapter(model) else model


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged(model: nn.Module) -> nn.Module:
    """A copy of a peft model as the plain model that computes the same."""
    return copy.deepcopy(model).merge_and_unload()
