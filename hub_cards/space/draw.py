# SPDX-License-Identifier: Apache-2.0
"""The numbers that ranking.html shows, and the page's pieces made of it."""

from dataclasses import dataclass
from pathlib import Path

from clip_search import Hit, Moment
from jinja2 import Environment, FileSystemLoader


TEMPLATE = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
).get_template("ranking.html")


@dataclass(frozen=True)
class Scale:
    """The common range of the bars of a ranking, below and above zero."""

    below: float
    above: float

    def percent(self, length: float) -> float:
        return round(100 * length / max(self.below + self.above, 1e-6), 2)


def draw_gallery(clips: list[list[Moment]], problems: list[str]) -> str:
    """The clips as small pictures, and the files that could not be read."""
    return str(TEMPLATE.module.clips(clips, problems))


def draw_hint(message: str) -> str:
    return str(TEMPLATE.module.hint(message))


def draw_ranking(texts: dict[str, str], hits: list[Hit]) -> str:
    """What each expert read of the sentence, and the moments, best first; the best one is open."""
    shown = [_numbers(hit, list(texts)) for hit in hits]
    scale = Scale(max(hit["below"] for hit in shown), max(hit["above"] for hit in shown))
    return str(TEMPLATE.module.ranking(texts, shown, scale))


def _numbers(hit: Hit, experts: list[str]) -> dict:
    moment, parts = hit.moment, hit.parts.tolist()
    rows = [
        {
            "number": e,
            "expert": expert,
            "gate": moment.gate[e].item(),
            "match": hit.matches[e].item(),
            "part": parts[e],
            "frames": _columns(moment, e),
        }
        for e, expert in enumerate(experts)
    ]
    return vars(moment) | {
        "score": f"{round(hit.score, 3) + 0.0:.3f}",  # no "-0.000"
        "bias": hit.bias,
        "parts": list(enumerate(parts)),
        "below": -sum(part for part in parts if part < 0),
        "above": sum(part for part in parts if part > 0),
        "rows": rows,
    }


def _columns(moment: Moment, expert: int) -> list[tuple[int, int, str]]:
    """For each frame: the height of its column, the weight of the frame in the expert (both in percent), its time."""
    weights = moment.frame_weights[expert]
    heights = (100 * weights / weights.max().clamp(min=1e-6)).round().int().tolist()
    shares = (100 * weights).round().int().tolist()
    return [(*pair, f"{time:.1f}") for *pair, time in zip(heights, shares, moment.times, strict=True)]
