# SPDX-License-Identifier: Apache-2.0
"""Inference Endpoint: texts and videos in, vectors or scores out. Every request is treated as untrusted.

Request body (JSON):

    {"inputs": {"texts": ["a dog runs"]}}                           -> {"text_vectors": [[...]]}
    {"inputs": {"videos": ["<base64 of a video file>"]}}            -> {"video_vectors": [[...]]}
    {"inputs": {"texts": [...], "videos": [...]}}                   -> {"scores": [[...]]}, texts x videos
    {"inputs": "a dog runs"}                                        -> like one text

A video is base64 of a file, {"frames": [base64 of an image, ...]}, or {"url": "https://..."} if the owner of the
endpoint has set CAMOE_ALLOW_URLS=1. An invalid request raises RequestError, which the endpoint's server answers with
HTTP 400 {"error": message}; later requests are not affected.
"""

import os
from collections.abc import Iterator

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from untrusted import MAX_BYTES, RequestError, check_video, decode_base64, download, read_frames


MAX_TEXTS = 256
MAX_CHARACTERS = 2_000  # of one text; CLIP reads at most 77 tokens
MAX_VIDEOS = 8


class EndpointHandler:
    """The class that the inference toolkit calls.

    Args:
        path: folder of this repository.
        allow_urls: download videos from https addresses; by default only if CAMOE_ALLOW_URLS=1 is set.
    """

    def __init__(self, path: str = "", allow_urls: bool | None = None):
        self.allow_urls = os.environ.get("CAMOE_ALLOW_URLS") == "1" if allow_urls is None else allow_urls
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.probe_video = get_class_from_dynamic_module("frames.probe_video", path)

    def __call__(self, data: dict) -> dict:
        """Answer one request, with lists and numbers only.

        Raises:
            RequestError: what is wrong with the request.
        """
        texts, videos = _read_inputs(data)
        result = {}
        with torch.inference_mode():
            if texts:
                result["text_vectors"] = self._embed(text=texts)
            if videos:
                # One at a time: the decoded frames of one video fit in memory, those of a whole request may not.
                rows = [self._embed(videos=[video]) for video in self._read_videos(videos)]
                result["video_vectors"] = torch.cat(rows)  # (B,K)
        if len(result) == 2:
            return {"scores": (result["text_vectors"] @ result["video_vectors"].T).tolist()}
        return {name: vectors.tolist() for name, vectors in result.items()}

    def _embed(self, **inputs) -> torch.Tensor:
        """Texts or videos -> vectors, (N,K) or (B,K)."""
        try:
            inputs = self.processor(**inputs, return_tensors="pt").to(self.model.device)
        except ValueError as error:  # an empty caption, a truncated video
            raise RequestError(str(error)) from error
        if "input_ids" in inputs:
            return self.model.get_text_features(**inputs).pooler_output.float().cpu()
        return self.model.get_video_features(**inputs).pooler_output.float().cpu()

    def _read_videos(self, videos: list) -> Iterator:
        budget = MAX_BYTES
        for index, video in enumerate(videos):
            where = f"videos[{index}]"
            if isinstance(video, dict) and set(video) == {"frames"}:
                frames, size = read_frames(video["frames"], where, budget)
                yield frames
                budget -= size
                continue
            if isinstance(video, dict) and set(video) == {"url"}:
                if not self.allow_urls:
                    raise RequestError(f"{where}: this endpoint does not download; send the file as base64")
                content = download(video["url"], where, budget)
            elif isinstance(video, str):
                content = decode_base64(video, where, budget)
            else:
                raise RequestError(f'{where} must be base64 of a video file, {{"frames": [...]}} or {{"url": "..."}}')
            yield check_video(content, where, self.probe_video)
            budget -= len(content)


def _read_inputs(data) -> tuple[list[str], list]:
    """The texts and videos of a request; not both are empty."""
    inputs = data.get("inputs") if isinstance(data, dict) else None
    if isinstance(inputs, str):
        inputs = {"texts": [inputs]}
    elif isinstance(inputs, Image.Image):  # content type image/*: the toolkit has decoded it
        inputs = {"videos": [{"frames": [inputs]}]}
    if not isinstance(inputs, dict) or not inputs or not set(inputs) <= {"texts", "videos"}:
        raise RequestError('the body must be {"inputs": {"texts": [...], "videos": [...]}}, with either or both')
    texts, videos = inputs.get("texts", []), inputs.get("videos", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not isinstance(videos, list):
        raise RequestError("texts and videos must be lists")
    if not texts and not videos:
        raise RequestError("there are no texts and no videos")
    if len(texts) > MAX_TEXTS or len(videos) > MAX_VIDEOS:
        raise RequestError(f"{len(texts)} texts, {len(videos)} videos; the limits are {MAX_TEXTS} and {MAX_VIDEOS}")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"texts[{index}] must be a non-empty text")
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"texts[{index}] has {len(text)} characters; the limit is {MAX_CHARACTERS}")
    return texts, videos
