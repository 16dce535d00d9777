# SPDX-License-Identifier: Apache-2.0
"""DiDeMo (Hendricks et al., ICCV 2017) as paragraph retrieval: 10,000 videos, the descriptions of each joined.

Files: {train,val,test}_list.txt (one file name per line) and {train,val,test}_data.json (a list of {description,
times, video}, or {video: such a list}; times are pairs of 5-second segments, one pair per annotator). Without a list,
all described videos are used.
"""

from pathlib import Path

from ..errors import UserError
from .common import AnnotatedClip, Splits, add_captions, caption_list, get_field, get_name, read_json, read_lines


# Annotators saw the first 30 seconds (LocalizingMoments' README); CLIP4Clip reads 0 to 31, and so do we.
ANNOTATED_SECONDS = 31.0
SEGMENT_SECONDS = 5.0


def read_didemo(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test: one paragraph per video or, with `windows`, one clip per description."""
    splits = {}
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        path, listed_in = folder / f"{file}_data.json", folder / f"{file}_list.txt"
        moments: dict[str, list[dict]] = {}
        for moment in _moments(read_json(path), path):
            moments.setdefault(get_name(moment, "video", path), []).append(moment)
        descriptions = {
            v: [text for m in found for text in caption_list(get_field(m, "description", path), path, v)]
            for v, found in moments.items()
        }
        listed = read_lines(listed_in) if listed_in.is_file() else list(moments)
        clips = add_captions(listed, descriptions, listed_in, path)
        if windows:
            splits[name] = [
                _window(moment, n, path) for clip in clips for n, moment in enumerate(moments[clip.video_id])
            ]
        else:
            for clip in clips:
                clip.captions = [" ".join(clip.captions)]
                clip.start, clip.end = 0.0, ANNOTATED_SECONDS
            splits[name] = clips
    return splits


def _moments(data, path: Path) -> list[dict]:
    if isinstance(data, dict):  # {video or annotation: one moment or several}
        data = [
            {"video": key, **moment} if isinstance(moment, dict) else moment
            for key, value in data.items()
            for moment in (value if isinstance(value, list) else [value])
        ]
    if not isinstance(data, list):
        raise UserError(f"{path} holds a {type(data).__name__}, not a list of moments; download it again")
    return data


def _window(moment: dict, number: int, path: Path) -> AnnotatedClip:
    """One description and its window: the mean over the annotators, as in CLIP4Clip."""
    times, video = get_field(moment, "times", path), moment["video"]
    try:
        start = sum(first for first, _ in times) / len(times) * SEGMENT_SECONDS
        end = (sum(last for _, last in times) / len(times) + 1) * SEGMENT_SECONDS
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: video {video!r} has times that are not pairs of segments: {str(times)[:80]}"
        ) from error
    return AnnotatedClip(f"{video}#{number}", video, caption_list(moment["description"], path, video), start, end)
