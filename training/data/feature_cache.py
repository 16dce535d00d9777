# SPDX-License-Identifier: Apache-2.0
"""A cache of CLIP's embeddings on disk, for training the head on a frozen CLIP: everything is embedded once.

Before the first step, the processes share the work of embedding: every clip that is not stored yet goes through CLIP's
vision tower, every text through its text tower. From then on a pair is (T,D) frame embeddings and (E,D) text
embeddings, a few kilobytes, and a step runs the head alone. A second run on the same clips with the same CLIP (another
seed, other experts, another loss) starts at once.

File names are hashes of the clip or the texts, the sampling settings and CLIP's weights, so another CLIP never reads
the wrong embeddings. Frames are stored per clip, (T',D) with T' as in frame_cache.py; texts in shards of (n,D).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from modeling_camoe.encode import BadVideo
from modeling_camoe.frames import VideoDecodingError, describe_source

from .batches import TrainPairs, pair_ids, split_failures
from .captioned_clips import CaptionedClips
from .encode_split import EncodedSplit
from .errors import UserError
from .frame_cache import ArrayFolder, clip_identity, decode_all, frame_settings, jitter_positions


TEXTS_PER_SHARD = 4096  # 8 MB at 512 dimensions in float32


class FeatureCache:
    """Frame and text embeddings of one frozen CLIP. Reading needs no model, so workers can read.

    Args:
        folder: created if it does not exist. model: [`CAMoEModel`] with the frozen CLIP. processor: its processor.
        precision: the number format in which CLIP runs: "no" (float32), "bf16" or "fp16".
    """

    def __init__(self, folder: str, model, processor, precision: str = "no"):
        self.arrays = ArrayFolder(folder)
        self.clip_weights = [weights_hash(model.clip), precision]
        self.video_processor = processor.video_processor
        vocabulary = sorted(processor.tokenizer.get_vocab().items())  # sorted: its order differs between processes
        self.text_settings = [hash_text(str(vocabulary)), processor.max_length]
        self.rows: dict[str, tuple[int, int]] = {}  # text -> shard, row
        self.shards: list[np.ndarray] = []
        self.causes: dict[int, str] = {}  # hash of a clip's identity -> why it could not be decoded

    # --- writing -----------------------------------------------------------------------------------------------------

    def fill(self, accelerator, model, processor, split: CaptionedClips, sampling: str, batch_size: int, workers: int):
        """Store what is missing of a split. All processes must call this; each does its share.

        Args:
            model: on its device; put into eval mode. sampling: of the frames. batch_size: clips per forward pass.

        Raises:
            UserError: the disk is full.
        """
        model.eval()
        try:
            self._fill_frames(accelerator, model, split, sampling, batch_size, workers)
            self._fill_texts(accelerator, model, processor, split, batch_size)
        except OSError as error:
            raise UserError(f"cannot write the feature cache {self.arrays.folder}: {error}") from error
        accelerator.wait_for_everyone()
        self._open_texts(self._text_shards(split))

    def _fill_frames(self, accelerator, model, split, sampling, batch_size, workers):
        missing = [
            index
            for index, clip in enumerate(split.clips)
            if self.arrays.load(self._frames_path(clip, sampling)) is None
        ]
        accelerator.wait_for_everyone()  # all must know what is missing before the first one writes
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        decoded = DataLoader(
            _DecodedClips(split.clips, mine, self.video_processor, sampling),
            batch_size=batch_size,
            num_workers=min(workers, len(mine)),
            collate_fn=list,
        )
        bad = []
        with tqdm(
            total=len(mine), desc="embedding clips", unit="clip", disable=_hide_progress(accelerator, missing)
        ) as bar:
            for items in decoded:
                bad += [item for item in items if isinstance(item, BadVideo)]
                good = [item for item in items if not isinstance(item, BadVideo)]
                if good:
                    embeds = embed_frames(accelerator, model, torch.cat([frames for _, frames in good]))
                    counts = [len(frames) for _, frames in good]
                    for (index, _), rows in zip(good, embeds.split(counts), strict=True):
                        self.arrays.store(self._frames_path(split.clips[index], sampling), rows.numpy())
                bar.update(len(items))
        for video in gather_object(bad):
            self.causes[str(clip_identity(split.clips[video.index]))] = video.cause

    def _fill_texts(self, accelerator, model, processor, split, batch_size):
        shards = list(self._text_shards(split))
        mine = shards[accelerator.process_index :: accelerator.num_processes]
        for texts, path in tqdm(mine, desc="embedding texts", unit="shard", disable=_hide_progress(accelerator, mine)):
            if self.arrays.load(path) is None:
                self.arrays.store(path, embed_texts(accelerator, model, processor, texts, 8 * batch_size).numpy())

    # --- reading -----------------------------------------------------------------------------------------------------

    def frames(self, clip, sampling: str, seed: int | None = None) -> torch.Tensor:
        """(T',D) embeddings of a clip's frames, at most T.

        Raises:
            VideoDecodingError: the clip could not be decoded when the cache was filled.
        """
        embeds = self.arrays.load(self._frames_path(clip, sampling))
        if embeds is None:
            unknown = f"{describe_source(clip)}: changed since it was embedded"
            raise VideoDecodingError(self.causes.get(str(clip_identity(clip)), unknown))
        if sampling == "jitter":
            embeds = embeds[jitter_positions(len(embeds), self.video_processor.num_frames, seed)]
        return torch.from_numpy(np.array(embeds))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """(E,D) embeddings of the E texts of a caption."""
        rows = (self.rows[text] for text in texts)
        return torch.from_numpy(np.stack([self.shards[shard][row] for shard, row in rows]))

    def _frames_path(self, clip, sampling: str):
        return self.arrays.path(
            "frames", self.clip_weights, clip_identity(clip), frame_settings(self.video_processor, sampling)
        )

    def _text_shards(self, split: CaptionedClips):
        """Shards of the distinct texts of a split, sorted by length, each with its file."""
        distinct = {text for captions in split.streams for texts in captions for text in texts}
        distinct = sorted(distinct, key=lambda text: (len(text), text))
        for start in range(0, len(distinct), TEXTS_PER_SHARD):
            texts = distinct[start : start + TEXTS_PER_SHARD]
            yield texts, self.arrays.path("texts", self.clip_weights, self.text_settings, texts)

    def _open_texts(self, shards):
        for texts, path in shards:
            self.rows.update({text: (len(self.shards), row) for row, text in enumerate(texts)})
            self.shards.append(self.arrays.load(path))


class _DecodedClips(Dataset):
    """The clips to embed: (index, (T',3,H,W) uint8), or a `BadVideo`."""

    def __init__(self, clips, indices: list[int], video_processor, sampling: str):
        self.clips = clips
        self.indices = indices
        self.video_processor = video_processor
        self.sampling = sampling

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int):
        index = self.indices[position]
        try:
            return index, decode_all(self.video_processor, self.clips[index], self.sampling)
        except VideoDecodingError as error:
            return BadVideo(index, describe_source(self.clips[index]), str(error))


@torch.no_grad()
def embed_frames(accelerator, model, frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames (F,3,H,W) -> (F,D) float32 on the CPU. CLIP embeds frames one by one: each is a clip of its own."""
    with accelerator.autocast():
        output = model.get_video_features(frames[:, None].to(model.device, non_blocking=True))
    return output.frame_embeds[:, 0].float().cpu()


@torch.no_grad()
def embed_texts(accelerator, model, processor, texts: list[str], batch_size: int) -> torch.Tensor:
    """Texts -> (n,D) float32 on the CPU, E at a time: the text tower is the same for every expert."""
    experts, parts = processor.experts, []
    rows = [texts[start : start + len(experts)] for start in range(0, len(texts), len(experts))]
    rows[-1] = rows[-1] + [rows[-1][-1]] * (len(experts) - len(rows[-1]))  # pad the last row
    for start in range(0, len(rows), batch_size):
        captions = [dict(zip(experts, row, strict=True)) for row in rows[start : start + batch_size]]
        inputs = processor(text=captions, return_tensors="pt").to(model.device)
        with accelerator.autocast():
            output = model.get_text_features(**inputs)
        parts.append(output.text_embeds.flatten(0, 1).float().cpu())
    return torch.cat(parts)[: len(texts)]


class FeaturePairs(TrainPairs):
    """`TrainPairs` with a `FeatureCache` in place of the decoder."""

    def _load(self, video: int, caption: int, seed: int) -> dict:
        return {
            "frame_embeds": self.decoder.frames(self.split.clips[video], self.sampling, seed),
            "text_embeds": self.decoder.texts(self.split.streams[video][caption]),
        }


@dataclass
class FeatureCollator:
    """Pairs -> `frame_embeds` (N,T,D), `frame_mask` (N,T), `text_embeds` (N,E,D), `pair_ids` (N,2)."""

    num_frames: int

    def __call__(self, items: list[dict]) -> dict:
        items, failures = split_failures(items)
        if not items:
            return failures
        frame_embeds, frame_mask = pad_frames([item["frame_embeds"] for item in items], self.num_frames)
        return {
            "frame_embeds": frame_embeds,
            "frame_mask": frame_mask,
            "text_embeds": torch.stack([item["text_embeds"] for item in items]),
            "pair_ids": pair_ids(items),
            **failures,
        }


def pad_frames(clips: list[torch.Tensor], num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of (T',D) -> (N,T,D), padded with zeros, and the mask (N,T) of real frames."""
    padded = pad_sequence([torch.zeros(num_frames, clips[0].shape[1]), *clips], batch_first=True)[1:]
    mask = torch.zeros(padded.shape[:2], dtype=torch.long)
    for row, clip in enumerate(clips):
        mask[row, : len(clip)] = 1
    return padded, mask


@torch.inference_mode()
def encode_split_from_cache(
    model, cache: FeatureCache, split: CaptionedClips, captions: str, on_bad_video: str, batch_size: int = 1024
) -> EncodedSplit:
    """Like `encode_split`, from stored embeddings: so little work that every process does all of it."""
    sampling, num_frames = cache.video_processor.sampling, cache.video_processor.num_frames
    clips, kept, bad = [], [], []
    for index, clip in enumerate(split.clips):
        try:
            clips.append(cache.frames(clip, sampling))
            kept.append(index)
        except VideoDecodingError as error:
            if on_bad_video == "raise":
                raise
            bad.append(BadVideo(index, describe_source(clip), str(error)))
    outputs = []
    for start in range(0, len(clips), batch_size):
        embeds, mask = (t.to(model.device) for t in pad_frames(clips[start : start + batch_size], num_frames))
        outputs.append(model.get_video_features(frame_embeds=embeds, frame_mask=mask))

    position = {index: row for row, index in enumerate(kept)}
    rows = [row for row in zip(*split.flat(captions), strict=True) if row[2] in position]
    texts = torch.stack([cache.texts(streams) for _, streams, _ in rows]).to(model.device)
    return EncodedSplit(
        text_vectors=model.get_text_features(text_embeds=texts).pooler_output.float().cpu(),
        video_vectors=torch.cat([output.pooler_output for output in outputs]).float().cpu(),
        gate_weights=torch.cat([output.gate_weights for output in outputs]).float().cpu(),
        video_of_text=torch.tensor([position[video] for _, _, video in rows]),
        video_rows=kept,
        bad=bad,
        captions=[caption for caption, _, _ in rows],
    )


def weights_hash(module: torch.nn.Module) -> str:
    """A hash of the names, shapes and bytes of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:40]


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _hide_progress(accelerator, work: list) -> bool:
    return not accelerator.is_main_process or not work
