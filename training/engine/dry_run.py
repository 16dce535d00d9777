# SPDX-License-Identifier: Apache-2.0
"""What a training run would do: the report of `run_retrieval.py --dry_run`.

Activation memory is not computed from a formula: the model runs forward once on the `meta` device, where tensors have
shapes but no storage, and the sizes of the tensors that autograd would keep for the backward pass are summed. Not
included: kernel workspaces, memory fragmentation and the optimiser step's temporaries. Add 20 % for these.
"""

import copy
import dataclasses

import torch
import yaml
from torch.multiprocessing.reductions import StorageWeakRef

from data.captioned_clips import CaptionedClips


GIB = 2**30
FLOAT32 = 4  # bytes


def describe_run(options, train: CaptionedClips, validation: CaptionedClips | None, model) -> str:
    """The resolved recipe, split sizes, steps, parameters and a memory estimate, as text.

    Args:
        options: [`TrainOptions`]. train, validation: the splits. model: on the CPU, frozen parameters marked.
    """
    pairs = len(train.captions) if options.captions_per_video == "one" else sum(map(len, train.captions))
    pairs_per_step = options.batch_size * options.gradient_accumulation_steps
    steps_per_epoch = pairs // pairs_per_step
    sizes = [f"train split {options.train_split!r}: {_split_size(train)}; {pairs:,} pairs an epoch"]
    if validation is None:
        sizes.append("validation: none, the model of the last epoch is kept")
    else:
        sizes.append(f"validation split {options.validation_split!r}: {_split_size(validation)}")

    named = [(name, p) for name, p in model.named_parameters() if "original_module" not in name]  # peft's copy
    total = sum(p.numel() for _, p in named)
    head = sum(p.numel() for name, p in named if ".head." in f".{name}")
    trained = sum(p.numel() for _, p in named if p.requires_grad)

    fixed = FLOAT32 * (total + 3 * trained)  # weights; gradients and the two moments of AdamW
    chunk = min(options.gradient_cache_chunk or options.batch_size, options.batch_size)
    pair = activation_bytes(model, options.num_frames, options.max_words, options.feature_cache is not None)
    part = "the batch" if chunk == options.batch_size else "a chunk of the gradient cache"
    lines = [
        yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, allow_unicode=True).rstrip(),
        "",
        *sizes,
        f"steps of {pairs_per_step} pairs: {options.total_steps(steps_per_epoch):,}, {steps_per_epoch:,} an epoch",
        f"parameters: {total:,}, of them {head:,} beside CLIP; {trained:,} are trained",
        f"memory, estimated in float32: {(fixed + chunk * pair) / GIB:.1f} GiB in one process",
        f"  weights, gradients, optimiser: {fixed / GIB:.2f} GiB in every process",
        f"  activations: {chunk * pair / GIB:.2f} GiB, {pair / GIB:.3f} for each of {chunk} pairs of {part}; "
        "W processes share them, and bf16 takes about half",
    ]
    if chunk == options.batch_size:
        lines.append("  too much? --gradient_cache_chunk embeds the same batch in chunks, with the same gradient")
    return "\n".join(lines)


def activation_bytes(model, num_frames: int, num_tokens: int, from_features: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of one pair, in float32.

    Args:
        model: [`CAMoEModel`]; not changed. num_frames: T. num_tokens: L, of the longest text.
        from_features: whether only the head runs, on stored embeddings.
    """
    model = copy.deepcopy(model).to("meta").train()
    size, channels = model.config.clip_config.vision_config.image_size, 3
    weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())  # views share a storage: count it once
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    # Two pairs, because some layers skip work for a single one.
    experts, dim = len(model.config.experts), model.config.projection_dim
    if model.config.text_padding == "max_length":
        num_tokens = model.config.max_text_length
    shapes = {"text_embeds": (2, experts, dim), "frame_embeds": (2, num_frames, dim)}
    if not from_features:
        shapes = {"input_ids": (2, experts, num_tokens), "pixel_values_videos": (2, num_frames, channels, size, size)}
    inputs = {
        name: torch.zeros(shape, dtype=torch.long if name == "input_ids" else None, device="meta")
        for name, shape in shapes.items()
    }
    mask = torch.ones(2, num_frames, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs, frame_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 2


def _split_size(split: CaptionedClips) -> str:
    return f"{len(split.clips):,} clips, {sum(map(len, split.captions)):,} captions"
