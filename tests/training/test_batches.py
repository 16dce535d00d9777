# SPDX-License-Identifier: Apache-2.0
"""What a training step sees: bad clips are replaced, same captions are found, frames lie in shared memory."""

import numpy as np
import pytest
import torch

from data.batches import PairCollator, RunBatchSampler, TrainPairs, pair_ids
from data.captioned_clips import CaptionedClips
from data.frame_ring import FrameRing, RingLoader
from data.workers import leave_signals_to_the_parent
from modeling_camoe.frames import Clip, SampledFrames, VideoDecodingError


class Decoder:
    """Frames filled with the number of the clip; `bad` ones raise. Every call adds a line to a file."""

    def __init__(self, log, bad=()):
        self.log, self.bad = log, bad

    def decode(self, clip, sampling, seed):
        with open(self.log, "a") as file:
            file.write(clip.source + "\n")
        if clip.source in self.bad:
            raise VideoDecodingError(f"{clip.source}: damaged")
        return SampledFrames(torch.full((1 + int(clip.source) % 2, 3, 4, 4), int(clip.source)).byte(), (0.0,), 1.0)


def split(num_clips: int, captions_each: int) -> CaptionedClips:
    names = [str(n) for n in range(num_clips)]
    captions = [[f"caption {c} of {name}" for c in range(captions_each)] for name in names]
    return CaptionedClips(
        [Clip(name) for name in names], names, captions, [[[t] for t in texts] for texts in captions]
    )


class Processor:
    def __call__(self, text=None, return_tensors=None):
        return {"input_ids": torch.tensor([[len(one["fusion"])] for one in text])}


def loader(pairs, workers, ring_prefetch=2, batch=4, epochs=1):
    batches = RunBatchSampler(len(pairs), batch, seed=0)
    batches.start_from(0, 0, epochs * len(batches))
    ring = FrameRing(batch, (2, 3, 4, 4), workers, ring_prefetch)
    return RingLoader(
        pairs, batch_sampler=batches, collate_fn=PairCollator(Processor(), ["fusion"], ring), num_workers=workers,
        prefetch_factor=ring_prefetch if workers else None, worker_init_fn=leave_signals_to_the_parent, ring=ring,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_with_twenty_captions_is_decoded_once_in_a_run_and_the_next_clip_replaces_it(tmp_path, workers):
    log = tmp_path / "log"
    pairs = TrainPairs(split(6, 20), Decoder(log, bad=("2", "3")), 0, "uniform", "all", on_bad_video="skip")
    seen, bad = [], []
    for batch in loader(pairs, workers, epochs=2):
        seen += batch["pair_ids"][:, 0].tolist()
        bad += [video.index for video in batch["bad"]]
    decoded = log.read_text().split()
    # Each worker may have met a bad clip before it heard of the other's: never more than one decode a worker.
    assert all(1 <= decoded.count(name) <= max(1, workers) for name in ("2", "3"))
    assert sorted(set(bad)) == [2, 3]
    assert len(seen) == 240 and seen.count(4) == 3 * 40 and not {2, 3} & set(seen)


def test_a_replacement_does_not_depend_on_what_was_known_to_be_bad(tmp_path):
    options = (Decoder(tmp_path / "log", bad=("2", "3")), 0, "uniform", "all", "skip")
    fresh, warm = TrainPairs(split(6, 3), *options), TrainPairs(split(6, 3), *options)
    warm.bad[2] = 1
    for position in range(len(fresh)):
        fresh.bad.zero_()
        ours, theirs = fresh[0, position], warm[0, position]
        assert (ours["video"], ours["text"]) == (theirs["video"], theirs["text"])


def test_where_all_clips_are_bad_each_is_tried_once(tmp_path):
    log = tmp_path / "log"
    pairs = TrainPairs(split(5, 4), Decoder(log, bad=tuple("01234")), 0, "uniform", "all", "skip")
    items = [pairs[0, position] for position in range(20)]
    assert all(item["video"] is None for item in items)
    assert sorted(log.read_text().split()) == list("01234")


def test_pairs_are_the_captions_of_all_clips_in_order(tmp_path):
    data = split(3, 2)
    data.captions[1].append("one more")
    data.streams[1].append(["one more"])
    pairs = TrainPairs(data, Decoder(tmp_path / "log"), 0, "uniform", "all")
    assert [pairs[0, n]["text"] for n in range(len(pairs))] == [text for texts in data.captions for text in texts]


def test_captions_that_differ_in_case_and_spaces_only_have_the_same_number():
    texts = ["A dog  runs", "a dog runs", "a dog ran", "A DOG RUNS "]
    ids = pair_ids([{"video": n, "text": text} for n, text in enumerate(texts)])
    assert ids[:, 0].tolist() == [0, 1, 2, 3]
    assert (ids[:, None, 1] == ids[:, 1]).int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 2])
def test_a_batch_in_shared_memory_is_whole_until_the_next_one_is_taken(tmp_path, workers, prefetch):
    pairs = TrainPairs(split(40, 1), Decoder(tmp_path / "log"), 0, "uniform", "one")
    for batch in loader(pairs, workers, prefetch, epochs=3):
        for _ in range(3):  # workers go on meanwhile
            videos, frames, mask = batch["pair_ids"][:, 0], batch["pixel_values_videos"], batch["frame_mask"]
            assert torch.equal(mask, torch.stack([torch.ones_like(videos), videos % 2], dim=1))
            assert torch.equal(frames.amax(dim=(2, 3, 4)).long(), mask * videos[:, None])
            assert torch.equal(frames.amin(dim=(2, 3, 4)).long(), mask * videos[:, None])


def test_the_order_takes_eight_bytes_a_pair():
    batches = RunBatchSampler(1000, 10, seed=3)
    assert batches._shuffled(0).dtype == torch.int64
    keys = [key for batch in batches for key in batch]
    assert sorted(position for _, position in keys) == list(range(1000)) and type(keys[0][1]) is int
    assert np.mean([position == n for n, (_, position) in enumerate(keys)]) < 0.1
