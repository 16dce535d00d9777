# SPDX-License-Identifier: Apache-2.0
"""ActivityNet Captions (Krishna et al., ICCV 2017) as paragraph retrieval: all sentences of a video joined.

Files: train.json and val_1.json ({"v_" + id: {duration, timestamps, sentences}}), and train_ids.json, val_ids.json
(lists of the keys to use; without them, all are used). The literature evaluates on val_1, so it is `test` here. There
is no validation split; see `--hold_out`.
"""

from pathlib import Path

from .common import AnnotatedClip, Splits, add_captions, get_field, read_json


def read_activitynet(folder: Path, windows: bool = False) -> Splits:
    """train and test (val_1): one paragraph per video or, with `windows`, one clip per sentence."""
    splits = {}
    for name, file, ids in (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json")):
        path, listed_in = folder / file, folder / ids
        videos = read_json(path)
        sentences = {key: [s.strip() for s in get_field(video, "sentences", path)] for key, video in videos.items()}
        if listed_in.is_file():
            # Some listed videos have no captions in this release; CLIP4Clip skips them as well.
            keys = [key for key in read_json(listed_in) if key in videos]
        else:
            keys, listed_in = list(videos), path
        splits[name] = []
        for clip in add_captions(keys, sentences, listed_in, path):
            clip.file_name = clip.video_id
            timestamps = get_field(videos[clip.video_id], "timestamps", path) if windows else None
            splits[name] += paragraph_or_windows(clip, timestamps)
    return splits


def paragraph_or_windows(clip: AnnotatedClip, timestamps: list[list[float]] | None) -> list[AnnotatedClip]:
    """The whole video with one paragraph or, given (start, end) of each sentence, one clip per sentence."""
    if timestamps is None:
        return [AnnotatedClip(clip.video_id, clip.file_name, [" ".join(clip.captions)])]
    return [
        AnnotatedClip(f"{clip.video_id}#{n}", clip.file_name, [sentence], float(min(window)), float(max(window)))
        for n, (sentence, window) in enumerate(zip(clip.captions, timestamps, strict=True))
    ]
