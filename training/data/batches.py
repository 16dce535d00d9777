# SPDX-License-Identifier: Apache-2.0
"""The training batches: which caption-clip pairs a step sees, and how they are collated.

This depends on (seed, epoch, position) alone, not on the number of processes or workers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from modeling_camoe.encode import BadVideo, note_damage
from modeling_camoe.frames import VideoDecodingError, describe_source

from .captioned_clips import CaptionedClips
from .errors import UserError
from .frame_ring import FrameRing


class RunBatchSampler(Sampler):
    """The batches of a whole run for one process: lists of (epoch, position) keys, shuffled by (seed, epoch).

    A step has `accumulate` contrastive batches of `batch_size` pairs over all W processes. Rank r takes the r-th of W
    equal parts of each batch, so what a step sees does not depend on W. An incomplete step at the end of an epoch is
    dropped. One iteration covers all epochs, so workers prefetch the next epoch while the current one ends.

    Args:
        length: number of pairs. seed: of the run. rank, world: of this process.

    Raises:
        UserError: the batch cannot be divided over the processes, or is larger than the data.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1):
        if batch_size % world != 0:
            raise UserError(f"option 'batch_size' {batch_size} must be a multiple of the number of processes, {world}")
        if length < batch_size * accumulate:
            what = f"option 'batch_size' {batch_size}"
            what += f" times 'gradient_accumulation_steps' {accumulate}" if accumulate > 1 else ""
            raise UserError(f"{what} is more than the {length} training pairs")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.start_from(epoch=0, done=0, steps=len(self))

    @property
    def order(self) -> dict:
        """What determines the order of the pairs."""
        return {
            "training pairs": self.length,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "seed": self.seed,
        }

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one step over all processes."""
        return self.batch_size * self.accumulate

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.length // self.pairs_per_step

    def start_from(self, epoch: int, done: int, steps: int):
        """The next iteration starts after `done` steps of `epoch`, and ends `steps` steps later."""
        self.start = (epoch, done, steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done, left = self.start
        share = self.batch_size // self.world
        while left > 0:
            order = self._shuffled(epoch)
            for step in range(done, min(len(self), done + left)):
                starts = [
                    step * self.pairs_per_step + batch * self.batch_size + self.rank * share
                    for batch in range(self.accumulate)
                ]
                yield [(epoch, position) for start in starts for position in order[start : start + share].tolist()]
            left -= len(self) - done
            epoch, done = epoch + 1, 0

    def _shuffled(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        return torch.randperm(self.length, generator=generator)


class TrainPairs(Dataset):
    """Video-caption pairs, decoded on access. An item depends only on its key (epoch, position) and the seed.

    Args:
        split: the captioned clips. decoder: a video processor or a frame cache.
        sampling: "jitter", "uniform" or "keyframe".
        captions_per_video: "one": a random caption of each clip per epoch; "all": every caption is a pair.
        on_bad_video: "raise", or "skip": the next clip that can be decoded replaces a bad one, with one of its own
            captions. All workers of a process know of a bad clip after the first one that met it.
    """

    def __init__(
        self,
        split: CaptionedClips,
        decoder,
        seed: int,
        sampling: str = "jitter",
        captions_per_video: str = "one",
        on_bad_video: str = "raise",
    ):
        self.split = split
        self.decoder = decoder
        self.seed = seed
        self.sampling = sampling
        self.on_bad_video = on_bad_video
        self.ends = np.cumsum(split.caption_counts) if captions_per_video == "all" else None  # (V,) pairs up to a clip
        self.bad = torch.zeros(len(split.clips), dtype=torch.uint8).share_memory_()  # 1: could not be decoded

    def __len__(self) -> int:
        return len(self.split.clips) if self.ends is None else int(self.ends[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        first, given = position, None
        if self.ends is not None:
            first = int(np.searchsorted(self.ends, position, side="right"))
            given = position - int(self.ends[first - 1] if first else 0)
        bad = []
        for attempt, video in self._candidates(first):
            caption, frame_seed = given, 0
            if caption is None or attempt > 0 or self.sampling == "jitter":  # making a generator takes time
                # One per (seed, epoch, position, attempt): workers and resumes do not change what it draws.
                generator = torch.Generator().manual_seed(hash((self.seed, epoch, position, attempt)) % 2**63)
                if caption is None or attempt > 0:
                    caption = int(torch.randint(int(self.split.caption_counts[video]), (1,), generator=generator))
                if self.sampling == "jitter":
                    frame_seed = int(torch.randint(2**31, (1,), generator=generator))
            try:
                item = self._load(video, caption, frame_seed)
            except VideoDecodingError as error:
                self.bad[video] = 1
                bad.append(BadVideo(video, describe_source(self.split.clips[video]), str(error)))
                if self.on_bad_video == "raise":
                    break
            except OSError as error:  # a cache cannot be written; raised in a worker, it would be a page of traceback
                return {"video": None, "bad": bad, "error": str(error)}
            else:
                bad += note_damage(item.get("clip"), video, describe_source(self.split.clips[video]))
                return {**item, "video": video, "text": self.split.captions[video][caption], "bad": bad}
        return {"video": None, "bad": bad}

    def _candidates(self, first: int) -> Iterator[tuple[int, int]]:
        """(attempt, clip): this clip, then those after it, without the ones that are known to be bad."""
        flags, count = self.bad.numpy(), len(self.bad)
        if not flags[first]:
            yield 0, first
        if flags.all():
            return
        for attempt in range(1, count):
            video = (first + attempt) % count
            if not flags[video]:
                yield attempt, video

    def _load(self, video: int, caption: int, seed: int) -> dict:
        # A frame cache is read by the collator, straight into the batch.
        load = getattr(self.decoder, "open", self.decoder.decode)
        clip = load(self.split.clips[video], sampling=self.sampling, seed=seed)
        return {"clip": clip, "texts": self.split.streams[video][caption]}


@dataclass
class PairCollator:
    """Pairs -> `input_ids`, `attention_mask` (N,E,L), uint8 pixels (N,T,3,H,W), `frame_mask`, `pair_ids` (N,2).

    With a [`FrameRing`], the pixels lie in it and the batch has their `slot` instead.
    """

    processor: object
    experts: list[str]
    ring: FrameRing | None = None

    def __call__(self, items: list[dict]) -> dict:
        items, failures = split_failures(items)
        if not items:
            return failures
        texts = [dict(zip(self.experts, item["texts"], strict=True)) for item in items]
        clips = [item["clip"] for item in items]
        # NumPy reads nested lists four times as fast as torch does.
        tokens = self.processor(text=texts, return_tensors="np")
        batch = {name: torch.as_tensor(array) for name, array in tokens.items()}
        if self.ring is not None and all(self.ring.fits(clip) for clip in clips):
            batch |= self.ring.write(clips)
        else:
            frames = [clip if hasattr(clip, "times") else clip.read() for clip in clips]
            batch |= self.processor(
                videos=frames, videos_kwargs={"do_rescale": False, "do_normalize": False}, return_tensors="pt"
            )
        return {**batch, "pair_ids": pair_ids(items), **failures}


def pair_ids(items: list[dict]) -> torch.Tensor:
    """(N,2) integers: the number of the clip, and a hash of the caption as people compare captions."""
    plain = [" ".join(item["text"].split()).casefold().encode() for item in items]
    hashes = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True) for text in plain]
    return torch.tensor([[item["video"], text] for item, text in zip(items, hashes, strict=True)])


def split_failures(items: list[dict]) -> tuple[list[dict], dict]:
    """Items of `TrainPairs` -> the pairs, and {"bad": clips that could not be decoded, "error": e.g. a full disk}."""
    bad = [bad for item in items for bad in item["bad"]]
    errors = [item["error"] for item in items if "error" in item]
    return [item for item in items if item["video"] is not None], {"bad": bad, "error": errors[0] if errors else None}
