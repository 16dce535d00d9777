# SPDX-License-Identifier: Apache-2.0
"""pipeline("video-text-retrieval"): the same vectors and scores as the model, by the names of the arguments."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_camoe import CAMoEPipeline
from modeling_camoe.encode import encode_texts, encode_videos
from modeling_camoe.frames import Clip, VideoDecodingError
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


TEXTS = ["a red star spins clockwise", "two kids in a gym", "a small blue disc"]


@pytest.fixture(scope="module")
def pipe():
    model, processor = tiny_model_and_processor()
    return CAMoEPipeline(model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    return [write_video(folder / "a.mp4"), write_video(folder / "b.mp4", 8, pictures=pictures)]


@pytest.fixture(scope="module")
def vectors(pipe, clips):
    return encode_texts(pipe.model, pipe.processor, TEXTS), encode_videos(pipe.model, pipe.processor, clips).vectors


def test_one_side_alone_gives_the_vectors_of_search_and_evaluation(pipe, clips, vectors):
    assert torch.equal(pipe(texts=TEXTS), vectors[0])
    assert torch.equal(pipe(clips), vectors[1])
    assert pipe(clips[0]).shape == pipe(texts=TEXTS[0]).shape == (64,)


def test_candidate_texts_are_ranked_for_each_video(pipe, clips, vectors):
    results = pipe(clips, candidate_texts=TEXTS)
    scores = vectors[0] @ vectors[1].T  # (N,B)
    scale = pipe.model.clip.logit_scale.exp()
    for b, found in enumerate(results):
        order = scores[:, b].argsort(descending=True)
        assert [entry["text"] for entry in found] == [TEXTS[n] for n in order]
        torch.testing.assert_close(torch.tensor([entry["score"] for entry in found]), scores[order, b])
        expected = (scale * scores[:, b]).softmax(0)[order].detach()
        torch.testing.assert_close(torch.tensor([entry["probability"] for entry in found]), expected)
    alone = pipe(clips[0], candidate_texts=TEXTS)  # a batch of one rounds otherwise
    assert [entry["text"] for entry in alone] == [entry["text"] for entry in results[0]]
    assert [entry["score"] for entry in alone] == pytest.approx([entry["score"] for entry in results[0]], abs=1e-5)
    assert pipe(clips[0], candidate_texts=TEXTS[0])[0]["probability"] == 1


def test_videos_are_ranked_for_each_text(pipe, clips, vectors):
    scores = vectors[0] @ vectors[1].T
    results = pipe(texts=TEXTS, videos=clips)
    assert [[entry["video"] for entry in found] for found in results] == scores.argsort(descending=True).tolist()
    alone = pipe(texts=TEXTS[1], videos=clips)
    assert [entry["video"] for entry in alone] == [entry["video"] for entry in results[1]]
    assert pipe(texts=TEXTS[1], videos=clips, top_k=1) == alone[:1]


def test_a_video_may_have_any_form(pipe, clips, vectors):
    expected = pipe(clips[0])
    torch.testing.assert_close(expected, vectors[1][0])
    assert torch.equal(pipe(str(clips[0])), expected)
    assert torch.equal(pipe(clips[0].read_bytes()), expected)
    assert torch.equal(pipe(Clip(clips[0])), expected)
    frames = pipe.processor.video_processor.decode(clips[0])
    for video in (frames, frames.frames, frames.frames.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(pipe(video), expected)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames.frames]
    torch.testing.assert_close(pipe(images), expected)


def test_files_and_decoded_videos_may_be_mixed_and_keep_their_order(pipe, clips, vectors):
    frames = pipe.processor.video_processor.decode(clips[1]).frames
    found = pipe([clips[0], frames, clips[0], frames], batch_size=1)
    torch.testing.assert_close(found, vectors[1][[0, 1, 0, 1]])
    torch.testing.assert_close(pipe(torch.stack([frames, frames])), vectors[1][[1, 1]])


def test_columns_of_a_data_set_rows_and_generators_are_lists(pipe, clips, vectors):
    paths = [str(path) for path in clips]
    rows = Dataset.from_dict({"video": paths, "caption": TEXTS[:2]}).cast_column("video", Video(decode=False))
    assert torch.equal(pipe(path for path in paths), vectors[1])
    torch.testing.assert_close(pipe(rows["video"]), vectors[1])
    torch.testing.assert_close(pipe(KeyDataset(rows, "video")), vectors[1])
    torch.testing.assert_close(pipe(rows[1]["video"]), vectors[1][1])  # one row is one video
    torch.testing.assert_close(pipe(texts=rows["caption"]), vectors[0][:2])
    found = pipe(paths, candidate_texts=rows["caption"])
    assert found == pipe(paths, candidate_texts=TEXTS[:2])
    assert pipe(paths[0], candidate_texts={"caption": TEXTS[0]})[0]["text"] == {"caption": TEXTS[0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `videos`, `texts`, or both"),
        ({"candidate_texts": TEXTS}, "needs `videos` to compare the texts with"),
        ({"videos": "a.mp4", "texts": TEXTS, "candidate_texts": TEXTS}, "not both"),
        ({"videos": []}, "`videos` is empty"),
        ({"videos": "a.mp4", "candidate_texts": []}, "`candidate_texts` is empty"),
        ({"texts": TEXTS, "top_k": 0}, "`top_k` must be at least 1"),
        ({"texts": [""]}, "Caption 0 is empty"),
        ({"videos": (path for path in ())}, "`videos` is empty"),
        ({"videos": io.BytesIO(b"")}, "BytesIO is not a video"),
        ({"videos": 7}, "int is not a video"),
    ],
)
def test_arguments_that_make_no_sense_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_file_that_is_missing_is_named(pipe):
    with pytest.raises(VideoDecodingError, match="nowhere.mp4"):
        pipe("nowhere.mp4", candidate_texts=TEXTS)


def test_a_saved_pipeline_loads_by_its_task(pipe, clips, vectors, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    assert (tmp_path / "encode.py").is_file()
    loaded = pipeline("video-text-retrieval", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert "transformers_modules" in type(loaded).__module__
    assert torch.equal(loaded(clips), vectors[1])
