# SPDX-License-Identifier: Apache-2.0
"""Shared memory into which workers write batches of frames: nothing large is copied twice, allocated or sent.

A batch of 128 clips of 12 frames is 231 MB. New memory of that size costs four times its copy (every page is a fault),
and so does a loader that sends each batch in a new file. So the memory is taken once, before the workers start: every
worker has `depth` slots, fills them in turn, straight from the cache's files, and sends the number of a slot.

A worker has at most `prefetch_factor` batches ahead of the one that the trainer holds, so a batch is whole until the
next one is asked for, and no longer. Linux only: workers inherit the memory by a fork.
"""

import mmap
import multiprocessing
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info


def can_share_frames() -> bool:
    """Whether workers inherit memory here."""
    return sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()


class FrameRing:
    """Slots for batches of frames.

    Args:
        batch: clips of a batch, N. shape: of a clip, (T,3,H,W). workers: 0 for the process itself. prefetch: batches
            that a worker prepares ahead.
    """

    def __init__(self, batch: int, shape: tuple[int, ...], workers: int, prefetch: int):
        self.batch, self.shape = batch, tuple(shape)
        self.depth = prefetch + 1 if workers else 1
        self.slots = max(1, workers) * self.depth
        self.count = 0  # batches that this process has written
        # Anonymous shared memory is not bounded by the size of /dev/shm, which is 64 MB in a container.
        self.memory = mmap.mmap(-1, self.slots * batch * int(np.prod(self.shape)))
        self.frames = torch.frombuffer(self.memory, dtype=torch.uint8).view(self.slots, batch, *self.shape)

    @staticmethod
    def size(batch: int, shape: tuple[int, ...], workers: int, prefetch: int) -> int:
        """Bytes of such a ring."""
        return max(1, workers) * (prefetch + 1 if workers else 1) * batch * int(np.prod(shape))

    def fits(self, clip) -> bool:
        """Whether a clip's frames have the shape of a slot's; there may be fewer of them."""
        shape = tuple(clip.frames.shape) if hasattr(clip, "frames") else clip.shape
        return 0 < shape[0] <= self.shape[0] and shape[1:] == self.shape[1:]

    def write(self, clips: list) -> dict:
        """Lay at most N clips down -> `slot`, `rows` and `frame_mask` (n,T). Absent frames are zero."""
        worker = get_worker_info()
        slot = (worker.id if worker is not None else 0) * self.depth + self.count % self.depth
        self.count += 1
        target = self.frames[slot].numpy()  # (N,T,3,H,W)
        mask = torch.zeros(len(clips), self.shape[0], dtype=torch.long)
        for row, clip in enumerate(clips):
            if hasattr(clip, "frames"):
                length = len(clip.frames)
                target[row, :length] = clip.frames.numpy()
            else:
                length = clip.read_into(target[row])
            target[row, length:] = 0
            mask[row, :length] = 1
        return {"slot": slot, "rows": len(clips), "frame_mask": mask}

    def resolve(self, batch: dict) -> dict:
        """A batch as `write` made it -> one with `pixel_values_videos` (n,T,3,H,W)."""
        if "slot" in batch:
            batch["pixel_values_videos"] = self.frames[batch.pop("slot"), : batch.pop("rows")]
        return batch

    def pin(self) -> bool:
        """Let a GPU copy straight from the slots. Returns whether the driver agreed; it works without, more slowly."""
        return int(torch.cuda.cudart().cudaHostRegister(self.frames.data_ptr(), self.frames.numel(), 0)) == 0


class RingLoader(DataLoader):
    """A `DataLoader` whose collator writes frames into a ring (or None). A batch is whole until the next is taken."""

    def __init__(self, *arguments, ring: FrameRing | None, **options):
        workers = options.get("num_workers", 0)
        if ring is not None and workers:
            options["multiprocessing_context"] = "fork"
        super().__init__(*arguments, **options)
        self.ring = ring

    def __iter__(self):
        for batch in super().__iter__():
            yield batch if self.ring is None else self.ring.resolve(batch)
