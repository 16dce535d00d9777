# SPDX-License-Identifier: Apache-2.0
"""What a set of queries and candidates is, whichever source it comes from."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluation.compare_runs import query_key


@dataclass
class ScoringInputs:
    """One split, ready to be scored.

    Args:
        text_vectors: (N,K), or the (N,M) scores where `video_vectors` is None. video_vectors: (M,K) or None.
        video_of_text: (N,), the right video of each text. text_keys: N, see `query_key`. video_ids: M names.
    """

    text_vectors: Any
    video_vectors: torch.Tensor | None
    video_of_text: torch.Tensor
    text_keys: list[int]
    video_ids: list[str]

    def data(self) -> dict:
        """Arguments of `score_retrieval`."""
        names = ("text_vectors", "video_vectors", "video_of_text")
        return {name: getattr(self, name) for name in names}

    def keys_of(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Direction -> what each of its queries is known by, for the videos of the queries of each direction."""
        videos = np.array([query_key(name) for name in self.video_ids], dtype=np.int64)
        return {
            direction: np.array(self.text_keys, dtype=np.int64) if direction == "text_to_video" else videos[of]
            for direction, of in groups.items()
        }
