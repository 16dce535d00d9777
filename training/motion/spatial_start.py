# SPDX-License-Identifier: Apache-2.0
"""An initialisation for a CLIP vision tower that is trained from scratch in minutes: it attends to positions at once.

With CLIP's default initialisation, the class token averages all patches and barely sees where each one was: position
embeddings start at a fiftieth of the scale of patch embeddings, and pre-norm keeps that ratio. Motion is invisible
until attention has learned to localise, which takes longer than a small run. Following structured initialisation of
attention (Trockman and Kolter, arXiv 2305.09828; the details are our choice):

- position embeddings are two-dimensional sinusoids on the scale of the patch embeddings, in their own dimensions;
- each head of the class token attends to one region of the frame (left, right, top, bottom, ...), in every layer;
- value and output projections are orthogonal, with a larger gain in the last layer, so that what the heads read
  reaches the class token.

No weight is frozen, and the architecture is CLIP's. H is the hidden size, G the number of patches per side, P the
number of dimensions that hold positions.
"""

import math

import torch
from torch import nn

from data.errors import UserError


# (x, y) in frame units: the regions that the class token's heads attend to; further heads attend to the whole frame.
REGIONS = (
    *((0.2, 0.5), (0.8, 0.5), (0.5, 0.2), (0.5, 0.8)),  # halves
    (0.5, 0.5),
    *((0.2, 0.2), (0.8, 0.8), (0.8, 0.2), (0.2, 0.8)),  # corners
)
FREQUENCIES = 2  # per axis: half a period and a whole one over the frame, so that no position repeats
SHARPNESS = 1.5  # of a region: attention logits fall by about twice this from its centre to its neighbour's
OUTPUT_GAIN = 2.0  # of the last layer's output projection; the others have 0.5
PATCH_STD = 0.28  # of CLIP's initial patch embeddings on normalised pixels of smooth pictures


def position_waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Positions x, y (N,) in [0, 1] -> sinusoids (N,P), P = 4 * FREQUENCIES."""
    phases = [math.pi * k * axis for k in range(1, FREQUENCIES + 1) for axis in (x, y)]
    return torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)], dim=-1)


@torch.no_grad()
def apply_spatial_start(vision_model: nn.Module):
    """Initialise a `CLIPVisionTransformer` in place, as described at the top of this file.

    Raises:
        UserError: a head has fewer than P dimensions.
    """
    embeddings, layers = vision_model.embeddings, vision_model.encoder.layers
    hidden, side = embeddings.embed_dim, embeddings.image_size // embeddings.patch_size  # H, G
    waves = 4 * FREQUENCIES  # P
    num_heads = layers[0].self_attn.num_heads
    if hidden // num_heads < waves:
        raise UserError(
            f"spatial_start needs heads of at least {waves} dimensions, these have {hidden // num_heads}: choose a "
            "larger hidden_size or a smaller num_attention_heads in clip_config.vision_config"
        )

    # Positions in the first P dimensions, a constant that marks the class token in the next one, patches in the rest.
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :waves] = position_waves(x.flatten(), y.flatten())
    embeddings.patch_embedding.weight /= PATCH_STD
    embeddings.patch_embedding.weight[: waves + 1] = 0
    embeddings.class_embedding.normal_(std=0.3)
    embeddings.class_embedding[:waves] = 0
    embeddings.class_embedding[waves] = math.sqrt(hidden)

    for number, layer in enumerate(layers):
        _attend_to_regions(layer.self_attn, hidden, waves)
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        last = number == len(layers) - 1
        nn.init.orthogonal_(layer.self_attn.out_proj.weight, gain=OUTPUT_GAIN if last else 0.5)


def _attend_to_regions(attention: nn.Module, hidden: int, waves: int):
    """Keys read the positions; the class token's query, recognised by its constant, is the region of each head."""
    width = hidden // attention.num_heads
    scale = math.sqrt(SHARPNESS * math.sqrt(width))  # the square root, because query and key each get one
    query, key = attention.q_proj.weight, attention.k_proj.weight  # (H,H)
    query *= 0.5  # the random part must not dominate the regions
    key *= 0.5
    for head in range(attention.num_heads):
        rows = slice(head * width, head * width + waves)
        key[rows, :waves] = scale * torch.eye(waves)
        query[rows] = 0
        if head < len(REGIONS):
            region_x, region_y = torch.tensor(REGIONS[head])
            # After the layer norm the class token's constant is a little less than sqrt(H).
            query[rows, waves] = scale * position_waves(region_x, region_y) / (0.9 * math.sqrt(hidden))
