# SPDX-License-Identifier: Apache-2.0
"""Train CAMoE on captioned clips.

    accelerate launch training/run_retrieval.py --config training/recipes/motion_demo.yaml [--name value ...]

Starts from a CLIP or CAMoE checkpoint or, with `clip_config`, from scratch. Notable features:
- one contrastive batch over all processes (`batch_size` is the global one) with the exact gradient; what a step sees
  does not depend on the number of processes;
- clips are decoded in workers, which write uint8 frames into shared memory; with --frame_cache or --feature_cache
  each clip is decoded once; captions are tagged once for all runs, and rows stay on disk;
- --gradient_cache_chunk makes contrastive batches beyond memory, with the gradient of the plain batch;
- with --streaming, data that does not fit a disk, sharded over processes and workers and resumable too;
- the best model is chosen on validation data; from the first validation on, `output_dir` holds it, complete;
- `--resume_from_checkpoint latest` continues after any kill, with the same result.

`output_dir` receives the model and processor, recipe.yaml, query_bank.txt (training captions, for search and
evaluation), training_log.jsonl (a line per `logging_steps`), all_results.json, and bad_videos.jsonl. docs/training.md
explains how to run on one core, one GPU, eight GPUs or four nodes, with the files in training/cluster/.
"""

import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from transformers import get_cosine_schedule_with_warmup

from data.batches import PairCollator, RunBatchSampler, TrainPairs
from data.captioned_clips import (
    bank_of,
    check_decodable,
    find_caption_column,
    load_split,
    query_bank,
    read_captioned_clips,
)
from data.encode_split import encode_split
from data.errors import UserError
from data.feature_cache import FeatureCache, FeatureCollator, FeaturePairs, encode_split_from_cache
from data.frame_cache import FrameCache
from data.frame_ring import FrameRing, RingLoader, can_share_frames
from data.streaming import StreamBatches, StreamCollator, StreamedClips, StreamPairs
from data.workers import leave_signals_to_the_parent
from engine.distributed import check_options, prepare_training
from engine.dry_run import choose_prefetch, describe_run, frame_shape, free_memory, pair_cost
from engine.lora import add_lora
from engine.optimizer import make_optimizer
from engine.options import TrainOptions
from engine.recipe import exit_on_user_error, flat_options, parse_options
from engine.start import build_model, build_processor
from engine.telemetry import peak_rate
from engine.trainer import Terminated, Trainer


logger = get_logger(__name__)


def make_accelerator(options: TrainOptions) -> Accelerator:
    try:
        return Accelerator(
            log_with=options.report_to,
            project_dir=options.output_dir,
            dynamo_backend=options.torch_compile,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ImportError, ValueError) as error:  # an unknown tracker, backend or number format
        raise UserError(f"Accelerate cannot start: {error}") from error


def load_data(options: TrainOptions):
    """The tagged splits by role ("train", "validation", "test"), and the processor, whose tokenizer may be trained on
    the captions."""
    names = {"train": options.train_split, "validation": options.validation_split, "test": options.report_test_split}
    limits = {"train": options.max_train_clips, "validation": options.max_validation_clips}
    tables = {
        role: load_split(
            options.dataset_name, name, options.dataset_config, limits.get(role), options.streaming and role == "train"
        )
        for role, name in names.items()
        if name is not None
    }
    splits = {}
    if options.streaming:
        columns = options.video_column, options.caption_column, options.video_root
        splits["train"] = StreamedClips(tables.pop("train"), *columns)
    processor = build_processor(options, training_captions(options, tables.get("train"), splits))
    processor.video_processor.fps = options.frames_per_second
    processor.video_processor.on_damage = options.on_damage
    splits |= {
        role: read_captioned_clips(
            table,
            processor.experts,
            processor.tagger,
            processor.streams,
            options.video_column,
            options.caption_column,
            options.video_root,
        )
        for role, table in tables.items()
    }
    return splits, processor


def training_captions(options: TrainOptions, table, splits: dict) -> Iterator[str]:
    """All captions, or those at the beginning of a stream."""
    if table is None:
        yield from splits["train"].first_captions(10_000)
        return
    for value in table[find_caption_column(table.column_names, options.caption_column)]:
        yield from [value] if isinstance(value, str) else value or []


def make_pairs(options, accelerator, model, processor, splits: dict):
    """The training pairs, and for every other split a function: model -> the split, encoded."""
    pair_options = (options.seed, options.train_sampling, options.captions_per_video, options.on_bad_video)
    if options.feature_cache is not None:
        cache = fill_feature_cache(options, accelerator, model, processor, splits)
        pairs = FeaturePairs(splits["train"], cache, *pair_options)
        encode = functools.partial(encode_split_from_cache, cache=cache)
        decode = functools.partial(cache.frames, sampling=processor.video_processor.sampling)
    else:
        decoder = processor.video_processor
        if options.frame_cache is not None:
            decoder = FrameCache(options.frame_cache, decoder, options.frame_cache_jpeg)
        if options.streaming:
            batches = stream_batches(options, accelerator, splits["train"])
            tagging = processor.experts, processor.tagger, processor.streams
            pairs = StreamPairs(splits["train"], batches, decoder, *tagging, *pair_options[1:])
        else:
            pairs = TrainPairs(splits["train"], decoder, *pair_options)
        decode = decoder.decode
        encode = functools.partial(
            encode_split,
            accelerator,
            processor=processor,
            batch_size=options.eval_batch_size,
            num_workers=options.num_workers,
            decoder=decoder,
        )
    if "validation" in splits:  # not after a whole epoch
        check_decodable(splits["validation"], decode, options.validation_split)
    choices = {"captions": options.validation_captions, "on_bad_video": options.on_bad_video}
    scored = {role: functools.partial(encode, split=split, **choices) for role, split in splits.items()}
    scored.pop("train")
    return pairs, scored


def stream_batches(options, accelerator, clips: StreamedClips) -> StreamBatches:
    readers = accelerator.num_processes * max(1, options.num_workers)
    if clips.num_shards % readers != 0:
        logger.warning(
            f"the stream has {clips.num_shards} files, which {readers} workers of all processes cannot divide: each "
            f"reads all rows and keeps its own; of {readers} files, or a multiple, each would read its own alone",
            main_process_only=True,
        )
    return StreamBatches(
        options.steps_per_epoch,
        options.batch_size,
        options.seed,
        accelerator.process_index,
        accelerator.num_processes,
        options.gradient_accumulation_steps,
        options.num_workers,
        clips.num_shards,
        options.stream_shuffle,
    )


def fill_feature_cache(options, accelerator, model, processor, splits: dict) -> FeatureCache:
    """Embed everything of the splits that is not stored yet; the model is on its device."""
    cache = FeatureCache(options.feature_cache, model, processor, accelerator.mixed_precision)
    for role, split in splits.items():
        sampling = options.train_sampling if role == "train" else processor.video_processor.sampling
        cache.fill(accelerator, model, processor, split, sampling, options.eval_batch_size, options.num_workers)
    return cache


def make_loader(options, accelerator, pairs, processor) -> RingLoader:
    batches = (
        pairs.batches
        if options.streaming
        else RunBatchSampler(
            len(pairs),
            options.batch_size,
            options.seed,
            accelerator.process_index,
            accelerator.num_processes,
            options.gradient_accumulation_steps,
        )
    )
    workers, ring = options.num_workers, None
    if options.feature_cache is not None:
        collator, prefetch = FeatureCollator(processor.video_processor.num_frames), options.prefetch_factor or 4
    else:
        clips, shape = batches.pairs_per_step // accelerator.num_processes, frame_shape(processor.video_processor)
        prefetch = choose_prefetch(
            options.prefetch_factor, clips, shape, workers, accelerator.num_processes, free_memory()
        )
        if can_share_frames():
            ring = FrameRing(clips, shape, workers, prefetch)
        collator = PairCollator(processor, processor.experts, ring)
        collator = StreamCollator(collator) if options.streaming else collator
    if ring is not None and accelerator.device.type == "cuda":
        ring.pin()
    return RingLoader(
        pairs,
        # A stream makes its batches itself.
        **({"batch_size": None} if options.streaming else {"batch_sampler": batches}),
        collate_fn=collator,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        # Its own generator: a loader draws from it, and after a resume that must not shift the global random state.
        generator=torch.Generator().manual_seed(options.seed),
        ring=ring,
    )


def main():
    options = parse_options(TrainOptions, description=__doc__)
    output_dir = Path(options.output_dir)
    accelerator = make_accelerator(options)
    check_options(accelerator, options)
    if options.torch_compile is not None:
        logger.warning(
            "a compiled model does not group texts by length, it pads those of a batch to the longest: 128 short "
            "captions are 13,824 tokens instead of 3,560, a tenth more work in a step of ViT-B/32 on 12 frames",
            main_process_only=True,
        )
    set_seed(options.seed)
    if not options.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)

    with accelerator.main_process_first():  # the main process tags and caches, the others read its cache
        splits, processor = load_data(options)
    model = build_model(options, processor)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if options.lora is not None:
        model = add_lora(model, options.lora)
    optimizer = make_optimizer(model, options)
    if options.dry_run:
        accelerator.print(describe_run(options, splits, model, processor, accelerator.num_processes))
        return
    cost = None
    if peak_rate(accelerator.device) is not None:
        cost = pair_cost(model, options.num_frames, options.feature_cache is not None)

    model.to(accelerator.device)
    pairs, scored_splits = make_pairs(options, accelerator, model, processor, splits)
    loader = make_loader(options, accelerator, pairs, processor)
    total_steps = options.total_steps(options.steps_per_epoch or len(loader))
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(options.warmup_ratio * total_steps), total_steps)
    model, optimizer = prepare_training(accelerator, model, optimizer, options.batch_size // accelerator.num_processes)
    accelerator.init_trackers("camoe", config=flat_options(options))

    if options.streaming:
        bank = bank_of(splits["train"].first_captions(options.query_bank_size))
    else:
        bank = query_bank(splits["train"], options.query_bank_size, options.seed)
    extra = {"query_bank.txt": bank}
    trainer = Trainer(options, accelerator, model, optimizer, scheduler, processor, loader, scored_splits, extra, cost)
    try:
        trainer.run()
    except Terminated as reason:
        print(reason, file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, what a scheduler expects
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)
