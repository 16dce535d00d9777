# SPDX-License-Identifier: Apache-2.0
"""A real CLIP tokenizer, small enough for tests."""

from collections.abc import Iterable

from transformers import CLIPTokenizer

from motion.clip_tokenizer import train_clip_tokenizer


CAPTIONS = (
    "a red star spins clockwise on a sandy beach",
    "on the brick wall, a small blue disc is moving to the left",
    "two kids are playing basketball in a gym",
)


def tiny_tokenizer(captions: Iterable[str] = CAPTIONS, vocab_size: int = 600) -> CLIPTokenizer:
    """Byte pairs of a few captions; about 550 entries, a word of CAPTIONS is mostly one token."""
    return train_clip_tokenizer(list(captions) * 2, vocab_size=vocab_size)
