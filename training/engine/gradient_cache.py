# SPDX-License-Identifier: Apache-2.0
"""Contrastive batches larger than memory: the gradient of one big batch, embedded chunk by chunk (GradCache).

After Gao et al., arXiv 2101.06983: (1) embed all chunks without a graph and record the random state before each; (2)
compute the loss on all embeddings and its gradient with respect to them; (3) embed each chunk again in the same random
state and backpropagate the stored gradient through it. Memory is that of one chunk, the cost is one more forward pass.
The gradient is exact, also with dropout and several processes (which synchronise once, with the last chunk).

Also here, plain gradient accumulation: the mean gradient of several independent contrastive batches.
"""

import contextlib

import torch

from modeling_camoe.modeling_camoe import CAMoETextOutput, CAMoEVideoOutput
from modeling_camoe.retrieval import fold_text, fold_video

from .lora import unwrap_peft


class RandomState:
    """The random state of the CPU and of one device, to run the same computation twice."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replayed(self):
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def cached_backward(accelerator, model, batch: dict, video_ids: torch.Tensor, chunk: int):
    """Forward and backward pass of one contrastive batch in chunks of `chunk` pairs; fills the parameters' `grad`.

    Args:
        model: as prepared by `accelerator`. batch: inputs of the model, this process's (n, ...) tensors on any device;
            each chunk is moved to the model's device when it is needed. video_ids: (n,).

    Returns:
        the detached loss (scalar) and the gate weights (n,E).
    """
    core = unwrap_peft(accelerator.unwrap_model(model, keep_torch_compile=False))
    device = accelerator.device
    parts = [
        {name: tensor[start : start + chunk] for name, tensor in batch.items()}
        for start in range(0, len(video_ids), chunk)
    ]

    states, leaves = [], None
    for index, part in enumerate(parts):
        states.append(RandomState(device))
        embeds = _embed(model, part, device)
        if leaves is None:  # allocated once: small long-lived tensors between activations would fragment the memory
            leaves = [embed.new_empty(len(video_ids), *embed.shape[1:]) for embed in embeds]
        for leaf, embed in zip(leaves, embeds, strict=True):
            leaf[index * chunk : index * chunk + chunk] = embed
    for leaf in leaves:
        leaf.requires_grad_()

    # The logit scale is a parameter: its gradient, too, must arrive in the last backward pass, which synchronises.
    text_embeds, video_embeds, gate_weights = leaves
    log_scale = core.clip.logit_scale.detach().clone().requires_grad_()
    loss = core.retrieval_loss(
        CAMoETextOutput(pooler_output=fold_text(text_embeds), text_embeds=text_embeds),
        CAMoEVideoOutput(pooler_output=fold_video(video_embeds, gate_weights), video_embeds=video_embeds),
        video_ids.to(device),
        log_scale=log_scale,
        gather_across_devices=True,
    )
    gradients = torch.autograd.grad(loss, [*leaves, log_scale], allow_unused=True, materialize_grads=True)
    *leaf_gradients, scale_gradient = gradients

    for index, (part, state) in enumerate(zip(parts, states, strict=True)):
        last = index == len(parts) - 1
        own = [gradient[index * chunk : index * chunk + chunk] for gradient in leaf_gradients]
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with state.replayed():
                surrogate = _surrogate(model, part, device, own)
            if last:
                surrogate = surrogate + core.clip.logit_scale * scale_gradient
            accelerator.backward(surrogate)
        del surrogate
    return loss.detach(), gate_weights.detach()


@torch.no_grad()
def _embed(model, part: dict, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Text embeddings (c,E,D), video embeddings (c,E,D) and gate weights (c,E) of a chunk."""
    output = model(**to_device(part, device))
    return output.text_embeds, output.video_embeds, output.gate_weights


def _surrogate(model, part: dict, device: torch.device, gradients: list[torch.Tensor]) -> torch.Tensor:
    """A scalar with the loss's gradient for the parameters: the sum of the embeddings times their gradients."""
    output = model(**to_device(part, device))
    outputs = (output.text_embeds, output.video_embeds, output.gate_weights)
    return sum((embed * gradient).sum() for embed, gradient in zip(outputs, gradients, strict=True))


def accumulated_backward(accelerator, model, batch: dict, video_ids: torch.Tensor, steps: int):
    """Forward and backward passes of `steps` contrastive batches in turn; fills `grad` with the mean gradient.

    Each loss sees its own pairs only: these are `steps` small contrastive batches, not one large one.

    Args:
        batch, video_ids: (n, ...), this process's `steps` batches concatenated, on any device.

    Returns:
        the detached mean loss (scalar) and the gate weights (n,E).
    """
    rows = len(video_ids) // steps
    losses, gates = [], []
    for index in range(steps):
        own = slice(index * rows, index * rows + rows)
        part = {name: tensor[own] for name, tensor in batch.items()} | {"video_ids": video_ids[own]}
        with contextlib.nullcontext() if index == steps - 1 else accelerator.no_sync(model):
            inputs = to_device(part, accelerator.device)
            output = model(**inputs, return_loss=True, gather_across_devices=True)
            accelerator.backward(output.loss / steps)
        losses.append(output.loss.detach())
        gates.append(output.gate_weights.detach())
    return torch.stack(losses).mean(), torch.cat(gates)


def to_device(inputs: dict, device: torch.device) -> dict:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
