# SPDX-License-Identifier: Apache-2.0
"""Captions to measure with, in the manner of people who describe short clips: a dozen words, many without a place.

Put together by chance, the same for the same seed.
"""

import random


WHO = (
    "a man|a woman|two kids|a young girl in a red dress|the chef|a group of people|a band|an old man with a hat|"
    "a small brown dog|three boys|someone|a lady|the player in the blue shirt|a cartoon character|a black cat|"
    "people|a football team|a news anchor|two friends|a guy wearing glasses"
).split("|")
DOES = (
    "is playing the guitar|cooks pasta|is talking about a new phone|runs quickly|dances|is driving a fast car|"
    "jumps over a fence|sings a song|is folding a piece of paper|cuts some vegetables with a knife|rides a horse|"
    "is explaining how to fix an engine|throws the ball back|walks slowly to the left|is swimming|plays a video game|"
    "shows a recipe|opens the door|is|and a young man are discussing the news"
).split("|")
WHERE = (
    "on the stage|in a kitchen|at the beach|in front of a large crowd|on a busy street at night|in the park|"
    "inside a car|near the river|in a small room|on a football field|behind the wooden table|under a tree"
).split("|")


def make_captions(count: int, seed: int = 0) -> list[str]:
    """`count` captions, the same for the same seed."""
    generator = random.Random(seed)
    captions = []
    for _ in range(count):
        parts = [generator.choice(WHO), generator.choice(DOES)]
        if generator.random() < 0.55:
            parts.insert(generator.choice((0, 2, 2, 2)), generator.choice(WHERE))
        if generator.random() < 0.15:
            parts += ["while", generator.choice(WHO), generator.choice(DOES)]
        captions.append(" ".join(parts))
    return captions


def paragraph(count: int, seed: int = 0) -> list[str]:
    """`count` descriptions of several sentences, as DiDeMo's and ActivityNet's are after joining."""
    generator = random.Random(seed)
    sentences = make_captions(6 * count, seed)
    return [". ".join(sentences[6 * n : 6 * n + generator.randint(4, 6)]) for n in range(count)]
