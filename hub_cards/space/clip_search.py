# SPDX-License-Identifier: Apache-2.0
"""What the page shows: clips as the model sees them, their ranking for a sentence, and what each expert contributed.

Model, processor and code are loaded from the release repository. T frames, E experts, D dims, N captions.
The score of a clip is a sum over experts, `gate[e] * <text[e], video[e]>`; its terms are what the page draws.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from untrusted import MAX_BYTES, RequestError, check_video


BANK_SIZE = 256  # captions of query_bank.txt: more slow down the start and hardly change the biases
DEFAULT_TAU = 0.05  # for releases whose evaluation chose none
MAX_CHARACTERS = 500  # of a query


@dataclass(frozen=True)
class EncodedClip:
    """A clip and the model's output for it."""

    name: str
    path: str
    frames: torch.Tensor  # (T,3,H,W) uint8: exactly what the model saw
    times: tuple[float, ...]  # (T,) seconds
    duration: float  # seconds
    video_embeds: torch.Tensor  # (E,D), a unit vector per expert
    gate: torch.Tensor  # (E,), sums to 1
    frame_weights: torch.Tensor  # (E,T), weight of each frame in each expert
    bias: float | None  # similarity to the whole query bank; None if the release has none


@dataclass(frozen=True)
class Hit:
    """A clip in a ranking."""

    clip: EncodedClip
    score: float  # the sum of the parts, minus the bias if corrected
    similarities: torch.Tensor  # (E,), <text, video>
    parts: torch.Tensor  # (E,), gate * similarity


class Retrieval:
    """A loaded release.

    Args:
        model: id of the repository on the Hub, or a release folder.
        revision: branch, tag or commit of the repository.
    """

    def __init__(self, model: str, revision: str | None = None):
        self.repo, self.revision = model, revision
        pinned = {"revision": revision, "trust_remote_code": True}
        self.model = AutoModel.from_pretrained(model, **pinned).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.processor = AutoProcessor.from_pretrained(model, **pinned)
        self.probe_video = get_class_from_dynamic_module("frames.probe_video", model, revision=revision)
        self.experts = list(self.model.config.experts)
        self.bank, self.tau = self._load_bank()

    def file(self, name: str) -> Path | None:
        """A file of the release, or None if it has no such file."""
        if Path(self.repo).is_dir():
            path = Path(self.repo) / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.repo, name, revision=self.revision))
        except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError, but the connection failed
            raise
        except EntryNotFoundError:
            return None

    def example_clips(self) -> dict[str, str]:
        """The example clips of the release as {label: path}, in a folder of their own that can be served."""
        listed = self.file("examples.json")
        if listed is None:
            return {}
        folder = Path(tempfile.mkdtemp(prefix="examples_"))
        clips = {}
        for example in json.loads(listed.read_text(encoding="utf-8")):
            label = example["caption"] or example["clip"]
            label += f" ({example['clip']})" if label in clips else ""
            clips[label] = str(shutil.copy(self.file(example["clip"]), folder / example["clip"]))
        return clips

    def encode_clip(self, path: str, name: str | None = None) -> EncodedClip:
        """Decode and encode a clip.

        Raises:
            RequestError: the file is not a video, or too large or too long; the message names it.
        """
        name = name or Path(path).name
        if Path(path).stat().st_size > MAX_BYTES:
            raise RequestError(f"{name} is larger than {MAX_BYTES // 2**20} MiB")
        content = check_video(Path(path).read_bytes(), name, self.probe_video)
        try:
            decoded = self.processor.video_processor.decode(content)
        except ValueError as error:  # it is truncated
            raise RequestError(f"{name} cannot be decoded: {error}") from error
        with torch.inference_mode():
            inputs = self.processor(videos=[decoded], return_tensors="pt").to(self.model.device)
            output = self.model.get_video_features(**inputs)
        vector = output.pooler_output.float().cpu()  # (1,E*D)
        return EncodedClip(
            name=name,
            path=path,
            frames=decoded.frames,
            times=decoded.times,
            duration=decoded.duration,
            video_embeds=output.video_embeds[0].float().cpu(),
            gate=output.gate_weights[0].float().cpu(),
            frame_weights=output.frame_weights[0, :, : len(decoded.frames)].float().cpu(),
            bias=None if self.bank is None else self._bias(vector),
        )

    def encode_query(self, query: str) -> tuple[dict[str, str], torch.Tensor]:
        """A sentence -> the text that each expert reads, and their vectors (E,D)."""
        texts = dict(zip(self.experts, self.processor.streams_of([query[:MAX_CHARACTERS]])[0], strict=True))
        return texts, self._text_embeds([texts])[0]

    def rank(self, text_embeds: torch.Tensor, clips: list[EncodedClip], is_corrected: bool = False) -> list[Hit]:
        """Clips by score, best first. `text_embeds` (E,D) as from `encode_query`; `is_corrected` subtracts biases."""
        hits = []
        for clip in clips:
            similarities = (text_embeds * clip.video_embeds).sum(dim=1)  # (E,)
            parts = clip.gate * similarities
            score = parts.sum().item() - (clip.bias if is_corrected else 0.0)
            hits.append(Hit(clip, score, similarities, parts))
        return sorted(hits, key=lambda hit: -hit.score)

    def _text_embeds(self, texts: list) -> torch.Tensor:
        with torch.inference_mode():
            inputs = self.processor(text=texts, return_tensors="pt").to(self.model.device)
            return self.model.get_text_features(**inputs).text_embeds.float().cpu()  # (N,E,D)

    def _load_bank(self) -> tuple[torch.Tensor | None, float]:
        """Vectors of training captions (N,E*D), and the temperature of the biases."""
        bank, results = self.file("query_bank.txt"), self.file("eval_results.json")
        captions = [] if bank is None else bank.read_text(encoding="utf-8").split("\n")[:BANK_SIZE]
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            return None, DEFAULT_TAU
        settings = {} if results is None else json.loads(results.read_text(encoding="utf-8")).get("settings", {})
        return self._text_embeds(captions).flatten(1), settings.get("tau") or DEFAULT_TAU

    def _bias(self, vector: torch.Tensor) -> float:
        """tau * log mean exp over the bank of (score / tau), of one clip (1,E*D)."""
        scores = (self.bank @ vector.T)[:, 0]  # (N,)
        return self.tau * (torch.logsumexp(scores / self.tau, dim=0).item() - math.log(len(scores)))
