# SPDX-License-Identifier: Apache-2.0
"""pipeline("video-text-retrieval"): the same vectors and scores as the model, by the names of the arguments."""

import base64
import io
import weakref

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


def test_candidate_labels_are_ranked_for_each_video(pipe, clips, vectors):
    results = pipe(clips, candidate_labels=TEXTS)
    similarities = vectors[0] @ vectors[1].T  # (N,B)
    scale = pipe.model.clip.logit_scale.exp()
    for b, found in enumerate(results):
        order = similarities[:, b].argsort(descending=True)
        assert [entry["label"] for entry in found] == [TEXTS[n] for n in order]
        torch.testing.assert_close(torch.tensor([e["similarity"] for e in found]), similarities[order, b])
        expected = (scale * similarities[:, b]).softmax(0)[order].detach()
        torch.testing.assert_close(torch.tensor([entry["score"] for entry in found]), expected)
        assert [set(entry) for entry in found] == [{"label", "score", "similarity"}] * 3
    alone = pipe(clips[0], TEXTS)  # a batch of one rounds otherwise
    assert [entry["label"] for entry in alone] == [entry["label"] for entry in results[0]]
    assert [entry["score"] for entry in alone] == pytest.approx([entry["score"] for entry in results[0]], abs=1e-5)
    assert pipe(clips[0], candidate_labels=TEXTS[0])[0]["score"] == 1
    assert pipe(clips, candidate_labels=TEXTS, top_k=1) == [found[:1] for found in results]


def test_a_template_makes_the_text_of_a_label(pipe, clips):
    labels = ["star", "two kids"]
    found = pipe(clips[0], candidate_labels=labels, hypothesis_template="a red {} spins")
    expected = pipe(clips[0], candidate_labels=["a red star spins", "a red two kids spins"])
    assert [e["score"] for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-6)
    assert {e["label"] for e in found} == set(labels)
    fixed = CAMoEPipeline(
        pipe.model, processor=pipe.processor, candidate_labels=labels, hypothesis_template="a red {} spins", top_k=1
    )
    assert fixed(clips[0]) == found[:1]
    assert fixed(texts="two kids").shape == (64,)


def test_a_picture_is_answered_as_by_zero_shot_image_classification(pipe, clips, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    images = CAMoEPipeline(pipe.model, processor=pipe.processor, device="cpu", task="zero-shot-image-classification")
    expected = images(picture, candidate_labels=TEXTS)
    assert [e["score"] for e in expected] == sorted((e["score"] for e in expected), reverse=True)
    assert sum(e["score"] for e in expected) == pytest.approx(1) and {e["label"] for e in expected} == set(TEXTS)
    data_uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for form in (tmp_path / "picture.png", str(tmp_path / "picture.png"), content, data_uri, np.array(picture)):
        assert images(form, candidate_labels=TEXTS) == expected
    other = picture.rotate(90)
    both = images([picture, other], candidate_labels=TEXTS)  # two pictures
    assert [e["score"] for e in both[0]] == pytest.approx([e["score"] for e in expected], abs=1e-5)
    assert both[0] != both[1] and len(both) == 2
    assert len(pipe([picture, other], candidate_labels=TEXTS)) == 3  # one clip of two frames: its three labels


@pytest.mark.parametrize("name", ["image", "images", "inputs"])
def test_the_librarys_names_of_the_first_argument_are_known(pipe, clips, name):
    assert pipe(**{name: clips[0]}, candidate_labels=TEXTS) == pipe(clips[0], candidate_labels=TEXTS)
    with pytest.raises(ValueError, match=f"Give one of `videos`, `{name}`"):
        pipe(clips[0], candidate_labels=TEXTS, **{name: clips[1]})


def test_a_string_of_labels_is_split_at_its_commas(pipe, clips):
    expected = pipe(clips[0], candidate_labels=TEXTS)
    assert pipe(clips[0], candidate_labels=f" {', '.join(TEXTS)},") == expected
    assert [found["label"] for found in pipe(clips[0], candidate_labels=["a dog, a cat"])] == ["a dog, a cat"]


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


def test_data_sets_columns_and_generators_are_streamed(pipe, clips, vectors):
    paths = [str(path) for path in clips]
    rows = Dataset.from_dict({"video": paths, "caption": TEXTS[:2]}).cast_column("video", Video(decode=False))
    plain = pipe(paths, candidate_labels=TEXTS)
    for stream in (rows["video"], KeyDataset(rows, "video"), rows.to_iterable_dataset()["video"], iter(paths)):
        found = pipe(stream, batch_size=2)
        assert not isinstance(found, list | torch.Tensor)
        torch.testing.assert_close(torch.stack(list(found)), vectors[1])
    found = pipe(KeyDataset(rows, "video"), candidate_labels=rows["caption"], num_workers=1)
    assert [[e["label"] for e in labels] for labels in found] == [
        [e["label"] for e in labels if e["label"] in TEXTS[:2]] for labels in plain
    ]
    torch.testing.assert_close(pipe(rows[1]["video"]), vectors[1][1])  # one row is one video
    torch.testing.assert_close(torch.stack(list(pipe(texts=rows["caption"]))), vectors[0][:2])
    assert pipe(texts=rows["caption"], videos=rows["video"]) == pipe(texts=TEXTS[:2], videos=paths)
    assert pipe(paths[0], candidate_labels={"caption": TEXTS[0]})[0]["label"] == {"caption": TEXTS[0]}
    assert list(pipe(path for path in ())) == []


def test_a_stream_is_read_as_its_results_are_taken(pipe, clips):
    taken, alive = [], weakref.WeakSet()

    def videos():
        for i in range(20):
            taken.append(i)
            frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
            alive.add(frames)
            yield frames

    results = pipe(videos(), candidate_labels=TEXTS, batch_size=2)
    assert taken == []
    next(results)
    assert len(taken) <= 4
    most = max(len(alive) for _ in results)
    assert len(taken) == 20 and most <= 6


def test_another_default_type_of_torch_changes_nothing(pipe, clips, vectors):
    torch.set_default_dtype(torch.float64)
    try:
        found = pipe(clips), pipe(texts=TEXTS), pipe(clips, candidate_labels=TEXTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], vectors[1])
    torch.testing.assert_close(found[1], vectors[0])
    assert found[2][0][0]["score"] == pytest.approx(pipe(clips, candidate_labels=TEXTS)[0][0]["score"], abs=1e-5)


def test_frames_of_every_type_give_the_same_vectors(pipe, clips, vectors):
    frames = pipe.processor.video_processor.decode(clips[0]).frames
    for form in (frames.float(), frames.double() / 255, frames.long(), (frames / 255).half()):
        torch.testing.assert_close(pipe(form), vectors[1][0])
        torch.testing.assert_close(pipe([clips[0], form])[1], vectors[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `videos`, `texts`, or both"),
        ({"candidate_labels": TEXTS}, "needs `videos` to compare the labels with"),
        ({"videos": "a.mp4", "texts": TEXTS, "candidate_labels": TEXTS}, "not both"),
        ({"videos": []}, "`videos` is empty"),
        ({"videos": "a.mp4", "candidate_labels": []}, "`candidate_labels` is empty"),
        ({"videos": "a.mp4", "candidate_labels": " , "}, "`candidate_labels` is empty"),
        ({"videos": "a.mp4", "candidate_labels": TEXTS, "hypothesis_template": "a video"}, "no {} for the label"),
        ({"texts": TEXTS, "top_k": 0}, "`top_k` must be at least 1"),
        ({"texts": [""]}, "Caption 0 is empty"),
        ({"videos": (path for path in ()), "texts": TEXTS}, "`videos` is empty"),
        ({"videos": io.BytesIO(b"")}, "the file is empty"),
        ({"videos": 7}, "int is not a video"),
    ],
)
def test_arguments_that_make_no_sense_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_file_that_is_missing_is_named(pipe):
    with pytest.raises(VideoDecodingError, match="nowhere.mp4"):
        pipe("nowhere.mp4", candidate_labels=TEXTS)


def test_a_saved_pipeline_loads_by_its_task(pipe, clips, vectors, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    assert (tmp_path / "encode.py").is_file()
    loaded = pipeline("video-text-retrieval", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert "transformers_modules" in type(loaded).__module__
    assert torch.equal(loaded(clips), vectors[1])
