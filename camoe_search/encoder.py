# SPDX-License-Identifier: Apache-2.0
"""The models that make the vectors of an index, behind one protocol.

- `CAMoEEncoder`: a CAMoE checkpoint, or a plain dual encoder (CLIP, SigLIP, …) as a CAMoE of one expert;
- `SentenceEncoder`: any SentenceTransformer that encodes video;
- `text_encoder.OnnxTextEncoder`: a CAMoE's texts alone, without torch (`camoe search`).

A model is identified by a hash of its weights. N texts, K entries a folded vector.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from modeling_camoe import CAMoEModel, CAMoEProcessor
from modeling_camoe.encode import encode_texts, encode_videos, iter_encoded_videos
from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames

from .errors import SearchError
from .text_encoder import check_texts
from .thumbnails import SIZE, as_jpeg
from .window_decoder import WindowDecoder


DECODER_THREADS = 4  # of `SentenceEncoder`; decoding releases Python's global lock


@dataclass(frozen=True)
class ClipBatch:
    """Some of the clips that were given: row r of `vectors` is clip `indices[r]`; `bad` has the others' causes.

    `damaged` are the clips whose frames were taken around damage. `thumbnails` has a JPEG for each row, or None where
    that could not be made, if they were asked for.
    """

    indices: list[int]
    vectors: np.ndarray  # (b,K) float32
    bad: dict[int, str]
    damaged: list[int] = field(default_factory=list)
    thumbnails: list[bytes | None] = field(default_factory=list)


class Encoder(Protocol):
    """What makes vectors: the inner product of a text's and a clip's is the score."""

    name: str  # folder or Hub id, written into the index
    weights: str  # hash of the weights: vectors are comparable only if it is the same
    experts: list[str]  # a vector is one part of equal length per expert
    dim: int  # D, of a part
    num_frames: int  # decoded of each clip
    sampling: str  # how they are chosen
    on_damage: str  # "error", or take them "around" damage; may be set

    def encode_clips(
        self, clips: Sequence, batch_size: int, num_workers: int, thumbnails: bool = False
    ) -> Iterator[ClipBatch]:
        """Clips (paths or `Clip`s) in order, batch by batch; what cannot be decoded is listed."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Queries -> (N,K) float32.

        Raises:
            SearchError: a query is empty.
        """

    def encode_clip(self, clip) -> np.ndarray:
        """A clip -> the query vector that finds clips like it, (1,K)."""


def process_group() -> PartialState:
    """This process among those of `accelerate launch`, or a group of one without it.

    The timeout is long because processes wait for each other at the end, and one with slow files may take hours more.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))


def load_encoder(
    name: str, device: str | None = None, sampling: str | None = None, trust_remote_code: bool = False
) -> Encoder:
    """Load a model, onto the GPU if there is one.

    Args:
        name: folder or Hub id of a CAMoE checkpoint, a plain dual encoder or a SentenceTransformer.
        sampling: how frames are chosen; None: as the model is configured.
        trust_remote_code: let a SentenceTransformer run code from its repository.

    Raises:
        SearchError: it cannot be loaded.
    """
    device = device or process_group().device
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        is_camoe = config.get("model_type") == "camoe"
        if not is_camoe and cached_file(name, "modules.json", **options):
            # The library copies a repository's code without a lock: the first process of a machine fills the cache.
            with process_group().local_main_process_first():
                return SentenceEncoder.from_pretrained(name, device, sampling, trust_remote_code)
        return CAMoEEncoder.from_pretrained(name, device, sampling, zero_shot=not is_camoe)
    except SearchError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SearchError(f"cannot load the model {name}: {reason}") from error


def hash_weights(state: dict[str, torch.Tensor]) -> str:
    """128-bit hash of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _saved_name(name: str) -> str:
    return os.path.abspath(name) if os.path.isdir(name) else name  # an index can be opened from anywhere


class CAMoEEncoder:
    """A CAMoE in eval mode on its device, with its processor.

    Args:
        name: folder or Hub id, written into the index.
        model, processor: a [`CAMoEModel`] and its [`CAMoEProcessor`].
        sampling: how frames are chosen; None: as the processor is configured.
    """

    def __init__(self, name: str, model, processor, sampling: str | None = None):
        self.name = name
        self.model = model.eval()
        self.processor = processor
        if sampling is not None:
            processor.video_processor.sampling = sampling
        self.experts, self.dim = list(model.config.experts), model.config.projection_dim

    @classmethod
    def from_pretrained(
        cls, name: str, device: str | None = None, sampling: str | None = None, zero_shot: bool = False
    ) -> "CAMoEEncoder":
        """`zero_shot`: the model is a plain dual encoder; it becomes a CAMoE of one expert, the mean of its frames."""
        options = {"zero_shot": True} if zero_shot else {}
        model, processor = CAMoEModel.from_pretrained(name, **options), CAMoEProcessor.from_pretrained(name, **options)
        return cls(_saved_name(name), model.to(device), processor, sampling)

    @property
    def num_frames(self) -> int:
        return self.processor.video_processor.num_frames

    @property
    def sampling(self) -> str:
        return self.processor.video_processor.sampling

    @property
    def on_damage(self) -> str:
        return self.processor.video_processor.on_damage

    @on_damage.setter
    def on_damage(self, choice: str):
        self.processor.video_processor.on_damage = choice

    @cached_property
    def weights(self) -> str:
        """128-bit hash of all weights."""
        return hash_weights(self.model.state_dict())

    def encode_clips(
        self, clips: Sequence, batch_size: int = 16, num_workers: int = 0, thumbnails: bool = False
    ) -> Iterator[ClipBatch]:
        """See `Encoder`."""
        decoder = WindowDecoder(clips, batch_size, self.processor.video_processor, SIZE if thumbnails else None)
        options = {"batch_size": batch_size, "num_workers": num_workers, "on_bad_video": "skip", "decoder": decoder}
        keep = as_jpeg if thumbnails else None
        for batch in iter_encoded_videos(self.model, self.processor, clips, keep=keep, **options):
            bad, damaged = {entry.index: entry.cause for entry in batch.bad}, [entry.index for entry in batch.damaged]
            yield ClipBatch(batch.indices, batch.vectors.numpy(), bad, damaged, batch.kept)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        check_texts(texts)
        return encode_texts(self.model, self.processor, list(texts)).numpy()

    def encode_clip(self, clip) -> np.ndarray:
        """Every expert's part has length 1, as in a text's vector: the score uses the gates of the found videos."""
        vector = encode_videos(self.model, self.processor, [clip]).vectors  # (1,K), gated
        experts = vector.unflatten(1, (len(self.experts), -1))  # (1,E,D)
        return torch.nn.functional.normalize(experts, dim=-1).flatten(1).numpy()


class SentenceEncoder:
    """A SentenceTransformer that encodes video: one expert, the whole.

    Clips are decoded here, as the library would decode whole files; our own model takes them as they are.

    Args:
        name: folder or Hub id, written into the index.
        model: a `SentenceTransformer`. Unless its similarity is the inner product, vectors get length 1, so that the
            score is the cosine.
        sampling: "uniform" (default) or "keyframe".

    Raises:
        SearchError: the model has no video modality, or a similarity that is no inner product.
    """

    experts = ["all"]
    num_frames = 12  # as CLIP4Clip
    on_damage = "error"

    def __init__(self, name: str, model, sampling: str | None = None):
        if "video" not in model.modalities:
            raise SearchError(f"{name} encodes {', '.join(map(str, model.modalities))}: it cannot encode video")
        if str(model.similarity_fn_name or "cosine") not in ("cosine", "dot"):
            raise SearchError(f"{name} compares by {model.similarity_fn_name}: an index needs cosine or dot")
        self.name, self.model = name, model.eval()
        self.sampling = sampling or "uniform"
        self.normalize = model.similarity_fn_name != "dot"
        self.dim = model.get_embedding_dimension()
        # Our module samples frames as in training, at the size that the model reads.
        self._takes_clips = type(model[0]).__name__ == "CAMoESentenceModule"

    @classmethod
    def from_pretrained(
        cls, name: str, device: str | None = None, sampling: str | None = None, trust_remote_code: bool = False
    ) -> "SentenceEncoder":
        """Load one; see the constructor."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(f"{name} is a SentenceTransformer: pip install sentence-transformers") from error
        model = SentenceTransformer(name, device=str(device), trust_remote_code=trust_remote_code)
        return cls(_saved_name(name), model, sampling)

    @cached_property
    def weights(self) -> str:
        """128-bit hash of all weights."""
        return hash_weights(self.model.state_dict())

    def encode_clips(
        self, clips: Sequence, batch_size: int = 16, num_workers: int = 0, thumbnails: bool = False
    ) -> Iterator[ClipBatch]:
        """See `Encoder`; `num_workers` is not used: threads decode a batch."""
        decode = partial(self._decode, preview_size=SIZE if thumbnails else None)
        with ThreadPoolExecutor(DECODER_THREADS) as decoders:
            for first in range(0, len(clips), batch_size):
                indices = range(first, min(first + batch_size, len(clips)))
                decoded = list(decoders.map(decode, [clips[i] for i in indices]))
                videos = {i: video for i, (video, _) in zip(indices, decoded, strict=True)}
                sampled = {i: sampled for i, (_, sampled) in zip(indices, decoded, strict=True)}
                bad = {i: str(video) for i, video in videos.items() if isinstance(video, VideoDecodingError)}
                good = [i for i in indices if i not in bad]
                vectors = self._documents([videos[i] for i in good]) if good else np.empty((0, self.dim), np.float32)
                pictures = [as_jpeg(sampled[i]) for i in good] if thumbnails else []
                yield ClipBatch(good, vectors, bad, [i for i in good if sampled[i].skipped_damage], pictures)

    def _decode(self, clip, preview_size: int | None = None):
        """A clip -> what the model encodes, or the error; and the frames as they were decoded."""
        options = {"on_damage": self.on_damage, "preview_size": preview_size}
        try:
            if self._takes_clips:
                video_processor = self.model[0].processor.video_processor
                sampled = video_processor.decode(clip, **options)
                return sampled, sampled
            sampled = sample_frames(clip, self.num_frames, sampling=self.sampling, **options)
        except VideoDecodingError as error:
            return error, None
        frames, times = sampled.frames.numpy(), sampled.times  # (T,3,H,W) uint8
        span = times[-1] - times[0] if len(times) > 1 else 0
        fps = (len(times) - 1) / span if span > 0 else 1.0
        indices = list(range(len(times)))
        metadata = {
            "fps": fps,
            "total_num_frames": len(times),
            "frames_indices": indices,
            "duration": len(times) / fps,
        }
        return {"array": frames, "video_metadata": metadata}, sampled

    def _documents(self, videos: list) -> np.ndarray:
        vectors = self.model.encode_document(
            videos, batch_size=len(videos), normalize_embeddings=self.normalize, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        check_texts(texts)
        # Named as texts: the library would fetch a query that is an address, and open one that is the path of a file.
        queries = [{"text": text} for text in texts]
        vectors = self.model.encode_query(queries, normalize_embeddings=self.normalize, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    def encode_clip(self, clip) -> np.ndarray:
        """See `Encoder`.

        Raises:
            VideoDecodingError: naming the file and the cause.
        """
        video, _ = self._decode(Clip(clip) if isinstance(clip, str) else clip)
        if isinstance(video, VideoDecodingError):
            raise video
        vector = self._documents([video])
        return vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-12)
