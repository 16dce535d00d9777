# SPDX-License-Identifier: Apache-2.0
"""Captions of a motion clip, as people might write them: five from templates with synonyms.

Notable features:
- the first caption names everything, mostly in common words; evaluation uses it;
- the others paraphrase it and leave something out: the scene, the action, the colour or the shape (with two entities:
  the scene, what they do, their colours, or what the second one is). Some add a size or speed that stands out;
- no phrase belongs to two values, so a first caption belongs to one combination only;
- most captions use the progressive ("is moving left"), like most captions of real data sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .plan import Combination


# Value -> its synonyms, the most common word first.
COLOR_WORDS = {
    "red": ("red", "crimson"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "white": ("white",),
    "purple": ("purple", "violet"),
    "orange": ("orange",),
    "pink": ("pink", "rosy"),
    "black": ("black",),
    "cyan": ("cyan", "turquoise"),
    "brown": ("brown", "chestnut"),
    "gray": ("gray", "grey"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "block"),
    "star": ("star",),
    "triangle": ("triangle",),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "moon"),
    "hexagon": ("hexagon",),
    "arrow": ("arrow",),
    "diamond": ("diamond", "rhombus"),
    "oval": ("oval", "ellipse"),
}
SCENE_PHRASES = {
    "beach": ("on a beach", "on a sandy beach"),
    "night sky": ("in the night sky", "in the sky at night"),
    "brick wall": ("in front of a brick wall", "against a brick wall"),
    "meadow": ("in a meadow", "on the grass"),
    "snowy field": ("in a snowy field", "in the snow"),
    "wooden table": ("on a wooden table", "on wooden planks"),
    "ocean": ("on the ocean", "on the sea"),
    "checkered floor": ("on a checkered floor", "on a tiled floor"),
    "street": ("on a street", "on the road"),
    "forest": ("in a forest", "in the woods"),
    "cloudy sky": ("in a cloudy sky", "among the clouds"),
    "desert": ("in the desert", "among sand dunes"),
}
# Value -> pairs of (simple present, progressive).
ACTION_WORDS = {
    "move left": (("moves left", "moving left"), ("slides to the left", "sliding to the left")),
    "move right": (("moves right", "moving right"), ("slides to the right", "sliding to the right")),
    "rise": (("rises", "rising"), ("moves up", "moving up")),
    "fall": (("falls", "falling"), ("moves down", "moving down")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller")),
    "spin clockwise": (("spins clockwise", "spinning clockwise"), ("rotates clockwise", "rotating clockwise")),
    "spin counterclockwise": (
        ("spins counterclockwise", "spinning counterclockwise"),
        ("rotates counterclockwise", "rotating counterclockwise"),
    ),
    "bounce": (("bounces up and down", "bouncing up and down"), ("hops up and down", "hopping up and down")),
    "loop around": (("loops around", "looping around"), ("goes round and round", "going round and round")),
    "blink": (("blinks", "blinking"), ("flashes", "flashing")),
    "shake": (("shakes", "shaking"), ("trembles", "trembling")),
    "sway": (
        ("sways from side to side", "swaying from side to side"),
        ("swings back and forth", "swinging back and forth"),
    ),
    "stay still": (("stays still", "staying still"), ("rests", "resting")),
}
RELATION_WORDS = {
    "chase": (("chases", "chasing"), ("runs after", "running after")),
    "approach": (("approaches", "approaching"), ("moves toward", "moving toward")),
    "circle": (("circles", "circling"), ("orbits", "orbiting")),
    "pass": (("passes", "passing"), ("overtakes", "overtaking")),
    "push": (("pushes", "pushing"), ("shoves", "shoving")),
    "leave": (("moves away from", "moving away from"), ("leaves", "leaving")),
    "bump into": (("bumps into", "bumping into"), ("runs into", "running into")),
    "jump over": (("jumps over", "jumping over"), ("leaps over", "leaping over")),
}
# For "a blue ring is chased by a red star"; the other relations have no natural passive.
PASSIVES = {"chase": "chased", "approach": "approached", "circle": "circled", "pass": "passed", "push": "pushed"}

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}


@dataclass
class _CaptionWriter:
    """Writes captions of one clip."""

    combination: Combination
    rng: np.random.Generator
    common: float  # probability of the common word without considering its synonyms
    size: str = ""  # "small" or "large" if it may be mentioned
    speed: str = ""  # "slowly" or "quickly" if it may be mentioned

    def pick(self, words: Sequence):
        """A synonym, or with probability `common` the first, common word."""
        return words[0] if self.rng.random() < self.common else self.any(words)

    def any(self, choices: Sequence):
        return choices[int(self.rng.integers(len(choices)))]

    def entity(self, color: str, shape: str, size: str = "") -> str:
        """For example: a small red star; an orange object (no shape); a star (no colour)."""
        words = [self.pick(SIZE_WORDS[size])] if size and self.rng.random() < 0.5 else []
        words += [self.pick(COLOR_WORDS[color])] if color else []
        words += [self.pick(SHAPE_WORDS[shape] if shape else ("object", "shape"))]
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)

    def verb(self, forms: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """(simple present, progressive), sometimes with an adverb of speed."""
        present, progressive = self.pick(forms)
        if self.speed and self.rng.random() < 0.5:
            return f"{self.speed} {present}", f"{self.speed} {progressive}"
        return present, progressive

    def clause(self, leave_out: str) -> tuple[str, bool]:
        """Everything but the scene, and whether it has a finite verb: then the scene may come first."""
        c = self.combination
        with_color, with_shape = leave_out != "color", leave_out != "shape"
        first = self.entity(c.color if with_color else "", c.shape if with_shape else "", self.size)
        if not c.relation:
            if leave_out == "action":
                return self.any([(first, False), (f"there is {first}", True), (f"a video of {first}", False)])
            return self.any(_statements(first, *self.verb(ACTION_WORDS[c.action])))

        second = self.entity(c.second_color if with_color else "", c.second_shape)
        if leave_out == "second":
            second = self.any(("something", "another object"))
        elif second == first:
            second = "another " + second.split(" ", 1)[1]
        if leave_out == "action":
            return self.any([(f"{first} and {second}", False), (f"there are {first} and {second}", True)])
        if c.relation == "while":
            a, b = (first, *self.verb(ACTION_WORDS[c.action])), (second, *self.verb(ACTION_WORDS[c.second_action]))
            if self.rng.random() < 0.5 and not second.startswith("another"):
                a, b = b, a
            return self.any(_joint_statements(a, b, self.any(("while", "and"))))
        present, progressive = self.verb(RELATION_WORDS[c.relation])
        statements = _statements(first, f"{present} {second}", f"{progressive} {second}")
        if c.relation in PASSIVES and not second.startswith("another"):
            passive = f"{PASSIVES[c.relation]} by {first}"
            statements += [(f"{second} is {passive}", True), (f"{second} is being {passive}", True)]
        return self.any(statements)

    def caption(self, leave_out: str = "") -> str:
        clause, finite = self.clause(leave_out)
        if leave_out != "scene":
            scene = self.pick(SCENE_PHRASES[self.combination.scene])
            clause = f"{scene}, {clause}" if finite and self.rng.random() < 0.35 else f"{clause} {scene}"
        if self.rng.random() < 0.5:  # not everyone uses capitals and full stops
            return clause[0].upper() + clause[1:] + "."
        return clause


def _statements(who: str, present: str, progressive: str) -> list[tuple[str, bool]]:
    """Ways to say what one entity does, the usual one more often, and whether each has a finite verb."""
    return [(f"{who} is {progressive}", True)] * 3 + [
        (f"{who} {present}", True),
        (f"{who} {progressive}", False),
        (f"there is {who} {progressive}", True),
    ]


def _joint_statements(a: tuple[str, str, str], b: tuple[str, str, str], joint: str) -> list[tuple[str, bool]]:
    """The same for two entities, each given as (who, simple present, progressive)."""
    return [(f"{a[0]} is {a[2]} {joint} {b[0]} is {b[2]}", True)] * 2 + [
        (f"{a[0]} {a[1]} {joint} {b[0]} {b[1]}", True),
        (f"{a[0]} {a[2]} and {b[0]} {b[2]}", False),
    ]


def write_captions(combination: Combination, rng: np.random.Generator, size: str = "", speed: str = "") -> list[str]:
    """Five different captions of one clip, the first of which names everything.

    Args:
        combination: what the clip shows.
        size: "small", "large" or "" (not worth a word), of the first entity.
        speed: "slowly", "quickly" or "".
    """
    captions = [_CaptionWriter(combination, rng, common=0.7).caption()]
    writer = _CaptionWriter(combination, rng, common=0.3, size=size, speed=speed)
    omissions = ["", "scene", "action", "color", "second" if combination.relation else "shape"]
    for index in rng.permutation(len(omissions))[:4]:
        caption = captions[0]
        while caption in captions:
            caption = writer.caption(omissions[index])
        captions.append(caption)
    return captions
