# SPDX-License-Identifier: Apache-2.0
"""A start for a CLIP vision tower that is trained from scratch in minutes: it begins by looking at places.

Freshly drawn, CLIP's tower averages all patches into the class token and hardly hears where each one was: its position
table starts at a fiftieth of CLIP's own patch embeddings, and pre-norm keeps that ratio. What moves is then invisible
until attention has learned to localise, which takes longer than a small run lasts. So, in the spirit of structured
starts for attention (Trockman and Kolter, arXiv 2305.09828; the forms here are our choice):

- the position table is two-dimensional sinusoids, as loud as the patches, in dimensions of their own;
- each head of the class token attends to one region of the frame (left, right, top, bottom, ...), in every layer;
- values and outputs are orthogonal, and the last layer's are scaled up: the class token reads what its heads saw.

All of it is only a start: no weight is frozen, and the architecture is CLIP's. H is the hidden size, G the patches a
side, P the dimensions that hold positions.
"""

import math

import torch
from torch import nn

from data.errors import UserError


# (x, y) in frame units that the class token's heads look at, in turn; heads beyond these look at the whole frame.
REGIONS = (
    *((0.2, 0.5), (0.8, 0.5), (0.5, 0.2), (0.5, 0.8)),  # halves
    (0.5, 0.5),
    *((0.2, 0.2), (0.8, 0.8), (0.8, 0.2), (0.2, 0.8)),  # corners
)
FREQUENCIES = 2  # an axis: half a period and a whole one over the frame, so that nothing repeats
SHARPNESS = 1.5  # of a region: logits fall by about twice this from its centre to the next region's
READOUT_GAIN = 2.0  # of the last layer; the others start at half
PATCH_STD = 0.28  # of CLIP's fresh patch embeddings on normalised pixels of smooth pictures


def position_waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Places (N,) in [0, 1] -> sinusoids (N, P), P = 4 * FREQUENCIES, of an axis-wise cosine kernel."""
    phases = [math.pi * k * axis for k in range(1, FREQUENCIES + 1) for axis in (x, y)]
    return torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)], dim=-1)


@torch.no_grad()
def start_with_places(vision_model: nn.Module):
    """Set the weights of a fresh `CLIPVisionTransformer` in place, as the head of this file describes.

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

    # Positions in the first P dimensions, a constant that marks the class token in the next, patches in the others.
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
        _look_at_regions(layer.self_attn, hidden, waves)
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        last = number == len(layers) - 1
        nn.init.orthogonal_(layer.self_attn.out_proj.weight, gain=READOUT_GAIN if last else 0.5)


def _look_at_regions(attention: nn.Module, hidden: int, waves: int):
    """Keys read the positions; the query of the class token, known by its constant, is each head's region."""
    width = hidden // attention.num_heads
    scale = math.sqrt(SHARPNESS * math.sqrt(width))  # half of it on either side of the inner product
    query, key = attention.q_proj.weight, attention.k_proj.weight  # (H,H)
    query *= 0.5  # what is random beside it should not drown the regions
    key *= 0.5
    for head in range(attention.num_heads):
        rows = slice(head * width, head * width + waves)
        key[rows, :waves] = scale * torch.eye(waves)
        query[rows] = 0
        if head < len(REGIONS):
            region_x, region_y = torch.tensor(REGIONS[head])
            # After its layer norm the class token's constant is a little less than sqrt(H).
            query[rows, waves] = scale * position_waves(region_x, region_y) / (0.9 * math.sqrt(hidden))
