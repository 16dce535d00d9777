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
"""A real CLIP tokenizer, small enough for tests."""

from collections.abc import Iterable

from clip_tokenizer import train_clip_tokenizer
from transformers import CLIPTokenizer


CAPTIONS = (
    "a red star spins clockwise on a sandy beach",
    "on the brick wall, a small blue disc is moving to the left",
    "two kids are playing basketball in a gym",
)


def tiny_tokenizer(captions: Iterable[str] = CAPTIONS, vocab_size: int = 600) -> CLIPTokenizer:
    """Byte pairs of a few captions; about 550 entries, a word of CAPTIONS is mostly one token."""
    return train_clip_tokenizer(list(captions) * 2, vocab_size=vocab_size)
