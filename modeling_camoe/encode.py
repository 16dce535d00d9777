# SPDX-License-Identifier: Apache-2.0
"""Many clips or captions -> vectors: workers decode while the model runs.

Evaluation, search and the pipeline all encode here. Frames travel from the workers as uint8 and are normalised on the
model's device. K = E*D is the length of a folded vector; B clips, N captions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .frames import VideoDecodingError
from .video_inputs import describe_video


@dataclass(frozen=True)
class BadVideo:
    """A clip that could not be decoded, or only around its damage: position in the given list, name and cause."""

    index: int
    source: str
    cause: str
    is_used: bool = False  # with frames from around the damage


@dataclass(frozen=True)
class VideoBatch:
    """One batch of `iter_encoded_videos`.

    Args:
        indices: positions in the given list, one per row.
        vectors: (b,K) float32 on the CPU.
        gate_weights: (b,E) float32 on the CPU.
        times: for each row, the seconds at which its frames were taken.
        bad: clips of this batch that could not be decoded.
        damaged: clips of this batch whose frames were taken around damage.
        kept: for each row, what `keep` made of its frames.
    """

    indices: list[int]
    vectors: torch.Tensor
    gate_weights: torch.Tensor
    times: list[tuple[float, ...]]
    bad: list[BadVideo]
    damaged: list[BadVideo] = field(default_factory=list)
    kept: list = field(default_factory=list)


@dataclass(frozen=True)
class EncodedVideos:
    """All clips, in the given order: row r is clip `indices[r]`; `bad` lists the missing ones."""

    indices: list[int]
    vectors: torch.Tensor  # (B,K)
    gate_weights: torch.Tensor  # (B,E)
    bad: list[BadVideo]
    damaged: list[BadVideo] = field(default_factory=list)  # frames were taken around their damage


def note_damage(sampled, index: int, source: str) -> list[BadVideo]:
    """A [`BadVideo`] if frames were taken around damage, else nothing."""
    parts = ", ".join(f"{start:.3f} to {end:.3f} s" for start, end in getattr(sampled, "skipped_damage", ()))
    cause = f"{source}: damaged from {parts}: frames are taken around it"
    return [BadVideo(index, source, cause, is_used=True)] if parts else []


class ClipFrames(Dataset):
    """Clips, decoded on access: a decoder is opened and closed inside `__getitem__`, in the process that calls it."""

    def __init__(self, clips: Sequence, video_processor):
        self.clips = clips
        self.video_processor = video_processor

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int):
        clip = self.clips[index]
        try:
            sampled = self.video_processor.decode(clip)
            return index, sampled, note_damage(sampled, index, describe_video(clip))
        except VideoDecodingError as error:
            return BadVideo(index, describe_video(clip), str(error))


class _Collate:
    def __init__(self, video_processor, keep=None):
        self.video_processor, self.keep = video_processor, keep

    def __call__(self, items):
        bad = [item for item in items if isinstance(item, BadVideo)]
        good = [item for item in items if not isinstance(item, BadVideo)]
        if not good:
            return [], None, [], bad, [], []
        clips = [clip for _, clip, _ in good]
        inputs = self.video_processor(videos=clips, do_rescale=False, do_normalize=False, return_tensors="pt")
        damaged = [note for _, _, notes in good for note in notes]
        kept = [] if self.keep is None else [self.keep(clip) for clip in clips]
        return [index for index, *_ in good], dict(inputs), [clip.times for clip in clips], bad, damaged, kept


def iter_encoded_videos(
    model,
    processor,
    clips: Sequence,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    on_bad_video: str = "raise",
    progress: str | None = None,
    decoder=None,
    keep: Callable | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterator[VideoBatch]:
    """Encode clips batch by batch, in order, while workers decode the next ones.

    Args:
        model: [`CAMoEModel`]; runs where it is and in the mode it is in (put it in `eval()`).
        processor: its [`CAMoEProcessor`], which decides how many frames are sampled, how, and at which size.
        clips: videos in any form the video processor takes; a list, or anything with a length and an index.
        batch_size: clips per forward pass.
        num_workers: processes that decode; 0 decodes in this one.
        on_bad_video: "raise" stops at a clip that cannot be decoded, "skip" lists it in the batch.
        progress: label of a progress bar, or None for none.
        decoder: has `decode(clip)`, used in place of the processor's video processor (a cache of frames).
        keep: called in the worker with the decoded frames of each clip; what it returns comes with the batch.
        worker_init_fn: called in each worker with its number, as a `DataLoader` does.

    Raises:
        VideoDecodingError: naming the file and the cause.
        ValueError: the processor is not this model's; names what differs.
    """
    if on_bad_video not in ("raise", "skip"):
        raise ValueError(f"`on_bad_video` is {on_bad_video!r}; choose 'raise' or 'skip'.")
    processor.check(model.config)
    loader = DataLoader(
        ClipFrames(clips, decoder or processor.video_processor),
        batch_size=batch_size,
        num_workers=min(num_workers, len(clips)),
        collate_fn=_Collate(processor.video_processor, keep),
        pin_memory=model.device.type == "cuda",
        worker_init_fn=worker_init_fn,
    )
    with tqdm(total=len(clips), desc=progress, unit="clip", disable=progress is None) as bar:
        for indices, inputs, times, bad, damaged, kept in loader:
            if bad and on_bad_video == "raise":
                raise VideoDecodingError(bad[0].cause)
            if inputs is not None:
                with torch.inference_mode():
                    inputs = {name: tensor.to(model.device, non_blocking=True) for name, tensor in inputs.items()}
                    output = model.get_video_features(**inputs)
                vectors, gates = output.pooler_output.float().cpu(), output.gate_weights.float().cpu()
            else:
                vectors = torch.empty(0, model.config.projection_dim * len(model.config.experts), dtype=torch.float32)
                gates = torch.empty(0, len(model.config.experts), dtype=torch.float32)
            yield VideoBatch(indices, vectors, gates, times, bad, damaged, kept)
            bar.update(len(indices) + len(bad))


def encode_videos(model, processor, clips: Sequence, **options) -> EncodedVideos:
    """Encode all clips, with the options of `iter_encoded_videos`."""
    batches = list(iter_encoded_videos(model, processor, clips, **options))
    num_experts = len(model.config.experts)
    return EncodedVideos(
        indices=[index for batch in batches for index in batch.indices],
        vectors=torch.cat([b.vectors for b in batches] or [torch.empty(0, model.config.projection_dim * num_experts)]),
        gate_weights=torch.cat([b.gate_weights for b in batches] or [torch.empty(0, num_experts)]),
        bad=[bad for batch in batches for bad in batch.bad],
        damaged=[damaged for batch in batches for damaged in batch.damaged],
    )


def encode_texts(
    model, processor, captions: Sequence, *, batch_size: int = 256, progress: str | None = None
) -> torch.Tensor:
    """Captions (strings, or dictionaries expert -> text) -> folded vectors (N,K), float32 on the CPU.

    Captions of similar length are encoded together, so that little is padding; rows stay in the given order.
    """
    processor.check(model.config)
    streams = processor.streams_of(captions)
    order = sorted(range(len(streams)), key=lambda n: max(len(text) for text in streams[n]))
    num_dims = model.config.projection_dim * len(model.config.experts)
    vectors = torch.empty(len(streams), num_dims, dtype=torch.float32)
    with tqdm(total=len(order), desc=progress, unit="caption", disable=progress is None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = [dict(zip(model.config.experts, streams[n], strict=True)) for n in rows]
            with torch.inference_mode():
                inputs = processor(text=texts, return_tensors="pt").to(model.device)
                vectors[rows] = model.get_text_features(**inputs).pooler_output.float().cpu()
            bar.update(len(rows))
    return vectors


__all__ = ["BadVideo", "EncodedVideos", "VideoBatch", "encode_texts", "encode_videos", "iter_encoded_videos"]
