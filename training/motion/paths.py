# SPDX-License-Identifier: Apache-2.0
"""How the shapes of the motion clips move: the actions of one shape and the relations of two, as coordinates.

Notable features:
- lengths are in units of the frame's short side and positions are relative to the frame's centre, so everything that
  matters happens inside the central square, which is what a centre crop keeps;
- actions that are each other's time reversal (left and right, rise and fall, grow and shrink, the two spins; for two
  shapes, approach and leave) draw their frames from the same distribution: only the order of the frames differs.

Letters: F frames of the clip.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Path:
    """A shape's path through a clip; every field has shape (F,). Lengths in short sides, from the frame's centre."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray  # radians, clockwise
    visible: np.ndarray  # bool


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def action_path(
    action: str,
    frames: int,
    radius: float,
    rng: np.random.Generator,
    center: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> Path:
    """The path of one shape that does one of `ACTIONS` around `center`; a `scale` below 1 makes it move less."""
    t = np.linspace(0.0, 1.0, frames)
    zero = np.zeros(frames)
    x, y = zero + rng.uniform(-0.1, 0.1), zero + rng.uniform(-0.1, 0.1)
    size, visible = zero + radius, zero == 0
    angle = zero + rng.uniform(-0.2, 0.2)  # nothing is perfectly upright
    travel = rng.uniform(0.28, 0.38) * (2 * t - 1)  # across the central square, symmetric about its middle
    if action == "move right":
        x = travel
    elif action == "move left":
        x = -travel
    elif action == "fall":
        y = travel
    elif action == "rise":
        y = -travel
    elif action in ("grow", "shrink"):
        # from about half to about one and a half times the radius, evenly on a logarithmic scale as the eye sees it
        size = radius * rng.uniform(1.5, 1.7) ** (2 * t - 1)
        size = size if action == "grow" else size[::-1]
    elif action in ("spin clockwise", "spin counterclockwise"):
        # Less than one turn per clip, so that between two of eight sampled frames the direction is visible. Almost
        # upright in the middle of the clip, so that some hundred clips are enough to learn it.
        turns = rng.uniform(0.6, 0.95) * (1 if action == "spin clockwise" else -1)
        angle = rng.uniform(-0.6, 0.6) + 2 * math.pi * turns * (t - 0.5)
    elif action == "bounce":
        y = 0.2 - rng.uniform(0.32, 0.42) * np.abs(np.sin(math.pi * rng.uniform(2.0, 3.0) * t))
    elif action == "blink":
        visible = (rng.uniform(2.0, 3.0) * t + rng.random()) % 1.0 < 0.5
    elif action == "shake":
        x, y = x + rng.uniform(-0.07, 0.07, frames), y + rng.uniform(-0.07, 0.07, frames)
        angle = angle + rng.uniform(-0.25, 0.25, frames)
    elif action == "loop around":
        turn = 2 * math.pi * (rng.random() + _sign(rng) * rng.uniform(1.0, 1.5) * t)
        reach = rng.uniform(0.22, 0.28)
        x, y = reach * np.cos(turn), reach * np.sin(turn)
    elif action == "sway":
        x = rng.uniform(0.2, 0.28) * np.sin(2 * math.pi * (rng.uniform(1.5, 2.2) * t + rng.random()))
    elif action != "stay still":
        raise ValueError(f"unknown action {action!r}")
    return Path(center[0] + scale * x, center[1] + scale * y, size, angle, visible)


ACTIONS = (
    *("move left", "move right", "rise", "fall", "grow", "shrink", "spin clockwise", "spin counterclockwise"),
    *("bounce", "loop around", "blink", "shake", "sway", "stay still"),
)
# Each action that is another one when it is played backwards; the paths of both have one distribution.
_PAIRS = (
    ("move left", "move right"),
    ("rise", "fall"),
    ("grow", "shrink"),
    ("spin clockwise", "spin counterclockwise"),
)
REVERSALS = dict(_PAIRS) | {second: first for first, second in _PAIRS}


def relation_paths(
    relation: str, frames: int, radius: float, other: float, rng: np.random.Generator
) -> tuple[Path, Path]:
    """The paths of two shapes, of radius `radius` and `other`: the first does one of `RELATIONS` to the second."""
    t = np.linspace(0.0, 1.0, frames)
    still = np.zeros(frames)
    touch = radius + other
    # Coordinates of the two shapes along the direction of travel and, `_across`, to its left.
    if relation == "chase":
        gap = touch + rng.uniform(0.03, 0.08)
        run = (0.84 - gap) * t
        wiggle = rng.uniform(0.03, 0.07)
        first, second = -0.42 + run, -0.42 + gap + run
        first_across, second_across = wiggle * np.sin(9 * first), wiggle * np.sin(9 * second)
    elif relation == "pass":
        first, second = 0.84 * t - 0.42, 0.2 * t - 0.1
        first_across = still + 0.55 * touch * _sign(rng)
        second_across = -first_across
    elif relation == "approach" or relation == "leave":
        goal = rng.uniform(0.24, 0.34)
        second = still + goal
        first = -0.42 + (goal - touch - 0.02 + 0.42) * (t if relation == "approach" else 1 - t)
        first_across, second_across = still, still
    elif relation == "push":
        meet, start, goal = 0.35, -0.42 + touch + rng.uniform(0.1, 0.16), rng.uniform(0.28, 0.36)
        second = start + (goal - start) * np.clip((t - meet) / (1 - meet), 0, 1)
        first = np.where(t < meet, -0.42 + (start - 0.95 * touch + 0.42) * t / meet, second - 0.95 * touch)
        first_across, second_across = still, still
    elif relation == "bump into":
        goal = rng.uniform(0.1, 0.2)
        first = goal - 0.95 * touch - (0.42 + goal - 0.95 * touch) * np.abs(2 * t - 1)
        second = goal + 0.05 * np.clip((t - 0.5) * 8, 0, 1)
        first_across, second_across = still, still
    elif relation == "jump over":
        first, second = 0.76 * t - 0.38, still
        first_across, second_across = -0.2 + (touch + 0.12) * 4 * t * (1 - t), still - 0.2
    elif relation == "circle":
        turn = 2 * math.pi * (rng.random() + rng.uniform(1.0, 1.4) * t)
        reach = max(touch + 0.04, 0.3)
        first, first_across, second, second_across = reach * np.cos(turn), reach * np.sin(turn), still, still
    else:
        raise ValueError(f"unknown relation {relation!r}")

    flip = _sign(rng)
    horizontal = relation == "jump over" or rng.random() < 0.6  # then "across" is up
    paths = []
    for along, across, size in ((first, first_across, radius), (second, second_across, other)):
        x, y = (flip * along, -across) if horizontal else (across, flip * along)
        paths.append(Path(x, y, still + size, still + rng.uniform(-0.2, 0.2), still == 0))
    return tuple(paths)


RELATIONS = ("chase", "approach", "circle", "pass", "push", "leave", "bump into", "jump over")
