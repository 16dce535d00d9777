# SPDX-License-Identifier: Apache-2.0
"""Captions of one-entity clips by other hands: the words of captions.py, but none of its sentences.

A test for rules and models that may have learned the templates of captions.py rather than English. The sentences here
are what people write under real videos: relative clauses, passives, lists of keywords, "video of ...", what is seen
before who is seen, missing articles, lower case, typos. The verbs of the passives are words of their own.
"""

import re

import numpy as np

from .captions import ACTION_WORDS, COLOR_WORDS, SCENE_PHRASES, SHAPE_WORDS
from .plan import Combination


# Action -> participle, for "is being ..." and "gets ...".
PASSIVE_ACTIONS = {
    "move left": "pulled to the left",
    "move right": "pulled to the right",
    "rise": "lifted up",
    "fall": "dropped down",
    "grow": "made bigger",
    "shrink": "made smaller",
    "spin clockwise": "turned clockwise",
    "spin counterclockwise": "turned counterclockwise",
    "bounce": "thrown up and down",
    "loop around": "sent round and round",
    "blink": "switched on and off",
    "shake": "shaken",
    "sway": "swung from side to side",
    "stay still": "left alone",
}
# {a}: "a red star", {n}: "red star", {is_doing}: "moving left", {does}: "moves left", {done}: "pulled to the left",
# {where}: "on a beach", {color}, {shape}.
SENTENCES = (
    "{a} that is {is_doing} can be seen {where}",
    "this shows {a}, which {does}, {where}",
    "what {does} {where} is {a}",
    "the thing {where} that {does} is {a}",
    "{a} is being {done} {where}",
    "{where} {a} gets {done}",
    "{a}, {done}, {where}",
    "video of {a} {is_doing} {where}",
    "footage in which {a} {does} {where}",
    "in this clip we see how {a} {does} {where}",
    "{is_doing} {where}: {a}",
    "{where} you can watch {a} as it {does}",
    "{shape}, {color}, {is_doing}, {where}",
    "{where} - {n} - {is_doing}",
    "somebody filmed {a} {where} while it was {is_doing}",
    "it is {color}, it is {a_shape} and it {does} {where}",
)
TYPOS = 0.25  # of the captions have one


def write_other_captions(combination: Combination, rng: np.random.Generator, *_) -> list[str]:
    """Five captions of one clip in five different sentences, each of which names everything.

    Args:
        combination: what the clip shows, one entity.
        rng: of the clip.
    """
    return [_caption(combination, SENTENCES[number], rng) for number in rng.permutation(len(SENTENCES))[:5]]


def _caption(combination: Combination, sentence: str, rng: np.random.Generator) -> str:
    def any_of(choices):
        return choices[int(rng.integers(len(choices)))]

    color, shape = any_of(COLOR_WORDS[combination.color]), any_of(SHAPE_WORDS[combination.shape])
    present, progressive = any_of(ACTION_WORDS[combination.action])
    noun = f"{color} {shape}"
    text = sentence.format(
        a=_with_article(noun) if rng.random() < 0.8 else noun,
        a_shape=_with_article(shape),
        n=noun,
        color=color,
        shape=shape,
        does=present,
        is_doing=progressive,
        done=PASSIVE_ACTIONS[combination.action],
        where=any_of(SCENE_PHRASES[combination.scene]),
    )
    if rng.random() < TYPOS:
        text = _misspell(text, rng)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + any_of(("", "", ".", "!", " ..."))


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _misspell(text: str, rng: np.random.Generator) -> str:
    """One word of four letters or more with two letters exchanged, one missing, or one twice."""
    long = list(re.finditer(r"[A-Za-z]{4,}", text))
    chosen = long[int(rng.integers(len(long)))]
    word = chosen.group()
    place = 1 + int(rng.integers(len(word) - 2))  # not the first letter, and one is left after it
    kind = int(rng.integers(3))
    if kind == 0:
        word = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    elif kind == 1:
        word = word[:place] + word[place + 1 :]
    else:
        word = word[: place + 1] + word[place:]
    return text[: chosen.start()] + word + text[chosen.end() :]
