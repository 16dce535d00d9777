# SPDX-License-Identifier: Apache-2.0
"""Showing results: times, a table, a grid of thumbnails, and rows for JSON. Only pictures need torch."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from .results import Hit


if TYPE_CHECKING:
    from PIL import Image


TILE, CAPTION, COLUMNS = 224, 34, 5  # pixels, pixels, pictures per row
GREY, BLACK = (235, 235, 235), (20, 20, 20)


def format_time(seconds: float) -> str:
    """83.5 -> "1:23.5", as a player shows it."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def format_table(hits: list[Hit]) -> str:
    """Rank, score, from, to and file; below them the other files with this content, and the moments of a group."""
    if not hits:
        return "nothing found"
    lines = [f"{'rank':>4}  {'score':>7}  {'from':>9}  {'to':>9}  file"]
    for rank, hit in enumerate(hits, start=1):
        lines.append(f"{rank:>4}  {_format_moment(hit)}  {_relative(hit.path)}")
        lines += [f"{'':>36}= {_relative(path)}" for path in hit.paths if path != hit.path]
        if len(hit.moments) > 1:
            lines += [f"{'':>4}  {_format_moment(moment)}  ." for moment in hit.moments]
    return "\n".join(lines)


def _format_moment(hit: Hit) -> str:
    return f"{hit.score:7.4f}  {format_time(hit.start):>9}  {format_time(hit.end):>9}"


def _relative(path: str) -> str:
    """Relative to the working folder, if it is inside."""
    return path.removeprefix(os.getcwd() + os.sep)


def json_rows(hits: list[Hit]) -> list[dict]:
    """One dict per hit: rank and the fields of [`Hit`]; its `moments` have score, start, end, key and peak."""
    rows = []
    for rank, hit in enumerate(hits, start=1):
        moments = [
            {name: getattr(moment, name) for name in ("score", "start", "end", "key", "peak")}
            for moment in hit.moments
        ]
        rows.append({"rank": rank} | hit._asdict() | {"moments": moments})
    return rows


def thumbnail(path: str, start: float, end: float, size: int) -> Image.Image:
    """The middle frame of a moment, all of it; the long side has at most `size` pixels.

    Raises:
        VideoDecodingError: naming the file and the cause.
    """
    from PIL import Image

    from modeling_camoe.frames import Clip, sample_frames

    clip = Clip(path, start, end) if end > start else Clip(path)
    preview = sample_frames(clip, 1, preview_size=size).preview  # (3,h,w)
    return Image.fromarray(preview.permute(1, 2, 0).numpy())


def thumbnail_grid(hits: list[Hit]) -> Image.Image:
    """Thumbnails with rank, score, time and file name. A file that cannot be read shows the cause instead."""
    from PIL import Image, ImageDraw, ImageOps

    from modeling_camoe.frames import VideoDecodingError

    columns = max(1, min(COLUMNS, len(hits)))
    rows = max(1, -(-len(hits) // columns))
    picture = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(picture)
    for i, hit in enumerate(hits):
        left, top = i % columns * TILE, i // columns * (TILE + CAPTION)
        try:
            tile = ImageOps.contain(thumbnail(hit.path, *(hit.peak or (hit.start, hit.end)), TILE), (TILE, TILE))
            picture.paste(BLACK, (left, top, left + TILE, top + TILE))
            picture.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        except VideoDecodingError as error:
            draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), GREY)
            draw.multiline_text((left + 8, top + 8), "\n".join(textwrap.wrap(str(error), 32)), BLACK)
        times = f"{format_time(hit.start)} - {format_time(hit.end)}"
        draw.text((left + 4, top + TILE + 2), f"{i + 1}.  {hit.score:.3f}  {times}", BLACK)
        draw.text((left + 4, top + TILE + 17), textwrap.shorten(os.path.basename(hit.path), 34), BLACK)
    return picture
