# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: load or create the model and its processor.

A run starts from a CLIP or CAMoE checkpoint (folder or Hub id), or from scratch with the sizes of a CLIP. In that case
a byte-pair tokenizer is trained on the training captions.
"""

import os
from collections.abc import Iterable

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig

from data.errors import UserError
from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEProcessor, CAMoEVideoProcessor
from motion.clip_tokenizer import train_clip_tokenizer
from motion.spatial_start import apply_spatial_start


def load_checkpoint(path: str):
    """A CAMoE checkpoint -> (model, processor).

    Raises:
        UserError: the folder is missing or holds something else.
    """
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path} is not a checkpoint: it has no config.json; give the output_dir of a finished run")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"the checkpoint folder {path} does not exist")
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "camoe":
            raise UserError(
                f"{path} is a {config.model_type!r} checkpoint, not a CAMoE one; "
                "train it first with training/run_retrieval.py --model_name_or_path"
            )
        return AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the checkpoint {path}: {error}") from error


def build_processor(options, captions: Iterable[str]) -> CAMoEProcessor:
    """The processor for these options; from scratch, its tokenizer is trained on the captions."""
    if options.model_name_or_path is None:
        tokenizer = train_clip_tokenizer(captions, vocab_size=options.tokenizer_vocab_size)
        size = (options.clip_config.get("vision_config") or {}).get("image_size", 224)
    else:
        try:
            config = AutoConfig.from_pretrained(options.model_name_or_path)
            if config.model_type == "camoe":
                return with_options(AutoProcessor.from_pretrained(options.model_name_or_path), options)
            if config.model_type != "clip":
                raise UserError(
                    f"{options.model_name_or_path} is a {config.model_type!r} checkpoint; start from a CLIP or a CAMoE"
                )
            tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {options.model_name_or_path}: {error}") from error
        size = config.vision_config.image_size
    try:
        return CAMoEProcessor(
            video_processor=CAMoEVideoProcessor(
                num_frames=options.num_frames, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
            tokenizer=tokenizer,
            experts=options.model.get("experts", CAMoEConfig().experts),
            streams=options.streams,
            tagger=options.tagger,
            max_length=options.max_words,
        )
    except ValueError as error:  # experts, streams, lengths
        raise UserError(f"the processor's options are wrong: {error}") from error


def with_options(processor: CAMoEProcessor, options) -> CAMoEProcessor:
    """A checkpoint's processor with the run's frames, tokens, tagger, streams and experts: what the recipe records."""
    experts = options.model.get("experts", processor.experts)
    streams = options.streams
    if streams is None:
        streams = {expert: stream for expert, stream in processor.streams.items() if expert in experts}
    processor.video_processor.num_frames = options.num_frames
    try:
        return CAMoEProcessor(
            processor.video_processor, processor.tokenizer, experts, streams, options.tagger, options.max_words
        )
    except ValueError as error:
        raise UserError(f"the processor's options are wrong: {error}") from error


def build_model(options, processor: CAMoEProcessor) -> CAMoEModel:
    """The model for these options, on the CPU."""
    changes = {"max_frames": max(64, options.num_frames), **options.model}
    try:
        if options.model_name_or_path is not None:
            # A gate over other experts starts anew, and says so in the library's report.
            other_gate = "experts" in options.model
            return CAMoEModel.from_pretrained(
                options.model_name_or_path, ignore_mismatched_sizes=other_gate, **changes
            )
        tokenizer = processor.tokenizer
        text = {
            **(options.clip_config.get("text_config") or {}),
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        clip = CLIPConfig(**{**options.clip_config, "text_config": text})
        model = CAMoEModel(CAMoEConfig(clip_config=clip, **changes))
        if options.spatial_start:
            apply_spatial_start(model.clip.vision_model)
        return model
    except (StrictDataclassError, RuntimeError, TypeError, ValueError) as error:  # wrong types, other sizes, ...
        raise UserError(f"the model's options are wrong: {error}") from error
