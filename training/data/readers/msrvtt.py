# SPDX-License-Identifier: Apache-2.0
"""MSR-VTT (Xu et al., CVPR 2016): 10,000 clips, 20 captions each.

Files, as in CLIP4Clip's release: MSRVTT_data.json ({videos: [{video_id, url, ...}], sentences: [{video_id,
caption}]}), MSRVTT_train.9k.csv and MSRVTT_train.7k.csv (video_id), MSRVTT_JSFUSION_test.csv (key, vid_key, video_id,
sentence). If a list is missing, only its splits are left out.
"""

import re
from collections import defaultdict
from pathlib import Path

from ..errors import UserError
from .common import (
    AnnotatedClip,
    Splits,
    add_captions,
    caption_list,
    check_unique,
    clean,
    get_field,
    get_name,
    read_csv,
    read_json,
    twin_in,
)


# Official split -> its numbers in video0 to video9999. Some releases have the split in a field, some do not.
OFFICIAL_RANGES = {"train": range(0, 6513), "validate": range(6513, 7010), "test": range(7010, 10_000)}


def read_msrvtt(folder: Path, windows: bool = False) -> Splits:
    """train_9k, train_7k and test_1k (1k-A, one caption per video); train_full, validation_full and test_full.

    validation_7k has the videos that are in neither train_7k nor test_1k, because the protocol has no validation data.
    (train_9k includes them; there, see `--hold_out`.)
    """
    path = folder / "MSRVTT_data.json"
    data = read_json(path)
    captions = defaultdict(list)
    sentences = get_field(data, "sentences", path)
    if isinstance(sentences, dict):  # {video: captions}
        sentences = [{"video_id": video, "caption": texts} for video, texts in sentences.items()]
    for sentence in _records(sentences, path):
        video = get_name(sentence, "video_id", path)
        captions[video] += caption_list(get_field(sentence, "caption", path), path, video)

    splits: Splits = {}
    for name in ("train_9k", "train_7k"):
        listed_in = folder / f"MSRVTT_{name.replace('_', '.')}.csv"
        if listed_in.is_file():
            video_ids = [row["video_id"] for row in read_csv(listed_in, ["video_id"])]
            splits[name] = add_captions(video_ids, captions, listed_in, path)

    listed_in = folder / "MSRVTT_JSFUSION_test.csv"
    if listed_in.is_file():
        rows = read_csv(listed_in, ["video_id", "sentence"])
        for row in rows:
            row["video_id"] = twin_in(captions, row["video_id"]) or row["video_id"]
        check_unique((row["video_id"] for row in rows), listed_in)
        splits["test_1k"] = [AnnotatedClip(row["video_id"], row["video_id"], [clean(row["sentence"])]) for row in rows]

    videos = get_field(data, "videos", path)
    if isinstance(videos, dict):
        videos = [{**(record or {}), "video_id": video} for video, record in videos.items()]
    videos = [{**video, "video_id": get_name(video, "video_id", path)} for video in _records(videos, path)]
    if "train_7k" in splits and "test_1k" in splits:
        used = {clip.video_id for name in ("train_7k", "test_1k") for clip in splits[name]}
        unused = [video["video_id"] for video in videos if video["video_id"] not in used]
        if unused:
            splits["validation_7k"] = add_captions(unused, captions, path, path)

    full = {"train": "train_full", "validate": "validation_full", "test": "test_full"}
    members = defaultdict(list)
    for video in videos:
        members[official_split(video, path)].append(video["video_id"])
    return splits | {full[name]: add_captions(members[name], captions, path, path) for name in full if members[name]}


def _records(records, path: Path) -> list[dict]:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} holds something else than lists of records: {str(records)[:80]}; download it again")
    return records


def official_split(video: dict, path: Path) -> str:
    """train, validate or test: by the record's field or else by the video's number."""
    if "split" in video:
        if video["split"] not in list(OFFICIAL_RANGES):
            raise UserError(f"{path} has split {video['split']!r}; MSR-VTT's are {', '.join(OFFICIAL_RANGES)}")
        return video["split"]
    number = re.fullmatch(r"video(\d+)", video["video_id"])
    for name, numbers in OFFICIAL_RANGES.items():
        if number and int(number[1]) in numbers:
            return name
    raise UserError(f"{path} has video {video['video_id']!r}; MSR-VTT's are video0 to video9999")
