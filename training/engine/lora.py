# SPDX-License-Identifier: Apache-2.0
"""LoRA on CLIP, with the experts and the gate trained in full (peft; Hu et al., arXiv 2106.09685).

The published model is a plain CAMoE checkpoint with the LoRA matrices merged into CLIP's weights. Next to it,
`adapter/` holds the matrices and the head alone, a few megabytes, which peft loads on top of the CLIP that the run
started from:

    model = PeftModel.from_pretrained(CAMoEModel.from_pretrained("openai/clip-vit-base-patch32"), "runs/x/adapter")
"""

import copy

from torch import nn

from data.errors import UserError


# The attention of both towers' layers, as a pattern of peft: CLIP's names, and BERT's, which the text towers of
# Chinese CLIP and AltCLIP have. SigLIP's pooling head is left out: its attention does not call its own linear layer.
TARGETS = r"clip\..*\.layers?\.\d+\..*(q_proj|k_proj|v_proj|out_proj|query|key|value|attention\.output\.dense)"


def add_lora(model, fields: dict) -> nn.Module:
    """Wrap a [`CAMoEModel`] in a peft model that trains only the LoRA matrices and the head.

    Args:
        model: changed in place. fields: of peft's LoraConfig; by default, rank 16 on the attention of both towers.

    Raises:
        UserError: peft is not installed, or rejects the fields.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("option 'lora' needs peft: pip install peft") from error
    # Not "head": peft compares the ends of names, and SigLIP's towers have a head of their own.
    head = [f"head.experts.{name}" for name in model.head.experts] + ["head.gate"] * (model.head.gate is not None)
    fields = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS, "modules_to_save": head, **fields}
    try:
        return get_peft_model(model, LoraConfig(**fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"option 'lora' is wrong: {error}") from error


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The [`CAMoEModel`] inside a peft model; any other model is returned unchanged."""
    return model.get_base_model() if has_adapter(model) else model


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of a peft model as the equivalent plain model."""
    return copy.deepcopy(model).merge_and_unload()
