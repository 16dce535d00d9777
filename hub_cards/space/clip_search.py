# SPDX-License-Identifier: Apache-2.0
"""What the page shows: the moments of clips, their ranking for a sentence, and what each expert contributed.

Model, processor and code are loaded from the release: score, decoding and encoding are its own (retrieval.py,
frames.py, encode.py). hubs.py is this project's. T frames, E experts, D dims, K = E*D, N captions, B moments.
"""

import base64
import io
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


try:
    import spaces  # on the Hub's ZeroGPU; before torch, which it changes
except ImportError:
    spaces = None

import torch
from hubs import query_bank_bias
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from untrusted import MAX_BYTES, RequestError, check_video


BANK_SIZE = 256  # captions of query_bank.txt: more slow down the start and hardly change the biases
DEFAULT_TAU = 0.05  # for releases whose evaluation chose none
MAX_CHARACTERS = 500  # of a query
# As `camoe index` cuts: a clip up to WHOLE seconds is one moment, a longer one is cut every STRIDE seconds.
WHOLE, WINDOW, STRIDE = 30.0, 10.0, 5.0
BATCH = 8  # moments per forward pass
STRIP, POSTER = 96, 320  # pixels of the long side of a frame


@dataclass(frozen=True)
class Moment:
    """A part of a clip, or all of it, and the model's output for it."""

    clip: str  # its name
    path: str
    start: float  # seconds
    end: float
    is_part: bool  # the clip has other moments
    strip: list[str]  # data URLs: the T frames that the model saw
    poster: str  # the one in the middle, larger
    times: tuple[float, ...]  # (T,) seconds
    video_embeds: torch.Tensor  # (E,D), a unit vector per expert
    gate: torch.Tensor  # (E,), sums to 1
    frame_weights: torch.Tensor  # (E,T), weight of each frame in each expert
    vector: torch.Tensor  # (K,)


@dataclass(frozen=True)
class Hit:
    """A moment in a ranking."""

    moment: Moment
    score: float  # the sum of the parts, minus the bias if corrected
    matches: torch.Tensor  # (E,), <text, video>
    parts: torch.Tensor  # (E,), gate * match
    bias: float | None  # that was subtracted


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
        self.experts = list(self.model.config.experts)
        names = "frames.Clip frames.probe_video frames.sample_frames encode.encode_texts retrieval.expert_scores"
        for name in [*names.split(), "retrieval.similarity"]:
            setattr(self, name.split(".")[1], get_class_from_dynamic_module(name, model, revision=revision))
        if spaces is not None:  # a ZeroGPU Space has a GPU for the duration of such a call
            self._run_on_videos = spaces.GPU(self._run_on_videos)
            self._run_on_texts = spaces.GPU(self._run_on_texts)
        self._of_examples: dict[str, list[Moment]] = {}

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

    @cached_property
    def examples(self) -> dict[str, str]:
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

    def thumbnail(self, path: str) -> Image.Image:
        """The frame in the middle of a clip, all of it."""
        return picture(self.sample_frames(path, 1, size=None).frames[0], POSTER)

    # --- clips -------------------------------------------------------------------------------------------------------

    def moments(self, path: str, name: str | None = None) -> list[Moment]:
        """Decode a clip, cut it into moments, and encode them. The examples are encoded once for all visitors.

        Raises:
            RequestError: the file is not a video, or too large or too long; the message names it.
        """
        if path in self._of_examples:
            return self._of_examples[path]
        name = name or Path(path).name
        if Path(path).stat().st_size > MAX_BYTES:
            raise RequestError(f"{name} is larger than {MAX_BYTES // 2**20} MiB")
        content = check_video(Path(path).read_bytes(), name, self.probe_video)
        windows = cut(self.probe_video(content).duration)
        moments, problems = [], []
        for first in range(0, len(windows), BATCH):
            moments += self._encode(content, path, name, windows[first : first + BATCH], len(windows) > 1, problems)
        if not moments:
            raise RequestError(f"{name} cannot be decoded: {problems[0]}")
        if path in self.examples.values():
            self._of_examples[path] = moments
        return moments

    def _encode(self, content: bytes, path: str, name: str, windows: list, is_part: bool, problems: list):
        """Some windows of a clip as moments; `problems` gets the causes for those that cannot be decoded."""
        decoder = self.processor.video_processor
        try:
            if is_part:
                decoded = decoder.decode_windows([self.Clip(content, *window) for window in windows])
            else:  # as everywhere: the whole file, wherever its header says that it ends
                decoded = [decoder.decode(content)]
                windows = [(0.0, decoded[0].duration)]
        except ValueError as error:  # it is truncated
            decoded = [error]
        problems += [sampled for sampled in decoded if isinstance(sampled, ValueError)]
        good = [n for n, sampled in enumerate(decoded) if not isinstance(sampled, ValueError)]
        if not good:
            return []
        windows, decoded = [windows[n] for n in good], [decoded[n] for n in good]
        output = self._run_on_videos(decoded)
        return [
            Moment(
                clip=name,
                path=path,
                start=start,
                end=end,
                is_part=is_part,
                strip=[data_url(picture(frame, STRIP)) for frame in sampled.frames],
                poster=data_url(picture(sampled.frames[len(sampled.frames) // 2], POSTER)),
                times=sampled.times,
                video_embeds=embeds,
                gate=gate,
                frame_weights=weights[:, : len(sampled.frames)],
                vector=vector,
            )
            for (start, end), sampled, embeds, gate, weights, vector in zip(windows, decoded, *output, strict=True)
        ]

    def _run_on_videos(self, decoded: list) -> tuple[torch.Tensor, ...]:
        """Experts (B,E,D), gates (B,E), frame weights (B,E,T) and folded vectors (B,K), on the CPU."""
        with torch.inference_mode():
            inputs = self.processor(videos=decoded, return_tensors="pt").to(self.model.device)
            output = self.model.get_video_features(**inputs)
        names = ("video_embeds", "gate_weights", "frame_weights", "pooler_output")
        return tuple(output[name].float().cpu() for name in names)

    # --- sentences ---------------------------------------------------------------------------------------------------

    def encode_query(self, query: str) -> tuple[dict[str, str], torch.Tensor]:
        """A sentence -> the text that each expert reads, and their vectors (E,D)."""
        texts = dict(zip(self.experts, self.processor.streams_of([query[:MAX_CHARACTERS]])[0], strict=True))
        return texts, self._run_on_texts([texts])[0].unflatten(0, (len(self.experts), -1))

    def _run_on_texts(self, texts: list) -> torch.Tensor:
        """Captions -> folded vectors (N,K), on the CPU."""
        return self.encode_texts(self.model, self.processor, texts)

    @cached_property
    def captions(self) -> list[str]:
        """Of the query bank; none if the release has no bank."""
        bank = self.file("query_bank.txt")
        lines = [] if bank is None else bank.read_text(encoding="utf-8").split("\n")[:BANK_SIZE]
        return [line for line in lines if line.strip()]

    @cached_property
    def bank(self) -> tuple[torch.Tensor, float]:
        """Vectors of the captions (N,K), and the temperature of the biases."""
        results = self.file("eval_results.json")
        settings = {} if results is None else json.loads(results.read_text(encoding="utf-8")).get("settings", {})
        return self._run_on_texts(self.captions), settings.get("tau") or DEFAULT_TAU

    # --- ranking -----------------------------------------------------------------------------------------------------

    def rank(self, text_embeds: torch.Tensor, moments: list[Moment], is_corrected: bool = False) -> list[Hit]:
        """Moments by score, best first; those that overlap a better one of their clip are left out.

        Args:
            text_embeds: (E,D) as from `encode_query`.
            is_corrected: subtract each moment's bias, its similarity to the whole query bank.
        """
        if not moments:
            return []
        embeds, gates = torch.stack([m.video_embeds for m in moments]), torch.stack([m.gate for m in moments])
        parts = self.expert_scores(text_embeds[None], embeds, gates)[0]  # (B,E)
        matches = self.expert_scores(text_embeds[None], embeds, torch.ones_like(gates))[0]
        scores, biases = parts.sum(dim=1), [None] * len(moments)
        if is_corrected:
            bank, tau = self.bank
            bias = query_bank_bias(self.similarity(bank, torch.stack([m.vector for m in moments])), tau)
            scores, biases = scores - bias, bias.tolist()
        hits: list[Hit] = []
        for n in scores.argsort(descending=True, stable=True).tolist():
            moment = moments[n]
            of_clip = [hit.moment for hit in hits if hit.moment.path == moment.path]
            if not any(moment.start < other.end and other.start < moment.end for other in of_clip):
                hits.append(Hit(moment, scores[n].item(), matches[n], parts[n], biases[n]))
        return hits


def cut(duration: float) -> list[tuple[float, float]]:
    """The moments of a clip of so many seconds, as (start, end); the last one ends where the clip ends."""
    if duration <= WHOLE:
        return [(0.0, duration)]
    steps = math.ceil((duration - WINDOW) / STRIDE - 1e-9)
    return [(start, start + WINDOW) for start in [*(STRIDE * n for n in range(steps)), duration - WINDOW]]


def picture(frame: torch.Tensor, size: int) -> Image.Image:
    """(3,H,W) uint8 -> a picture whose long side has at most `size` pixels."""
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    image.thumbnail((size, size))
    return image


def data_url(image: Image.Image) -> str:
    """A picture as part of a page."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
