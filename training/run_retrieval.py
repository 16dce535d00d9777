# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Train CAMoE on captioned clips.

    accelerate launch training/run_retrieval.py --config training/recipes/motion_demo.yaml [--name value ...]

Starts from a CLIP or CAMoE checkpoint or, with `clip_config`, from scratch. Notable features:
- one contrastive batch over all processes (`batch_size` is the global one), exact to the gradient; what a step sees
  does not depend on the number of processes;
- clips are decoded in workers, and travel as uint8;
- the best model is chosen on validation data; `output_dir` holds it, complete, from the first validation on;
- `--resume_from_checkpoint latest` goes on after any kill, to the same result.

`output_dir` receives the model and processor, recipe.yaml, query_bank.txt (training captions, for search and
evaluation), training_log.jsonl (a line per `logging_steps`), all_results.json, and bad_videos.jsonl if there were any.
"""

import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from build import build_model, build_processor, parameter_groups
from dry_run import describe_run
from frame_cache import FrameCache
from recipe import exit_on_user_error, parse_options, save_recipe
from retrieval_data import (
    EpochSampler,
    PairCollator,
    TrainPairs,
    find_caption_column,
    load_split,
    read_captioned_clips,
)
from torch.utils.data import DataLoader
from train_options import TrainOptions
from trainer import GlobalBatches, Terminated, Trainer
from transformers import get_cosine_schedule_with_warmup


def load_data(options: TrainOptions):
    """The tagged training and validation splits, and the processor, whose tokenizer may be made from the captions."""
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


def query_bank(captions: list[list[str]], size: int, seed: int) -> str:
    """A sample of the training captions, a line each: what search and evaluation measure hubs with."""
    bank = [" ".join(text.split()) for texts in captions for text in texts]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bank), generator=generator)[:size].sort().values.tolist()
    return "".join(f"{bank[n]}\n" for n in chosen)


def main():
    options = parse_options(TrainOptions, description=__doc__)
    output_dir = Path(options.output_dir)
    accelerator = Accelerator(
        log_with=options.report_to,
        project_dir=options.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(options.seed)
    output_dir.mkdir(parents=True, exist_ok=True)

    with accelerator.main_process_first():  # the first tags and caches, the others read the cache
        train, validation, processor = load_data(options)
    model = build_model(options, processor)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options),
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )

    decoder = processor.video_processor
    if options.frame_cache is not None:
        decoder = FrameCache(options.frame_cache, decoder)
    pairs = TrainPairs(
        train, decoder, options.seed, options.train_sampling, options.captions_per_video, options.on_bad_video
    )
    batches = GlobalBatches(
        EpochSampler(len(pairs), options.seed),
        options.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        pairs,
        batch_sampler=batches,
        collate_fn=PairCollator(processor, list(model.config.experts)),
        num_workers=options.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if options.num_workers else None,
        # Without one of its own, every epoch would draw from the global random state, and a resume draws once more.
        generator=torch.Generator().manual_seed(options.seed),
    )
    total_steps = options.total_steps(len(batches))
    if options.dry_run:
        accelerator.print(describe_run(options, train, validation, model, total_steps))
        return
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(options.warmup_ratio * total_steps), total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.init_trackers("camoe")
    if accelerator.is_main_process:
        save_recipe(options, output_dir / "recipe.yaml")

    extra = {"query_bank.txt": query_bank(train.captions, options.query_bank_size, options.seed)}
    trainer = Trainer(options, accelerator, model, optimizer, scheduler, processor, loader, validation, extra)
    try:
        trainer.run()
    except Terminated as reason:
        print(reason, file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, what a scheduler expects
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)
