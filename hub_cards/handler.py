# SPDX-License-Identifier: Apache-2.0
"""Inference Endpoint: texts and videos in, vectors, scores or labels out. Every request is treated as untrusted.

Request body (JSON):

    {"inputs": {"texts": ["a dog runs"]}}                           -> {"text_vectors": [[...]]}
    {"inputs": {"videos": ["<base64 of a video file>"]}}            -> {"video_vectors": [[...]]}
    {"inputs": {"texts": [...], "videos": [...]}}                   -> {"scores": [[...]]}, texts x videos
    {"inputs": "a dog runs"}                                        -> like one text

A video is base64 of a file, or {"frames": [base64 of an image, ...]}. The payload of zero-shot image classification,
which the Hub's widget and clients post, is answered as that task says, best first; `hypothesis_template` is optional:

    {"inputs": "<base64 of an image or a video>", "parameters": {"candidate_labels": ["a dog", "a cat"]}}
                                                                    -> [{"label": "a dog", "score": 0.9}, ...]

An image is a clip of one frame. A label's score is its probability among the labels given. An invalid request raises
RequestError, which the endpoint's server answers with HTTP 400 {"error": message}; later requests are not affected.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from untrusted import MAX_BYTES, RequestError, check_video, decode_base64, is_image, read_frames


MAX_TEXTS = 256
MAX_CHARACTERS = 2_000  # of one text; CLIP reads at most 77 tokens
MAX_VIDEOS = 8


class EndpointHandler:
    """The class that the inference toolkit calls.

    Args:
        path: folder of this repository.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.probe_video = get_class_from_dynamic_module("frames.probe_video", path)
        self.split_labels = get_class_from_dynamic_module("pipeline_camoe.split_labels", path)
        pipeline_class = get_class_from_dynamic_module("pipeline_camoe.CAMoEPipeline", path)
        self.pipeline = pipeline_class(self.model, processor=self.processor, device=self.model.device)

    @torch.inference_mode()
    def __call__(self, data: dict) -> dict | list[dict]:
        """Answer one request, with lists and numbers only.

        Raises:
            RequestError: what is wrong with the request.
        """
        if isinstance(data, dict) and data.get("parameters"):
            return self._classify(data.get("inputs"), data["parameters"])
        texts, videos = _read_inputs(data)
        result = {}
        if texts:
            result["text_vectors"] = self._embed(text=texts)
        if videos:
            # One at a time: the decoded frames of one video fit in memory, those of a whole request may not.
            rows = [self._embed(videos=[video]) for video in self._read_videos(videos)]
            result["video_vectors"] = torch.cat(rows)  # (B,K)
        if len(result) == 2:
            return {"scores": (result["text_vectors"] @ result["video_vectors"].T).tolist()}
        return {name: vectors.tolist() for name, vectors in result.items()}

    def _classify(self, inputs, parameters) -> list[dict]:
        """Zero-shot classification of an image or a video: the labels, best first."""
        if not isinstance(parameters, dict):
            raise RequestError("parameters must be an object")
        unknown = sorted(set(parameters) - {"candidate_labels", "hypothesis_template"})
        if unknown:
            raise RequestError(f"unknown parameters {unknown}: there are candidate_labels and hypothesis_template")
        labels, template = parameters.get("candidate_labels"), parameters.get("hypothesis_template")
        labels = self.split_labels(labels) if isinstance(labels, str) else labels  # from the address of a request
        _check_texts(labels, "candidate_labels")
        template = "{}" if template is None else template
        if not isinstance(template, str) or "{}" not in template:
            raise RequestError('hypothesis_template must be a text with "{}" where the label goes')
        _check_texts([template.replace("{}", label) for label in labels], "candidate_labels in hypothesis_template")
        if isinstance(inputs, dict) and set(inputs) == {"image"}:  # as the JavaScript client posts it
            inputs = inputs["image"]
        if isinstance(inputs, Image.Image) or (isinstance(inputs, str) and is_image(inputs)):
            inputs = {"frames": [inputs]}
        [video] = self._read_videos([inputs], "inputs")
        try:
            found = self.pipeline(video, [label.strip() for label in labels], hypothesis_template=template)
        except ValueError as error:
            raise RequestError(str(error)) from error
        return [{"label": answer["label"], "score": answer["score"]} for answer in found]

    def _embed(self, **inputs) -> torch.Tensor:
        """Texts or videos -> vectors, (N,K) or (B,K)."""
        try:
            inputs = self.processor(**inputs, return_tensors="pt").to(self.model.device)
        except ValueError as error:  # an empty caption, a truncated video
            raise RequestError(str(error)) from error
        if "input_ids" in inputs:
            return self.model.get_text_features(**inputs).pooler_output.float().cpu()
        return self.model.get_video_features(**inputs).pooler_output.float().cpu()

    def _read_videos(self, videos: list, name: str | None = None) -> Iterator:
        budget = MAX_BYTES
        for index, video in enumerate(videos):
            where = name or f"videos[{index}]"
            if isinstance(video, dict) and set(video) == {"frames"}:
                frames, size = read_frames(video["frames"], where, budget)
                yield frames
                budget -= size
            elif isinstance(video, str):
                content = decode_base64(video, where, budget)
                yield check_video(content, where, self.probe_video)
                budget -= len(content)
            else:
                raise RequestError(f'{where} must be base64 of a file or {{"frames": [base64 of an image, ...]}}')


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
    if len(videos) > MAX_VIDEOS:
        raise RequestError(f"{len(videos)} videos; the limit is {MAX_VIDEOS}")
    if texts:
        _check_texts(texts, "texts")
    return texts, videos


def _check_texts(texts, where: str):
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise RequestError(f"{where} must be a list of 1 to {MAX_TEXTS} texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"{where}[{index}] must be a non-empty text")
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"{where}[{index}] has {len(text)} characters; the limit is {MAX_CHARACTERS}")
