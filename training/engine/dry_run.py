# SPDX-License-Identifier: Apache-2.0
"""What a training run would do and take: the report of `run_retrieval.py --dry_run`, and its estimates.

Activation memory is not computed from a formula: the model runs forward once on the `meta` device, where tensors have
shapes but no storage, and the sizes of the tensors that autograd would keep for the backward pass are summed. Not
included: kernel workspaces, memory fragmentation and the optimiser step's temporaries. Add 20 % for these. Operations
are counted in the same way.
"""

import copy
import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from data.errors import UserError
from data.frame_cache import JITTER_CHOICES
from data.frame_ring import FrameRing
from data.streaming import StreamedClips

from .telemetry import PairCost


GB, GIB = 1e9, 2**30
FLOAT32 = 4  # bytes
# Measured here on two processor cores: 12 frames of 224 pixels, of 10 seconds of 640 x 360 (benchmarks/results).
DECODE_SECONDS = 0.05
JPEG_SHARE = 0.22  # of the raw frames, at quality 95 on detailed pictures; 0.15 at quality 90
# What a process holds without a model, data or batches: the interpreter and its libraries.
PROCESS_BYTES, WORKER_BYTES = 0.9 * GB, 0.15 * GB


def describe_run(options, splits: dict, model, processor, processes: int = 1) -> str:
    """The resolved recipe, split sizes, steps and hours, parameters, disk and memory, as text.

    Args:
        options: [`TrainOptions`]. splits: role -> the captioned clips. model: on the CPU, frozen parameters marked.
        processor: of the model. processes: of the run.
    """
    train = splits["train"]
    pairs_per_step = options.batch_size * options.gradient_accumulation_steps
    if options.streaming:
        steps_per_epoch = options.steps_per_epoch
        size = f"a stream of {train.num_shards:,} files; its clips are not known and not counted below"
    else:
        pairs = len(train.clips) if options.captions_per_video == "one" else int(train.caption_counts.sum())
        steps_per_epoch, size = pairs // pairs_per_step, f"{_split_size(train)}; {pairs:,} pairs an epoch"
    steps = options.total_steps(steps_per_epoch)
    sizes = [f"train split {options.train_split!r}: {size}"]
    if "validation" in splits:
        sizes.append(f"validation split {options.validation_split!r}: {_split_size(splits['validation'])}")
    else:
        sizes.append("validation: none, the model of the last epoch is kept")
    if "test" in splits:
        name = options.report_test_split
        sizes.append(f"test split {name!r}: {_split_size(splits['test'])}; reported, not used for selection")

    named = [(name, p) for name, p in model.named_parameters() if "original_module" not in name]  # peft's copy
    total = sum(p.numel() for _, p in named)
    head = sum(p.numel() for name, p in named if ".head." in f".{name}")
    trained = sum(p.numel() for _, p in named if p.requires_grad)

    fixed = FLOAT32 * (total + 3 * trained)  # weights; gradients and the two moments of AdamW
    fixed += FLOAT32 * trained if options.ema_decay is not None else 0
    chunk = min(options.gradient_cache_chunk or options.batch_size, options.batch_size)
    pair = activation_bytes(model, options.num_frames, options.max_words, options.feature_cache is not None)
    part = "the batch" if chunk == options.batch_size else "a chunk of the gradient cache"
    hours = steps * pairs_per_step / options.samples_per_second / 3600
    lines = [
        yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, allow_unicode=True).rstrip(),
        "",
        *sizes,
        f"steps of {pairs_per_step} pairs: {steps:,}, {steps_per_epoch:,} an epoch; {hours:.1f} hours at "
        f"{options.samples_per_second:g} pairs a second (--samples_per_second), validation not included",
        f"parameters: {total:,}, of them {head:,} beside CLIP; {trained:,} are trained",
        *_storage(options, splits, model, processor, processes),
        f"device memory, estimated in float32: {(fixed + chunk * pair) / GIB:.1f} GiB in one process",
        f"  weights, gradients, optimiser: {fixed / GIB:.2f} GiB in every process",
        f"  activations: {chunk * pair / GIB:.2f} GiB, {pair / GIB:.3f} for each of {chunk} pairs of {part}; "
        "W processes share them, and bf16 takes about half",
    ]
    if chunk == options.batch_size:
        lines.append("  too much? --gradient_cache_chunk embeds the same batch in chunks, with the same gradient")
    return "\n".join(lines)


def _storage(options, splits: dict, model, processor, processes: int) -> list[str]:
    """Disk, host and shared memory, each with what it is made of."""
    shape = frame_shape(processor.video_processor)
    clips = {role: 0 if isinstance(split, StreamedClips) else len(split.clips) for role, split in splits.items()}
    pairs = options.batch_size * options.gradient_accumulation_steps // processes
    stored = JITTER_CHOICES if options.train_sampling == "jitter" else 1
    checkpoints = (options.save_total_limit or 1) * FLOAT32 * 3 * sum(p.numel() for p in model.parameters())
    frames, what = 0, "none: every clip is decoded in every epoch (--frame_cache DIR decodes it once)"
    kept = stored * clips["train"] + sum(count for role, count in clips.items() if role != "train")
    if options.feature_cache is not None:
        frames = kept * shape[0] * model.config.projection_dim * FLOAT32
        what = f"features of {sum(clips.values()):,} clips in {options.feature_cache}"
    elif options.frame_cache is not None:
        frames = kept * int(np.prod(shape)) * (JPEG_SHARE if options.frame_cache_jpeg else 1)
        what = f"frames of {sum(clips.values()):,} clips in {options.frame_cache}"
        workers = max(1, options.num_workers) * processes
        hours = sum(clips.values()) * stored * shape[0] / 12 * DECODE_SECONDS / workers / 3600
        what += f", filled in {hours:.1f} hours or more by {workers} workers, one core each, at 50 ms for 12 frames"
    lines = [
        f"disk: {(frames + checkpoints) / GB:.1f} GB",
        f"  cache: {frames / GB:.1f} GB; {what}",
        f"  checkpoints: {checkpoints / GB:.1f} GB, {options.save_total_limit or 'all'} of them",
    ]
    free = _free_disk(options.frame_cache or options.feature_cache or options.output_dir)
    if free is not None and free < frames + checkpoints:
        lines.append(f"  the disk has {free / GB:.1f} GB free: clear some, or --frame_cache_jpeg 95")
    shared, why = 0, "features are small"
    if options.feature_cache is None:
        workers = options.num_workers
        prefetch = choose_prefetch(options.prefetch_factor, pairs, shape, workers, processes, free_memory())
        shared = FrameRing.size(pairs, shape, workers, prefetch)
        batch = pairs * int(np.prod(shape))
        why = f"{workers} workers x {prefetch} batches ahead and one in use, {batch / GB:.2f} GB each"
    host = PROCESS_BYTES + options.num_workers * WORKER_BYTES + FLOAT32 * sum(p.numel() for p in model.parameters())
    lines += [
        f"host memory: {(host + shared) * processes / GB:.1f} GB for {processes} processes, shared memory included",
        f"shared memory: {shared * processes / GB:.1f} GB; a process: {why}",
    ]
    return lines


def _free_disk(folder: str) -> int | None:
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def frame_shape(video_processor) -> tuple[int, int, int, int]:
    """(T,3,H,W) of a clip as the model reads it."""
    crop = video_processor.crop_size
    return (video_processor.num_frames, 3, crop["height"], crop["width"])


def free_memory() -> int:
    """Bytes that this machine, or the container that we are in, can still give."""
    free = psutil.virtual_memory().available
    try:  # cgroup v2
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, free)


def choose_prefetch(wanted: int | None, pairs: int, shape, workers: int, processes: int, free: int) -> int:
    """Batches that each worker prepares ahead: what is wanted, or 4, or fewer where memory is short.

    Args:
        pairs: of a step of one process. shape: of a clip. workers: of one process. processes: on this machine.
        free: bytes.

    Raises:
        UserError: half of the free memory does not hold what is wanted, or not even one batch a worker.
    """
    if workers == 0:
        return 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    for prefetch in [wanted] if wanted is not None else (4, 3, 2, 1):
        needed = processes * FrameRing.size(pairs, shape, workers, prefetch)
        if needed <= free / (2 if wanted is not None or prefetch == 1 else 4):
            return prefetch
    raise UserError(
        f"batches of {workers} workers with prefetch_factor {prefetch} need {needed / GB:.1f} GB of shared memory for "
        f"{processes} processes, and {free / GB:.1f} GB are free, of which they may take half: lower --num_workers, "
        "--prefetch_factor or --batch_size"
    )


def activation_bytes(model, num_frames: int, num_tokens: int, from_features: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of one pair, in float32.

    Args:
        model: [`CAMoEModel`]; not changed. num_frames: T. num_tokens: L, of the longest text.
        from_features: whether only the head runs, on stored embeddings.
    """
    model = copy.deepcopy(model).to("meta").train()
    weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())  # views share a storage: count it once
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run_two_pairs(model, num_frames, num_tokens, from_features)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 2


def pair_cost(model, num_frames: int, from_features: bool = False) -> PairCost:
    """Operations of one pair, forward and backward, of what the model's frozen parts leave to do."""
    model = copy.deepcopy(model).to("meta").train()

    def count(num_tokens: int) -> float:
        with FlopCounterMode(display=False) as counter:
            _run_two_pairs(model, num_frames, num_tokens, from_features).logits_per_text.sum().backward()
        return counter.get_total_flops() / 2

    short, long = count(8), count(16)
    token = (long - short) / (8 * len(model.config.experts))
    return PairCost(fixed=short - 8 * len(model.config.experts) * token, token=token)


def _run_two_pairs(model, num_frames: int, num_tokens: int, from_features: bool):
    """Forward on the `meta` device. Two pairs, because some layers skip work for a single one."""
    size, channels = model.config.clip_config.vision_config.image_size, 3
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
    return model(**inputs, frame_mask=mask)


def _split_size(split) -> str:
    return f"{len(split.clips):,} clips, {int(split.caption_counts.sum()):,} captions"
