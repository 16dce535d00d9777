# SPDX-License-Identifier: Apache-2.0
"""What FSDP2 and DeepSpeed need beyond `accelerator.prepare`, so that the trainer need not know about them.

DDP needs nothing. FSDP2 shards the weights over the processes. `logit_scale` is a scalar and cannot be sharded, so
every process keeps it whole, and the full model is gathered before it is validated or published. DeepSpeed takes the
optimiser step inside its backward pass.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import UserError
from modeling_camoe import CAMoEModel


def prepare_training(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, pairs: int):
    """`accelerator.prepare(model, optimizer)`, with what FSDP2 and DeepSpeed need.

    Args:
        pairs: in one forward pass of this process.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = pairs
    if accelerator.distributed_type == DistributedType.FSDP:
        scale = model.clip.logit_scale
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(model)
        accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList([scale])]
        if scale.requires_grad:
            scale.register_hook(_mean_over_processes)
    return accelerator.prepare(model, optimizer)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of transformer layers that FSDP shards one by one: the towers' and the head's."""
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    return sorted(layers)


def check_options(accelerator: Accelerator, options):
    """Refuse options that do not work with the launch configuration.

    Raises:
        UserError: names the option and the configuration.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if options.gradient_cache_chunk or options.gradient_accumulation_steps > 1:
            raise UserError(
                "DeepSpeed steps with every backward pass, so --gradient_cache_chunk and "
                "--gradient_accumulation_steps do not work under it; launch with multi_gpu_ddp.yaml or fsdp2.yaml"
            )
        if options.on_nan == "skip":
            raise UserError("DeepSpeed takes its step before --on_nan skip could prevent it; leave the option out")
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if sharded and options.lora is not None:
        raise UserError(
            "--lora works in one process or under DDP (it trains few weights); launch with multi_gpu_ddp.yaml"
        )
    if sharded and options.ema_decay is not None:
        raise UserError("--ema_decay works in one process or under DDP; launch with multi_gpu_ddp.yaml")


def full_model(model: CAMoEModel) -> CAMoEModel:
    """The model with all its weights: itself, or a copy gathered from the shards. All processes must call this."""
    from torch.distributed.tensor import DTensor

    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    with torch.random.fork_rng():  # initialising a model must not change the run's random state
        full = CAMoEModel(model.config)
    full.load_state_dict(state)
    return full.to(model.clip.logit_scale.device)


def _mean_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient / dist.get_world_size()
    dist.all_reduce(gradient)
    return gradient
