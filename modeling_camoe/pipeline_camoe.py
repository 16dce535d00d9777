# SPDX-License-Identifier: Apache-2.0
"""`pipeline("video-text-retrieval", model=..., trust_remote_code=True)`: videos and texts in, scores or vectors out.

Three uses, distinguished by argument names:

    pipe(videos, candidate_texts=[...])     for each video, how well each text fits (zero-shot classification)
    pipe(texts=[...], videos=[...])         for each text, the videos, best first
    pipe(videos) or pipe(texts=[...])       the vectors, whose inner product is the score

A single item instead of a list gives a single result. Files are encoded by encode.py, as in search and evaluation, so
their vectors are the same.
"""

import os
from collections.abc import Mapping

import torch
from transformers import Pipeline
from transformers.image_utils import is_pil_image

from .encode import encode_texts, encode_videos
from .retrieval import similarity


class CAMoEPipeline(Pipeline):
    """Video-text retrieval with a [`CAMoEModel`] and its [`CAMoEProcessor`].

    Args:
        model: a [`CAMoEModel`].
        processor: its processor.
        batch_size: videos per forward pass, 8 by default.
        num_workers: processes that decode; 0, the default, decodes in this one.
        **kwargs: as for every pipeline (`device`, ...).
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(
        self, videos=None, *, texts=None, candidate_texts=None, top_k=None, batch_size=None, num_workers=None
    ):
        """
        Args:
            videos: a video, or a list of B: path, bytes of a file, `Clip`, array or tensor (T,3,H,W) or (T,H,W,3), or
                a list of frames (PIL images or arrays). Any other iterable (a data set's column, a generator) counts
                as a list.
            texts: a caption, or a list of N (or mappings expert -> text), to query with or to embed.
            candidate_texts: what each video is compared with.
            top_k: keep only this many of the best.
            batch_size, num_workers: for this call.

        Returns:
            With `candidate_texts`: for each video [{"text", "score", "probability"}, ...], best first; `score` is in
            [-1, 1], `probability` the softmax of the scaled scores over the candidates. With `texts` and `videos`: for
            each text [{"video", "score"}, ...], best first; `video` is the position in the list. With only one of the
            two: float32 vectors, (B,K) or (N,K).

        Raises:
            ValueError: for arguments that do not go together.
            VideoDecodingError: a file cannot be decoded; names it.
        """
        if texts is not None and candidate_texts is not None:
            raise ValueError("Give `texts` to rank videos for each, or `candidate_texts` to rank these; not both.")
        if videos is None and texts is None:
            needs = "`videos`, `texts`, or both" if candidate_texts is None else "`videos` to compare the texts with"
            raise ValueError(f"The pipeline needs {needs}.")
        if isinstance(candidate_texts, str | Mapping):
            candidate_texts = [candidate_texts]
        inputs = {"videos": videos, "texts": texts, "candidate_texts": candidate_texts}
        inputs = {name: _as_list(given) for name, given in inputs.items()}
        for name, given in inputs.items():
            if isinstance(given, list | tuple) and not given:
                raise ValueError(f"`{name}` is empty.")
        inputs["batch_size"] = batch_size or self._batch_size or 8
        inputs["num_workers"] = num_workers or self._num_workers or 0
        return super().__call__(inputs, top_k=top_k)

    def save_pretrained(self, save_directory, **kwargs):
        self.processor.save_pretrained(save_directory)  # first: a model beside a processor does not look for one
        super().save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, top_k=None):
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: dict) -> dict:
        """Wraps single items in lists and notes whether there was one."""
        videos, texts = inputs["videos"], inputs["texts"]
        is_one_video = videos is not None and _is_one_video(videos)
        is_one_text = isinstance(texts, str | Mapping)
        return inputs | {
            "videos": [videos] if is_one_video else None if videos is None else list(videos),
            "texts": [texts] if is_one_text else texts if texts is None else list(texts),
            "is_single": is_one_video if texts is None else is_one_text,
        }

    def _forward(self, inputs: dict) -> dict:
        """Videos and texts -> their vectors, (B,K) and (N,K)."""
        texts = inputs["candidate_texts"] if inputs["texts"] is None else inputs["texts"]
        return {
            "video_vectors": None
            if inputs["videos"] is None
            else self._embed_videos(inputs["videos"], inputs["batch_size"], inputs["num_workers"]),
            "text_vectors": None if texts is None else encode_texts(self.model, self.processor, texts),
            "candidate_texts": inputs["candidate_texts"],
            "is_single": inputs["is_single"],
        }

    def _embed_videos(self, videos: list, batch_size: int, num_workers: int) -> torch.Tensor:
        """Videos in any form -> (B,K) float32 on the CPU."""
        vectors = torch.empty(len(videos), self.model.config.projection_dim * len(self.model.config.experts))
        files = [i for i, video in enumerate(videos) if _is_file(video)]
        decoded = [i for i, video in enumerate(videos) if not _is_file(video)]
        if files:
            clips = [videos[i] for i in files]
            vectors[files] = encode_videos(
                self.model, self.processor, clips, batch_size=batch_size, num_workers=num_workers
            ).vectors
        for start in range(0, len(decoded), batch_size):
            rows = decoded[start : start + batch_size]
            inputs = self.processor(videos=[videos[i] for i in rows], return_tensors="pt").to(self.model.device)
            vectors[rows] = self.model.get_video_features(**inputs).pooler_output.float().cpu()
        return vectors

    def postprocess(self, outputs: dict, top_k: int | None = None):
        video_vectors, text_vectors = outputs["video_vectors"], outputs["text_vectors"]
        if video_vectors is None or text_vectors is None:
            results = text_vectors if video_vectors is None else video_vectors
        elif outputs["candidate_texts"] is not None:
            scale = self.model.clip.logit_scale.exp().item()
            results = [
                _ranked_texts(scores, outputs["candidate_texts"], scale, top_k)
                for scores in similarity(text_vectors, video_vectors).T
            ]
        else:
            results = [_ranked_videos(scores, top_k) for scores in similarity(text_vectors, video_vectors)]
        return results[0] if outputs["is_single"] else results


def _ranked_texts(scores: torch.Tensor, texts: list, scale: float, top_k: int | None) -> list[dict]:
    probabilities = (scale * scores).softmax(dim=0).tolist()
    order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    return [{"text": texts[n], "score": scores[n].item(), "probability": probabilities[n]} for n in order]


def _ranked_videos(scores: torch.Tensor, top_k: int | None) -> list[dict]:
    order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    return [{"video": b, "score": scores[b].item()} for b in order]


def _as_list(items):
    """A data set's column, a generator or the like -> a list; one video or one text stays as it is."""
    is_item = isinstance(items, str | os.PathLike | bytes | bytearray | memoryview | Mapping)
    is_item = is_item or hasattr(items, "ndim") or hasattr(items, "read") or hasattr(items, "get_frames_at")
    is_listable = hasattr(items, "__iter__") or hasattr(items, "__getitem__")
    return list(items) if is_listable and not is_item and not is_pil_image(items) else items


def _is_file(video) -> bool:
    return isinstance(video, str | os.PathLike | bytes) or hasattr(video, "source")  # `source`: a Clip


def _is_one_video(videos) -> bool:
    if isinstance(videos, list | tuple):  # of videos, or of the frames of one
        return all(is_pil_image(item) or getattr(item, "ndim", None) in (2, 3) for item in videos)
    return getattr(videos, "ndim", None) != 5


__all__ = ["CAMoEPipeline"]
