# SPDX-License-Identifier: Apache-2.0
"""ActivityNet Captions (Krishna et al., ICCV 2017) as paragraph retrieval: all sentences of a video joined.

Files: train.json and val_1.json ({"v_" + id: {duration, timestamps, sentences}}), and train_ids.json, val_ids.json
(lists of such keys: which videos count; without them, all do). The literature scores on val_1, so it is `test` here;
there is no validation split, see `--hold_out`.
"""

from pathlib import Path

from .common import AnnotatedClip, Splits, captioned, field, read_json


def read_activitynet(folder: Path, windows: bool = False) -> Splits:
    """train and test (val_1): a paragraph a video or, with `windows`, a clip for each sentence."""
    splits = {}
    for name, file, ids in (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json")):
        path, listed_in = folder / file, folder / ids
        videos = read_json(path)
        sentences = {key: [s.strip() for s in field(video, "sentences", path)] for key, video in videos.items()}
        if listed_in.is_file():
            # Some listed videos have no captions in this release; CLIP4Clip passes over them as well.
            keys = [key for key in read_json(listed_in) if key in videos]
        else:
            keys, listed_in = list(videos), path
        splits[name] = []
        for clip in captioned(keys, sentences, listed_in, path):
            clip.file_name = clip.video_id
            timestamps = field(videos[clip.video_id], "timestamps", path) if windows else None
            splits[name] += paragraph_or_windows(clip, timestamps)
    return splits


def paragraph_or_windows(clip: AnnotatedClip, timestamps: list[list[float]] | None) -> list[AnnotatedClip]:
    """The whole video with one paragraph or, given (start, end) for each sentence, a clip for each sentence."""
    if timestamps is None:
        return [AnnotatedClip(clip.video_id, clip.file_name, [" ".join(clip.captions)])]
    return [
        AnnotatedClip(f"{clip.video_id}#{n}", clip.file_name, [sentence], float(min(window)), float(max(window)))
        for n, (sentence, window) in enumerate(zip(clip.captions, timestamps, strict=True))
    ]
