# SPDX-License-Identifier: Apache-2.0
"""Training on a stream: all readers together see every row once, and a resumed run sees what an unbroken one sees."""

import json
import shutil
import signal
from types import SimpleNamespace

import datasets
import pytest
import run_retrieval
import torch

from data.batches import PairCollator
from data.captioned_clips import load_split
from data.errors import UserError
from data.frame_ring import FrameRing, RingLoader
from data.streaming import StreamBatches, StreamCollator, StreamedClips, StreamPairs
from engine.options import TrainOptions
from modeling_camoe.frames import SampledFrames, VideoDecodingError
from tests.programs import RunningProgram, run_processes, run_program, wait_until


class Decoder:
    """Frames without content; sources in `bad` raise. Every call adds a line to a file."""

    def __init__(self, log, bad=()):
        self.log, self.bad = log, bad

    def decode(self, clip, sampling, seed):
        with open(self.log, "a") as file:
            file.write(f"{clip.source if isinstance(clip.source, str) else len(clip.source)}\n")
        if clip.source in self.bad:
            raise VideoDecodingError(f"{clip.source}: damaged")
        return SampledFrames(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (0.0,), 1.0)


class Processor:
    def __call__(self, text=None, return_tensors=None):
        return {"input_ids": torch.tensor([[len(one["fusion"])] for one in text])}


def write_tables(folder, files, rows, captions=1, change=None):
    """`rows` rows of clips v0.mp4, ... over `files` files, as equal as they can be."""
    folder.mkdir(exist_ok=True)
    for file in range(files):
        mine = [
            {"video": f"v{n}.mp4", "captions": [f"text {c} of {n}" for c in range(captions)]}
            for n in range(file, rows, files)
        ]
        for row in mine:
            row |= (change or {}).get(row["video"], {})
        text = "".join(json.dumps(row) + "\n" for row in mine)
        (folder / f"train-{file:05d}-of-{files:05d}.jsonl").write_text(text)
    return StreamedClips(load_split(str(folder), "train", streaming=True))


def loader(clips, decoder, rank=0, world=1, workers=2, batch=4, steps=5, captions="all", policy="raise", places=None):
    """A process's loader, after `places`: (steps done, the state of the places)."""
    batches = StreamBatches(100, batch, 7, rank, world, 1, workers, clips.num_shards, block=3)
    done = 0
    if places is not None:
        done, state = places
        batches.load_state_dict(state)
    batches.start_from(done // 100, done % 100, steps)
    pairs = StreamPairs(clips, batches, decoder, ["fusion"], None, None, "uniform", captions, policy)
    ring = FrameRing(batch // world, (2, 3, 4, 4), workers, 2)
    collator = StreamCollator(PairCollator(Processor(), ["fusion"], ring))
    options = {"num_workers": workers, "prefetch_factor": 2 if workers else None}
    return RingLoader(pairs, batch_size=None, collate_fn=collator, ring=ring, **options), batches


def names(feed) -> list[list[str]]:
    return [batch["names"] for batch in feed]


@pytest.mark.parametrize(("files", "workers"), [(4, 2), (8, 2), (3, 2), (1, 1), (2, 0)])
def test_two_processes_see_every_row_once_in_a_pass(tmp_path, files, workers):
    clips = write_tables(tmp_path / "data", files, rows=24)
    seen = []
    for rank in range(2):
        feed, _ = loader(clips, Decoder(tmp_path / "log"), rank, 2, workers, batch=4, steps=6)
        batches = names(feed)
        assert [len(batch) for batch in batches] == [2] * 6
        seen += [name for batch in batches for name in batch]
    assert sorted(seen) == sorted(f"v{n}" for n in range(24))
    assert seen != sorted(seen)


def test_every_caption_is_a_pair_or_one_of_each_clip(tmp_path):
    clips = write_tables(tmp_path / "data", 2, rows=8, captions=3)
    feed, _ = loader(clips, Decoder(tmp_path / "log"), steps=6)
    every = [name for batch in names(feed) for name in batch]
    assert sorted(every) == sorted(f"v{n}" for n in range(8) for _ in range(3))
    feed, _ = loader(clips, Decoder(tmp_path / "log"), steps=4, captions="one")
    passes = [name for batch in names(feed) for name in batch]
    assert sorted(passes) == sorted(f"v{n}" for n in range(8) for _ in range(2))


@pytest.mark.parametrize(("files", "workers"), [(2, 2), (3, 2), (3, 3), (1, 0)])
@pytest.mark.parametrize("done", [1, 2, 5, 9])
def test_from_any_step_on_a_resumed_stream_yields_the_same_batches(tmp_path, files, workers, done):
    clips = write_tables(tmp_path / "data", files, rows=14, captions=2)
    feed, batches = loader(clips, Decoder(tmp_path / "log"), workers=workers, steps=12)
    unbroken, state = [], None
    for number, batch in enumerate(feed):
        unbroken.append((batch["names"], batch["pair_ids"].tolist()))
        batches.advance(*batch["reader"])
        if number + 1 == done:
            state = json.loads(json.dumps(batches.state_dict()))
    again, _ = loader(clips, Decoder(tmp_path / "log"), workers=workers, steps=12 - done, places=(done, state))
    assert [(batch["names"], batch["pair_ids"].tolist()) for batch in again] == unbroken[done:]


def test_a_bad_clip_is_tried_once_by_a_reader_and_the_next_pair_replaces_it(tmp_path):
    clips = write_tables(tmp_path / "data", 2, rows=6, captions=4)
    feed, _ = loader(clips, Decoder(tmp_path / "log", bad=("v2.mp4",)), steps=10, policy="skip")
    seen, bad = [], []
    for batch in feed:
        seen += batch["names"]
        bad += [video.source for video in batch["bad"]]
    assert len(seen) == 40 and "v2" not in seen and bad == ["v2.mp4"]
    assert (tmp_path / "log").read_text().split().count("v2.mp4") == 1


def test_where_no_clip_can_be_decoded_the_stream_ends(tmp_path):
    clips = write_tables(tmp_path / "data", 1, rows=5)
    feed, _ = loader(clips, Decoder(tmp_path / "log", bad=tuple(f"v{n}.mp4" for n in range(5))), workers=1, steps=2,
                     policy="skip")  # fmt: skip
    first = next(iter(feed))
    assert "pair_ids" not in first and len(first["bad"]) == 5
    assert first["error"] == "no clip of the stream can be decoded; see bad_videos.jsonl"


def test_a_worker_whose_clips_are_all_bad_says_which_they_are(tmp_path):
    clips = write_tables(tmp_path / "data", 2, rows=8)  # v1, v3, v5 and v7 are in the second file
    feed, _ = loader(clips, Decoder(tmp_path / "log", bad=tuple(f"v{n}.mp4" for n in (1, 3, 5, 7))), policy="skip")
    good, bad = [next(batches) for batches in [iter(feed)] for _ in range(2)]
    assert good["error"] is None and len(good["names"]) == 4 and len(bad["bad"]) == 4
    assert bad["error"].startswith(
        "no clip of the part of the stream of worker 2 of 2 (files [1], counted from 0) can"
    )


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (6, {"captions": [" "]}, "shard 1 of the stream: row 0 of the data set has an empty caption"),
        (6, {"video": None}, "has no video in column 'video'"),
        (1, {}, "worker 2 of 2 (files [1], counted from 0) has no row: lower --num_workers"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, rows, change, message):
    clips = write_tables(tmp_path / "data", 2, rows, change={"v1.mp4": change})
    feed, _ = loader(clips, Decoder(tmp_path / "log"), workers=2, batch=2)
    errors = [batch.get("error") for batch in feed]
    assert any(message in (error or "") for error in errors), errors


def test_a_video_at_an_address_is_read_when_it_is_decoded(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"x" * 321)
    change = {"v0.mp4": {"video": f"file://{tmp_path / 'clip.mp4'}"}, "v1.mp4": {"video": "file:///nowhere.mp4"}}
    clips = write_tables(tmp_path / "data", 1, rows=3, change=change)
    feed, _ = loader(clips, Decoder(tmp_path / "log"), workers=1, steps=1, batch=2, policy="skip")
    (batch,) = feed
    assert set(batch["names"]) <= {"clip", "v2"}
    address = f"file://{tmp_path / 'clip.mp4'}"
    assert clips.clip({"video": address}, 0).source == address
    assert clips.clip({"video": {"path": "s3://films/a.mp4", "bytes": None}}, 0).source == "s3://films/a.mp4"
    clips.places["window"] = ["end"]  # a table without a column `start`
    windowed = clips.clip({"video": f"file://{tmp_path / 'clip.mp4'}", "end": 5.0}, 0)
    assert (windowed.start, windowed.end) == (None, 5.0)


@pytest.mark.parametrize("feature", [datasets.Video(decode=False), datasets.Value("binary")])
def test_videos_in_tables_have_names_of_their_own(tmp_path, feature):
    content = [bytes([n]) * (100 + n) for n in range(8)]
    is_video = isinstance(feature, datasets.Video)
    videos = [{"bytes": video, "path": "a.mp4"} for video in content] if is_video else content
    features = datasets.Features({"video": feature, "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"video": videos, "caption": ["a dog"] * 8}, features=features)
    for file in range(2):
        table.shard(2, file).to_parquet(tmp_path / f"train-{file:05d}-of-00002.parquet")
    clips = StreamedClips(load_split(str(tmp_path), "train", streaming=True))
    feed, _ = loader(clips, Decoder(tmp_path / "log"), steps=2)
    seen = [name for batch in names(feed) for name in batch]
    assert len(set(seen)) == 8
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(100, 108))


@pytest.mark.parametrize(("files", "warned"), [(8, False), (3, True)])
def test_files_that_the_readers_cannot_divide_are_a_warning(tmp_path, monkeypatch, files, warned):
    clips, said = write_tables(tmp_path / "data", files, rows=files), []
    monkeypatch.setattr(run_retrieval.logger, "warning", lambda message, **_: said.append(message))
    options = TrainOptions("data", "runs", model_name_or_path="clip", streaming=True, steps_per_epoch=3)
    run_retrieval.stream_batches(options, SimpleNamespace(num_processes=2, process_index=1), clips)
    assert bool(said) == warned and all("3 files, which 4 workers" in message for message in said)


def test_the_query_bank_is_the_beginning_of_the_stream(tmp_path):
    clips = write_tables(tmp_path / "data", 2, rows=4, captions=2)
    assert clips.first_captions(3) == ["text 0 of 0", "text 1 of 0", "text 0 of 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True}, "--streaming needs --steps_per_epoch"),
        ({"steps_per_epoch": 3}, "--steps_per_epoch is for --streaming"),
        ({"streaming": True, "steps_per_epoch": 3, "max_train_clips": 5}, "--max_train_clips does not work with"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainOptions("data", "runs", model_name_or_path="clip", **options)


# --- whole runs ------------------------------------------------------------------------------------------------------

RECIPE = """
clip_config:
  projection_dim: 16
  vision_config: {image_size: 16, patch_size: 8, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
                  num_attention_heads: 2}
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 600
num_frames: 2
captions_per_video: one
train_sampling: jitter
batch_size: 8
num_train_epochs: 5
learning_rate: 1.0e-3
clip_learning_rate: 1.0e-3
num_workers: 2
logging_steps: 1
checkpointing_steps: 2
streaming: true
stream_shuffle: 4
steps_per_epoch: 4
"""

# Every process writes the names of its batches to a file of its own.
SPY = """
import json, os
import engine.trainer as t
step = t.Trainer._step
def spied(self, batch):
    with open(self.output_dir / f"names_{self.accelerator.process_index}.jsonl", "a") as file:
        file.write(json.dumps(batch["names"]) + "\\n")
    step(self, batch)
t.Trainer._step = spied
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """32 clips in four tables, as `train-00000-of-00004.jsonl`."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = ("--num_train", 32, "--num_validation", 4, "--num_test", 2, "--num_workers", 1)
    made = run_program("make_motion_clips.py", "--output", folder, *sizes)
    assert made.returncode == 0, made.stderr
    tables = folder / "tables"
    tables.mkdir()
    for split, files in (("train", 4), ("validation", 1)):
        rows = [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]
        rows = [{"video": str(folder / split / row["file_name"]), "captions": row["captions"]} for row in rows]
        for n in range(files):
            name = f"{split}-{n:05d}-of-{files:05d}.jsonl" if files > 1 else f"{split}.jsonl"
            (tables / name).write_text("".join(json.dumps(row) + "\n" for row in rows[n::files]))
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset_name: {tables}\n")
    return folder


def arguments(clips, output_dir, *options):
    return ("run_retrieval.py", "--config", clips / "recipe.yaml", "--output_dir", output_dir, *options)


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_of_two_processes_sees_every_row_once_and_resumes_with_the_same_losses(clips, tmp_path):
    (tmp_path / "whole").mkdir()
    done = run_processes(2, *arguments(clips, tmp_path / "whole", "--save_total_limit", "null"), code=SPY)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    seen = []
    for rank in range(2):
        lines = (tmp_path / "whole" / f"names_{rank}.jsonl").read_text().splitlines()
        assert len(lines) == 20
        seen += [name for line in lines[:4] for name in json.loads(line)]  # 4 steps of 8 pairs
    assert sorted(seen) == [f"train_{n:05d}" for n in range(32)]
    assert len(losses(tmp_path / "whole")) == 20
    assert len((tmp_path / "whole" / "query_bank.txt").read_text().splitlines()) >= 32

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for folder in (tmp_path / "resumed" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > 8:
            shutil.rmtree(folder)
    resume = ("--resume_from_checkpoint", "latest")
    done = run_processes(2, *arguments(clips, tmp_path / "resumed", *resume), code=SPY)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    for rank in range(2):
        lines = (tmp_path / "resumed" / f"names_{rank}.jsonl").read_text().splitlines()
        assert lines[20:] == lines[8:20]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")

    other = run_program(*arguments(clips, tmp_path / "resumed", *resume))
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "was written with processes 2, now it is 1" in other.stderr.strip().splitlines()[-1]


def test_a_killed_run_goes_on_to_the_same_bytes(clips, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_program(*arguments(clips, whole))
    assert done.returncode == 0, done.stderr
    for moment in (3, 11):
        run = RunningProgram(*arguments(clips, killed, "--resume_from_checkpoint", "latest"))
        log = killed / "training_log.jsonl"
        wait_until(lambda moment=moment, log=log: log.is_file() and log.read_text().count('"loss"') >= moment, run)
        run.send_signal_to_group(signal.SIGKILL)
        assert run.wait(60) == -signal.SIGKILL
    done = run_program(*arguments(clips, killed, "--resume_from_checkpoint", "latest"))
    assert done.returncode == 0 and "from step_" in done.stderr, done.stderr
    assert losses(killed) == losses(whole) and len(losses(whole)) == 20
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((whole / "all_results.json").read_text())["train_pairs"] is None


def test_a_dry_run_says_what_is_known_of_a_stream(clips, tmp_path):
    done = run_program(*arguments(clips, tmp_path, "--dry_run", "true"))
    assert done.returncode == 0, done.stderr
    assert "train split 'train': a stream of 4 files; its clips are not known" in done.stdout
    assert "steps of 8 pairs: 20, 4 an epoch" in done.stdout


def test_help_says_what_a_stream_cannot_do():
    text = run_program("run_retrieval.py", "--help").stdout
    option = " ".join(text.rpartition("--streaming bool")[2].partition("--stream_shuffle")[0].split())
    for word in ("shuffled within stream_shuffle", "number of steps is unknown", "query_bank.txt holds the first"):
        assert word in option
