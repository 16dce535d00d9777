# SPDX-License-Identifier: Apache-2.0
"""The model that makes the vectors of an index, identified by a hash of its weights."""

import hashlib
import os
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError

from modeling_camoe import CAMoEModel, CAMoEProcessor
from modeling_camoe.encode import encode_texts, encode_videos

from .errors import SearchError


def process_group() -> PartialState:
    """This process among those of `accelerate launch`, or a group of one without it.

    The timeout is long because processes wait for each other at the end, and one with slow files may take hours more.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))


class Encoder:
    """A model in eval mode on its device, with its processor.

    Args:
        name: folder or Hub id, written into the index.
        model, processor: a [`CAMoEModel`] and its [`CAMoEProcessor`].
        sampling: how frames are chosen; None: as the processor is configured.
    """

    def __init__(self, name: str, model, processor, sampling: str | None = None):
        self.name = name
        self.model = model.eval()
        self.processor = processor
        if sampling is not None:
            processor.video_processor.sampling = sampling

    @classmethod
    def from_pretrained(cls, name: str, device: str | None = None, sampling: str | None = None) -> "Encoder":
        """Load a CAMoE checkpoint, or a plain dual encoder as it is (zero-shot), onto the GPU if there is one.

        Raises:
            SearchError: it cannot be loaded.
        """
        try:
            # Without effect on a CAMoE checkpoint.
            model, processor = (cls.from_pretrained(name, zero_shot=True) for cls in (CAMoEModel, CAMoEProcessor))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise SearchError(f"cannot load the model {name}: {reason}") from error
        name = os.path.abspath(name) if os.path.isdir(name) else name  # an index can be opened from anywhere
        return cls(name, model.to(device or process_group().device), processor, sampling)

    @cached_property
    def weights(self) -> str:
        """128-bit hash of all weights. Vectors are comparable only if it is the same."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Queries -> folded vectors (N,K).

        Raises:
            SearchError: a query is empty.
        """
        for text in texts:
            if not text.strip():
                raise SearchError("the query is empty: describe what happens in the video")
        return encode_texts(self.model, self.processor, texts).numpy()

    def encode_clip(self, clip) -> np.ndarray:
        """A video -> the query vector that finds similar videos, (1,K).

        Every expert's part has length 1, as in the vector of a text: the score uses the gates of the found videos.
        """
        vector = encode_videos(self.model, self.processor, [clip]).vectors  # (1,K), gated
        experts = vector.unflatten(1, (len(self.model.config.experts), -1))  # (1,E,D)
        return torch.nn.functional.normalize(experts, dim=-1).flatten(1).numpy()
