# SPDX-License-Identifier: Apache-2.0
"""`pipeline("video-text-retrieval", model=..., trust_remote_code=True)`: videos and texts in, scores or vectors out.

Three uses, distinguished by argument names:

    pipe(videos, candidate_labels=[...])    for each video, how well each label fits (zero-shot classification)
    pipe(texts=[...], videos=[...])         for each text, the videos, best first
    pipe(videos) or pipe(texts=[...])       the vectors, whose inner product is the score

As in the library's pipelines, a single item gives a single result, a list gives a list, and data sets, columns,
`KeyDataset` and generators give an iterator: each result comes as soon as it is computed, and only a batch is in
memory. All is encoded by encode.py, as in search and evaluation, so the vectors are the same.
"""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import IterableDataset
from transformers import Pipeline

from .encode import encode_texts, iter_encoded_videos
from .retrieval import similarity
from .video_inputs import as_videos, is_one_video


IMAGE_TASK = "zero-shot-image-classification"
TEXTS_PER_BATCH = 256


class CAMoEPipeline(Pipeline):
    """Video-text retrieval with a [`CAMoEModel`] and its [`CAMoEProcessor`].

    Args:
        model: a [`CAMoEModel`].
        processor: its processor.
        batch_size: videos per forward pass, 8 by default.
        num_workers: processes that decode; 0, the default, decodes in this one.
        candidate_labels, hypothesis_template, top_k: defaults for calls.
        **kwargs: as for every pipeline (`device`, ...).
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(
        self,
        videos=None,
        candidate_labels=None,
        *,
        texts=None,
        hypothesis_template: str | None = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        image=None,
        images=None,
        inputs=None,
    ):
        """
        Args:
            videos: a video in any form that [`CAMoEVideoProcessor`] takes, or several. A picture is a clip of one
                frame. A list of pictures is the frames of one clip (for the task "zero-shot-image-classification", as
                many pictures).
            candidate_labels: what each video is compared with: a list of labels, or one string of labels with commas
                between them, as in the library. In a list a label may be a whole caption, or a mapping expert -> text.
            texts: a caption, or several (or mappings expert -> text), to query with or to embed.
            hypothesis_template: the text that is read for a label, "{}" standing for it, for instance "a video of {}";
                the label itself by default.
            top_k: keep only this many of the best.
            batch_size, num_workers: for this call. Generators are decoded in this process.
            image, images, inputs: other names of `videos`, by which the library's pipelines are called.

        Returns:
            With `candidate_labels`: for each video [{"label", "score", "similarity"}, ...], best first. `score` is the
            probability of the label among the candidates, the softmax of exp(logit_scale) times the similarities: it
            depends on the other labels, and says nothing about whether any of them fits. `similarity` is CAMoE's own
            score of the pair, the gated mean of the experts' cosines, in [-1, 1], whatever the other labels are.

            With `texts` and `videos`: for each text [{"video", "score"}, ...], best first; `video` is the position in
            the list, `score` the similarity. With only one of the two: float32 vectors, (B,K) or (N,K).

        Raises:
            ValueError: for arguments that do not go together.
            VideoDecodingError: a file cannot be decoded; names it.
        """
        names = _given(videos=videos, image=image, images=images, inputs=inputs)
        if len(names) > 1:
            raise ValueError(f"Give one of {', '.join(f'`{name}`' for name in names)}: they are names of the same.")
        videos = next(iter(names.values()), None)
        options = self._postprocess_params | _given(
            candidate_labels=candidate_labels, hypothesis_template=hypothesis_template, top_k=top_k
        )
        self._sanitize_parameters(**options)
        labels, top_k = options.get("candidate_labels"), options.get("top_k")
        if candidate_labels is None and texts is not None:
            labels = None  # a default of the pipeline
        if texts is not None and labels is not None:
            raise ValueError("Give `texts` to rank videos for each, or `candidate_labels` to rank these; not both.")
        if videos is None and texts is None:
            needs = "`videos`, `texts`, or both" if labels is None else "`videos` to compare the labels with"
            raise ValueError(f"The pipeline needs {needs}.")
        for name, items in (("videos", videos), ("texts", texts)):
            if isinstance(items, list | tuple) and not items:
                raise ValueError(f"`{name}` is empty.")

        if videos is None:
            return self._embed_texts(texts)
        # A list is a batch of pictures where the task is that of pictures; elsewhere, the frames of a clip.
        is_list = isinstance(videos, list | tuple)
        is_one = is_one_video(videos) and not (is_list and self.task == IMAGE_TASK)
        is_stream = not (is_one or is_list or hasattr(videos, "ndim"))
        if not is_stream:
            videos = [videos] if is_one else [video for item in videos for video in as_videos(item)]
        batches = self._embed_videos(
            videos, batch_size or self._batch_size or 8, num_workers or self._num_workers or 0
        )
        if texts is not None:
            return self._rank_videos(texts, list(batches), top_k)
        finish = iter if labels is None else self._label(labels, options.get("hypothesis_template", "{}"), top_k)
        results = (result for vectors in batches for result in finish(vectors))
        if is_stream:
            return results
        if is_one:
            return next(results)
        return torch.stack(list(results)) if labels is None else list(results)

    def save_pretrained(self, save_directory, **kwargs):
        self.processor.save_pretrained(save_directory)  # first: a model beside a processor does not look for one
        super().save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, candidate_labels=None, hypothesis_template=None, top_k=None):
        """Called for the arguments of the constructor, too."""
        if candidate_labels is not None and not len(split_labels(candidate_labels)):
            raise ValueError("`candidate_labels` is empty.")
        if hypothesis_template is not None and "{}" not in hypothesis_template:
            raise ValueError(f"`hypothesis_template` has no {{}} for the label: {hypothesis_template!r}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        given = _given(candidate_labels=candidate_labels, hypothesis_template=hypothesis_template, top_k=top_k)
        return {}, {}, given

    def _embed_videos(self, videos, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        """Videos, one by one or with a length and an index -> their vectors (b,K), batch by batch."""
        if not hasattr(videos, "__iter__") and not hasattr(videos, "__getitem__"):
            as_videos(videos)  # says what it is
        if not hasattr(videos, "__len__") or isinstance(videos, IterableDataset):
            chunks = _chunks(videos, batch_size)
            return itertools.chain.from_iterable(self._embed_videos(chunk, batch_size, 0) for chunk in chunks)
        batches = iter_encoded_videos(
            self.model, self.processor, videos, batch_size=batch_size, num_workers=num_workers
        )
        return (batch.vectors for batch in batches)

    def _embed_texts(self, texts):
        """A text -> (K,), a list -> (N,K), anything else -> an iterator of (K,)."""
        if _is_one_text(texts):
            return encode_texts(self.model, self.processor, [texts])[0]
        if isinstance(texts, list | tuple):
            return encode_texts(self.model, self.processor, texts)
        chunks = _chunks(texts, TEXTS_PER_BATCH)
        return itertools.chain.from_iterable(encode_texts(self.model, self.processor, chunk) for chunk in chunks)

    def _rank_videos(self, texts, batches: list[torch.Tensor], top_k: int | None):
        """Texts and the vectors of all videos -> the videos of each text, best first."""
        if not batches:
            raise ValueError("`videos` is empty.")
        is_one = _is_one_text(texts)
        text_vectors = encode_texts(self.model, self.processor, [texts] if is_one else list(texts))
        found = []
        for scores in similarity(text_vectors, torch.cat(batches)):
            order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
            found.append([{"video": b, "score": scores[b].item()} for b in order])
        return found[0] if is_one else found

    def _label(self, labels, template: str, top_k: int | None):
        """What turns vectors (b,K) into b lists of labels."""
        labels = split_labels(labels)
        texts = [template.replace("{}", label) if isinstance(label, str) else label for label in labels]
        text_vectors = encode_texts(self.model, self.processor, texts)
        scale = self.model.clip.logit_scale.float().exp().item()

        def rank(scores: torch.Tensor) -> list[dict]:  # (N,), of one video
            probabilities = (scale * scores).softmax(dim=0).tolist()
            order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
            return [{"label": labels[n], "score": probabilities[n], "similarity": scores[n].item()} for n in order]

        return lambda vectors: map(rank, similarity(text_vectors, vectors).T)

    # The library's three steps, for one batch of videos. A call overlaps them instead, as encode.py does.

    def preprocess(self, videos) -> dict:
        return self.processor.process_videos(videos)

    def _forward(self, inputs: dict) -> dict:
        return {"vectors": self.model.get_video_features(**inputs).pooler_output}

    def postprocess(self, outputs: dict) -> torch.Tensor:
        return outputs["vectors"].float()


def _given(**arguments) -> dict:
    return {name: value for name, value in arguments.items() if value is not None}


def split_labels(labels) -> list:
    """Labels as a list: a string is split at its commas, as by the library's zero-shot pipelines."""
    if isinstance(labels, str):
        return [label.strip() for label in labels.split(",") if label.strip()]
    return [labels] if isinstance(labels, Mapping) else list(labels)


def _is_one_text(texts) -> bool:
    return isinstance(texts, str | Mapping)


def _chunks(items, size: int) -> Iterator[list]:
    """Lists of at most `size` items, read when they are asked for."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


__all__ = ["CAMoEPipeline"]
