# SPDX-License-Identifier: Apache-2.0
"""A CLIP tokenizer of one's own, for a model trained from scratch on a small world of captions.

CLIP's own vocabulary has 49,408 entries, most of which a thousand captions never use: at 512 dimensions they would be
25 million parameters that learn nothing. This makes a small vocabulary of the same construction, in the same class.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int = 1000, model_max_length: int = 77) -> CLIPTokenizer:
    """Trains byte-pair merges on captions and returns a CLIPTokenizer.

    The vocabulary is laid out as OpenAI's is: the 256 bytes, the same at the end of a word, the merges,
    `<|startoftext|>`, `<|endoftext|>`. With all bytes in it no text has an unknown token. That matters: CLIP's unknown
    token is `<|endoftext|>`, and the text tower reads its embedding at the first of these.

    Args:
        captions: the training captions.
        vocab_size: entries of the vocabulary. It has fewer where the captions run out of pairs to merge, and never
            fewer than 514, the bytes and the two special tokens.
        model_max_length: positions of the text tower.

    Returns:
        A tokenizer that saves and loads like any other. For the text tower's config take its `bos_token_id`,
        `eos_token_id`, `pad_token_id` and `len(tokenizer)`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    num_merges = max(vocab_size - len(base) - 2, 0)

    untrained = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    trained.normalizer, trained.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    # The trainer's own vocabulary has only the word ends that it saw, so it has room for all the merges we take.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"][:num_merges]]

    tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), BOS, EOS])  # two pairs may make the same token
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)
