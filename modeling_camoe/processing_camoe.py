# SPDX-License-Identifier: Apache-2.0
"""CAMoEProcessor: captions -> token ids of one text per expert, (N,E,L); videos -> pixels (B,T,3,H,W).

A caption is split into streams (captions.py), one per expert of the model. The texts of a batch are padded to the
longest of them rather than to CLIP's 77 tokens: streams are short, and padding changes no embedding.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from .captions import CUSTOM, STREAMS, caption_streams, closest, tagger_name
from .saving import SavesRelease


logger = logging.get_logger(__name__)


class CAMoEProcessor(SavesRelease, ProcessorMixin):
    """Prepares captions and videos for [`CAMoEModel`].

    Args:
        video_processor: a [`CAMoEVideoProcessor`].
        tokenizer: a CLIP tokenizer.
        experts: names of the model's experts, in its order.
        streams: {expert: stream} for experts that are not named after the stream they read.
        tagger: what splits a caption into streams: the name of a spaCy model, "none" (every expert reads the whole
            caption), or any callable caption -> {expert: text}. A callable is not saved: set it again after loading
            (`processor.tagger = ...`), before the processor reads captions.
        max_length: tokens read of each text, including the start and end tokens.
    """

    _auto_class = "AutoProcessor"  # also where this class was imported by another class's code
    text_kwargs = {"padding": "longest", "truncation": True}

    def __init__(
        self,
        video_processor,
        tokenizer,
        experts: Sequence[str] = STREAMS,
        streams: Mapping[str, str] | None = None,
        tagger: str | Callable[[str], Mapping[str, str]] | None = "en_core_web_sm",
        max_length: int = 32,
    ):
        super().__init__(video_processor, tokenizer)
        self.experts = list(experts)
        self.streams = dict(streams or {})
        self.tagger = "none" if tagger is None else tagger
        self.max_length = max_length
        if not self.experts or len(set(self.experts)) < len(self.experts):
            raise ValueError(f"`experts` must be names that differ from each other, at least one: {self.experts}.")
        for expert in self.streams:
            if expert not in self.experts:
                raise ValueError(f"`streams` names an unknown expert {expert!r}. {closest(expert, self.experts)}")
        if isinstance(self.tagger, str) and self.tagger != "none" and not self.tagger.startswith(CUSTOM):
            for expert in self.experts:
                stream = self.streams.get(expert, expert)
                if stream not in STREAMS:
                    raise ValueError(
                        f"Unknown expert {stream!r}. {closest(stream, STREAMS)} Name the stream that an expert reads "
                        "in `streams`, or set a tagger of your own."
                    )
        self._check_length(max_length)

    def _check_length(self, max_length: int) -> None:
        longest = self.tokenizer.model_max_length
        if not 3 <= max_length <= longest:  # two tokens are the start and the end alone
            raise ValueError(f"`max_length` is {max_length}; it must be from 3 to {longest}, the tokenizer's limit.")

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
        kwargs = self._merge_kwargs(**kwargs)
        tensor_type = kwargs["text_kwargs"].pop("return_tensors", None)
        data = {}
        if text is not None:
            data.update(self._tokenize(self.streams_of(text), kwargs["text_kwargs"]))
        if videos is not None:
            videos_kwargs = kwargs["videos_kwargs"]
            tensor_type = videos_kwargs.get("return_tensors") or tensor_type
            data.update(self.video_processor(videos=videos, **videos_kwargs))
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)

    def _tokenize(self, texts: list[list[str]], options: dict) -> dict[str, list]:
        """(N,E) texts -> (N,E,L) ids and mask. A truncated text keeps its end token, which CLIP pools at."""
        if not texts:
            raise ValueError("`text` holds no caption.")
        options.setdefault("max_length", self.max_length)
        self._check_length(options["max_length"])
        encoded = self.tokenizer([text for row in texts for text in row], **options)  # N*E rows
        num_experts = len(self.experts)
        starts = range(0, len(texts) * num_experts, num_experts)
        return {name: [rows[i : i + num_experts] for i in starts] for name, rows in encoded.items()}

    def streams_of(self, text: str | Mapping[str, str] | Sequence[str | Mapping[str, str]]) -> list[list[str]]:
        """The text that each expert reads of each caption, (N,E)."""
        captions = [text] if isinstance(text, str | Mapping) else list(text)
        return caption_streams(captions, self.experts, self.tagger, self.streams)

    def to_dict(self) -> dict:
        saved = copy.copy(self)
        saved.tagger = tagger_name(self.tagger)
        return super(CAMoEProcessor, saved).to_dict()

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if tagger_name(self.tagger).startswith(CUSTOM):
            logger.warning(
                f"The tagger {self.tagger!r} is a callable, which is not saved: set `processor.tagger` after loading."
            )
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["CAMoEProcessor"]
