# SPDX-License-Identifier: Apache-2.0
"""The processor: shapes, padding, truncation, errors, and that it saves and loads."""

import pickle

import pytest
import torch
from transformers import AutoProcessor, AutoVideoProcessor

from modeling_camoe.configuration_camoe import CAMoEConfig
from modeling_camoe.processing_camoe import CAMoEProcessor
from modeling_camoe.video_processing_camoe import CAMoEVideoProcessor
from tests.tiny_processor import tiny_model_and_processor
from tests.tokenizer_files import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def processor(tokenizer):
    return make_processor(tokenizer)


def make_processor(tokenizer, experts=None, streams=None, **options) -> CAMoEProcessor:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    config = CAMoEConfig(streams=streams, **({} if experts is None else {"experts": experts}))
    return CAMoEProcessor(CAMoEVideoProcessor(num_frames=3, **size), tokenizer, config, **options)


def test_a_text_per_expert_is_tokenised_and_padded_to_the_longest_of_the_batch(processor):
    inputs = processor(text=["a red star spins clockwise on a sandy beach", "two kids"], return_tensors="pt")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 4, 11)  # nine words and the two ends
    texts = [processor.batch_decode(row, skip_special_tokens=True) for row in inputs["input_ids"]]
    assert texts[0] == [
        "a red star spins clockwise on a sandy beach",
        "red star",
        "spins clockwise",
        "on a sandy beach",
    ]
    assert texts[1] == ["two kids"] * 4
    assert inputs["attention_mask"].sum(-1).tolist() == [[11, 4, 4, 6], [4, 4, 4, 4]]


def test_one_caption_is_a_batch_of_one(processor):
    assert processor(text="a red star", return_tensors="pt")["input_ids"].shape == (1, 4, 5)
    assert processor(text={"fusion": "a red star", "entity": "star"}, return_tensors="pt")["input_ids"].shape[0] == 1


def test_tagged_texts_are_read_as_they_are(processor):
    texts = [{"fusion": "a red star spins", "entity": "two kids", "action": ""}]
    assert processor.streams_of(texts) == [["a red star spins", "two kids", "a red star spins", "a red star spins"]]


def test_long_texts_are_cut_to_max_length_and_keep_their_end_token(processor):
    ids = processor(text="a red star " * 100, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 4, 32)
    assert (ids[..., -1] == processor.tokenizer.eos_token_id).all()
    ids = processor(text="a red star " * 100, max_length=7, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 4, 7) and (ids[..., -1] == processor.tokenizer.eos_token_id).all()


def test_texts_can_be_padded_to_a_fixed_length(processor):
    inputs = processor(text="a red star", padding="max_length", max_length=77, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 4, 77)
    assert inputs["attention_mask"].sum(-1).tolist() == [[5, 4, 5, 5]]


def test_videos_and_options_for_them_reach_the_video_processor(processor):
    video = torch.randint(0, 255, (2, 3, 40, 48), dtype=torch.uint8)
    inputs = processor(text="two kids", videos=[video], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    assert inputs["frame_mask"].tolist() == [[1, 1, 0]]
    inputs = processor(videos=[video], videos_kwargs={"do_rescale": False, "do_normalize": False}, return_tensors="pt")
    assert inputs["pixel_values_videos"].dtype == torch.uint8 and "input_ids" not in inputs


def test_without_tensors_the_ids_are_nested_lists(processor):
    ids = processor(text=["two kids", "a red star"])["input_ids"]
    assert (len(ids), len(ids[0]), len(ids[0][0])) == (2, 4, 5)


def test_mistakes_get_an_error_that_names_them(processor, tokenizer):
    with pytest.raises(ValueError, match="Caption 1 is empty"):
        processor(text=["a dog", ""])
    with pytest.raises(ValueError, match="no caption"):
        processor(text=[])
    with pytest.raises(ValueError, match="`text`, `videos`, or both"):
        processor()
    with pytest.raises(ValueError, match="'sceen'. Did you mean 'scene'"):
        make_processor(tokenizer, experts=["fusion", "sceen"])
    with pytest.raises(ValueError, match="`max_length` is 128; it must be from 3 to 77"):
        make_processor(tokenizer, max_length=128)


def test_a_saved_processor_is_loaded_by_the_auto_class_as_it_was(tokenizer, tmp_path):
    AutoVideoProcessor.register(CAMoEConfig, CAMoEVideoProcessor, exist_ok=True)
    AutoProcessor.register(CAMoEConfig, CAMoEProcessor, exist_ok=True)
    processor = make_processor(
        tokenizer, experts=["fusion", "motion"], streams={"motion": "action"}, tagger=None, max_length=16
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, CAMoEProcessor)
    assert (loaded.experts, loaded.streams) == (["fusion", "motion"], {"fusion": "fusion", "motion": "action"})
    assert (loaded.tagger, loaded.max_length, loaded.video_processor.num_frames) == ("none", 16, 3)
    assert loaded(text="two kids")["input_ids"] == processor(text="two kids")["input_ids"]


def test_a_tagger_that_is_a_callable_is_used_and_must_be_set_again_after_loading(processor, tmp_path):
    def last_word(caption):
        return {"entity": caption.split()[-1]}

    processor.tagger = last_word
    assert processor.streams_of("two kids") == [["two kids", "kids", "two kids", "two kids"]]
    processor.save_pretrained(tmp_path)
    assert processor.tagger is last_word
    loaded = CAMoEProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="last_word.*set `processor.tagger`"):
        loaded(text="two kids")
    assert loaded(text={"fusion": "two kids"})["input_ids"]  # needs no tagger
    loaded.tagger = last_word
    assert loaded.streams_of("two kids") == processor.streams_of("two kids")


def test_a_processor_can_be_sent_to_worker_processes(processor):
    processor(text="a red star")
    copy = pickle.loads(pickle.dumps(processor))
    assert copy(text="a red star")["input_ids"] == processor(text="a red star")["input_ids"]


def test_metadata_of_videos_is_passed_on(processor):
    video = {"array": torch.zeros(8, 3, 32, 32), "video_metadata": {"total_num_frames": 8, "fps": 4.0}}
    inputs = processor(videos=[video], return_metadata=True, return_tensors="pt")
    assert inputs["video_metadata"][0].timestamps == [0.25, 1.0, 1.5]
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)


def test_queries_and_videos_are_scored_as_in_colpali():
    model, processor = tiny_model_and_processor()
    videos = [
        torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in (0, 1)
    ]
    queries, clips = (
        processor.process_queries(["a red star spins", "two kids", "a disc"]),
        processor.process_videos(videos),
    )
    assert set(queries) == {"input_ids", "attention_mask"} and set(clips) == {"pixel_values_videos", "frame_mask"}
    with torch.inference_mode():
        texts, pictures = model.get_text_features(**queries), model.get_video_features(**clips)
        expected = model(**queries, **clips).logits_per_text / model.clip.logit_scale.exp()
    vectors = texts.pooler_output, pictures.pooler_output
    lists = [list(texts.pooler_output), list(pictures.pooler_output.numpy())]
    for arguments in ((texts, pictures), vectors, lists):
        scores = processor.score(*arguments)
        assert scores.shape == (3, 2) and scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected)
    one = processor.score(vectors[0][0].bfloat16(), vectors[1].bfloat16())
    torch.testing.assert_close(one, expected[:1], atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="texts have vectors of 64 entries, videos of 3"):
        processor.score(texts, torch.zeros(2, 3))


def test_a_text_that_several_experts_read_is_tokenised_once_and_all_have_it(monkeypatch):
    _, processor = tiny_model_and_processor()
    captions = [{"fusion": "a dog runs", "action": "runs"}, {"fusion": "a cat", "entity": "a cat", "scene": "runs"}]
    alone = [processor(text=[caption], return_tensors="pt") for caption in captions]
    seen, encode = [], type(processor.tokenizer).__call__

    def counted(self, texts, **options):
        seen.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(type(processor.tokenizer), "__call__", counted)
    inputs = processor(text=captions, return_tensors="pt")
    assert sorted(seen) == ["a cat", "a dog runs", "runs"]
    for row, one in enumerate(alone):
        length = one["input_ids"].shape[-1]
        assert torch.equal(inputs["input_ids"][row, :, :length], one["input_ids"][0])
        assert torch.equal(inputs["attention_mask"][row, :, :length], one["attention_mask"][0])
