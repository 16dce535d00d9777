# SPDX-License-Identifier: Apache-2.0
"""Contrastive batches larger than memory: the gradient of one big batch, embedded chunk by chunk (GradCache).

After Gao et al., arXiv 2101.06983: (1) embed all chunks without a graph, remembering the random state before each; (2)
the loss on all embeddings, and its gradient with respect to them; (3) embed each chunk again in the same random state,
and send the remembered gradient back through it. Memory is that of one chunk; time is one more forward pass. Exact,
also with dropout and over several processes (the gradients are synchronised once, with the last chunk).

Beside it, plain gradient accumulation: the mean gradient of several contrastive batches that do not see each other.
"""

import contextlib

import torch

from modeling_camoe.modeling_camoe import CAMoETextOutput, CAMoEVideoOutput
from modeling_camoe.retrieval import fold_text, fold_video

from .lora import camoe_of


class RandomState:
    """The random state of the CPU and of one device, to run something twice alike."""

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
    """Forward and backward of one contrastive batch in chunks of `chunk` pairs; gradients land in the parameters.

    Args:
        model: as prepared by `accelerator`. batch: inputs of the model, (n, ...) tensors of this process, on any
            device: each chunk is moved to the model's when its turn comes. video_ids: (n,).

    Returns:
        loss (scalar, without graph) and the gate weights (n,E).
    """
    core = camoe_of(accelerator.unwrap_model(model, keep_torch_compile=False))
    device = accelerator.device
    parts = [
        {name: tensor[start : start + chunk] for name, tensor in batch.items()}
        for start in range(0, len(video_ids), chunk)
    ]

    states, leaves = [], None
    for index, part in enumerate(parts):
        states.append(RandomState(device))
        embeds = _embed(model, part, device)
        if leaves is None:  # all at once: what stays must not lie scattered among the activations that go
            leaves = [embed.new_empty(len(video_ids), *embed.shape[1:]) for embed in embeds]
        for leaf, embed in zip(leaves, embeds, strict=True):
            leaf[index * chunk : index * chunk + chunk] = embed
    for leaf in leaves:
        leaf.requires_grad_()

    # The scale is a parameter: its gradient, too, must reach it inside the last, synchronised backward pass.
    text_embeds, video_embeds, gate_weights = leaves
    log_scale = core.clip.logit_scale.detach().clone().requires_grad_()
    loss = core.retrieval_loss(
        CAMoETextOutput(pooler_output=fold_text(text_embeds), text_embeds=text_embeds),
        CAMoEVideoOutput(pooler_output=fold_video(video_embeds, gate_weights), video_embeds=video_embeds),
        video_ids.to(device),
        log_scale=log_scale,
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
    """A scalar whose gradient is that of the loss, for the parameters: the embeddings times their known gradients."""
    output = model(**to_device(part, device))
    outputs = (output.text_embeds, output.video_embeds, output.gate_weights)
    return sum((embed * gradient).sum() for embed, gradient in zip(outputs, gradients, strict=True))


def accumulated_backward(accelerator, model, batch: dict, video_ids: torch.Tensor, steps: int):
    """Forward and backward of `steps` contrastive batches one after the other; gradients add up to their mean.

    Each loss sees its own pairs only: this is `steps` small contrastive batches, not one large one.

    Args:
        batch, video_ids: (n, ...), the `steps` batches of this process one after the other, on any device.

    Returns:
        mean loss (scalar, without graph) and the gate weights (n,E).
    """
    rows = len(video_ids) // steps
    losses, gates = [], []
    for index in range(steps):
        own = slice(index * rows, index * rows + rows)
        part = {name: tensor[own] for name, tensor in batch.items()} | {"video_ids": video_ids[own]}
        with contextlib.nullcontext() if index == steps - 1 else accelerator.no_sync(model):
            output = model(**to_device(part, accelerator.device), return_loss=True)
            accelerator.backward(output.loss / steps)
        losses.append(output.loss.detach())
        gates.append(output.gate_weights.detach())
    return torch.stack(losses).mean(), torch.cat(gates)


def to_device(inputs: dict, device: torch.device) -> dict:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
