# SPDX-License-Identifier: Apache-2.0
"""Annotation files as they are in the wild: encodings, quotes, shapes; read right, or one line that says why."""

import collections
import json
import pickle
import re

import datasets
import pytest

from data.errors import UserError
from data.readers import read_annotations
from tests import benchmark_files as files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The tables of one test must not be found in another's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "annotations"


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_a_table_is_read_in_any_usual_encoding_with_any_line_ends(folder, encoding):
    files.write_msrvtt(folder)
    rows = ["key,vid_key,video_id,sentence", "ret0,msr0,video7012,a café", 'ret1,msr1,video9999,"a dog, and more"']
    for ends in ("\n", "\r\n", "\r"):
        (folder / "MSRVTT_JSFUSION_test.csv").write_bytes((ends.join(rows) + ends).encode(encoding))
        clips = read_annotations("msrvtt", str(folder))["test_1k"]
        assert [(clip.video_id, clip.captions) for clip in clips] == [
            ("video7012", ["a café"]),
            ("video9999", ["a dog, and more"]),
        ]


def test_bytes_that_only_cp1252_has_are_the_signs_that_they_were(folder):
    files.write_lsmdc(folder)
    line = "\t".join(["1004_Juno_00.03", "1", "2", "1", "2", "SOMEONE\u2019s door \u2013 it opens\u2026"])
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_bytes(line.encode("cp1252"))
    (clip,) = read_annotations("lsmdc", str(folder))["test"]
    assert clip.captions == ["SOMEONE\u2019s door \u2013 it opens\u2026"]


def test_a_line_end_inside_quotes_is_a_space(folder):
    files.write_msrvtt(folder)
    text = 'key,vid_key,video_id,sentence\r\nret0,msr0,video7012,"a girl\r\ndoes gymnastics"\r\n'
    (folder / "MSRVTT_JSFUSION_test.csv").write_bytes(text.encode())
    (clip,) = read_annotations("msrvtt", str(folder))["test_1k"]
    assert clip.captions == ["a girl does gymnastics"]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_signs_that_python_takes_for_line_ends_do_not_end_a_line(folder, sign):
    files.write_lsmdc(folder)
    line = "\t".join(["1004_Juno_00.03", "1", "2", "1", "2", f"SOMEONE opens{sign}a door."])
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text(f"{line}\n", encoding="utf-8")
    (clip,) = read_annotations("lsmdc", str(folder))["test"]
    assert clip.captions == ["SOMEONE opens a door."]


@pytest.mark.parametrize(
    "line",
    [
        "\ufeff{id}\t1\t2\t1\t2\tHe says hi.",
        '"{id}\t1\t2\t1\t2\tHe says hi."',
        '"{id}"\t1\t2\t1\t2\t"He says hi."',
        '{id}\t1\t2\t1\t2\t"He says hi."',
        '"{id}\t1\t2\t1\t2\tHe says hi.',
        " {id} \t1\t2\t1\t2\t He  says hi. \r",
    ],
)
def test_a_byte_order_mark_or_quotes_lose_no_lsmdc_clip(folder, line):
    clip_id = "1004_Juno_00.03.32.938-00.03.37.166"
    files.write_lsmdc(folder)
    text = line.format(id=clip_id) + "\n" + "\t".join(["1004_Juno_00.04", "1", "2", "1", "2", '"Hi," he says.']) + "\n"
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_bytes(text.encode())
    clips = read_annotations("lsmdc", str(folder))["test"]
    assert [(clip.video_id, clip.file_name, clip.captions) for clip in clips] == [
        (clip_id, clip_id, ["He says hi."]),
        ("1004_Juno_00.04", "1004_Juno_00.04", ['"Hi," he says.']),
    ]


def test_doubled_quotes_inside_a_quoted_sentence_are_quotes(folder):
    files.write_lsmdc(folder)
    line = "\t".join(["1004_Juno_00.03", "1", "2", "1", "2", '"SOMEONE reads ""Go!"" aloud."'])
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text(line)
    assert read_annotations("lsmdc", str(folder))["test"][0].captions == ['SOMEONE reads "Go!" aloud.']


def test_half_a_surrogate_pair_does_not_reach_a_table(folder):
    files.write_activitynet(folder)
    path = folder / "val_1.json"
    path.write_text(path.read_text().replace("A man runs.", "A man \\ud83d runs."))
    clip = read_annotations("activitynet", str(folder))["test"][0]
    assert clip.captions == ["A man ? runs. He jumps."]


# --- shapes ----------------------------------------------------------------------------------------------------------


def captions_of(splits) -> list[list[str]]:
    return [clip.captions for clips in splits.values() for clip in clips]


@pytest.mark.parametrize("shape", ["list", "ids as keys", "one text"])
def test_activitynet_in_other_shapes_gives_the_same_paragraphs(folder, shape):
    files.write_activitynet(folder)
    expected = captions_of(read_annotations("activitynet", str(folder)))
    for name in ("train", "val_1"):
        path = folder / f"{name}.json"
        videos = json.loads(path.read_text())
        if shape == "list":
            path.write_text(json.dumps([{"video_id": video, **record} for video, record in videos.items()]))
        elif shape == "one text":
            for record in videos.values():
                record["sentences"] = "A man runs. He jumps."
            path.write_text(json.dumps(videos))
        else:
            path = folder / f"{name.removesuffix('_1')}_ids.json"
            path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), {})))
    assert captions_of(read_annotations("activitynet", str(folder))) == expected == [["A man runs. He jumps."]] * 4


@pytest.mark.parametrize("shape", ["by video", "by number"])
def test_didemo_in_other_shapes_gives_the_same_paragraphs(folder, shape):
    files.write_didemo(folder)
    expected = captions_of(read_annotations("didemo", str(folder)))
    for path in folder.glob("*_data.json"):
        moments = json.loads(path.read_text())
        changed = collections.defaultdict(list) if shape == "by video" else {}
        for number, moment in enumerate(moments):
            if shape == "by video":
                changed[moment.pop("video")].append(moment)
            else:
                changed[number] = moment
        path.write_text(json.dumps(changed))
    assert captions_of(read_annotations("didemo", str(folder))) == expected


def test_msrvtt_by_video_gives_the_same_captions(folder):
    files.write_msrvtt(folder)
    expected = captions_of(read_annotations("msrvtt", str(folder)))
    path = folder / "MSRVTT_data.json"
    data = json.loads(path.read_text())
    sentences = collections.defaultdict(list)
    for sentence in data["sentences"]:
        sentences[sentence["video_id"]].append(sentence["caption"])
    videos = {video["video_id"]: {"url": video["url"]} for video in data["videos"]}
    path.write_text(json.dumps({"videos": videos, "sentences": sentences}))
    assert captions_of(read_annotations("msrvtt", str(folder))) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda captions: {video: [" ".join(words) for words in found] for video, found in captions.items()},
        lambda captions: {video: tuple(map(tuple, found)) for video, found in captions.items()},
        collections.OrderedDict,
        lambda captions: collections.defaultdict(list, captions),
    ],
)
def test_msvd_pickles_of_texts_tuples_and_other_dictionaries_give_the_same_captions(folder, change):
    files.write_msvd(folder)
    expected = captions_of(read_annotations("msvd", str(folder)))
    path = folder / "raw-captions.pkl"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    assert captions_of(read_annotations("msvd", str(folder))) == expected


def test_one_text_where_msvd_has_a_list_is_one_caption(folder):
    names = files.write_msvd(folder)
    texts = {name.removesuffix(".avi"): "a man runs" for name in names}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(texts))
    assert captions_of(read_annotations("msvd", str(folder))) == [["a man runs"]] * 6


def test_a_pickle_of_python_2_with_bytes_of_latin_1_is_read(folder):
    files.write_msvd(folder)
    (folder / "test_list.txt").write_text("x\n")
    (folder / "train_list.txt").write_text("x\n")
    (folder / "val_list.txt").write_text("x\n")
    caption = b"(dp0\nS'x'\np1\n(lp2\n(lp3\nS'a'\naS'caf\\xe9'\naas."  # {'x': [['a', 'caf\xe9']]}, protocol 0
    (folder / "raw-captions.pkl").write_bytes(caption)
    assert captions_of(read_annotations("msvd", str(folder))) == [["a café"]] * 3


def test_a_window_without_a_sentence_is_left_out_and_the_others_keep_their_times(folder):
    files.write_activitynet(folder)
    path = folder / "val_1.json"
    path.write_text(path.read_text().replace("A man runs.", " "))
    clips = read_annotations("activitynet", str(folder), windows=True)["test"]
    assert [(clip.video_id, clip.captions, clip.start, clip.end) for clip in clips] == [
        ("v_cc#1", ["He jumps."], 0.5, 2.0),
        ("v_dd#1", ["He jumps."], 0.5, 2.0),
    ]


def test_lists_of_file_names_name_the_same_videos_as_lists_of_ids(folder):
    for write_files, benchmark, name, suffix in (
        (files.write_msvd, "msvd", "test_list.txt", ".avi"),
        (files.write_msrvtt, "msrvtt", "MSRVTT_train.7k.csv", ".mp4"),
        (files.write_msrvtt, "msrvtt", "MSRVTT_JSFUSION_test.csv", ".MP4"),
    ):
        write_files(folder)
        wanted = read_annotations(benchmark, str(folder))
        path = folder / name
        path.write_text(re.sub(r"(video\d+|_5_15)(?=\n|,\")", rf"\g<1>{suffix}", path.read_text()))
        assert suffix in path.read_text()
        assert read_annotations(benchmark, str(folder)) == wanted


def test_activitynet_ids_without_v_list_the_same_videos(folder):
    files.write_activitynet(folder)
    wanted = read_annotations("activitynet", str(folder))
    (folder / "val_ids.json").write_text('["cc", "dd", "without_captions"]')
    assert read_annotations("activitynet", str(folder)) == wanted


@pytest.mark.parametrize("header", ["clip_id\tstart_aligned\t", '\ufeff"video_id"\tstart\t'])
def test_the_header_of_a_copy_of_lsmdc_is_no_clip(folder, header):
    files.write_lsmdc(folder)
    wanted = read_annotations("lsmdc", str(folder))
    path = folder / "LSMDC16_challenge_1000_publictect.csv"
    path.write_text(header + "end\tstart\tend\tsentence\n" + path.read_text())
    assert read_annotations("lsmdc", str(folder)) == wanted


# --- one line that says why ------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def change_json(name, change):
    def mistake(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(data) or data))

    return mistake


def change_all(field, value):
    return lambda videos: {video: {**record, field: value} for video, record in videos.items()}


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_pickle(value):
    return lambda folder: (folder / "raw-captions.pkl").write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(
    ("benchmark", "mistake", "words"),
    [
        ("msrvtt", write("MSRVTT_data.json", POINTER), ["MSRVTT_data.json is a Git LFS pointer", "git lfs pull"]),
        ("msrvtt", write("MSRVTT_data.json", "<!DOCTYPE html><html>"), ["is a web page", "download the file itself"]),
        ("msrvtt", write("MSRVTT_data.json", "[]"), ["MSRVTT_data.json has a record without 'sentences'"]),
        (
            "msrvtt",
            write("MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\na,b,video7012,x\na,b,video9999\n"),
            ["MSRVTT_JSFUSION_test.csv, line 3, has no 'sentence'"],
        ),
        (
            "msrvtt",
            write("MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\na,b,video7012,a dog, a cat\n"),
            ["MSRVTT_JSFUSION_test.csv, line 2, has more fields than the header", "in double quotes"],
        ),
        (
            "msrvtt",
            write("MSRVTT_JSFUSION_test.csv", 'key,vid_key,video_id,sentence\na,b,video7,"a dog\nc,d,video9,x\n'),
            ["MSRVTT_JSFUSION_test.csv, line 2, is not comma-separated text", "correct its quotes"],
        ),
        (
            "msrvtt",
            change_json("MSRVTT_data.json", lambda data: data | {"videos": [{"video_id": ["video0"]}]}),
            ["MSRVTT_data.json has a record whose 'video_id' is no name: \"['video0']\"; correct or remove it"],
        ),
        (
            "msrvtt",
            change_json("MSRVTT_data.json", lambda data: data | {"sentences": 5}),
            ["MSRVTT_data.json holds something else than lists of records: 5; download it again"],
        ),
        (
            "didemo",
            change_json("test_data.json", lambda moments: [{"video": {}}]),
            ["a record whose 'video'"],
        ),
        ("msvd", write("raw-captions.pkl", POINTER), ["raw-captions.pkl is a Git LFS pointer"]),
        ("msvd", write("raw-captions.pkl", b"\x80\x04\x95nonsense"), ["cannot read", "raw-captions.pkl", "again"]),
        ("msvd", write_pickle([["a", "man"]]), ["raw-captions.pkl holds a list, not the captions by video"]),
        ("msvd", write_pickle({"a": 5}), ["the captions of video 'a' are not texts: 5"]),
        ("msvd", write_pickle({"a": ["a", "man", "runs"]}), ["video 'a' are single words", "a list of captions"]),
        ("lsmdc", write("LSMDC16_annos_val.csv", "\n\na\t1\t2\t1\t2\t \n"), ["val.csv, line 3, has 5 tab-separated"]),
        ("lsmdc", write("LSMDC16_annos_val.csv", 'a\t1\t2\t1\t2\t""\n'), ["val.csv, line 1, has no sentence"]),
        ("didemo", write("test_data.json", '"text"'), ["test_data.json holds a str", "download it again"]),
        (
            "didemo",
            change_json("test_data.json", lambda moments: [{**moment, "times": []} for moment in moments]),
            ["test_data.json: video '6@N01_d' has times that are not pairs of segments"],
        ),
        ("activitynet", write("val_1.json", "[1]"), ["val_1.json has a record without 'video_id'"]),
        ("activitynet", write("val_ids.json", '"v_cc"'), ["val_ids.json is not a list of video ids"]),
        (
            "activitynet",
            change_json("val_1.json", change_all("timestamps", [[0.0, 0.8]])),
            ["val_1.json: video 'v_cc' has 2 sentences but 1 times", "leave out --windows"],
        ),
        (
            "activitynet",
            change_json("val_1.json", change_all("timestamps", [[0.0], [1.0]])),
            ["val_1.json: video 'v_cc' has times that are not pairs"],
        ),
        (
            "activitynet",
            change_json("val_1.json", change_all("sentences", [None, 3])),
            ["the captions of video 'v_cc' are not texts"],
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_remedy(folder, benchmark, mistake, words):
    getattr(files, f"write_{benchmark}")(folder)
    mistake(folder)
    with pytest.raises(UserError) as raised:
        read_annotations(benchmark, str(folder), windows=benchmark in ("didemo", "activitynet"))
    for part in words:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_clone_of_the_hub_with_pointers_for_tables_is_named(folder):
    files.write_activitynet_leyo_hub(folder)
    (folder / "train.parquet").write_text(POINTER)
    with pytest.raises(UserError, match=r"train.parquet is a Git LFS pointer.*git lfs pull"):
        read_annotations("activitynet", str(folder))
