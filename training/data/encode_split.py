# SPDX-License-Identifier: Apache-2.0
"""A split -> folded vectors of its clips and captions, encoded by all processes of an Accelerate run.

Each of W processes encodes every W-th clip and caption. All of them get all rows, in the order of the split, so
results do not depend on W.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from modeling_camoe.encode import BadVideo, encode_texts, encode_videos

from .captioned_clips import CaptionedClips
from .workers import leave_signals_to_the_parent


@dataclass
class EncodedSplit:
    """Vectors of one split.

    Args:
        text_vectors: (N,K). video_vectors: (M,K). gate_weights: (M,E).
        video_of_text: (N,) row of each caption's clip in `video_vectors`.
        video_rows: (M,) position of each row's clip in the split.
        bad: clips that could not be decoded; they are left out with their captions.
        captions: N strings.
        damaged: clips whose frames were taken around damage.
    """

    text_vectors: torch.Tensor
    video_vectors: torch.Tensor
    gate_weights: torch.Tensor
    video_of_text: torch.Tensor
    video_rows: list[int]
    bad: list[BadVideo]
    captions: list[str]
    damaged: list[BadVideo] = dataclasses.field(default_factory=list)


@dataclass
class Part(Sequence):
    """Some items of a sequence, which are read when they are asked for: videos in a table stay on disk."""

    items: Sequence
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, n: int):
        return self.items[self.positions[n]]


def encode_split(
    accelerator,
    model,
    processor,
    split: CaptionedClips,
    captions: str = "first",
    batch_size: int = 32,
    num_workers: int = 2,
    on_bad_video: str = "raise",
    progress: str | None = None,
    decoder=None,
) -> EncodedSplit:
    """Encode the clips and the "first" or "all" captions of a split; `model` is unwrapped and in `eval()`.

    The options are those of `iter_encoded_videos`. The model runs in the run's number format (`--mixed_precision`);
    vectors are float32.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    label = progress if accelerator.is_main_process else None
    mine = range(rank, len(split.clips), world)
    with accelerator.autocast():
        encoded = encode_videos(
            model,
            processor,
            Part(split.clips, mine),
            batch_size=batch_size,
            num_workers=num_workers,
            on_bad_video=on_bad_video,
            progress=label and f"{label}: clips",
            decoder=decoder,
            worker_init_fn=leave_signals_to_the_parent,
        )
    rows = [mine[i] for i in encoded.indices]
    bad = [dataclasses.replace(b, index=mine[b.index]) for b in [*encoded.bad, *encoded.damaged]]
    video_rows, (video_vectors, gate_weights) = _gather_rows(
        accelerator, rows, [encoded.vectors, encoded.gate_weights]
    )
    bad = sorted(gather_object(bad), key=lambda b: b.index) if world > 1 else bad

    texts, streams, video_of_text = split.flat(captions)
    position = {row: m for m, row in enumerate(video_rows)}
    kept = [n for n, video in enumerate(video_of_text) if video in position]
    mine = kept[rank::world]
    tagged = [dict(zip(model.config.experts, streams[n], strict=True)) for n in mine]
    with accelerator.autocast():
        vectors = encode_texts(model, processor, tagged, progress=label and f"{label}: captions")
    text_rows, (text_vectors,) = _gather_rows(accelerator, mine, [vectors])
    return EncodedSplit(
        text_vectors=text_vectors,
        video_vectors=video_vectors,
        gate_weights=gate_weights,
        video_of_text=torch.tensor([position[video_of_text[n]] for n in text_rows], dtype=torch.long),
        video_rows=video_rows,
        bad=[b for b in bad if not b.is_used],
        damaged=[b for b in bad if b.is_used],
        captions=[texts[n] for n in text_rows],
    )


def _gather_rows(accelerator, rows: list[int], tensors: list[torch.Tensor]) -> tuple[list[int], list[torch.Tensor]]:
    """The rows of all processes, sorted by position."""
    if accelerator.num_processes > 1:
        parts = gather_object([(rows, tensors)])
        rows = [row for part, _ in parts for row in part]
        tensors = [torch.cat(column) for column in zip(*(part for _, part in parts), strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [rows[i] for i in order], [tensor[order] for tensor in tensors]
