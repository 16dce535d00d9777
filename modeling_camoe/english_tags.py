# SPDX-License-Identifier: Apache-2.0
"""Corrects part-of-speech tags of captions, the first step of english_streams.py, and holds the word lists of both.

The tagger learned from news, where words like "the red star spins" are mostly a noun phrase. Its errors on captions
are few and regular: `repair_tags` corrects what grammar rules out, and searches again for the verb of a caption that
seems to have none. Tags are those of the Penn Treebank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


# --- word lists ------------------------------------------------------------------------------------------------------

# Function words, and the few nouns and verbs that decide what a prepositional phrase means, all in lower case.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _forms(verbs: str) -> frozenset[str]:
    """All forms of regular verbs (and some that do not exist, which does no harm)."""
    forms = set()
    for verb in verbs.split():
        stem = verb.removesuffix("e")
        forms.update(
            (verb, f"{verb}s", f"{verb}es", f"{stem}ing", f"{stem}ed", f"{verb}{verb[-1]}ing", f"{verb}{verb[-1]}ed")
        )
    return frozenset(forms)


# Prepositions whose phrase says where something is or goes.
PLACE_PREPOSITIONS = _words(
    "in on at over under above below beneath underneath beside behind near between among amongst amid amidst "
    "across through throughout along alongside past against inside outside within around round by beyond atop "
    "upon opposite off into onto toward towards up down out"
)
PARTICLES = _words("up down on in off out over away")  # of a verb, with or without an object: "picks up a ball"
# What these lead to is a thing, and a place only where the caption names no other ("runs into the crowd") ...
GOAL_PREPOSITIONS = _words("into onto off toward towards away out")
# ... and these lead somewhere after such verbs only ("walks to the store", but "talks to a child").
MOTION_PREPOSITIONS = _words("to from")
MOTION_VERBS = _forms(
    "go walk run drive ride travel move fly swim jump head come return climb crawl roll slide drift race float "
    "hop glide rise fall drop rush sail march bounce hang emerge swing leap step pass lead spread stretch pull "
    "push drag carry throw pour"
) | _words("went gone ran drove rode flew swam came rose fell fallen hung swung leapt led threw travelled travelling")
LEAPING_VERBS = _forms("jump leap hop step climb") | {"leapt"}  # over things
# What these lead to is a thing; right after a verb they go with it ("talks about", "runs after").
THING_PREPOSITIONS = _words("of with for about after like without")
# These join clauses, or tell when and why.
CONJUNCTIONS = _words(
    "as than per during before since until till despite via except including versus that while if because whether "
    "though although unless"
)
PREPOSITIONS = PLACE_PREPOSITIONS | MOTION_PREPOSITIONS | THING_PREPOSITIONS | CONJUNCTIONS
# Two words that act as one preposition: do they say where?
PREPOSITION_PAIRS = {
    **dict.fromkeys([("next", "to"), ("close", "to"), ("adjacent", "to"), ("near", "to"), ("in", "between")], True),
    **dict.fromkeys([("out", "of"), ("outside", "of"), ("inside", "of"), ("off", "of"), ("away", "from")], True),
    **dict.fromkeys([("because", "of"), ("instead", "of"), ("along", "with"), ("due", "to"), ("such", "as")], False),
}
# Words of direction: motion, unless they belong to a noun ("slides right", but "his right hand").
DIRECTIONS = _words(
    "left right up down upward upwards downward downwards forward forwards backward backwards sideward sidewards "
    "sideways leftward leftwards rightward rightwards inward inwards outward outwards clockwise counterclockwise "
    "counter-clockwise anticlockwise anti-clockwise diagonally vertically horizontally around round away back "
    "forth"
)
# Both word of direction and preposition: before a noun they open a phrase of place.
DIRECTION_PREPOSITIONS = _words("up down around round")
# What makes a direction of a phrase: the end in "to the left", "from side to side" ...
GOAL_NOUNS = DIRECTIONS | _words("top bottom side centre center middle edge corner end north south east west")
# ... the picture rather than a place in it ("across the screen", "away from the camera") ...
FRAME_NOUNS = _words("screen frame camera viewer view lens")
# ... and the manner of moving ("in a circle", "at high speed", "around its axis").
MANNER_NOUNS = _words(
    "circle circles loop loops spiral spirals zigzag zigzags zig-zag arc line direction directions motion reverse "
    "place spot speed pace axis rhythm unison sync steps itself himself herself themselves"
)
MANNER_PREPOSITIONS = _words("in at on around")
# "in a red shirt" says who, not where.
WORN_NOUNS = _words(
    "shirt shirts t-shirt tshirt dress dresses suit suits hat cap jacket coat uniform uniforms costume costumes "
    "outfit outfits clothes clothing jeans shorts pants skirt sweater hoodie glasses sunglasses helmet mask wig "
    "bikini swimsuit robe gown tie vest makeup attire"
)
COLOURS = _words(
    "red blue green yellow purple orange white black pink cyan brown grey gray magenta turquoise teal violet "
    "golden silver beige"
)
# The "at" of these verbs is an aim, not a place.
AIMING_VERBS = _forms("look star stare gaze glance peer point shoot laugh smile wave yell shout aim bark grab") | {
    "shot"
}
PLACE_ADVERBS = _words(
    "outside outdoors inside indoors underwater upstairs downstairs overhead nearby underground onstage backstage "
    "aboard"
)
# Adverbs that tell neither action nor place.
EMPTY_ADVERBS = _words("also too then just even only so very as else ever however there here well rather quite really")
# Auxiliary verbs, which alone tell nothing that happens; those that can also be main verbs ("does gymnastics"); and
# those of captions that only point ("we see a ball rolling", "a ball can be seen rolling").
LIGHT_VERBS = _words(
    "be is s are was were been being am 's 're 'm can could will would shall should may might must ca wo 'll 'd"
)
HELPING_VERBS = _words("have has had having 've do does did")
SEEING_VERBS = _words("see sees seen")
# "in the video" is where every clip happens, and "at the same time" is no place.
RECORDINGS = _words("video videos clip clips footage")  # "a video of a man": not an entity where others are
EMPTY_PLACES = RECORDINGS | _words("time times moment while second seconds minute minutes once least")

SINGULAR_DETERMINERS = _words("a an one this that each every another")
PLURAL_DETERMINERS = _words("two three four five six seven eight nine ten some many several these those both all")
CLOSED_CLASS = (
    PREPOSITIONS
    | DIRECTIONS
    | PLACE_ADVERBS
    | LIGHT_VERBS
    | HELPING_VERBS
    | PLURAL_DETERMINERS
    | _words(
        "a an one this that each every another the no any its his her their my your our and or but & which who not"
    )
)
QUANTITIES = _words("few couple dozen hundred thousand lot bunch pair")  # "a couple kids" is plural
INDEFINITE_PRONOUNS = _words(
    "something someone somebody anything anyone anybody everything everyone everybody nothing nobody"
)
# Things in -ing, which need not be verbs even where the caption has no other.
THINGS_IN_ING = _words(
    "building ceiling painting wedding clothing ring king string spring wing thing evening morning railing "
    "lightning awning parking crossing landing opening beginning ending meeting drawing icing earring dressing "
    "frosting pudding topping something anything nothing everything sibling duckling lighting flooring bedding "
    "carving"
)


# --- tags ------------------------------------------------------------------------------------------------------------

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
