# SPDX-License-Identifier: Apache-2.0
"""Example clips of a release, and what the released model says about each of them.

    example_1.mp4, example_2.mp4, ...
    example_1.jpg, ...  the frame in the middle of each clip, for the widget, which takes an image
    examples.json       [{"clip": "example_1.mp4", "caption": "...", "candidates": [{"label", "score", "similarity"}],
                          "frame": "example_1.jpg", "frame_labels": [{"label", "score"}]}]

Captions come from a metadata.jsonl beside the clips, as in a VideoFolder. Every clip is compared with the captions of
all clips; if fewer than two clips have one, also with the example sentences of the card. The card and its widget are
rendered from examples.json, and the Space offers the clips. They are examples, not a measurement.
"""

import json
import shutil
from pathlib import Path

from PIL import Image

from modeling_camoe.frames import VideoDecodingError, sample_frames


FRAME_SIZE = 448  # pixels, square
CLIP_SUFFIXES = (".mp4", ".webm")  # what browsers play
MAX_CLIPS = 8
MAX_BYTES = 20 * 2**20  # of one clip


class ExampleError(Exception):
    """A clip that cannot be an example; the message says why."""


def add_examples(folder: Path, retrieval, clips: list, sentences: list[str]):
    """Copy `clips` (paths) into `folder` and write examples.json.

    Args:
        folder: of the release.
        retrieval: a [`CAMoEPipeline`] with the released model.
        clips: paths.
        sentences: candidates if the clips have too few captions.

    Raises:
        ExampleError: too many clips, or one is missing, too large or cannot be decoded.
    """
    if len(clips) > MAX_CLIPS:
        raise ExampleError(f"--example_clips: {len(clips)} clips; a release shows at most {MAX_CLIPS}")
    captions = [_caption_of(_check(Path(clip))) for clip in clips]
    candidates = list(dict.fromkeys(caption for caption in captions if caption))
    if len(candidates) < 2:
        candidates = list(dict.fromkeys([*candidates, *sentences]))
    names = [f"example_{i}{Path(clip).suffix.lower()}" for i, clip in enumerate(clips, start=1)]
    for clip, name in zip(clips, names, strict=True):
        shutil.copy(clip, folder / name)
    try:
        found = retrieval([str(folder / name) for name in names], candidate_labels=candidates)
    except VideoDecodingError as error:
        raise ExampleError(f"--example_clips: {error}") from error
    examples = [
        {"clip": name, "caption": caption, "candidates": ranked}
        for name, caption, ranked in zip(names, captions, found, strict=True)
    ]
    for example in examples:
        frame = _write_frame(folder / example["clip"])
        labels = retrieval(Image.open(frame).convert("RGB"), candidate_labels=candidates)  # as the widget asks
        labels = [{"label": found["label"], "score": round(found["score"], 4)} for found in labels]
        example |= {"frame": frame.name, "frame_labels": labels}
    (folder / "examples.json").write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")


def _write_frame(clip: Path) -> Path:
    """The frame in the middle of a clip, as an image beside it."""
    [frame] = sample_frames(clip, 1, size=FRAME_SIZE).frames  # (3,H,W)
    path = clip.with_suffix(".jpg")
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(path, quality=90)
    return path


def _check(clip: Path) -> Path:
    if clip.suffix.lower() not in CLIP_SUFFIXES:
        raise ExampleError(f"--example_clips: {clip} is not a {' or '.join(CLIP_SUFFIXES)} file: browsers play these")
    if not clip.is_file():
        raise ExampleError(f"--example_clips: {clip} does not exist")
    if clip.stat().st_size > MAX_BYTES:
        raise ExampleError(f"--example_clips: {clip} is larger than {MAX_BYTES // 2**20} MiB; cut it")
    return clip


def _caption_of(clip: Path) -> str | None:
    """The first caption of a clip in the table beside it, without commas: they separate the widget's candidates."""
    table = clip.parent / "metadata.jsonl"
    if not table.is_file():
        return None
    for line in table.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("file_name") == clip.name:
            captions = row.get("captions") or row.get("caption") or []
            captions = [captions] if isinstance(captions, str) else captions
            plain = [caption for caption in captions if "," not in caption] or captions
            return plain[0].replace(",", "").strip().rstrip(".") if plain else None
    return None
