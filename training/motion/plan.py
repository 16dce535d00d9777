# SPDX-License-Identifier: Apache-2.0
"""What each motion clip shows: the presets, and the split of all combinations into training, validation and test.

Notable features:
- validation and test show combinations that training never shows, and none of them twice;
- a hash of the seed and the combination decides which split it belongs to, so no split depends on the others, and a
  smaller set is the beginning of a larger one;
- a set with the split seed of another one may be a fresh test for a model that was trained on that one.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import UserError

from .paths import ACTIONS, RELATIONS, REVERSALS
from .scenes import COLORS, SCENES, SHAPES


SPLITS = ("train", "validation", "test")
# Shares of all combinations that the hash reserves for the held-out splits; training draws from the rest.
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.10
# Last key of a clip's random generators: one each for what it shows, its format, its pixels and its captions.
COMBINATION, FORMAT, PIXELS, CAPTIONS = range(4)


@dataclass(frozen=True)
class Combination:
    """What a clip shows. The fields of a second entity are empty strings where there is none."""

    color: str
    shape: str
    action: str  # empty where `relation` says what happens
    scene: str
    second_color: str = ""
    second_shape: str = ""
    second_action: str = ""
    relation: str = ""  # a relation, "while" (two entities, each with its own action), or empty (one entity)


@dataclass(frozen=True)
class Preset:
    """The kind of clips to make, and their default numbers."""

    counts: tuple[int, int, int]  # train, validation, test
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    actions: tuple[str, ...]
    scenes: tuple[str, ...]
    two_entities: bool
    long_tailed: bool  # the n-th value of each list is 1/n as frequent as the first
    short_side: tuple[int, int]  # pixels
    long_side: int  # pixels, at most
    seconds: tuple[float, float]
    radius: tuple[float, float]  # of an entity, in short sides


PRESETS = {
    # Small files, for a small model that sees 64 x 64 pixels: 3,700 of them take about a minute on two cores.
    "demo": Preset(
        counts=(3000, 200, 500),
        colors=tuple(COLORS),
        shapes=tuple(SHAPES)[:8],
        actions=ACTIONS[:12],
        scenes=tuple(SCENES),
        two_entities=False,
        long_tailed=False,
        short_side=(80, 112),
        long_side=160,
        seconds=(1.0, 3.0),
        radius=(0.16, 0.24),
    ),
    # The demo's clips with frequencies like those of real captions: a few values are very common, the others rare, so
    # some clips become hubs, near to very many captions. For measuring hub corrections.
    "long_tailed": Preset(
        counts=(3000, 300, 800),
        colors=tuple(COLORS),
        shapes=tuple(SHAPES)[:8],
        actions=ACTIONS[:12],
        scenes=tuple(SCENES),
        two_entities=False,
        long_tailed=True,
        short_side=(80, 112),
        long_side=160,
        seconds=(1.0, 3.0),
        radius=(0.16, 0.24),
    ),
    "full": Preset(
        counts=(20000, 1000, 1000),
        colors=tuple(COLORS),
        shapes=tuple(SHAPES),
        actions=ACTIONS,
        scenes=tuple(SCENES),
        two_entities=True,
        long_tailed=True,
        short_side=(128, 192),
        long_side=256,
        seconds=(1.5, 4.5),
        radius=(0.10, 0.14),
    ),
}
WHILE_SHARE = 0.3  # of the clips with two entities: each does its own action


@functools.cache
def _cumulative_weights(count: int) -> list[float]:
    return list(itertools.accumulate(1 / rank for rank in range(1, count + 1)))


def draw_combination(preset: Preset, rng: np.random.Generator) -> Combination:
    """What one clip shows, drawn with the frequencies of the preset."""

    def choose(values: Sequence[str]) -> str:
        if not preset.long_tailed:
            return values[int(rng.integers(len(values)))]
        weights = _cumulative_weights(len(values))
        return values[bisect.bisect_right(weights, rng.random() * weights[-1])]

    first, scene = (choose(preset.colors), choose(preset.shapes)), choose(preset.scenes)
    if not preset.two_entities:
        return Combination(*first, action=choose(preset.actions), scene=scene)
    second = first
    while second == first:
        second = (choose(preset.colors), choose(preset.shapes))
    if rng.random() >= WHILE_SHARE:
        return Combination(*first, "", scene, *second, "", choose(RELATIONS))
    # "A while B" is "B while A": sorted, so that the two cannot end up in different splits.
    first, second = sorted([(*first, choose(preset.actions)), (*second, choose(preset.actions))])
    return Combination(*first, scene, *second, "while")


def split_of(combination: Combination, seed: int) -> str:
    """The one split that may show this combination."""
    key = "|".join((str(seed), *dataclasses.astuple(combination)))
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
    return "test" if share < TEST_SHARE else "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def plan_split(
    preset: Preset, split: str, count: int, seed: int, split_seed: int | None = None, twins: bool = False
) -> list[Combination]:
    """What the clips of one split show; in validation and test no combination appears twice.

    Args:
        preset: of the set. split, count: which split, and how many clips.
        seed: of the draws.
        split_seed: the seed of the set whose training clips never show what is held out here (default: `seed`).
        twins: every second clip is the time reversal of the one before it. Both are held out from training.

    Raises:
        UserError: there are not enough combinations.
    """
    split_seed = seed if split_seed is None else split_seed
    plan, seen = [], set()
    for index in range(0, count, 2 if twins else 1):
        rng = np.random.default_rng([seed, SPLITS.index(split), index, COMBINATION])
        for _ in range(5000):  # some tens are enough unless the combinations run out
            combination = draw_combination(preset, rng)
            if twins and combination.action not in REVERSALS:
                continue
            shown = [combination, time_reversal(combination)] if twins else [combination]
            homes = {split_of(each, split_seed) for each in shown}
            fits = "train" not in homes if twins and split != "train" else homes == {split}
            if fits and not seen.intersection(shown):
                break
        else:
            raise UserError(
                f"--num_{split} {count}: this preset has only about {index} different combinations for {split}"
            )
        plan += shown
        if split != "train":
            seen.update(shown)
    return plan


def time_reversal(combination: Combination) -> Combination:
    """What a clip of one entity shows when it is played backwards."""
    return dataclasses.replace(combination, action=REVERSALS[combination.action])
