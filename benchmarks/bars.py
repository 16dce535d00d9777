# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
