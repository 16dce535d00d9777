# SPDX-License-Identifier: Apache-2.0
"""A small CLIP tokenizer, for a model that is trained from scratch on few captions.

CLIP's own vocabulary has 49,408 entries. A thousand captions never use most of them: at 512 dimensions that would be
25 million parameters that learn nothing. The vocabulary made here is small and built like CLIP's, in the same class.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int = 1000, model_max_length: int = 77) -> CLIPTokenizer:
    """Train byte-pair merges on captions, for a CLIPTokenizer.

    The vocabulary is laid out like OpenAI's: the 256 bytes, the same at the end of a word, the merges,
    `<|startoftext|>`, `<|endoftext|>`. Because it has all bytes, no text has an unknown token. That matters: CLIP's
    unknown token is `<|endoftext|>`, and the text tower takes its output at the first of these.

    Args:
        captions: the training captions.
        vocab_size: entries of the vocabulary. It has fewer if the captions have no more pairs to merge, but at least
            514: the bytes and the two special tokens.
        model_max_length: positions of the text tower.

    Returns:
        A tokenizer that saves and loads like any other. The text tower's config needs its `bos_token_id`,
        `eos_token_id`, `pad_token_id` and `len(tokenizer)`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    num_merges = max(vocab_size - len(base) - 2, 0)

    untrained = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    trained.normalizer, trained.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    # The trainer's vocabulary has only the word ends that it saw, so all the merges that we take fit in it.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"][:num_merges]]

    tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), BOS, EOS])  # two pairs may give the same token
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)
