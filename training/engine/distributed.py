# SPDX-License-Identifier: Apache-2.0
"""What FSDP2 and DeepSpeed need beside `accelerator.prepare`, so that the trainer need not know of them.

DDP needs nothing. Under FSDP2 a process holds a part of each weight: `logit_scale`, a scalar, cannot be parted and
stays whole on every process, and what validates or is published is gathered first. DeepSpeed steps inside its backward
pass.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn

from data.errors import UserError
from modeling_camoe import CAMoEModel


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, pairs: int):
    """`accelerator.prepare(model, optimizer)` -> the two, prepared.

    Args:
        pairs: of one forward pass of this process.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = pairs
    if accelerator.distributed_type == DistributedType.FSDP:
        scale = model.clip.logit_scale
        accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList([scale])]
        if scale.requires_grad:
            scale.register_hook(_mean_over_processes)
    return accelerator.prepare(model, optimizer)


def check(accelerator: Accelerator, options):
    """Refuse what does not work together.

    Raises:
        UserError: naming both.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if options.gradient_cache_chunk or options.gradient_accumulation_steps > 1:
            raise UserError(
                "DeepSpeed steps with every backward pass, so --gradient_cache_chunk and "
                "--gradient_accumulation_steps do not work under it; launch with multi_gpu_ddp.yaml or fsdp2.yaml"
            )
        if options.on_nan == "skip":
            raise UserError("DeepSpeed has made its step before --on_nan skip could; leave that out")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP) and options.lora is not None:
        raise UserError("--lora trains few weights, and is for one process or DDP; launch with multi_gpu_ddp.yaml")


def whole_model(model: CAMoEModel) -> CAMoEModel:
    """The model with all its weights: itself, or a copy gathered from the shards. All processes call this."""
    from torch.distributed.tensor import DTensor

    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    with torch.random.fork_rng():  # what the fresh weights draw must not change the run
        whole = CAMoEModel(model.config)
    whole.load_state_dict(state)
    return whole.to(model.clip.logit_scale.device)


def _mean_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient / dist.get_world_size()
    dist.all_reduce(gradient)
    return gradient
