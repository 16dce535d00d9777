# SPDX-License-Identifier: Apache-2.0
"""Train CAMoE on captioned clips.

    accelerate launch training/run_retrieval.py --config training/recipes/motion_demo.yaml [--name value ...]

Starts from a CLIP or CAMoE checkpoint or, with `clip_config`, from scratch. Notable features:
- one contrastive batch over all processes (`batch_size` is the global one) with the exact gradient; what a step sees
  does not depend on the number of processes;
- clips are decoded in workers and travel as uint8; with --frame_cache or --feature_cache each clip is decoded once;
- --gradient_cache_chunk makes contrastive batches beyond memory, with the gradient of the plain batch;
- the best model is chosen on validation data; from the first validation on, `output_dir` holds it, complete;
- `--resume_from_checkpoint latest` continues after any kill, with the same result.

`output_dir` receives the model and processor, recipe.yaml, query_bank.txt (training captions, for search and
evaluation), training_log.jsonl (a line per `logging_steps`), all_results.json, and bad_videos.jsonl. docs/training.md
explains how to run on one core, one GPU, eight GPUs or four nodes, with the files in training/cluster/.
"""

import functools
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from data.batches import PairCollator, RunBatchSampler, TrainPairs
from data.captioned_clips import check_decodable, find_caption_column, load_split, read_captioned_clips
from data.encode_split import encode_split
from data.errors import UserError
from data.feature_cache import FeatureCache, FeatureCollator, FeaturePairs, encode_split_from_cache
from data.frame_cache import FrameCache
from data.workers import leave_signals_to_the_parent
from engine.distributed import check_options, prepare_training
from engine.dry_run import describe_run
from engine.lora import add_lora
from engine.options import TrainOptions
from engine.recipe import exit_on_user_error, parse_options, save_recipe
from engine.start import build_model, build_processor, parameter_groups
from engine.trainer import Terminated, Trainer


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
    """The tagged training and validation splits, and the processor, whose tokenizer may be trained on the captions."""
    data = load_split(options.dataset_name, options.train_split, options.dataset_config, options.max_train_clips)
    captions = data[find_caption_column(data, options.caption_column)][:]
    processor = build_processor(
        options, [text for texts in captions for text in ([texts] if isinstance(texts, str) else texts or [])]
    )

    def read(data):
        return read_captioned_clips(
            data,
            processor.experts,
            processor.tagger,
            processor.streams,
            options.video_column,
            options.caption_column,
            options.video_root,
        )

    train, validation = read(data), None
    if options.validation_split is not None:
        name, limit = options.validation_split, options.max_validation_clips
        validation = read(load_split(options.dataset_name, name, options.dataset_config, limit))
    return train, validation, processor


def make_optimizer(model, options: TrainOptions) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options)
    if not groups:
        raise UserError("nothing is trained: learning_rate and clip_learning_rate are both 0")
    return torch.optim.AdamW(
        groups, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon, fused=True
    )


def make_pairs(options, accelerator, model, processor, train, validation):
    """The training pairs, their collator, and a function: model -> the encoded validation split."""
    pair_options = (options.seed, options.train_sampling, options.captions_per_video, options.on_bad_video)
    if options.feature_cache is not None:
        cache = fill_feature_cache(options, accelerator, model, processor, train, validation)
        pairs = FeaturePairs(train, cache, *pair_options)
        collator = FeatureCollator(processor.video_processor.num_frames)
        encode = functools.partial(encode_split_from_cache, cache=cache)
    else:
        decoder = processor.video_processor
        if options.frame_cache is not None:
            decoder = FrameCache(options.frame_cache, decoder)
        pairs = TrainPairs(train, decoder, *pair_options)
        collator = PairCollator(processor, processor.experts)
        encode = functools.partial(
            encode_split,
            accelerator,
            processor=processor,
            batch_size=options.eval_batch_size,
            num_workers=options.num_workers,
            decoder=decoder,
        )
    if validation is None:
        return pairs, collator, None
    choices = {"captions": options.validation_captions, "on_bad_video": options.on_bad_video}
    return pairs, collator, functools.partial(encode, split=validation, **choices)


def fill_feature_cache(options, accelerator, model, processor, train, validation) -> FeatureCache:
    """Embed everything of both splits that is not stored yet; the model is on its device."""
    cache = FeatureCache(options.feature_cache, model, processor)
    sizes = (options.eval_batch_size, options.num_workers)
    cache.fill(accelerator, model, processor, train, options.train_sampling, *sizes)
    if validation is not None:
        cache.fill(accelerator, model, processor, validation, processor.video_processor.sampling, *sizes)
    return cache


def make_loader(options, accelerator, pairs, collator) -> DataLoader:
    batches = RunBatchSampler(
        len(pairs),
        options.batch_size,
        options.seed,
        accelerator.process_index,
        accelerator.num_processes,
        options.gradient_accumulation_steps,
    )
    return DataLoader(
        pairs,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=options.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if options.num_workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        # Its own generator: a loader draws from it, and after a resume that must not shift the global random state.
        generator=torch.Generator().manual_seed(options.seed),
    )


def query_bank(captions: list[list[str]], size: int, seed: int) -> str:
    """A sample of the training captions, one per line: search and evaluation detect hubs with it."""
    bank = [" ".join(text.split()) for texts in captions for text in texts]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bank), generator=generator)[:size].sort().values.tolist()
    return "".join(f"{bank[n]}\n" for n in chosen)


def main():
    options = parse_options(TrainOptions, description=__doc__)
    output_dir = Path(options.output_dir)
    accelerator = make_accelerator(options)
    check_options(accelerator, options)
    set_seed(options.seed)
    if not options.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)

    with accelerator.main_process_first():  # the main process tags and caches, the others read its cache
        train, validation, processor = load_data(options)
    model = build_model(options, processor)
    if options.lora is not None:
        model = add_lora(model, options.lora)
    optimizer = make_optimizer(model, options)
    if options.dry_run:
        accelerator.print(describe_run(options, train, validation, model))
        return

    if validation is not None:  # not after a whole epoch
        check_decodable(validation, processor.video_processor, options.validation_split)
    model.to(accelerator.device)
    pairs, collator, encode_validation = make_pairs(options, accelerator, model, processor, train, validation)
    loader = make_loader(options, accelerator, pairs, collator)
    total_steps = options.total_steps(len(loader))
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(options.warmup_ratio * total_steps), total_steps)
    model, optimizer = prepare_training(accelerator, model, optimizer, options.batch_size // accelerator.num_processes)
    accelerator.init_trackers("camoe")
    if accelerator.is_main_process:
        save_recipe(options, output_dir / "recipe.yaml")

    extra = {"query_bank.txt": query_bank(train.captions, options.query_bank_size, options.seed)}
    trainer = Trainer(options, accelerator, model, optimizer, scheduler, processor, loader, encode_validation, extra)
    try:
        trainer.run()
    except Terminated as reason:
        print(reason, file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, what a scheduler expects
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)
