# SPDX-License-Identifier: Apache-2.0
"""A picture of a few bars a panel: what a benchmark shows beside its numbers."""

from pathlib import Path


IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLOURS = ("#9aa5b1", "#2b6cb0")  # the peer, ours


def draw(name: str, title: str, panels: dict[str, dict[str, float]]) -> Path:
    """docs/images/NAME.png.

    Args:
        panels: label of the axis, with its unit -> name of a bar -> its height.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (label, bars) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.bar(list(bars), list(bars.values()), color=COLOURS, width=0.6)
        axis.bar_label(drawn, fmt="%.3g" if max(bars.values()) < 1000 else "%.0f")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
