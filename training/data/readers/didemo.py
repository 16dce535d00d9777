# SPDX-License-Identifier: Apache-2.0
"""DiDeMo (Hendricks et al., ICCV 2017) as paragraph retrieval: 10,000 videos, the descriptions of each joined.

Files: {train,val,test}_list.txt (one file name per line) and {train,val,test}_data.json (a list of {description,
times, video}; times are pairs of 5-second segments, one pair per annotator).
"""

from pathlib import Path

from .common import AnnotatedClip, Splits, add_captions, get_field, read_json, read_lines


# Annotators saw the first 30 seconds (LocalizingMoments' README); CLIP4Clip reads 0 to 31, and so do we.
ANNOTATED_SECONDS = 31.0
SEGMENT_SECONDS = 5.0


def read_didemo(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test: one paragraph per video or, with `windows`, one clip per description."""
    splits = {}
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        path, listed_in = folder / f"{file}_data.json", folder / f"{file}_list.txt"
        moments: dict[str, list[dict]] = {}
        for moment in read_json(path):
            moments.setdefault(get_field(moment, "video", path), []).append(moment)
        descriptions = {v: [get_field(m, "description", path) for m in found] for v, found in moments.items()}
        clips = add_captions(read_lines(listed_in), descriptions, listed_in, path)
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


def _window(moment: dict, number: int, path: Path) -> AnnotatedClip:
    """One description and its window: the mean over the annotators, as in CLIP4Clip."""
    times = get_field(moment, "times", path)
    start = sum(first for first, _ in times) / len(times) * SEGMENT_SECONDS
    end = (sum(last for _, last in times) / len(times) + 1) * SEGMENT_SECONDS
    video = moment["video"]
    return AnnotatedClip(f"{video}#{number}", video, [moment["description"]], start, end)
