# SPDX-License-Identifier: Apache-2.0
"""A CLIP tokenizer trained on captions: its ids and its words, and that it saves and loads like any other."""

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from motion.clip_tokenizer import train_clip_tokenizer


CAPTIONS = ["a red star spins clockwise", "a red disc spins clockwise", "a blue star spins left"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_clip_tokenizer(CAPTIONS, vocab_size=560)


def test_every_text_begins_and_ends_with_the_special_tokens_which_are_the_last_of_the_vocabulary(tokenizer):
    ids = tokenizer("a red star").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_frequent_words_become_one_token_and_case_does_not_matter(tokenizer):
    assert tokenizer.tokenize("spins Clockwise") == ["spins</w>", "clockwise</w>"]
    assert tokenizer("A RED Star").input_ids == tokenizer("a  red star").input_ids


def test_no_text_has_an_unknown_token_inside_where_clip_would_stop_reading(tokenizer):
    ids = tokenizer("Zürich 北京 🙂 <html>!?").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zürich 北京 🙂 < html >!?"


def test_a_text_that_is_cut_keeps_its_end_token(tokenizer):
    ids = tokenizer("a red star spins clockwise " * 50, truncation=True, max_length=16).input_ids
    assert len(ids) == 16 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 77


def test_saved_and_loaded_by_the_auto_class_it_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, CLIPTokenizer)
    assert loaded("a blue disc, unseen words").input_ids == tokenizer("a blue disc, unseen words").input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert loaded.model_max_length == 77


def test_the_same_captions_give_the_same_vocabulary(tokenizer):
    assert train_clip_tokenizer(iter(CAPTIONS), vocab_size=560).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("vocab_size", "expected"), [(300, 514), (514, 514), (520, 520)])
def test_the_vocabulary_has_the_size_asked_for_and_never_less_than_all_bytes(vocab_size, expected):
    assert len(train_clip_tokenizer(CAPTIONS, vocab_size=vocab_size)) == expected
