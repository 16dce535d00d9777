# SPDX-License-Identifier: Apache-2.0
"""English grammar of caption streams: part-of-speech tags -> the texts of entity, action and scene.

Three steps: `repair_tags` (english_tags.py), finding noun and prepositional phrases, and `streams_from_tags`, which
assigns each phrase to a stream. captions.py says what the streams mean, and what the `SENTENCES` are.

There is no parse: captions are simple enough to be read from left to right by their parts of speech.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .english_tags import (
    ADJECTIVES,
    ADVERBS,
    AIMING_VERBS,
    COLOURS,
    CONJUNCTIONS,
    DETERMINERS,
    DIRECTION_PREPOSITIONS,
    DIRECTIONS,
    EMPTY_ADVERBS,
    EMPTY_PLACES,
    FRAME_NOUNS,
    GOAL_NOUNS,
    GOAL_PREPOSITIONS,
    HELPING_VERBS,
    LEAPING_VERBS,
    LIGHT_VERBS,
    MANNER_NOUNS,
    MANNER_PREPOSITIONS,
    MOTION_PREPOSITIONS,
    MOTION_VERBS,
    NO_WORD,
    NOMINAL,
    NOUNS,
    PARTICIPLES,
    PARTICLES,
    PLACE_ADVERBS,
    PLACE_PREPOSITIONS,
    PREPOSITION_PAIRS,
    PREPOSITIONS,
    RECORDINGS,
    SEEING_VERBS,
    VERBS,
    WORN_NOUNS,
    Word,
    is_main_verb,
    repair_tags,
    word_at,
)


SENTENCES = ("words", "phrases", "masked")
LEADING_PREPOSITIONS = GOAL_PREPOSITIONS | MOTION_PREPOSITIONS

Span = tuple[int, int]  # words[start:end]


# -- phrases -------------------------------------------------------------------------------------------------------


def _noun_phrase(words: Sequence[Word], start: int) -> int:
    """End of the noun phrase that begins at `start`; `start` if none does."""
    governed = word_at(words, start - 1).lower in PREPOSITIONS
    determined = seen_noun = False
    i = start
    while i < len(words):
        word, after = words[i], word_at(words, i + 1)
        attributive = after.tag in NOMINAL
        if word.lower in DIRECTIONS and not attributive and (seen_noun or not determined):
            break  # "moves the ball left"
        if word.tag in NOUNS:
            seen_noun = True
        elif seen_noun:
            number = word.tag == "CD" and after.tag not in NOUNS | ADJECTIVES  # "grand theft auto 5"
            compound = word.tag == "VBN" and determined and after.tag in NOUNS  # "a snow covered field"
            if not number and not compound:
                break
        elif word.tag in DETERMINERS or word.tag == "CD":
            determined = True
        elif word.tag in PARTICIPLES:
            if not attributive or not (determined or (governed and word.tag == "VBN")):
                break
        elif word.tag in ADVERBS:
            if i == start or not attributive:
                break
        elif word.tag in ("CC", ","):
            if i == start or words[i - 1].tag not in ADJECTIVES or after.tag not in ADJECTIVES:
                break  # but "a black and white cat"
        elif word.tag not in ADJECTIVES and not (word.lower in DIRECTIONS and determined):
            break
        i += 1
    headed = seen_noun or (determined and i > start + 1)  # "the left", "the young"
    return i if headed else start


class _Phrase(NamedTuple):
    kind: str  # "place", "direction", "goal", "thing", or "" for empty phrases ("in the video")
    noun: int  # where its noun phrase begins
    end: int


def _prepositional_phrase(words: Sequence[Word], start: int, verb: str) -> _Phrase | None:
    """The prepositional phrase at `start`, None if no noun follows; `verb` is the nearest verb before it."""
    first = words[start].lower
    pair = PREPOSITION_PAIRS.get((first, word_at(words, start + 1).lower))
    noun = start + (1 if pair is None else 2)
    end = _noun_phrase(words, noun)
    leads = first in LEADING_PREPOSITIONS
    if end == noun:
        pronoun = word_at(words, noun)
        if leads and pronoun.lower in GOAL_NOUNS:  # "from left to right"
            return _Phrase("direction", noun, noun + 1)
        if pronoun.lower in MANNER_NOUNS:  # "around itself"
            return _Phrase("direction", noun, noun + 1)
        return _Phrase("thing", noun, noun) if pronoun.tag == "PRP" else None

    before, head = word_at(words, start - 1), words[end - 1].lower
    if first in ("in", "at") and head in EMPTY_PLACES:
        return _Phrase("", noun, end)
    if (first in MANNER_PREPOSITIONS and head in MANNER_NOUNS) or (first not in ("in", "on") and head in FRAME_NOUNS):
        return _Phrase("direction", noun, end)
    if leads and head in GOAL_NOUNS:
        of_end = _noun_phrase(words, end + 1) if word_at(words, end).lower == "of" else end
        if of_end == end or words[of_end - 1].lower in FRAME_NOUNS:
            return _Phrase("direction", noun, of_end)
        kind = "place"  # "to the left of a tree"
    elif first == "by" and before.tag == "VBN" and before.lower not in DIRECTIONS:  # "kicked by a boy"
        kind = "thing"
    elif (first == "at" and verb in AIMING_VERBS) or (first == "in" and (head in WORN_NOUNS or head in COLOURS)):
        kind = "thing"
    elif first in GOAL_PREPOSITIONS:
        kind = "goal"
    elif first in MOTION_PREPOSITIONS:
        kind = "goal" if verb in MOTION_VERBS else "thing"
    elif first == "over" and verb in LEAPING_VERBS and before.lower == verb:
        kind = "goal"
    else:
        kind = "place" if (first in PLACE_PREPOSITIONS if pair is None else pair) else "thing"

    while word_at(words, end).lower in ("of", "and", "or"):  # "in front of judges and a crowd"
        longer = _noun_phrase(words, end + 1)
        new_clause = words[end].lower != "of" and word_at(words, longer).tag in VERBS  # "on a chair and a man sings"
        if longer == end + 1 or new_clause:
            break
        end = longer
    return _Phrase(kind, noun, end)


# -- streams -------------------------------------------------------------------------------------------------------


def streams_from_tags(words: Sequence[Word], sentences: str = "words") -> dict[str, str]:
    """Texts of the streams entity, action and scene for a caption's tagged words; "" for a stream without words.

    Args:
        words: of the caption.
        sentences: of `SENTENCES`, how a stream's words become its text.
    """
    reader = _Reader(repair_tags(words))
    reader.read()
    return {"words": reader.streams, "phrases": reader.phrases, "masked": reader.masked}[sentences]()


class _Reader:
    """Reads a caption from left to right and assigns each phrase to a stream.

    Each rule looks at the words from i on and returns the end of what it consumed, or i if it does not apply.
    """

    def __init__(self, words: Sequence[Word]):
        self.words = words
        self.has_main_verb = any(map(is_main_verb, words))
        self.verb = ""  # the nearest main verb so far
        self.entities: list[Span] = []
        self.recordings: list[Span] = []  # "a video": an entity if there is no other
        self.actions: list[list[Span]] = []  # verbs, each with what goes with it
        self.scenes: list[Span] = []
        self.goals: list[Span] = []  # "into the crowd": a scene if there is no other
        self.objects: list[tuple[int, Span]] = []  # the action's number and a noun phrase right after it
        self.modifiers: set[int] = set()  # where a preposition joins two noun phrases: "a man in a red shirt"

    def read(self) -> None:
        """Apply the first rule that matches at each word, and skip words that match none."""
        rules = (
            self.read_pair_of_directions,
            self.read_infinitive,
            self.read_prepositional_phrase,
            self.read_noun_phrase,
            self.read_direction,
            self.read_verb,
            self.read_adverb,
            self.read_adjective,
        )
        i = 0
        while i < len(self.words):
            i = next((end for rule in rules if (end := rule(i)) > i), i + 1)

    def streams(self) -> dict[str, str]:
        """The texts, after reading."""
        scenes = self.scenes or self.goals
        entities = self.entities or self.recordings or self.nouns_of(scenes)
        actions = [" ".join(map(self.text, group)) for group in self.actions]
        if not actions:  # "a spinning star"
            actions = [word.text for start, end in entities for word in self.words[start:end] if word.tag == "VBG"]
        return {
            "entity": ", ".join(map(self.text, map(self.without_determiner, entities))),
            "action": ", ".join(actions),
            "scene": ", ".join(map(self.text, scenes)),
        }

    def phrases(self) -> dict[str, str]:
        """The same with what belongs together: a verb with its object, a noun with its modifiers."""
        entities = []
        for start, end in self.entities:
            if entities and entities[-1][1] in self.modifiers and entities[-1][1] < start:
                start = entities.pop()[0]
            entities.append((start, end))
        actions = [[*group, *(span for of, span in self.objects if of == n)] for n, group in enumerate(self.actions)]
        texts = self.streams()
        if self.entities:
            texts["entity"] = ", ".join(map(self.text, map(self.without_determiner, entities)))
        if self.actions:
            texts["action"] = ", ".join(" ".join(map(self.text, sorted(group))) for group in actions)
        return texts

    def masked(self) -> dict[str, str]:
        """The caption in its order, for each stream without the words of the others.

        A word that belongs to none ("is", "and") goes with the one after it: "is playing", "and a dog".
        """
        spans = {
            "entity": self.entities or self.recordings,
            "action": [span for group in self.actions for span in group],
            "scene": self.scenes or self.goals,
        }
        numbers = {name: {n for start, end in own for n in range(start, end)} for name, own in spans.items()}
        kept: dict[str, list[str]] = {name: [] for name in numbers}
        open_words: list[str] = []
        for n, word in enumerate(self.words):
            owners = [name for name, own in numbers.items() if n in own]
            open_words += [word.text] if any(map(str.isalnum, word.text)) else []
            for name in owners:
                kept[name] += open_words
            open_words = [] if owners else open_words
        return {name: " ".join(texts) for name, texts in kept.items()}

    def text(self, span: Span) -> str:
        start, end = span
        return " ".join(word.text for word in self.words[start:end])

    def without_determiner(self, span: Span) -> Span:
        start, end = span
        while self.words[start].tag in DETERMINERS and start < end - 1:
            start += 1
        return start, end

    def nouns_of(self, scenes: Sequence[Span]) -> list[Span]:
        nouns = []
        for start, end in scenes:
            while start < end:
                noun_end = min(_noun_phrase(self.words, start), end)
                if noun_end > start:
                    nouns.append((start, noun_end))
                start = max(noun_end, start + 1)
        return nouns

    def add(self, spans: list[Span], start: int, end: int, joining: Sequence[str] = ()) -> int:
        """Append a span, or extend the last one if it is adjacent or only a word of `joining` lies between."""
        last = spans[-1][1] if spans else None
        if last is not None and (last == start or (last == start - 1 and self.words[last].lower in joining)):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
        return end

    def add_action(self, start: int, end: int, begins: bool = False) -> int:
        if begins or not self.actions:
            self.actions.append([])
        self.actions[-1].append((start, end))
        return end

    def is_action(self, i: int) -> bool:
        """Does word i end the latest action?"""
        return bool(self.actions) and self.actions[-1][-1][1] == i + 1

    def read_pair_of_directions(self, i: int) -> int:  # "side to side", "up and down"
        words = self.words
        joined = word_at(words, i + 1).lower in ("to", "and") and word_at(words, i - 1).tag not in DETERMINERS
        if joined and words[i].lower in GOAL_NOUNS and word_at(words, i + 2).lower in GOAL_NOUNS:
            return self.add_action(i, i + 3)
        return i

    def read_infinitive(self, i: int) -> int:
        if self.words[i].tag != "TO" or word_at(self.words, i + 1).tag not in ("VB", "RB"):
            return i
        if self.is_action(i - 1):  # "tries to catch"
            self.add_action(i, i + 1)
        return i + 1

    def read_prepositional_phrase(self, i: int) -> int:
        words, word = self.words, self.words[i]
        paired = (word.lower, word_at(words, i + 1).lower) in PREPOSITION_PAIRS
        if not paired and not (word.lower in PREPOSITIONS and word.tag in ("IN", "TO")):
            # "drives down the road" has a path, "picks up the ball" has not.
            moves = (
                self.verb in MOTION_VERBS or word_at(words, i - 1).lower in DIRECTIONS or word.lower not in PARTICLES
            )
            path = word.tag in ADVERBS and word.lower in PLACE_PREPOSITIONS and moves
            if not path or _noun_phrase(words, i + 1) == i + 1:
                return i
        phrase = _prepositional_phrase(words, i, self.verb)
        if phrase is None:
            return i
        if phrase.kind == "direction":
            return self.add_action(i, phrase.end)
        if phrase.kind == "place":
            if word.lower in DIRECTION_PREPOSITIONS and self.verb:
                self.add_action(i, i + 1)
            return self.add(self.scenes, i, phrase.end)
        if phrase.kind == "goal":
            self.goals.append((i, phrase.end))
        if not phrase.kind:
            return phrase.end
        if phrase.kind == "thing" and word.lower not in CONJUNCTIONS and self.entities and self.entities[-1][1] == i:
            self.modifiers.add(i)
        # The preposition goes with its verb ("jumps over", "talks to"), and its noun phrase is read next.
        if (self.is_action(i - 1) and word.lower not in CONJUNCTIONS) or (phrase.kind == "goal" and self.verb):
            self.add_action(i, phrase.noun)
        return phrase.noun

    def read_noun_phrase(self, i: int) -> int:
        end = _noun_phrase(self.words, i)
        if end > i:
            if self.is_action(i - 1):  # "playing the violin", "talks to his teacher"
                self.objects.append((len(self.actions) - 1, (i, end)))
            self.add(self.entities, i, end, joining=("of",))
            if self.words[end - 1].lower in RECORDINGS:
                self.recordings.append(self.entities.pop())
        return end

    def read_direction(self, i: int) -> int:
        word = self.words[i]
        if word.lower in DIRECTIONS and (self.verb or word.tag not in VERBS):  # but "a man left the room"
            return self.add_action(i, i + 1)
        return i

    def read_verb(self, i: int) -> int:
        words, word = self.words, self.words[i]
        if word.tag not in VERBS:
            return i
        following = next((later for later in words[i + 1 :] if later.tag not in ADVERBS), NO_WORD)
        helps = word.lower in LIGHT_VERBS or (word.lower in HELPING_VERBS and following.tag in ("VB", "VBN"))
        if not helps and not (word.lower in SEEING_VERBS and self.has_main_verb):
            # An adverb or "to" right before the verb has begun the action.
            begun = self.is_action(i - 1) and words[i - 1].tag in ADVERBS | {"TO"} and self.actions[-1][0][0] >= i - 2
            self.add_action(i, i + 1, begins=not begun)
            self.verb = word.lower
        return i + 1

    def read_adverb(self, i: int) -> int:
        word = self.words[i]
        if word.lower in PLACE_ADVERBS:
            return self.add(self.scenes, i, i + 1)
        particle = word.lower in PLACE_PREPOSITIONS and self.verb  # without a noun: "falls over"
        if (word.tag in ADVERBS and word.lower not in EMPTY_ADVERBS) or particle:
            return self.add_action(i, i + 1, begins=is_main_verb(word_at(self.words, i + 1)))
        return i

    def read_adjective(self, i: int) -> int:
        before = word_at(self.words, i - 1)
        if self.words[i].tag not in ADJECTIVES or before.tag not in VERBS:
            return i
        if is_main_verb(before):
            return self.add_action(i, i + 1)  # "grows bigger"
        return self.add(self.entities, i, i + 1)  # "is red"
