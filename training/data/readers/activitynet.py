# SPDX-License-Identifier: Apache-2.0
"""ActivityNet Captions (Krishna et al., ICCV 2017) as paragraph retrieval: all sentences of a video joined.

Files: train.json and val_1.json ({"v_" + id: {duration, timestamps, sentences}}, or a list of such records with their
video_id), and train_ids.json, val_ids.json (lists of the keys to use; without them, all are used). The literature
evaluates on val_1, so it is `test` here. There is no validation split; see `--hold_out`.
"""

from pathlib import Path

from ..errors import UserError
from .common import AnnotatedClip, Splits, by_video, caption_list, check_unique, get_field, read_json, twin_in


def read_activitynet(folder: Path, windows: bool = False) -> Splits:
    """train and test (val_1): one paragraph per video or, with `windows`, one clip per sentence."""
    splits = {}
    for name, file, ids in (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json")):
        path, listed_in = folder / file, folder / ids
        videos = by_video(read_json(path), path)
        if listed_in.is_file():
            # Some listed videos have no captions in this release; CLIP4Clip skips them as well.
            keys = [twin_in(videos, key) for key in _listed(read_json(listed_in), listed_in)]
            keys = [key for key in keys if key is not None]
        else:
            keys, listed_in = list(videos), path
        check_unique(keys, listed_in)
        splits[name] = []
        for key in keys:
            clip = AnnotatedClip(key, key, caption_list(get_field(videos[key], "sentences", path), path, key))
            timestamps = get_field(videos[key], "timestamps", path) if windows else None
            splits[name] += paragraph_or_windows(clip, timestamps, path)
    return splits


def _listed(ids, path: Path) -> list[str]:
    keys = list(ids) if isinstance(ids, list | dict) else None
    if keys is None or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path} is not a list of video ids: {str(ids)[:80]}; download it again")
    return keys


def paragraph_or_windows(
    clip: AnnotatedClip, timestamps: list[list[float]] | None, where: str | Path
) -> list[AnnotatedClip]:
    """The whole video with one paragraph or, given (start, end) of each sentence, one clip per sentence."""
    if timestamps is None:
        paragraph = " ".join(filter(None, clip.captions))
        if not paragraph:
            raise UserError(f"{where}: video {clip.video_id!r} has no sentence: correct or remove it")
        return [AnnotatedClip(clip.video_id, clip.file_name, [paragraph])]
    if len(timestamps) != len(clip.captions):
        raise UserError(
            f"{where}: video {clip.video_id!r} has {len(clip.captions)} sentences but {len(timestamps)} times: "
            "correct or remove it, or leave out --windows"
        )
    try:
        spans = [(float(min(first, last)), float(max(first, last))) for first, last in timestamps]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: video {clip.video_id!r} has times that are not pairs of seconds: {str(timestamps)[:80]}"
        ) from error
    return [
        AnnotatedClip(f"{clip.video_id}#{n}", clip.file_name, [sentence], start, end)
        for n, (sentence, (start, end)) in enumerate(zip(clip.captions, spans, strict=True))
        if sentence
    ]
