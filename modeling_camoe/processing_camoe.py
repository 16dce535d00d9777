# SPDX-License-Identifier: Apache-2.0
"""CAMoEProcessor: captions -> token ids of one text per expert, (N,E,L); videos -> pixels (B,T,3,H,W).

It is made from a model's configuration, which says what the experts are, what they read and how frames are
normalised. Its own are only the settings that a user may change: frames per clip and their sampling, the tagger,
`max_length`.

A caption is split into streams (captions.py), one per expert. The texts of a batch are padded to the longest of them
rather than to CLIP's 77 tokens: streams are short, and padding changes no embedding. SigLIP's text tower reads the
last position of a padded text, so its texts are always padded to that tower's length.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from .captions import CUSTOM, STREAMS, caption_streams, closest, tagger_name
from .configuration_camoe import (
    HUB_OPTIONS,
    INPUT_FIELDS,
    CAMoEConfig,
    image_statistics,
    is_rescaled_to_one,
    load_image_processor,
)
from .retrieval import similarity
from .saving import SavesProcessor
from .video_processing_camoe import CAMoEVideoProcessor


logger = logging.get_logger(__name__)

DEFAULT_MAX_LENGTH = 32  # as in CLIP4Clip's recipe for MSR-VTT
# What a video processor takes over from a dual encoder's image processor, besides the statistics.
IMAGE_SETTINGS = ("do_resize", "size", "do_center_crop", "crop_size", "do_convert_rgb", "do_rescale", "rescale_factor")
IMAGE_SETTINGS += ("do_normalize", "image_mean", "image_std", "resample", "default_to_square")


class CAMoEProcessor(SavesProcessor, ProcessorMixin):
    """Prepares captions and videos for [`CAMoEModel`].

    Args:
        video_processor: a [`CAMoEVideoProcessor`].
        tokenizer: the text tower's own.
        config: the model's [`CAMoEConfig`]; by default, a fresh one. Experts, streams and statistics cannot be changed
            there afterwards: make another processor.
        tagger: what splits a caption into streams: the name of a spaCy model, with ":phrases" or ":masked" after it
            for other texts of the same words (captions.py), "none" (every expert reads the whole caption), or any
            callable caption -> {expert: text}. A callable is not saved: set it again after loading
            (`processor.tagger = ...`), before the processor reads captions.
        max_length: tokens read of each text, including the start and end tokens. 32 by default, or what the text tower
            takes if that is less.
    """

    _auto_class = "AutoProcessor"  # also where this class was imported by another class's code
    text_kwargs = {"padding": "longest", "truncation": True}

    def __init__(
        self,
        video_processor,
        tokenizer,
        config: CAMoEConfig | None = None,
        tagger: str | Callable[[str], Mapping[str, str]] | None = "en_core_web_sm",
        max_length: int | None = None,
    ):
        super().__init__(video_processor, tokenizer)
        self.config = CAMoEConfig() if config is None else config
        self.config.follow_experts()  # as the model does
        self._made_for = self.config.input_fields()
        self.tagger = "none" if tagger is None else tagger
        self.max_length = min(DEFAULT_MAX_LENGTH, self._longest) if max_length is None else max_length
        if isinstance(self.tagger, str) and self.tagger != "none" and not self.tagger.startswith(CUSTOM):
            for stream in self.streams.values():
                if stream not in STREAMS:
                    raise ValueError(
                        f"Unknown expert {stream!r}. {closest(stream, STREAMS)} Name the stream that an expert reads "
                        "in the configuration's `streams`, or set a tagger of your own."
                    )
        self._check_length(self.max_length)

    @property
    def experts(self) -> list[str]:
        """Names of the model's experts, in its order."""
        return self.config.experts

    @property
    def streams(self) -> dict[str, str]:
        """The caption stream that each expert reads."""
        return self.config.streams

    @property
    def _longest(self) -> int:
        return min(self.tokenizer.model_max_length, self.config.max_text_length)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        zero_shot: bool = False,
        config: CAMoEConfig | None = None,
        **kwargs,
    ):
        """The processor of a CAMoE checkpoint, or one for a plain dual encoder, made from that model's own files.

        Args:
            pretrained_model_name_or_path: folder or Hub id of a CAMoE checkpoint or of a dual encoder.
            zero_shot: as for the model: a plain dual encoder has one expert, `mean`, which reads whole captions up to
                the text tower's own length. No effect on a CAMoE checkpoint.
            config: of a model that was loaded with other experts, streams or statistics than its folder says:
                `config=model.config`.
            **kwargs: `tagger`, `max_length`, for a plain dual encoder fields of the configuration (`experts`, ...), or
                where to load from (`revision`, `token`, ...).

        Raises:
            ValueError: it is another kind of model, or the processor would not be one for the model in that folder.
        """
        own = {f.name for f in fields(CAMoEConfig)} - {f.name for f in fields(PreTrainedConfig)}
        changes = {name: kwargs.pop(name) for name in own & set(kwargs)}
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        plain = CAMoEConfig.get_config_dict(pretrained_model_name_or_path, zero_shot=zero_shot, **hub)[0]
        is_trained = plain.get("model_type") == CAMoEConfig.model_type
        if config is None:
            config = CAMoEConfig.from_dict(plain, **changes)
            said = CAMoEConfig.from_dict(plain) if is_trained else config
            for name in INPUT_FIELDS:
                if getattr(config, name) != getattr(said, name):
                    raise ValueError(
                        f"The model in {pretrained_model_name_or_path} was trained with `{name}` "
                        f"{getattr(said, name)}; a processor with {getattr(config, name)} would give it wrong inputs. "
                        "For a model that was loaded with other ones, pass its configuration: `config=model.config`."
                    )
        elif changes:
            raise ValueError(f"Give either `config` or {sorted(changes)}, not both.")
        if is_trained:
            return super().from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        images = load_image_processor(pretrained_model_name_or_path, config.clip_config, **hub).to_dict()
        videos = {name: images[name] for name in IMAGE_SETTINGS if images.get(name) is not None}
        videos.setdefault("do_center_crop", False)  # the video processor's own default is CLIP's
        options = {name: kwargs[name] for name in ("tagger", "max_length") if name in kwargs}
        if zero_shot:
            longest = min(tokenizer.model_max_length, config.max_text_length)
            options = {"tagger": "none", "max_length": longest} | options
        return cls(CAMoEVideoProcessor(**videos), tokenizer, config, **options)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict, *, config: CAMoEConfig | None = None, **kwargs):
        """As in the library. Experts and streams that older checkpoints keep here must be the configuration's."""
        processor_dict = dict(processor_dict)
        for name in ("experts", "streams"):
            written = processor_dict.pop(name, None)
            said = getattr(config or CAMoEConfig(), name)
            if name == "streams":
                written = written and said | written
            if written and written != said:
                raise ValueError(
                    f"processor_config.json says `{name}` {written}, the model's config.json {said}. The model's are "
                    f"what it was trained with: delete `{name}` from processor_config.json, or write the right ones "
                    "into config.json."
                )
        return super().from_args_and_dict(args, processor_dict, config=config, **kwargs)

    def check(self, config: CAMoEConfig):
        """Refuse a model that this processor was not made for.

        Args:
            config: the model's.

        Raises:
            ValueError: naming what differs, with both values.
        """
        pairs = {name: (getattr(self.config, name), getattr(config, name)) for name in INPUT_FIELDS}
        pairs["clip_config.model_type"] = (self.config.clip_config.model_type, config.clip_config.model_type)
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise ValueError(
                    f"The processor is not this model's: `{name}` is {mine} in the processor and {theirs} in the "
                    "model. Load both from one folder."
                )
        self._check_unchanged()
        self._check_statistics()

    def _check_unchanged(self):
        for name, value in self._made_for.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"The configuration's `{name}` was changed to {getattr(self.config, name)} after the processor "
                    f"was made for {value}, which the model was built with. Build both again with what you want."
                )

    def _check_statistics(self, **changes):
        """Frames must be prepared as the configuration says: the model prepares uint8 frames in the same way."""
        prepared = copy.copy(self.video_processor)
        for name, value in changes.items():
            setattr(prepared, name, value)
        if prepared.do_rescale and not prepared.do_normalize:
            raise ValueError(
                "`do_rescale=True` with `do_normalize=False` gives frames that were never normalised. Turn off both: "
                "the model does both to uint8 frames."
            )
        if prepared.do_rescale and not is_rescaled_to_one(prepared.rescale_factor):
            raise ValueError(f"`rescale_factor` is {prepared.rescale_factor}; the model was trained with 1/255.")
        for name, value in image_statistics(prepared).items():
            said = getattr(self.config, name)
            if not np.allclose(value, said, rtol=0, atol=1e-6):
                raise ValueError(
                    f"The video processor's `{name.replace('image_resample', 'resample')}` is {value}, the model's "
                    f"configuration says {said}: frames would not be what the model was trained on. Change the "
                    f"configuration's `{name}`, which both follow."
                )

    def _check_length(self, max_length: int) -> None:
        if not 3 <= max_length <= self._longest:  # two tokens are the start and the end alone
            raise ValueError(
                f"`max_length` is {max_length}; it must be from 3 to {self._longest}, the limit of tokenizer and "
                "text tower."
            )

    def __call__(
        self,
        text: str | Mapping[str, str] | Sequence[str | Mapping[str, str]] | None = None,
        videos=None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Captions, videos, or both.

        Args:
            text: a caption or N of them. A mapping {expert: text} is an already tagged caption; experts that it leaves
                out read its "fusion" or "caption".
            videos: a clip or B of them, in any form the video processor accepts.
            **kwargs: `return_tensors` and options of the tokenizer (`max_length`, `padding`, ...) and of the video
                processor, also as `text_kwargs={...}` and `videos_kwargs={...}`.

        Returns:
            `input_ids` and `attention_mask` (N,E,L), `pixel_values_videos` (B,T,3,H,W) and `frame_mask` (B,T).

        Raises:
            ValueError: for an empty caption (naming its index), an unknown expert (naming the nearest known one).
            ImportError: if the tagger is not installed (naming the pip command).
        """
        if text is None and videos is None:
            raise ValueError("CAMoEProcessor needs `text`, `videos`, or both.")
        self._check_unchanged()
        kwargs = self._merge_kwargs(**kwargs)
        tensor_type = kwargs["text_kwargs"].pop("return_tensors", None)
        data = {}
        if text is not None:
            data.update(self._tokenize(self.streams_of(text), kwargs["text_kwargs"]))
        if videos is not None:
            videos_kwargs = kwargs["videos_kwargs"]
            names = {"image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize"}
            given = {name: videos_kwargs[name] for name in names if videos_kwargs.get(name) is not None}
            self._check_statistics(**given)
            tensor_type = videos_kwargs.get("return_tensors") or tensor_type
            data.update(self.video_processor(videos=videos, **videos_kwargs))
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)

    def process_queries(
        self, texts: str | Mapping[str, str] | Sequence[str | Mapping[str, str]], **kwargs
    ) -> BatchFeature:
        """Captions or queries -> what `model.get_text_features` takes, as tensors: `input_ids`, `attention_mask`.

        The name is colpali's, whose processors have `process_queries`, `process_images` and `score`.
        """
        return self(text=texts, **{"return_tensors": "pt"} | kwargs)

    def process_videos(self, videos, **kwargs) -> BatchFeature:
        """Videos in any form -> what `model.get_video_features` takes, as tensors: pixels and `frame_mask`."""
        return self(videos=videos, **{"return_tensors": "pt"} | kwargs)

    @staticmethod
    def score(text_vectors, video_vectors, device: str | torch.device | None = None) -> torch.Tensor:
        """The scores of every text with every video.

        Args:
            text_vectors: (N,K), or a list of N vectors (K,), or the output of `model.get_text_features`.
            video_vectors: (B,K), likewise.
            device: where to compute; by default where the texts are.

        Returns:
            (N,B) float32 on the CPU, from -1 to 1: rank a row for a text, a column for a video.

        Raises:
            ValueError: the vectors are not of one length.
        """
        texts, videos = _as_matrix(text_vectors), _as_matrix(video_vectors)
        if texts.shape[-1] != videos.shape[-1]:
            raise ValueError(f"texts have vectors of {texts.shape[-1]} entries, videos of {videos.shape[-1]}.")
        device = texts.device if device is None else device
        return similarity(texts.to(device, torch.float32), videos.to(device, torch.float32)).cpu()

    def _tokenize(self, texts: list[list[str]], options: dict) -> dict[str, list]:
        """(N,E) texts -> (N,E,L) ids and mask. A truncated text keeps its end token, which CLIP pools at."""
        if not texts:
            raise ValueError("`text` holds no caption.")
        options.setdefault("max_length", self.max_length)
        self._check_length(options["max_length"])
        # Experts without words of their own read the whole caption: each distinct text is tokenised once.
        numbers = {text: n for n, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
        if self.config.text_padding == "max_length":
            encoded = self._pad_to_tower(self.tokenizer(list(numbers), **options | {"padding": False}))
        else:
            encoded = self.tokenizer(list(numbers), **options | {"return_attention_mask": True})
        return {
            name: [[encoded[name][numbers[text]] for text in row] for row in texts]
            for name in ("input_ids", "attention_mask")
        }

    def _pad_to_tower(self, encoded: Mapping[str, list]) -> dict[str, list]:
        """Rows of any length -> rows of the text tower's. Where the tokenizer gives no mask, the tower reads all."""
        length, is_left = self.config.max_text_length, self.tokenizer.padding_side == "left"
        padded = {"input_ids": [], "attention_mask": []}
        for row, ids in enumerate(encoded["input_ids"]):
            padding = length - len(ids)
            mask = encoded["attention_mask"][row] if "attention_mask" in encoded else None
            for name, values, pad in (
                ("input_ids", ids, self.tokenizer.pad_token_id),
                ("attention_mask", [1] * len(ids) if mask is None else mask, 1 if mask is None else 0),
            ):
                padded[name].append([pad] * padding + values if is_left else values + [pad] * padding)
        return padded

    def streams_of(self, text: str | Mapping[str, str] | Sequence[str | Mapping[str, str]]) -> list[list[str]]:
        """The text that each expert reads of each caption, (N,E)."""
        captions = [text] if isinstance(text, str | Mapping) else list(text)
        return caption_streams(captions, self.experts, self.tagger, self.streams)

    def to_dict(self) -> dict:
        saved = copy.copy(self)
        saved.tagger = tagger_name(self.tagger)
        del saved.config, saved._made_for  # has a file of its own
        return super(CAMoEProcessor, saved).to_dict()

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if tagger_name(self.tagger).startswith(CUSTOM):
            logger.warning(
                f"The tagger {self.tagger!r} is a callable, which is not saved: set `processor.tagger` after loading."
            )
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _as_matrix(vectors) -> torch.Tensor:
    """(N,K) of a tensor, an array, a list of vectors, or an output of the model."""
    vectors = getattr(vectors, "pooler_output", vectors)
    if isinstance(vectors, list | tuple):
        vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
    return torch.atleast_2d(torch.as_tensor(vectors))


__all__ = ["CAMoEProcessor"]
