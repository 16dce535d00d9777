# SPDX-License-Identifier: Apache-2.0
"""MSR-VTT (Xu et al., CVPR 2016): 10,000 clips, 20 captions each.

Files, as CLIP4Clip's release has them: MSRVTT_data.json ({videos: [{video_id, url, ...}], sentences: [{video_id,
caption}]}), MSRVTT_train.9k.csv and MSRVTT_train.7k.csv (video_id), MSRVTT_JSFUSION_test.csv (key, vid_key, video_id,
sentence). A list that is not there only leaves out its splits.
"""

import re
from collections import defaultdict
from pathlib import Path

from data.errors import UserError

from .common import AnnotatedClip, Splits, captioned, field, read_csv, read_json, refuse_duplicates


# Official split -> its ids, video0 to video9999 in this order. Some releases state it in a field, some leave it out.
OFFICIAL_RANGES = {"train": range(0, 6513), "validate": range(6513, 7010), "test": range(7010, 10_000)}


def read_msrvtt(folder: Path, windows: bool = False) -> Splits:
    """train_9k, train_7k and test_1k (1k-A, one caption a video); train_full, validation_full and test_full.

    validation_7k are the videos that are neither in train_7k nor in test_1k: the protocol has no validation data of
    its own, and these were seen by neither. (9k trains on them; there, see `--hold_out`.)
    """
    path = folder / "MSRVTT_data.json"
    data = read_json(path)
    captions = defaultdict(list)
    for sentence in field(data, "sentences", path):
        captions[field(sentence, "video_id", path)].append(field(sentence, "caption", path))

    splits: Splits = {}
    for name in ("train_9k", "train_7k"):
        listed_in = folder / f"MSRVTT_{name.replace('_', '.')}.csv"
        if listed_in.is_file():
            video_ids = [row["video_id"] for row in read_csv(listed_in, ["video_id"])]
            splits[name] = captioned(video_ids, captions, listed_in, path)

    listed_in = folder / "MSRVTT_JSFUSION_test.csv"
    if listed_in.is_file():
        rows = read_csv(listed_in, ["video_id", "sentence"])
        refuse_duplicates((row["video_id"] for row in rows), listed_in)
        splits["test_1k"] = [AnnotatedClip(row["video_id"], row["video_id"], [row["sentence"]]) for row in rows]

    videos = field(data, "videos", path)
    if "train_7k" in splits and "test_1k" in splits:
        used = {clip.video_id for name in ("train_7k", "test_1k") for clip in splits[name]}
        unused = [video["video_id"] for video in videos if field(video, "video_id", path) not in used]
        if unused:
            splits["validation_7k"] = captioned(unused, captions, path, path)

    full = {"train": "train_full", "validate": "validation_full", "test": "test_full"}
    members = defaultdict(list)
    for video in videos:
        members[official_split(video, path)].append(video["video_id"])
    return splits | {full[name]: captioned(members[name], captions, path, path) for name in full if members[name]}


def official_split(video: dict, path: Path) -> str:
    """train, validate or test: what the record says, else what its number says."""
    if "split" in video:
        if video["split"] not in OFFICIAL_RANGES:
            raise UserError(f"{path} has split {video['split']!r}; MSR-VTT's are {', '.join(OFFICIAL_RANGES)}")
        return video["split"]
    number = re.fullmatch(r"video(\d+)", field(video, "video_id", path))
    for name, numbers in OFFICIAL_RANGES.items():
        if number and int(number[1]) in numbers:
            return name
    raise UserError(f"{path} has video {video['video_id']!r}; MSR-VTT's are video0 to video9999")
