# SPDX-License-Identifier: Apache-2.0
"""How the motion clips look: coloured shapes on textured scenes.

Notable features:
- everything is drawn with numpy and a `numpy.random.Generator`: the same generator state gives the same pixels;
- a shape is a signed distance, computed once per process on a fine grid and looked up for every frame. So its edges
  are antialiased at any size and angle, and a frame takes well under a millisecond;
- every shape has a dark or light stripe near its top, or a spinning disc would look still.

Letters: F frames of the clip, H and W its height and width in pixels.
"""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from .paths import Path


# Name -> RGB. The first eight are easy to tell apart in 64 pixels; the last four are the long-tailed presets' rarest.
COLORS = {
    "red": (214, 30, 38),
    "blue": (38, 76, 226),
    "yellow": (248, 220, 36),
    "green": (30, 172, 62),
    "white": (246, 246, 246),
    "purple": (128, 40, 170),
    "orange": (250, 132, 20),
    "pink": (255, 138, 190),
    "black": (26, 26, 28),
    "cyan": (50, 214, 226),
    "brown": (112, 62, 28),
    "gray": (136, 138, 142),
}


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: signed distances (negative inside) in a square where the shape's radius is 1, x to the right, y down


def _polygon(points: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The signed distance to a simple polygon: the nearest edge gives the size, the crossing number the sign."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
        return np.where(inside, -nearest, nearest)

    return distance


def _around(count: int, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """`count` points around the centre, the first at the top, with the distances `radii` in turn."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(turns)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.1,
        )
        for a in turns
    ]


_ARM = 0.34  # half the width of the cross's arms
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.92,
    "square": _polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "star": _polygon(_around(10, (1.08, 0.46))),
    "triangle": _polygon([(x, y + 0.12) for x, y in _around(3, (1.12,))]),
    "heart": _polygon(_heart()),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.25,
    "cross": _polygon(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1.0, 0.74 - np.hypot(x - 0.5, y)),
    "hexagon": _polygon(_around(6)),
    "arrow": _polygon([(0, -1.05), (0.75, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.75, -0.1)]),
    "diamond": _polygon([(0, -1.1), (0.62, 0), (0, 1.1), (-0.62, 0)]),
    "oval": lambda x, y: (np.hypot(x / 1.08, y / 0.62) - 1.0) * 0.7,
}

_EXTENT = 1.35  # the grid covers [-1.35, 1.35]: the shape, its outline and a margin
_CELLS = 270  # 100 per radius


@functools.cache
def _distance_grids(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances to the shape and to its stripe, (_CELLS, _CELLS) each, in units of the shape's radius."""
    ticks = (np.arange(_CELLS) + 0.5) * (2 * _EXTENT / _CELLS) - _EXTENT
    x, y = np.meshgrid(ticks, ticks)
    body = SHAPES[shape](x, y)
    stripe = np.maximum(np.maximum(np.abs(x) - 0.15, y + 0.12), body + 0.06)
    return body.astype(np.float32), stripe.astype(np.float32)


def paint(
    picture: np.ndarray,
    shape: str,
    color: tuple[float, float, float],
    x: float,
    y: float,
    radius: float,
    angle: float = 0.0,
    *,
    light_outline: bool = False,
) -> None:
    """Paint one shape into `picture` (H, W, 3), uint8, in place.

    `x`, `y` and `radius` are in pixels; `angle` is in radians, clockwise as seen on the screen.
    """
    height, width, _ = picture.shape
    x, y, radius = float(x), float(y), float(radius)  # numpy scalars would make the arrays float64
    cos, sin = math.cos(angle), math.sin(angle)
    reach = 1.15 * radius + 2.0  # includes every shape with its outline
    left, right = max(0, math.floor(x - reach)), min(width, math.ceil(x + reach))
    top, bottom = max(0, math.floor(y - reach)), min(height, math.ceil(y + reach))
    if left >= right or top >= bottom:
        return
    scale = _CELLS / (2 * _EXTENT)
    u = (np.arange(left, right, dtype=np.float32) + (0.5 - x)) * (scale / radius)
    v = ((np.arange(top, bottom, dtype=np.float32) + (0.5 - y)) * (scale / radius))[:, None]
    column = np.clip((cos * u + _CELLS / 2) + sin * v, 0, _CELLS - 1).astype(np.intp)
    row = np.clip((cos * v + _CELLS / 2) - sin * u, 0, _CELLS - 1).astype(np.intp)
    cell = row * _CELLS + column
    body_grid, stripe_grid = _distance_grids(shape)
    body_distance, stripe_distance = body_grid.take(cell) * radius, stripe_grid.take(cell) * radius  # in pixels
    outlined = np.clip(max(1.0, 0.07 * radius) + 0.5 - body_distance, 0.0, 1.0)[..., None]
    body = np.clip(0.5 - body_distance, 0.0, 1.0)[..., None]
    stripe = np.clip(0.5 - stripe_distance, 0.0, 1.0)[..., None]
    dark, light = np.float32(22.0), np.float32(238.0)
    outline = light if light_outline else dark
    fill = np.asarray(color, dtype=np.float32)
    ink = dark if fill @ np.float32([0.299, 0.587, 0.114]) > 75 else light
    inside = fill + (ink - fill) * stripe
    window = picture[top:bottom, left:right]
    shape_pixels = outline + (inside - outline) * body
    window[:] = (window + (shape_pixels - window) * outlined + np.float32(0.5)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: (H, W, rng) -> float picture (H, W, 3). Less saturated than the entities: a red star shows on a brick wall.


def _noise(height: int, width: int, cell_height: float, cell_width: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in [-1, 1], (H, W): random values on a coarse grid, interpolated linearly."""

    def interpolation(size: int, cell: float) -> tuple[np.ndarray, np.ndarray, int]:
        count = max(2, math.ceil(size / cell) + 1)
        position = np.linspace(0, count - 1 - 1e-6, size)
        below = position.astype(int)
        return below, position - below, count

    # Indexing, not a matrix product: BLAS may round differently with another number of threads.
    row, row_share, rows = interpolation(height, cell_height)
    column, column_share, columns = interpolation(width, cell_width)
    coarse = rng.uniform(-1, 1, (rows, columns))
    lines = coarse[row] + (coarse[row + 1] - coarse[row]) * row_share[:, None]
    return lines[:, column] + (lines[:, column + 1] - lines[:, column]) * column_share


def _sprinkle(picture: np.ndarray, count: int, sizes: tuple[float, float], strength: tuple[float, float], rng) -> None:
    """Add `count` soft white dots to `picture`, in place; `sizes` in pixels, `strength` in grey levels."""
    height, width, _ = picture.shape
    for _ in range(count):
        y, x, size, peak = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(*sizes), rng.uniform(*strength)
        reach = math.ceil(3 * size)
        rows = np.arange(max(0, int(y) - reach), min(height, int(y) + reach + 1))
        columns = np.arange(max(0, int(x) - reach), min(width, int(x) + reach + 1))
        dot = np.exp(-((rows[:, None] - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
        picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += peak * dot[..., None]


def _blend(under: tuple, over: tuple, share: np.ndarray) -> np.ndarray:
    """(H, W, 3): colour `under` where share (H, W) is 0, colour `over` where it is 1."""
    return np.asarray(under, float) + (np.asarray(over, float) - np.asarray(under, float)) * share[..., None]


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    return np.arange(height)[:, None].astype(float), np.arange(width)[None, :].astype(float), min(height, width)


def _waves(height: int, width: int, rng: np.random.Generator, periods: float) -> np.ndarray:
    """Wave crests in [0, 1], (H, W), `periods` of them over the short side."""
    y, x, short = _grid(height, width)
    swell = 0.9 * np.sin(2 * math.pi * (x / short * rng.uniform(0.8, 1.6) + rng.random()))
    swell = swell + 1.6 * _noise(height, width, short / 5, short / 3, rng)
    return (0.5 + 0.5 * np.sin(2 * math.pi * periods * y / short + swell)) ** 2


def _beach(height, width, rng):
    y, x, short = _grid(height, width)
    shore = height / 2 - short * rng.uniform(0.02, 0.16)
    shore = shore + short * 0.03 * np.sin(2 * math.pi * (x / short + rng.random()))
    sea = _blend((52, 142, 170), (128, 196, 206), _waves(height, width, rng, rng.uniform(5, 7)))
    grain = _noise(height, width, 1, 1, rng) * 0.3 + _noise(height, width, short / 8, short / 6, rng) * 0.3
    sand = _blend((222, 194, 142), (186, 154, 104), 0.4 + grain)
    picture = np.where((y < shore)[..., None], sea, sand)
    foam = np.exp(-(((y - shore) / (0.025 * short)) ** 2))
    return picture + (np.array([250.0, 250.0, 246.0]) - picture) * foam[..., None]


def _night_sky(height, width, rng):
    y, _, short = _grid(height, width)
    haze = 0.5 * y / height + 0.35 * _noise(height, width, short / 2, short / 2, rng)
    picture = _blend((8, 10, 30), (32, 36, 84), np.clip(haze, 0, 1))
    stars = int(rng.integers(35, 60) * height * width / short**2)
    _sprinkle(picture, stars, (0.004 * short, 0.011 * short), (150, 330), rng)
    return picture


def _brick_wall(height, width, rng):
    y, x, short = _grid(height, width)
    brick_height, aspect, mortar = short / rng.uniform(6.0, 8.0), rng.uniform(2.0, 2.4), 0.016 * short
    y, x = y + rng.uniform(0, short), x + rng.uniform(0, short)
    row = np.floor(y / brick_height)
    shifted = x + (row % 2) * brick_height * aspect / 2
    column = np.floor(shifted / (brick_height * aspect))
    tone = rng.uniform(0, 1, 4096)[((row * 61 + column * 7) % 4096).astype(int)]
    picture = _blend((116, 62, 48), (158, 92, 72), tone + 0.15 * _noise(height, width, 1, 2, rng))
    gap = np.minimum(y % brick_height, shifted % (brick_height * aspect)) < 2 * mortar
    return np.where(gap[..., None], np.array([196.0, 186.0, 172.0]), picture)


def _snowy_field(height, width, rng):
    y, x, short = _grid(height, width)
    horizon = height / 2 - short * rng.uniform(0.2, 0.32) + short * 0.03 * _noise(1, width, 1, short / 3, rng)
    drifts = 0.5 + 0.6 * _noise(height, width, short / 7, short / 2.5, rng)
    ground = _blend((232, 238, 246), (190, 206, 228), drifts)
    picture = np.where((y < horizon)[..., None], np.array([150.0, 164.0, 184.0]), ground)
    flakes = int(rng.integers(30, 45) * height * width / short**2)
    _sprinkle(picture, flakes, (0.006 * short, 0.013 * short), (60, 110), rng)
    return picture


def _meadow(height, width, rng):
    short = min(height, width)
    blades = 0.5 + 0.45 * _noise(height, width, short / 10, 1.5, rng)
    blades = blades + 0.35 * _noise(height, width, short / 4, short / 4, rng)
    return _blend((62, 108, 44), (138, 168, 74), np.clip(blades, 0, 1))


def _ocean(height, width, rng):
    crests = _waves(height, width, rng, rng.uniform(6, 9))
    return _blend((16, 62, 104), (84, 148, 178), crests + 0.15 * _noise(height, width, 1.5, 3, rng))


def _wooden_table(height, width, rng):
    y, x, short = _grid(height, width)
    plank = short / rng.uniform(3.2, 4.5)
    y = y + rng.uniform(0, plank)
    tone = rng.uniform(-0.25, 0.25, 64)[np.floor(y / plank).astype(int) % 64]
    rings = np.sin(2 * math.pi * (y / short * 9 + 1.3 * _noise(height, width, short / 3, short, rng)))
    grain = 0.5 + tone + 0.22 * rings + 0.25 * _noise(height, width, 1, short / 3, rng)
    picture = _blend((122, 82, 46), (184, 136, 84), np.clip(grain, 0, 1))
    return np.where((y % plank < max(1.0, 0.018 * short))[..., None], np.array([62.0, 40.0, 22.0]), picture)


def _checkered_floor(height, width, rng):
    y, x, short = _grid(height, width)
    tile = short / rng.uniform(4.5, 6.5)
    odd = (np.floor((y + rng.uniform(0, short)) / tile) + np.floor((x + rng.uniform(0, short)) / tile)) % 2
    return _blend((84, 88, 94), (206, 204, 198), odd) + 8 * _noise(height, width, 2, 2, rng)[..., None]


def _forest(height, width, rng):
    y, x, short = _grid(height, width)
    leaves = 0.5 + 0.5 * _noise(height, width, short / 16, short / 16, rng)
    picture = _blend((14, 40, 22), (44, 88, 46), leaves)
    for column in np.arange(rng.uniform(0, 0.2) * short, width, short * rng.uniform(0.2, 0.28)):
        half = short * rng.uniform(0.025, 0.05)
        trunk = np.abs(x - column - short * 0.02 * np.sin(y / short * 4 + column)) < half
        bark = _blend((66, 46, 32), (104, 78, 56), 0.5 + 0.5 * _noise(height, width, short / 8, 1.5, rng))
        picture = np.where(trunk[..., None], bark, picture)
    return picture


def _desert(height, width, rng):
    y, x, short = _grid(height, width)
    picture = _blend((244, 222, 176), (240, 196, 140), np.broadcast_to(y / height, (height, width)))
    tops = np.linspace(height / 2 - 0.25 * short, height / 2 + 0.4 * short, 4)
    for top, light in zip(tops, ((222, 168, 96), (206, 146, 74), (190, 126, 60), (172, 108, 50)), strict=True):
        amplitude = short * rng.uniform(0.05, 0.1)
        crest = top + amplitude * np.sin(2 * math.pi * (x / short * rng.uniform(0.4, 0.9) + rng.random()))
        dune = np.asarray(light, float) + 10 * _noise(height, width, 1.5, 3, rng)[..., None]
        picture = np.where((y > crest)[..., None], dune, picture)
    return picture


def _street(height, width, rng):
    y, x, short = _grid(height, width)
    asphalt = _blend((70, 70, 74), (104, 104, 108), 0.5 + 0.5 * _noise(height, width, 1, 1, rng))
    middle = height / 2 + short * rng.uniform(-0.1, 0.1)
    dash = (np.abs(y - middle) < 0.022 * short) & ((x + rng.uniform(0, short)) % (0.36 * short) < 0.22 * short)
    picture = np.where(dash[..., None], np.array([226.0, 222.0, 206.0]), asphalt)
    pavement = np.abs(y - middle) > 0.38 * short
    return np.where(pavement[..., None], np.array([168.0, 164.0, 158.0]), picture)


def _cloudy_sky(height, width, rng):
    short = min(height, width)
    clouds = _noise(height, width, short / 4, short / 3, rng) + 0.5 * _noise(height, width, short / 10, short / 8, rng)
    return _blend((112, 168, 222), (240, 244, 250), np.clip(0.3 + 1.1 * clouds, 0, 1))


SCENES = {
    "beach": _beach,
    "night sky": _night_sky,
    "brick wall": _brick_wall,
    "meadow": _meadow,
    "snowy field": _snowy_field,
    "wooden table": _wooden_table,
    "ocean": _ocean,
    "checkered floor": _checkered_floor,
    "street": _street,
    "forest": _forest,
    "cloudy sky": _cloudy_sky,
    "desert": _desert,
}
_DARK_SCENES = {"night sky", "forest"}  # a dark outline would be invisible here


def draw_scene(scene: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A background, (H, W, 3) uint8. Its texture, layout, brightness and tint vary with `rng`."""
    picture = SCENES[scene](height, width, rng) * rng.uniform(0.86, 1.1) + rng.uniform(-7, 7, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_frames(
    scene: str, entities: list[tuple[str, str, Path]], height: int, width: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield a clip's frames, (H, W, 3) uint8 each. `entities` are (color, shape, path), the last one in front."""
    background = draw_scene(scene, height, width, rng)
    short, light_outline = min(height, width), scene in _DARK_SCENES
    colors = [
        np.clip(np.array(COLORS[color]) * rng.uniform(0.92, 1.06) + rng.uniform(-8, 8, 3), 0, 255)
        for color, _, _ in entities
    ]
    for frame in range(len(entities[0][2].x)):
        picture = background.copy()
        for (_, shape, path), color in zip(entities, colors, strict=True):
            if path.visible[frame]:
                x, y = width / 2 + short * path.x[frame], height / 2 + short * path.y[frame]
                radius, angle = short * path.radius[frame], path.angle[frame]
                paint(picture, shape, color, x, y, radius, angle, light_outline=light_outline)
        yield picture
