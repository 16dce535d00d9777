# SPDX-License-Identifier: Apache-2.0
"""The page's HTML: the visitor's clips, and a ranking with what each expert contributed.

Everything that a visitor wrote (file names, sentences) is escaped here.
"""

import base64
import io
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

import torch
from clip_search import EncodedClip, Hit
from PIL import Image


COLORS = ("#6366f1", "#ec4899", "#f59e0b", "#10b981", "#06b6d4", "#8b5cf6", "#ef4444", "#84cc16")


@dataclass(frozen=True)
class Scale:
    """The common range of the bars of a ranking, below and above zero."""

    below: float
    above: float

    @property
    def length(self) -> float:
        return max(self.below + self.above, 1e-6)


def draw_gallery(clips: list[EncodedClip], problems: list[str]) -> str:
    """The clips as small pictures, and the files that could not be read."""
    tiles = [
        f'<figure class="tile"><img src="{_jpeg(clip.frames[len(clip.frames) // 2])}" alt="">'
        f"<figcaption>{escape(clip.name)}<span>{clip.duration:.1f} s</span></figcaption></figure>"
        for clip in clips
    ]
    lines = [f'<p class="problem" role="alert">{escape(problem)}</p>' for problem in problems]
    return f'<div class="gallery">{"".join(tiles)}</div>{"".join(lines)}'


def draw_hint(message: str) -> str:
    return f'<div class="hint">{escape(message)}</div>'


def draw_ranking(texts: dict[str, str], hits: list[Hit], is_corrected: bool) -> str:
    """What each expert read of the sentence, and the clips, best first; the best one is open."""
    scale = Scale(
        below=max(-hit.parts.clamp(max=0).sum().item() for hit in hits),
        above=max(hit.parts.clamp(min=0).sum().item() for hit in hits),
    )
    legend = "".join(
        f'<li><i style="background:{_color(e)}"></i><b>{escape(expert)}</b> reads “{escape(text)}”</li>'
        for e, (expert, text) in enumerate(texts.items())
    )
    rows = [_draw_hit(rank, hit, list(texts), scale, is_corrected) for rank, hit in enumerate(hits, start=1)]
    return f'<ul class="legend">{legend}</ul><ol class="ranking">{"".join(rows)}</ol>'


def _draw_hit(rank: int, hit: Hit, experts: list[str], scale: Scale, is_corrected: bool) -> str:
    clip = hit.clip
    strip = "".join(f'<img src="{_jpeg(frame, 96)}" alt="">' for frame in clip.frames)
    return (
        f'<li><details class="hit"{" open" if rank == 1 else ""}><summary><span class="rank">{rank}</span>'
        f'<span class="what"><span class="line"><b class="name">{escape(clip.name)}</b>'
        f'<span class="score">{_number(hit.score)}</span></span>'
        f'<span class="bar">{_draw_bar(hit, experts, scale)}</span><span class="strip">{strip}</span></span></summary>'
        f"{_draw_experts(hit, experts, is_corrected)}</details></li>"
    )


def _draw_bar(hit: Hit, experts: list[str], scale: Scale) -> str:
    """The parts of a score end to end: negative parts to the left of zero, positive ones to the right."""
    sides = {"negative": "", "positive": ""}
    for e, part in enumerate(hit.parts.tolist()):
        sides["positive" if part > 0 else "negative"] += (
            f'<i style="background:{_color(e)};width:{100 * abs(part) / scale.length:.2f}%" '
            f'title="{escape(experts[e])} {part:+.3f}"></i>'
        )
    zero = 100 * scale.below / scale.length
    space = zero - 100 * -hit.parts.clamp(max=0).sum().item() / scale.length
    return f'<i style="width:{space:.2f}%"></i>{sides["negative"]}<i class="zero"></i>{sides["positive"]}'


def _draw_experts(hit: Hit, experts: list[str], is_corrected: bool) -> str:
    """The sum, one row per expert, with the weight of each frame."""
    clip = hit.clip
    rows = []
    for e, expert in enumerate(experts):
        part = hit.parts[e].item()
        rows.append(
            f'<tr><th><i style="background:{_color(e)}"></i>{escape(expert)}</th>'
            f"<td>{clip.gate[e].item():.2f}</td><td>× {hit.similarities[e].item():.3f}</td>"
            f"<td>= {part:+.3f}</td><td>{_draw_weights(clip, e)}</td></tr>"
        )
    if is_corrected:
        rows.append(
            f'<tr class="sum"><th>bias</th><td></td><td></td><td>{-clip.bias:+.3f}</td>'
            "<td>similarity to any sentence</td></tr>"
        )
    rows.append(
        f'<tr class="sum"><th>score</th><td></td><td></td><td>= {_number(hit.score)}</td>'
        "<td>the sum of the parts</td></tr>"
    )
    # A browser that cannot decode the picture (HEVC, MPEG-4) plays the sound alone and reports no error.
    check = "this.classList.toggle('unplayable', !this.videoWidth)"
    return (
        f'<div class="inside"><div class="player"><video src="gradio_api/file={quote(clip.path)}" controls muted loop '
        f'preload="none" onloadedmetadata="{check}" onerror="{check}" poster="{_jpeg(clip.frames[0])}"></video>'
        '<p class="note">This browser cannot play this file. The frames above are what the model saw.</p></div>'
        "<table><thead><tr><th>expert</th><th>gate</th><th>match</th>"
        f"<th>part</th><th>weight of each frame</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _draw_weights(clip: EncodedClip, expert: int) -> str:
    """One column per frame, as high as the frame's weight in the expert."""
    weights = clip.frame_weights[expert]
    heights = (100 * weights / weights.max().clamp(min=1e-6)).tolist()
    columns = "".join(
        f'<i style="background:{_color(expert)};height:{height:.0f}%" title="{time:.1f} s: {100 * weight:.0f} %"></i>'
        for height, weight, time in zip(heights, weights.tolist(), clip.times, strict=True)
    )
    return f'<span class="weights">{columns}</span>'


def _number(score: float) -> str:
    return f"{round(score, 3) + 0.0:.3f}"  # no "-0.000"


def _color(expert: int) -> str:
    return COLORS[expert % len(COLORS)]


def _jpeg(frame: torch.Tensor, size: int = 160) -> str:
    """(3,H,W) uint8 -> a data URL with the picture."""
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    image.thumbnail((size, size))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
