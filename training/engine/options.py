# SPDX-License-Identifier: Apache-2.0
"""The options of `run_retrieval.py`, which are also the fields of a recipe. docs/training.md explains them in context.

Where CLIP4Clip's recipe for MSR-VTT (arXiv 2104.08860), the common baseline, sets a value, it is the default here.
"""

from dataclasses import dataclass

from data.errors import UserError

from .recipe import option


@dataclass
class TrainOptions:
    """All options of a training run."""

    # Data
    dataset_name: str = option(help="folder of clips with metadata.jsonl, folder of tables, or Hub id")
    output_dir: str = option(help="folder for the model, its log and its checkpoints")
    dataset_config: str | None = option(None, "name of a configuration of the Hub data set")
    train_split: str = option("train", "split to train on")
    validation_split: str | None = option(
        "validation", "split that chooses the best checkpoint, never the test split; null: keep the last"
    )
    video_column: str = option("video", "column of video paths")
    caption_column: str | None = option(None, "column of captions, a text or a list (default: captions or caption)")
    video_root: str | None = option(None, "folder that relative video paths are relative to")
    streaming: bool = option(
        False,
        "read the training split as it comes, for data that does not fit the disk. What it cannot do: rows are "
        "shuffled within stream_shuffle of them, not over the whole; the number of steps is unknown, so give "
        "steps_per_epoch; query_bank.txt holds the first captions, not a sample; a resume needs the same number of "
        "processes and num_workers; no feature_cache, no max_train_clips. Best if the number of files is a multiple "
        "of processes x num_workers",
    )
    stream_shuffle: int = option(
        100,
        "rows of a stream that are shuffled together; each worker holds that many, with any videos inside the table",
    )
    steps_per_epoch: int | None = option(None, "with streaming: steps after which the run validates and saves")
    max_train_clips: int | None = option(None, "keep only the first clips, for a quick try")
    max_validation_clips: int | None = option(None, "the same for the validation split")
    captions_per_video: str = option(
        "all", "all: every caption is a pair; one: a random caption of each clip per epoch", choices=("all", "one")
    )
    report_test_split: str | None = option(
        None, "also score this split at every validation; logged as test_*, not used for selection"
    )
    validation_captions: str = option("first", "captions that are queries in validation", choices=("first", "all"))
    on_bad_video: str = option(
        "raise", "what to do with a clip that cannot be decoded: stop, or skip and list it", choices=("raise", "skip")
    )
    on_damage: str = option(
        "error",
        "what to do with a clip of which a wanted frame is damaged: treat it as one that cannot be decoded, or take "
        "frames from around the damage; saved with the model's processor",
        choices=("error", "around"),
    )

    # Model
    model_name_or_path: str | None = option(
        None, "dual encoder (CLIP, SigLIP, ...) or CAMoE checkpoint to start from, folder or Hub id"
    )
    clip_config: dict | None = option(None, "sizes of a CLIP to train from scratch instead (CLIPConfig)")
    spatial_start: bool = option(False, "with clip_config: initialise the vision tower to attend to positions")
    tokenizer_vocab_size: int = option(2000, "size of the tokenizer that is trained when starting from scratch")
    model: dict = option({}, "fields of CAMoEConfig, e.g. --model.experts '[fusion]'")
    streams: dict | None = option(None, "caption stream of each expert that is not named after one")
    lora: dict | None = option(
        None, "train LoRA matrices instead of CLIP's weights: fields of peft's LoraConfig, e.g. --lora.r 16"
    )
    tagger: str | None = option(
        "en_core_web_sm",
        "spaCy model that tags captions, also with :phrases or :masked after its name; none: every expert reads the "
        "whole caption",
    )
    num_frames: int = option(12, "frames per clip")
    max_words: int = option(32, "tokens per text, at most what the text tower takes (CLIP: 77)")
    train_sampling: str = option(
        "uniform",
        "frames in training, from equal segments: their centres (uniform), or a random frame of each (jitter)",
        choices=("uniform", "jitter"),
    )
    frames_per_second: float | None = option(
        None,
        "at most this many frames a second, and at most num_frames; CLIP4Clip: 1 (default: num_frames alone)",
    )

    # Optimisation
    batch_size: int = option(128, "pairs in one contrastive batch over ALL processes")
    gradient_accumulation_steps: int = option(
        1, "batches per step; with gradient_cache_chunk they form one large contrastive batch, without it they do not"
    )
    num_train_epochs: int = option(5, "passes over the pairs")
    max_train_steps: int | None = option(None, "stop after this many steps instead; the schedule ends there too")
    learning_rate: float = option(1e-4, "learning rate of the new layers")
    clip_learning_rate: float = option(
        1e-7, "learning rate of CLIP's own parameters, or of their LoRA; 0 freezes CLIP"
    )
    layer_decay: float = option(1.0, "learning rate of each layer of CLIP, as a multiple of that of the layer above")
    weight_decay: float = option(0.2, "weight decay; not on norms, biases and logit_scale")
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises; then it falls as a cosine")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    ema_decay: float | None = option(
        None, "validate and publish an exponential moving average of the weights, e.g. 0.999 (default: none)"
    )
    mask_same_captions: bool = option(
        True, "pairs of different videos with the same caption are not each other's negatives"
    )
    adam_beta1: float = option(0.9, "beta 1 of AdamW")
    adam_beta2: float = option(0.98, "beta 2 of AdamW")
    adam_epsilon: float = option(1e-6, "epsilon of AdamW")
    dry_run: bool = option(False, "print what the run would do, and stop")
    samples_per_second: float = option(100.0, "pairs a second, from which a dry run computes the hours")
    seed: int = option(42, "random seed")

    # Running
    num_workers: int = option(2, "processes that load clips, for each training process; 0 loads in the process itself")
    prefetch_factor: int | None = option(
        None, "batches that each worker prepares ahead (default: 4, or what a quarter of the free memory holds)"
    )
    eval_batch_size: int = option(32, "clips per forward pass in validation")
    validation_epochs: int = option(1, "epochs between validations")
    frame_cache: str | None = option(None, "folder that caches sampled frames, so that each clip is decoded once")
    frame_cache_jpeg: int | None = option(
        None, "cache frames as JPEG of this quality, e.g. 95: a fifth of the space (default: raw)"
    )
    feature_cache: str | None = option(
        None, "folder that caches the embeddings of a frozen CLIP: after the first run nothing is decoded"
    )
    gradient_cache_chunk: int | None = option(
        None, "embed this many pairs of each process at a time: exact contrastive batches larger than memory"
    )
    gradient_checkpointing: bool = option(False, "keep no activations inside layers: less memory, a third more time")
    torch_compile: str | None = option(
        None, "compile the model with this backend of torch.compile, e.g. inductor; texts are then not grouped"
    )
    checkpointing_steps: int | None = option(
        None, "also write a checkpoint every this many steps, not only each epoch"
    )
    save_total_limit: int | None = option(2, "checkpoints to keep")
    resume_from_checkpoint: str | None = option(None, "latest, or a folder in output_dir/checkpoints")
    on_nan: str = option(
        "raise",
        "what to do at a loss or gradient that is not finite: stop, or skip the step",
        choices=("raise", "skip"),
    )
    max_nan_skips: int = option(10, "stop after this many skipped steps")
    report_to: str | None = option(None, "Accelerate tracker: tensorboard, trackio, wandb, ...")
    logging_steps: int = option(10, "steps between lines of training_log.jsonl")
    query_bank_size: int = option(5000, "training captions written to query_bank.txt for search and evaluation")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the run."""
        return self.num_train_epochs * steps_per_epoch if self.max_train_steps is None else self.max_train_steps

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.clip_config is None):
            raise UserError(
                "choose what to start from: either --model_name_or_path (a dual encoder or a CAMoE checkpoint) "
                "or --clip_config (sizes, to train from scratch)"
            )
        if self.spatial_start and self.clip_config is None:
            raise UserError("--spatial_start is for a CLIP from scratch (clip_config): a checkpoint has its own start")
        positive = ("batch_size", "num_frames", "num_train_epochs", "eval_batch_size", "logging_steps")
        positive += ("validation_epochs", "gradient_accumulation_steps")
        positive += ("stream_shuffle",)
        optional = ("gradient_cache_chunk", "checkpointing_steps", "save_total_limit", "prefetch_factor")
        optional += ("steps_per_epoch",)
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise UserError(f"option {name!r} must be at least 1, got {getattr(self, name)}")
        for name in ("num_workers", "max_nan_skips", "learning_rate", "clip_learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"option {name!r} must not be negative, got {getattr(self, name)}")
        if self.max_words < 3:  # two are the start and the end alone
            raise UserError(f"option 'max_words' must be at least 3, got {self.max_words}")
        if self.batch_size < 2:
            raise UserError("option 'batch_size' must be at least 2: a contrastive loss needs a negative")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"option 'warmup_ratio' must be from 0 to 1, got {self.warmup_ratio}")
        for name, low, high in (("layer_decay", 0, 1), ("ema_decay", 0, 1), ("frame_cache_jpeg", 1, 100)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"option {name!r} must be from {low} to {high}, got {value}")
        for name in ("frames_per_second", "samples_per_second"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"option {name!r} must be more than 0, got {getattr(self, name)}")
        if self.report_test_split is not None and self.report_test_split in (self.train_split, self.validation_split):
            raise UserError("--report_test_split must be another split than those of training and validation")
        self._check_caches()
        self._check_streaming()

    # What a checkpoint was written with must not change on resume: the schedule and the task. Speed may.
    FIXED = (
        *("num_train_epochs", "max_train_steps", "learning_rate", "clip_learning_rate", "layer_decay", "weight_decay"),
        *("warmup_ratio", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "ema_decay"),
        *("num_frames", "frames_per_second", "max_words", "train_sampling", "captions_per_video"),
        *("mask_same_captions", "model", "streams", "tagger", "lora"),
    )

    def fixed(self) -> dict:
        """The options that a resumed run must share with its checkpoint."""
        return {name: getattr(self, name) for name in self.FIXED}

    def _check_streaming(self):
        if not self.streaming:
            if self.steps_per_epoch is not None:
                raise UserError("--steps_per_epoch is for --streaming: elsewhere an epoch is a pass over the pairs")
            return
        if self.steps_per_epoch is None:
            raise UserError("--streaming needs --steps_per_epoch, because the length of a stream is not known")
        for name in ("feature_cache", "max_train_clips"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} does not work with --streaming, which sees the clips one by one")

    def _check_caches(self):
        if self.feature_cache is None:
            return
        if self.clip_learning_rate != 0 or self.lora is not None:
            raise UserError(
                "option 'feature_cache' stores what a frozen CLIP computes: set --clip_learning_rate 0 and no --lora, "
                "or use --frame_cache"
            )
        if self.frame_cache is not None:
            raise UserError(
                "options 'feature_cache' and 'frame_cache' cannot be used together: features need no frames"
            )
        if self.clip_config is not None:
            raise UserError("option 'feature_cache' needs a trained CLIP: start from --model_name_or_path")
