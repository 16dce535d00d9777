# SPDX-License-Identifier: Apache-2.0
"""CAMoE for sentence-transformers: `SentenceTransformer(path, trust_remote_code=True)` gives the folded vectors.

    model = SentenceTransformer("runs/demo", trust_remote_code=True)
    model.similarity(model.encode_query("a dog catches a frisbee"), model.encode_document(["a.mp4", "b.mp4"]))

Texts become (N,K) and videos (B,K), K = E*D, whose inner product is the score of the whole mixture; `similarity` is
that inner product. So anything built on sentence-transformers can use a CAMoE.

Notable features:
- a video is whatever [`CAMoEVideoProcessor`] takes, a picture included. It is read by that processor, not through the
  library's own `video` modality, which would decode whole files into memory and sample other frames than training did;
- saved checkpoints carry modules.json and this file (saving.py);
- the class is one of the library's `InputModule`s wherever the library loads it, and needs the library nowhere else.
"""

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import nn
from transformers import AutoModel, AutoProcessor

from .frames import VIDEO_EXTENSIONS
from .video_inputs import IMAGE_EXTENSIONS, is_web_address


DECODER_THREADS = 4  # decoding releases Python's global lock

# Not imported: that takes seconds, and whoever only saves a checkpoint needs no sentence-transformers. The library is
# there before it loads this file; without it, the class is a plain module with the same methods.
_library = sys.modules.get("sentence_transformers.base.modules.input_module")
InputModule = nn.Module if _library is None else _library.InputModule


class CAMoESentenceModule(InputModule):
    """The one module of a SentenceTransformer: preprocessing and both towers.

    Args:
        model: a [`CAMoEModel`].
        processor: its [`CAMoEProcessor`].
    """

    save_in_root = True  # its files are those of the checkpoint
    modalities = ["text", "image", "video"]  # an image is a clip of one frame

    def __init__(self, model, processor):
        super().__init__()
        processor.check(model.config)
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        *,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        **kwargs,
    ) -> "CAMoESentenceModule":
        """Called by the library, which has checked `trust_remote_code` before."""
        hub = {"token": token, "cache_dir": cache_folder, "revision": revision, "subfolder": subfolder}
        hub |= {"local_files_only": local_files_only, "trust_remote_code": True}
        model = AutoModel.from_pretrained(model_name_or_path, **hub, **(config_kwargs or {}), **(model_kwargs or {}))
        processor = AutoProcessor.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {}))
        return cls(model, processor)

    def save(self, output_path: str, *args, **kwargs):
        """Weights, processor and code; the library adds its own two files."""
        self.processor.save_pretrained(output_path)
        self.model.save_pretrained(output_path)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens read of each expert's text."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int):
        self.processor.max_length = value

    def get_embedding_dimension(self) -> int:
        """K."""
        return len(self.model.config.experts) * self.model.config.projection_dim

    def preprocess(self, inputs, prompt: str | None = None, task: str | None = None, **kwargs) -> dict:
        """A batch of texts or a batch of videos -> what `forward` takes.

        Args:
            inputs: texts; or videos in any form the video processor takes, also as `{"video": ...}` or
                `{"image": ...}`. A string is a video if it is an http(s) address, or has the suffix of a video or a
                picture and the file exists. As a document the suffix is enough, so that a missing file is an error.
                `{"text": ...}` is always a text: a service that encodes strings of strangers should pass them so.
            prompt: put before each text.
            task: "query" or "document", from `encode_query` and `encode_document`.

        Raises:
            ValueError: texts and videos in one batch; a file that cannot be decoded (naming it); an empty text.
        """
        videos = [_video_of(item, task) for item in inputs]
        if all(video is None for video in videos):
            texts = [(prompt or "") + (item if isinstance(item, str) else item["text"]) for item in inputs]
            return dict(self.processor.process_queries(texts))
        if any(video is None for video in videos):
            raise ValueError("texts and videos cannot share a batch: encode them in two calls")
        with ThreadPoolExecutor(min(DECODER_THREADS, len(videos))) as decoders:
            videos = list(decoders.map(self.processor.video_processor.decode, videos))
        # uint8: the model rescales and normalises on its own device.
        return dict(self.processor.process_videos(videos, do_rescale=False, do_normalize=False))

    def forward(self, features: dict, **kwargs) -> dict:
        """Adds `sentence_embedding`, (N,K): the vector to query with, or the one to index."""
        if "input_ids" in features:
            output = self.model.get_text_features(features["input_ids"], features["attention_mask"])
        else:
            output = self.model.get_video_features(features["pixel_values_videos"], features["frame_mask"])
        return features | {"sentence_embedding": output.pooler_output}


def _video_of(item, task: str | None):
    """The video in an input, None if it is a text."""
    if isinstance(item, Mapping) and len(item) == 1:  # the library's own form
        (modality, content), *_ = item.items()
        if modality in ("video", "image"):
            return content
        return None if modality == "text" else item
    if not isinstance(item, str):
        return item
    if is_web_address(item) or item.startswith("data:"):
        return item
    has_suffix = os.path.splitext(item)[1].lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    return item if has_suffix and (task == "document" or os.path.isfile(item)) else None


__all__ = ["CAMoESentenceModule"]
