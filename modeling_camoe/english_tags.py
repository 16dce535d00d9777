# SPDX-License-Identifier: Apache-2.0
"""Corrects part-of-speech tags of captions: the first step of english_streams.py.

The tagger learned from news, where words like "the red star spins" are mostly a noun phrase. Its errors on captions
are few and regular: `repair_tags` corrects what grammar rules out, and searches again for the verb of a caption that
seems to have none. Tags are those of the Penn Treebank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .english_words import (
    CLOSED_CLASS,
    COLOURS,
    CONJUNCTIONS,
    DIRECTIONS,
    GOAL_NOUNS,
    HELPING_VERBS,
    INDEFINITE_PRONOUNS,
    LIGHT_VERBS,
    PLACE_ADVERBS,
    PLURAL_DETERMINERS,
    QUANTITIES,
    SEEING_VERBS,
    SINGULAR_DETERMINERS,
    THINGS_IN_ING,
)


NOUNS = frozenset(("NN", "NNS"))
ADJECTIVES = frozenset(("JJ", "JJR", "JJS"))
ADVERBS = frozenset(("RB", "RBR", "RBS", "RP"))
PARTICIPLES = frozenset(("VBG", "VBN"))
VERBS = frozenset(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ", "MD"))
DETERMINERS = frozenset(("DT", "PDT", "PRP$", "WP$"))
NOMINAL = NOUNS | ADJECTIVES | PARTICIPLES  # what may follow inside a noun phrase
GOVERNORS = DETERMINERS | {"IN"}
AFTER_LAST_ADJECTIVE = NOUNS | ADJECTIVES | {"CC", ","}

AUXILIARIES = LIGHT_VERBS | HELPING_VERBS
NO_MAIN_VERBS = LIGHT_VERBS | SEEING_VERBS | DIRECTIONS


class Word(NamedTuple):
    """A word of a caption and its part of speech."""

    text: str
    tag: str
    lower: str

    @classmethod
    def of(cls, text: str, tag: str) -> "Word":
        return cls(text, tag, text.lower())

    def tagged(self, tag: str) -> "Word":
        return Word(self.text, tag, self.lower)


NO_WORD = Word("", "", "")


def word_at(words: Sequence[Word], i: int) -> Word:
    """Word i, or `NO_WORD` beyond either end, so that rules need not check bounds."""
    return words[i] if 0 <= i < len(words) else NO_WORD


def is_main_verb(word: Word) -> bool:
    """Does the word tell what happens, as "is", "see" and "left" do not?"""
    return word.tag in VERBS and word.lower not in NO_MAIN_VERBS


def _has_predicate(words: Sequence[Word]) -> bool:
    """Is there a main verb, and not just a participle that describes a noun ("a bowl filled with fruit")?"""
    return any(
        is_main_verb(word) and (word.tag != "VBN" or word_at(words, i - 1).lower in AUXILIARIES)
        for i, word in enumerate(words)
    )


def repair_tags(words: Sequence[Word]) -> list[Word]:
    """Correct tags that grammar rules out, and search again for the verb of a caption that seems to have none."""
    words = _tag_known_words(words)
    verbless = not _has_predicate(words)
    clause_verbless = True  # so far
    phrase = _OpenPhrase()
    for i, word in enumerate(words):
        if _must_be_noun(words, i, phrase):
            tag = "NN"
        else:
            tag = _verb_tag(words, i, phrase, verbless, clause_verbless) or word.tag
        if tag != word.tag:
            word = words[i] = word.tagged(tag)
            verbless = not _has_predicate(words)
        joins = tag in ("CC", ",") or word.lower in CONJUNCTIONS
        clause_verbless = joins or (clause_verbless and not is_main_verb(word))
        phrase.read(word)
    return words


def _tag_known_words(words: Sequence[Word]) -> list[Word]:
    """Tag words whose part of speech is known by name. It comes first: other rules look at what follows a noun."""
    words = [_without_names(word) for word in words]
    for i, word in enumerate(words):
        lower, tag = word.lower, word.tag
        before, after = word_at(words, i - 1), word_at(words, i + 1)
        governed = before.tag in GOVERNORS and before.lower not in DIRECTIONS
        if (lower, after.lower) in (("each", "other"), ("one", "another")):
            words[i + 1] = after.tagged("PRP")
            tag = "PRP"
        elif (lower, after.lower) == ("plus", "sign"):
            words[i + 1] = after.tagged("NN")
            tag = "NN"
        elif lower in PLACE_ADVERBS and not governed and not (before.tag in ADJECTIVES and after.tag in NOUNS):
            tag = "RB"
        elif lower in DIRECTIONS and tag in NOUNS and not governed and before.tag not in ADJECTIVES:
            tag = "RB"
        elif (
            lower in GOAL_NOUNS and tag in VERBS and before.lower == "to" and word_at(words, i - 2).lower in GOAL_NOUNS
        ):
            tag = "NN"  # "from side to side"
        elif lower in COLOURS and tag in NOUNS and after.text.isalpha() and after.lower not in CLOSED_CLASS:
            tag = "JJ"
        words[i] = word.tagged(tag)
    return words


def _without_names(word: Word) -> Word:
    """Captions name few people: what the tagger takes for a name is mostly an unknown noun."""
    if word.tag == "NNP":
        plural = word.text.islower() and word.text.endswith("s") and not word.text.endswith(("ss", "us"))
        return word.tagged("NNS" if plural else "NN")
    return word.tagged("NNS") if word.tag == "NNPS" else word


@dataclass
class _OpenPhrase:
    """The noun phrase that the next word may continue."""

    determiner: str = ""
    adjectives: int = 0
    nouns: int = 0

    @property
    def singular(self) -> bool:
        return self.determiner in SINGULAR_DETERMINERS

    def begin(self, determiner: str = "", adjectives: int = 0) -> None:
        self.determiner, self.adjectives, self.nouns = determiner, adjectives, 0

    def read(self, word: Word) -> None:
        """Read the next word: it continues the phrase, begins another, or ends it."""
        tag = word.tag
        adjective = tag in ADJECTIVES or (tag in PARTICIPLES and self.determiner and not self.nouns)
        if tag in DETERMINERS or tag == "CD":
            self.begin(word.lower)
        elif adjective and self.nouns:
            self.begin(adjectives=1)
        elif adjective:
            self.adjectives += 1
        elif tag in NOUNS:
            self.nouns += 1
        elif tag not in ADVERBS and not (self.determiner and not self.nouns and tag in ("CC", ",")):
            self.begin()


def _must_be_noun(words: Sequence[Word], i: int, phrase: _OpenPhrase) -> bool:
    lower, tag = words[i].lower, words[i].tag
    before, after = word_at(words, i - 1), word_at(words, i + 1)
    opened = phrase.adjectives or before.lower in ("a", "an", "the")
    if phrase.determiner and opened and not phrase.nouns and lower not in CLOSED_CLASS:
        # A determiner needs a noun: "a green cross slides", "a pink donut", "a painting of a man".
        if tag in ("VB", "VBP", "FW", "UH", "IN", "WDT", "DT", "CC"):
            return True
        if tag in ("VBZ", "VBD") and not phrase.adjectives:
            return True
        followed = after.tag in NOMINAL
        if tag == "RB" and not lower.endswith("ly") and not followed and after.tag not in ADVERBS:
            return True
        if tag in PARTICIPLES and not phrase.adjectives and not followed and after.tag not in ("CC", ","):
            return True
    if tag in ADJECTIVES and before.lower in COLOURS and not phrase.nouns:
        # Colour is the last adjective: "the white square contracts".
        last = after.tag not in AFTER_LAST_ADJECTIVE
        return last or after.tag == "NNS" or after.lower.endswith("ing")
    if tag in ("VB", "VBP"):  # no bare verb after a singular noun: "a stop sign is moving"
        bare = phrase.singular and phrase.nouns and lower not in AUXILIARIES
        return bool(bare and after.tag in ("VBZ", "VBD", "VBG", "WDT"))
    return tag == "VBG" and lower in THINGS_IN_ING and before.tag in ("IN", "RP")  # "walks around building"


def _verb_tag(words: Sequence[Word], i: int, phrase: _OpenPhrase, verbless: bool, clause_verbless: bool) -> str | None:
    """The tag of a verb that was taken for a noun, None for other words."""
    lower, tag = words[i].lower, words[i].tag
    before, after = word_at(words, i - 1), word_at(words, i + 1)
    if after.tag in NOUNS and after.lower not in INDEFINITE_PRONOUNS:
        return None  # part of a compound
    if tag == "NNS":
        relative = before.lower in ("that", "which", "who") and word_at(words, i - 2).tag in NOUNS
        relative = relative or before.lower in INDEFINITE_PRONOUNS  # "something falls"
        plural = before.lower in QUANTITIES or (before.tag == "NNS" and before.lower.endswith("s"))
        disagrees = phrase.singular and (phrase.nouns or phrase.adjectives) and not plural  # "a red star spins"
        if relative or disagrees:
            return "VBZ"
        moves = after.lower in DIRECTIONS or after.tag in ADVERBS
        if verbless and phrase.nouns and (phrase.determiner == "the" or moves):
            return "VBZ"
        if verbless and before.tag == "RB" and before.lower.endswith("ly"):  # "which slowly moves"
            return "VBZ"
    elif tag in NOUNS | ADJECTIVES and lower.endswith("ing") and lower not in THINGS_IN_ING:
        if phrase.nouns and (clause_verbless or after.lower in DIRECTIONS):  # "a blue disc spinning on the grass"
            return "VBG"
        if clause_verbless and phrase.adjectives > 1:  # "a round square spinning"
            return "VBG"
        if before.tag == "CC" and (verbless or word_at(words, i - 2).tag == "VBG"):  # "people laughing and dancing"
            return "VBG"
        if verbless and phrase.determiner and phrase.adjectives:
            return "VBG"
    elif tag == "NN" and verbless and before.tag == "NNS" and phrase.determiner in PLURAL_DETERMINERS:
        return "VBP"  # "two red stars spin"
    return None
