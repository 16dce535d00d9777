# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' public annotation files in miniature, and real videos for them.

Each `write_*` writes the files of one public layout to a folder and returns the names of the videos that they list.
"""

import csv
import json
import pickle
import shutil
from pathlib import Path

import datasets

from tests.video_files import write_video


def write_videos(folder: Path, names: list[str]) -> Path:
    """A real video of two seconds under each name."""
    folder.mkdir(parents=True, exist_ok=True)
    first = write_video(folder / "first.mp4", num_frames=8, fps=4, size=(32, 32))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first, folder / name)  # a demuxer looks at the content, not at the name
    first.unlink()
    return folder


def write_csv(path: Path, header: list[str], rows: list[list[str]]):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_msrvtt(folder: Path, with_split_field: bool = False) -> list[str]:
    """12 videos, 2 captions each: train_9k 10, train_7k 6, 1k-A test 2; official train 5, validate 3, test 4."""
    folder.mkdir(parents=True, exist_ok=True)
    official = {"train": [0, 1, 2, 3, 6512], "validate": [6513, 6514, 7009], "test": [7010, 7011, 7012, 9999]}
    ids = {name: [f"video{n}" for n in numbers] for name, numbers in official.items()}
    everything = [video for videos in ids.values() for video in videos]
    colours = "red blue green white black pink grey brown orange purple yellow golden".split()
    sentences = [
        {"video_id": v, "caption": f"a {colour} {thing} moves"}
        for v, colour in zip(everything, colours, strict=True)
        for thing in ("dog", "ball, the big one,")
    ]
    videos = [
        {"video_id": video, "url": f"https://www.youtube.com/watch?v={video}"}
        | ({"split": name} if with_split_field else {})
        for name, members in ids.items()
        for video in members
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    train = ids["train"] + ids["validate"] + ids["test"][:2]
    write_csv(folder / "MSRVTT_train.9k.csv", ["video_id"], [[v] for v in train])
    write_csv(folder / "MSRVTT_train.7k.csv", ["video_id"], [[v] for v in train[:6]])
    test = [[f"ret{n}", f"msr{n}", v, f"{v} shows a cat, and more"] for n, v in enumerate(ids["test"][2:])]
    write_csv(folder / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"], test)
    return [f"{v}.mp4" for v in everything[:-1]] + [f"{everything[-1]}.webm"]


def write_msvd(folder: Path) -> list[str]:
    """2, 1 and 3 videos; the n-th has n + 1 captions."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"-4wsuPCjDB{n}_5_15" for n in range(6)]
    for name, members in (("train", ids[:2]), ("val", ids[2:3]), ("test", ids[3:])):
        (folder / f"{name}_list.txt").write_text("".join(f"{v}\n" for v in members))
    captions = {v: [["a", "man", "number", str(c)] for c in range(n + 1)] for n, v in enumerate(ids)}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    return [f"{v}.avi" for v in ids]


def write_lsmdc(folder: Path) -> list[str]:
    """Films in subfolders; one training clip has two sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [f"1004_Juno_00.0{n}.32.938-00.0{n}.37.166" for n in range(5)]

    def lines(numbers):
        rows = [[clips[n], "00.1", "00.2", "00.1", "00.2", f"SOMEONE opens door {n}."] for n in numbers]
        return "".join("\t".join(row) + "\n" for row in rows)

    (folder / "LSMDC16_annos_training.csv").write_text(lines([0, 1, 0]))
    (folder / "LSMDC16_annos_val.csv").write_text(lines([2]))
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text(lines([3, 4]))
    return [f"1004_Juno/{clip}.avi" for clip in clips]


def write_didemo(folder: Path) -> list[str]:
    """2, 1 and 1 videos with 2 descriptions each; one description is of a video that is not listed."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"train": ["10015567@N08_3655_a.avi", "123@N00_b.mov"], "val": ["5@N01_c.mp4"], "test": ["6@N01_d"]}
    for name, members in ids.items():
        (folder / f"{name}_list.txt").write_text("\n".join(members))
        moments = [
            {"video": v, "description": f"{what} of {name}", "times": [[0, 0], [0, 1], [0, 2]]}
            for v in [*members, "not_listed.avi"]
            for what in ("the start", "a dog")
        ]
        (folder / f"{name}_data.json").write_text(json.dumps(moments))
    return [f"{Path(v).stem}.mp4" for members in ids.values() for v in members]


def write_activitynet(folder: Path) -> list[str]:
    """2 training and 2 test videos of 2 sentences; a third test video is not among the ids."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"train": ["v_aa", "v_-b"], "val_1": ["v_cc", "v_dd"]}
    for name, members in ids.items():
        video = {"duration": 2.0, "timestamps": [[0.0, 0.8], [0.5, 2.0]], "sentences": ["A man runs.", " He jumps."]}
        (folder / f"{name}.json").write_text(json.dumps(dict.fromkeys([*members, "v_more"], video)))
        (folder / f"{name.removesuffix('_1')}_ids.json").write_text(json.dumps([*members, "v_without_captions"]))
    return [f"{v}.mp4" for members in ids.values() for v in members]


# --- layouts of the Hub ----------------------------------------------------------------------------------------------


def write_hub_card(folder: Path, configs: dict[str, dict[str, str]]):
    """The README.md whose header tells `datasets` which file is which split of which configuration."""
    lines = ["---", "configs:"]
    for config, files in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in files.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_msrvtt_hub(folder: Path) -> list[str]:
    """friedrichor/MSR-VTT: lists of captions in training, one text in the test."""
    folder.mkdir(parents=True)
    rows = [{"video_id": f"video{n}", "video": f"video{n}.mp4", "caption": ["a cat", "a dog"]} for n in range(5)]
    test = [{"video_id": f"video{n}", "video": f"video{n}.mp4", "caption": f"a cow {n}"} for n in (5, 6)]
    files = {"train_9k": rows, "train_7k": rows[:3], "test_1k": test}
    for name, content in files.items():
        (folder / f"msrvtt_{name}.json").write_text(json.dumps(content))
    write_hub_card(folder, {name: {name.split("_")[0]: f"msrvtt_{name}.json"} for name in files})
    return [f"video{n}.mp4" for n in range(7)]


def write_msrvtt_one_caption_hub(folder: Path) -> list[str]:
    """AlexZigma/msr-vtt: official train and val, one caption each, no file name."""
    folder.mkdir(parents=True)
    for split, ids in (("train", (0, 1, 2)), ("val", (6513,))):
        rows = [{"video_id": f"video{n}", "caption": "a cat", "sen_id": n, "url": "u", "split": split} for n in ids]
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    write_hub_card(folder, {"default": {s: f"data/{s}-*" for s in ("train", "val")}})
    return [f"video{n}.mp4" for n in (0, 1, 2, 6513)]


def write_msvd_hub(folder: Path) -> list[str]:
    """friedrichor/MSVD and VLM2Vec/MSVD: .avi names, lists of captions."""
    folder.mkdir(parents=True)
    for split, ids in (("train", "ab"), ("validation", "c"), ("test", "de")):
        rows = [{"video_id": v, "video": f"{v}.avi", "caption": [f"{v} runs", f"{v} sits"]} for v in ids]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    write_hub_card(folder, {"default": {s: f"{s}.json" for s in ("train", "validation", "test")}})
    return [f"{v}.mp4" for v in "abcde"]  # converted, as many copies of the videos are


def write_didemo_hub(folder: Path) -> list[str]:
    """friedrichor/DiDeMo: no ids, a paragraph a video."""
    folder.mkdir(parents=True)
    for split, names in (("train", ["x.mp4", "y.mp4"]), ("test", ["z.mp4"])):
        (folder / f"{split}.json").write_text(
            json.dumps([{"video": v, "caption": "it starts. it ends."} for v in names])
        )
    write_hub_card(folder, {"default": {s: f"{s}.json" for s in ("train", "test")}})
    return ["x.mp4", "y.mp4", "z.mp4"]


def write_activitynet_hub(folder: Path) -> list[str]:
    """friedrichor/ActivityNet_Captions: sentences and their times."""
    folder.mkdir(parents=True)
    times = {"sentences": ["A man runs.", "He jumps."], "timestamps": [[0.0, 0.8], [0.5, 2.0]], "duration": 2.0}
    for split, ids in (("train", ["v_a", "v_b"]), ("val1", ["v_c"]), ("val2", ["v_c"])):
        (folder / f"{split}.json").write_text(json.dumps([{"video_id": v, "video": f"{v}.mp4"} | times for v in ids]))
    write_hub_card(folder, {"default": {s: f"{s}.json" for s in ("train", "val1", "val2")}})
    return [f"{v}.mp4" for v in ("v_a", "v_b", "v_c")]


def write_activitynet_leyo_hub(folder: Path) -> list[str]:
    """Leyo/ActivityNet_Captions: parquet, starts and ends in columns of their own."""
    folder.mkdir(parents=True)
    for split, ids in (("train", ["v_a", "v_b"]), ("validation", ["v_c"])):
        row = {
            "captions_starts": [0.0, 0.5],
            "captions_ends": [0.8, 2.0],
            "en_captions": ["A man runs.", "He jumps."],
        }
        rows = [{"video_id": v, "video_path": f"{v}.mp4", "duration": 2.0} | row for v in ids]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    write_hub_card(folder, {"default": {s: f"{s}.parquet" for s in ("train", "validation")}})
    return [f"{v}.mp4" for v in ("v_a", "v_b", "v_c")]
