# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: load or create the model and its processor.

A run starts from a plain dual encoder or a CAMoE checkpoint (folder or Hub id), or from scratch with the sizes of a
CLIP. In that case a byte-pair tokenizer is trained on the training captions.
"""

import os
from collections.abc import Iterable

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, PreTrainedConfig

from data.errors import UserError
from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEProcessor, CAMoEVideoProcessor
from motion.clip_tokenizer import train_clip_tokenizer
from motion.spatial_start import apply_spatial_start


def is_plain(path: str) -> bool:
    """Whether a checkpoint is a plain dual encoder rather than a CAMoE."""
    return PreTrainedConfig.get_config_dict(path)[0].get("model_type") != CAMoEConfig.model_type


def load_checkpoint(path: str):
    """A CAMoE checkpoint, or a plain dual encoder as it is (zero-shot) -> (model, processor).

    Raises:
        UserError: the folder is missing or holds something else.
    """
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path} is not a checkpoint: it has no config.json; give the output_dir of a finished run")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"the checkpoint folder {path} does not exist")
    try:
        return tuple(cls.from_pretrained(path, zero_shot=True) for cls in (CAMoEModel, CAMoEProcessor))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot load the checkpoint {path}: {error}") from error


def build_processor(options, captions: Iterable[str]) -> CAMoEProcessor:
    """The processor for these options, with the model's configuration; from scratch, its tokenizer is trained on the
    captions."""
    try:
        start = options.model_name_or_path
        stored = {} if start is None else PreTrainedConfig.get_config_dict(start)[0]
        # Of a CAMoE checkpoint its own number, which its weights have, unless the frames are more.
        changes = {"max_frames": max(stored.get("max_frames", 64), options.num_frames), **options.model}
        if options.streams is not None:
            changes["streams"] = options.streams
        if options.model_name_or_path is None:
            return _processor_from_scratch(options, captions, changes)
        # Of a CAMoE checkpoint, too: what the recipe records is what the run does.
        settings = {"tagger": options.tagger, "max_length": options.max_words}
        config = CAMoEConfig.from_pretrained(options.model_name_or_path, **changes)
        processor = CAMoEProcessor.from_pretrained(options.model_name_or_path, config=config, **settings)
        processor.video_processor.num_frames = options.num_frames
        parts = processor.video_processor, processor.tokenizer, processor.config
        return CAMoEProcessor(*parts, **settings)
    except OSError as error:
        raise UserError(f"cannot load {options.model_name_or_path}: {error}") from error
    except (StrictDataclassError, TypeError, ValueError) as error:  # wrong types, unknown experts, lengths, ...
        raise UserError(f"the options of model or processor are wrong: {error}") from error


def _processor_from_scratch(options, captions: Iterable[str], changes: dict) -> CAMoEProcessor:
    tokenizer = train_clip_tokenizer(captions, vocab_size=options.tokenizer_vocab_size)
    text = {
        **(options.clip_config.get("text_config") or {}),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CAMoEConfig(clip_config=CLIPConfig(**{**options.clip_config, "text_config": text}), **changes)
    side = config.clip_config.vision_config.image_size
    video_processor = CAMoEVideoProcessor(
        num_frames=options.num_frames, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return CAMoEProcessor(video_processor, tokenizer, config, options.tagger, options.max_words)


def build_model(options, processor: CAMoEProcessor) -> CAMoEModel:
    """The model for these options, with the processor's configuration, on the CPU."""
    if options.model_name_or_path is not None:
        try:
            return CAMoEModel.from_pretrained(options.model_name_or_path, config=processor.config)
        except (OSError, ValueError, RuntimeError) as error:  # no weights, or of other sizes
            raise UserError(f"cannot load {options.model_name_or_path}: {error}") from error
    model = CAMoEModel(processor.config)
    if options.spatial_start:
        apply_spatial_start(model.clip.vision_model)
    return model
