# SPDX-License-Identifier: Apache-2.0
"""mteb's own code evaluates a release on a small retrieval task, in both directions: its recalls are ours."""

import pytest
import torch
from datasets import Dataset, Video

from evaluation.scoring import score_retrieval
from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor
from tests.video_files import natural_picture, write_video


mteb = pytest.importorskip("mteb")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402 — after the check that mteb is installed
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb_model import CAMoEForMteb  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402


CAPTIONS = [
    f"{what} on {where}" for what in ("a star", "two kids", "a disc", "a dog") for where in ("a wall", "grass")
]


def describe(direction: str) -> TaskMetadata:
    return TaskMetadata(
        type="Any2AnyRetrieval", name=f"TinyVideos{direction}", main_score="recall_at_1", category=direction,
        description="Pairs that a test makes.", reference=None, dataset={"path": "none", "revision": "none"},
        eval_splits=["test"], eval_langs=["eng-Latn"], date=("2026-01-01", "2026-01-01"), domains=[],
        task_subtypes=[], license=None, annotations_creators="derived", dialect=[], modalities=["text", "video"],
        sample_creation="found", bibtex_citation="",
    )  # fmt: skip


class TextToVideo(AbsTaskRetrieval):
    """Captions and videos, one of each a pair."""

    metadata = describe("t2v")
    videos: list[str] = []  # paths

    def load_data(self, *args, **kwargs):
        ids = [str(i) for i in range(len(CAPTIONS))]
        texts = Dataset.from_dict({"id": ids, "text": CAPTIONS, "modality": ["text"] * len(ids)})
        videos = Dataset.from_dict({"id": ids, "video": self.videos, "modality": ["video"] * len(ids)})
        videos = videos.cast_column("video", Video())
        queries, corpus = (texts, videos) if self.metadata.category == "t2v" else (videos, texts)
        pairs = {name: {name: 1} for name in ids}
        split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=pairs, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class VideoToText(TextToVideo):
    metadata = describe("v2t")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    pictures = [[natural_picture(48, 64, 10 * i + j) for j in range(6)] for i in range(len(CAPTIONS))]
    return [str(write_video(folder / f"{i}.mp4", 6, pictures=shown)) for i, shown in enumerate(pictures)]


@pytest.mark.parametrize(("task", "ours"), [(TextToVideo, "text_to_video"), (VideoToText, "video_to_text")])
def test_recalls_of_mteb_are_those_of_our_evaluation(run_dir, videos, task, ours, monkeypatch):
    monkeypatch.setattr(TextToVideo, "videos", videos)
    model = CAMoEForMteb(SentenceTransformer(str(run_dir), trust_remote_code=True, device="cpu"))
    results = mteb.evaluate(model, task(), cache=None, encode_kwargs={"batch_size": 3})
    found = results.task_results[0].scores["test"][0]

    model, processor = CAMoEModel.from_pretrained(run_dir), CAMoEProcessor.from_pretrained(run_dir)
    pipe = CAMoEPipeline(model, processor=processor, device="cpu")
    texts, clips = pipe(texts=CAPTIONS), pipe(videos)
    assert torch.pdist(clips).min() > 1e-3  # no ties
    expected = score_retrieval(texts, clips).to_dict()["results"]["none"][ours]
    assert (100 * found["recall_at_1"], 100 * found["recall_at_5"]) == pytest.approx(
        (expected["R@1"], expected["R@5"])
    )
    assert 0 < expected["R@5"] < 100
