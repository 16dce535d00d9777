# SPDX-License-Identifier: Apache-2.0
"""`evaluate.Metric` of video-text retrieval: both directions, ties in random order, any correction of this project.

A thin wrapper around rank_retrieval, which the programs in training/ use as well. See README.md.
"""

import datasets
import evaluate
import numpy as np

from .protocol import recalls

# `evaluate` copies the files that are imported here, not what those import
from .ranks import rank_retrieval


_DESCRIPTION = """\
Retrieval between texts and videos: R@1, R@5, R@10 (percent), their sum Rsum, median rank and mean rank, for
text_to_video and video_to_text. Ranks start at 1. Candidates with equal scores are in random order: R@K is the
expectation, median and mean use the middle rank, so a model that gives every pair the same score gets chance. Where a
video has several captions, video_to_text is its best caption's rank (its other ones are no distractors) and
video_to_text_caption_max ranks groups of captions by their highest score, as CLIP4Clip does.
"""

_INPUTS = """
Args:
    predictions: a row per text: its scores with all M videos; or its embedding, with `video_embeddings`.
    references: the right video of each text: its position among the M, or its id in `video_ids`.
    video_embeddings: (M,K), to be multiplied with the embeddings of the texts.
    video_ids: M ids, in the order of the videos.
    correction: none (default), dual_softmax, query_bank, dynamic_query_bank or sinkhorn. dual_softmax and sinkhorn see
        all test queries at once; say so beside the number.
    options: as of rank_retrieval: scale, dual_softmax_temp, text_bank, video_bank, tau, video_tau, sinkhorn_temp.
Returns:
    text_to_video_R@1, text_to_video_R@5, ..., video_to_text_R@1, ...
Example:
    >>> metric = evaluate.load("training/evaluation/video_text_retrieval.py")
    >>> metric.compute(predictions=[[0.9, 0.1], [0.8, 0.3]], references=[0, 1])["text_to_video_R@1"]
    50.0
"""

_CITATION = """\
@article{cheng2021camoe,
  title = {Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss},
  author = {Cheng, Xing and Lin, Hezheng and Wu, Xiangyu and Yang, Fan and Shen, Dong},
  journal = {arXiv preprint arXiv:2109.04290}, year = {2021}}
"""


class VideoTextRetrieval(evaluate.Metric):
    """Retrieval metrics from scores or embeddings."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=[
                datasets.Features({"predictions": row, "references": datasets.Value("int64")}),
                datasets.Features({"predictions": row, "references": datasets.Value("string")}),
            ],
        )

    def _compute(
        self, predictions, references, video_embeddings=None, video_ids=None, correction: str = "none", **options
    ) -> dict[str, float]:
        if len({len(row) for row in predictions}) > 1:
            raise ValueError("Rows of predictions differ in length: each is the scores of one text with all videos.")
        if video_ids is not None:
            references = self._positions(references, video_ids)
        elif isinstance(references[0], str):
            raise ValueError("References are names of videos: pass `video_ids`, the names in the order of the videos.")
        ranked = rank_retrieval(
            np.asarray(predictions), video_embeddings, np.asarray(references), corrections=(correction,), **options
        )
        return {
            f"{direction}_{name}": value
            for direction, ranks in ranked.ranks[correction].items()
            for name, value in recalls(ranks).items()
        }

    @staticmethod
    def _positions(references, video_ids) -> list[int]:
        positions = {str(video_id): position for position, video_id in enumerate(video_ids)}
        if len(positions) < len(video_ids):
            raise ValueError("`video_ids` names a video twice.")
        for text, reference in enumerate(references):
            if str(reference) not in positions:
                raise ValueError(f"Text {text} belongs to video {reference!r}, which is not in `video_ids`.")
        return [positions[str(reference)] for reference in references]
