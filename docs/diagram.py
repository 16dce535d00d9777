# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/how_it_works.png: from a clip and a sentence to one score.

python docs/diagram.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


EXPERTS = [
    ("fusion", "a red star spins on the beach", "#4c72b0"),
    ("entity", "red star", "#dd8452"),
    ("action", "spins", "#55a868"),
    ("scene", "on the beach", "#8172b3"),
]
INK, PALE = "#222222", "#f3f3f3"


def box(axes, x, y, width, height, text, color=PALE, ink=INK, size=10.5):
    """A rounded box with its lower left corner at x, y."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size, linespacing=1.4)


def arrow(axes, start, end, color=INK):
    """From one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, linewidth=1.4))


def draw(path: Path):
    """Writes the picture: 1,600 pixels wide, readable at half of it."""
    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=160)
    axes.set(xlim=(0, 20), ylim=(0.5, 11.1), aspect="equal")
    axes.axis("off")
    box(axes, 0.1, 8.0, 2.6, 1.6, "clip\n12 frames")
    box(axes, 3.4, 8.0, 2.7, 1.6, "CLIP\nimage tower", size=10)
    box(axes, 0.1, 1.6, 2.6, 1.6, '"a red star\nspins on the\nbeach"', size=10)
    box(axes, 3.4, 1.6, 2.7, 1.6, "tagger:\nfour streams", size=10)
    arrow(axes, (2.7, 8.8), (3.5, 8.8))
    arrow(axes, (2.7, 2.4), (3.5, 2.4))
    box(axes, 7.0, 10.0, 5.2, 0.9, "gate: a weight per expert")
    arrow(axes, (6.1, 9.3), (7.0, 10.4))
    for i, (name, text, color) in enumerate(EXPERTS):
        top, low = 8.9 - 1.05 * i, 3.9 - 1.05 * i
        box(axes, 7.0, top, 5.2, 0.8, f"{name} expert", color, "white")
        arrow(axes, (6.1, 8.8), (7.0, top + 0.4), color)
        box(axes, 7.0, low, 5.2, 0.8, f"“{text}”", color, "white", 10 if i else 9)
        arrow(axes, (6.1, 2.4), (7.0, low + 0.4), color)
        arrow(axes, (12.2, top + 0.4), (13.2, 8.2), color)
        arrow(axes, (12.2, low + 0.4), (13.2, 3.0), color)
    axes.text(9.6, 4.95, "CLIP's text tower reads each", ha="center", va="bottom", fontsize=10, color=INK)
    box(axes, 13.2, 7.2, 3.1, 2.0, "video vector\n(weighted,\none after\nthe other)", size=10)
    arrow(axes, (12.2, 10.4), (14.7, 9.2))
    box(axes, 13.2, 2.0, 3.1, 2.0, "text vector\n(in the same\norder)", size=10)
    box(axes, 17.1, 4.6, 2.8, 2.0, "score =\ninner\nproduct", "#333333", "white")
    arrow(axes, (16.3, 7.6), (17.9, 6.6))
    arrow(axes, (16.3, 3.6), (17.9, 4.6))
    axes.text(14.75, 6.9, "any vector database", ha="center", va="top", fontsize=9, color="#555555")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "how_it_works.png")
