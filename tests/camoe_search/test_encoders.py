# SPDX-License-Identifier: Apache-2.0
"""Any model behind one protocol: our own through both roads, and a SentenceTransformer of another kind."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from camoe_search.encoder import SentenceEncoder, load_encoder
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from modeling_camoe.encode import iter_encoded_videos
from modeling_camoe.frames import Clip
from tests.tiny_backbones import KINDS, tiny_backbone
from tests.video_files import cut_off, spoil, write_video


QUERIES = ["a red star spins", "two kids are playing basketball in a gym", "a disc"]
OPTIONS = {"num_workers": 0, "batch_size": 4, "text_encoder": False}


@pytest.fixture(scope="module")
def sentence_encoder(checkpoint):
    model = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    return SentenceEncoder(str(checkpoint), model)


def test_our_own_model_gives_the_same_vectors_through_both_roads(encoder, sentence_encoder, videos, tmp_path):
    np.testing.assert_allclose(sentence_encoder.encode_texts(QUERIES), encoder.encode_texts(QUERIES), atol=1e-6)
    cut_off(write_video(videos / "clip_9.mp4", 48))
    clips = [Clip(str(videos / f"clip_{i}.mp4")) for i in (0, 9, 3)] + [Clip(str(videos / "clip_5.mp4"), 0.5, 1.5)]
    (ours,), (theirs,) = (list(each.encode_clips(clips, 4, 0)) for each in (sentence_encoder, encoder))
    assert ours.indices == theirs.indices == [0, 2, 3] and list(ours.bad) == list(theirs.bad) == [1]
    assert "clip_9.mp4" in ours.bad[1]
    np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-6)


def test_both_roads_make_the_same_pictures(encoder, sentence_encoder, tmp_path):
    clips = [Clip(str(write_video(tmp_path / "a.mp4", 24))), Clip(str(cut_off(write_video(tmp_path / "b.mp4", 48))))]
    (ours,), (theirs,) = (list(each.encode_clips(clips, 4, 0, True)) for each in (sentence_encoder, encoder))
    assert ours.thumbnails == theirs.thumbnails and len(ours.thumbnails) == 1
    assert Image.open(io.BytesIO(ours.thumbnails[0])).size == (64, 48)


def test_both_roads_say_which_clips_were_taken_around_damage(encoder, sentence_encoder, tmp_path):
    damaged = spoil(write_video(tmp_path / "damaged.mp4", 72, gop=24, size=(128, 96)), 6, 24)
    clips = [Clip(str(write_video(tmp_path / "whole.mp4", 24))), Clip(str(damaged))]
    for each in (encoder, sentence_encoder):
        each.on_damage = "around"
        (batch,) = each.encode_clips(clips, 4, 0)
        assert (batch.indices, batch.bad, batch.damaged) == ([0, 1], {}, [1])
        each.on_damage = "error"
        (batch,) = each.encode_clips(clips, 4, 0)
        assert (batch.indices, list(batch.bad), batch.damaged) == ([0], [1], [])


def test_both_roads_find_the_same_with_and_without_the_bank(encoder, sentence_encoder, videos, tmp_path):
    native = VideoIndex.create_or_update([videos], tmp_path / "native", encoder, **OPTIONS)
    sentence = VideoIndex.create_or_update([videos], tmp_path / "sentence", sentence_encoder, **OPTIONS)
    assert sentence.description.experts == ["all"] and native.description.width == sentence.description.width
    assert sentence.info()["query_bank"] == native.info()["query_bank"] is not None
    for correction in ("none", "query_bank", "dynamic"):
        for query in QUERIES:
            ours, theirs = (index.search(query, correction=correction) for index in (sentence, native))
            assert [hit.key for hit in ours] == [hit.key for hit in theirs]
            assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-6)


def test_a_model_without_video_is_refused(tmp_path):
    class Texts:
        modalities = ["text"]
        similarity_fn_name = "cosine"

    with pytest.raises(SearchError, match="it cannot encode video"):
        SentenceEncoder("texts", Texts())


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(SearchError, match=f"cannot load the model {tmp_path}"):
        load_encoder(str(tmp_path), "cpu")


# --- plain dual encoders ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_dual_encoder_is_indexed_and_searched_by_its_own_cosine(kind, videos, tmp_path):
    """With its text tower exported or, where its tokenizer cannot be, with the reason and the same results."""
    folder = tiny_backbone(tmp_path / "model", kind)
    exported = kind in ("clip", "siglip")  # others: tests/training/test_backbone_programs.py
    options = {"device": "cpu", "num_workers": 0, "queries": QUERIES, "tau": 0.05, "text_encoder": exported}
    index = VideoIndex.create_or_update([videos], tmp_path / "index", str(folder), **options)
    assert index.description.experts == ["mean"] and len(index) == 6
    texts = index.encoder.encode_texts(QUERIES)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    table = index.table()
    scores = texts @ np.array(table["vector"].to_pylist(), np.float32).T
    np.testing.assert_allclose(table["bias"].to_pylist(), 0.05 * np.log(np.exp(scores / 0.05).mean(axis=0)), atol=1e-5)
    cold = VideoIndex(tmp_path / "index")
    for n, query in enumerate(QUERIES):
        found = cold.search(query, k=6, correction="none")
        assert [hit.score for hit in found] == pytest.approx(sorted(scores[n], reverse=True), abs=1e-4)
    assert (cold._text_encoder is not None) == (kind == "clip")
    assert bool(index.report.text_encoder) == (kind == "siglip")  # the reason


# --- Qwen3-VL, tiny and random ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
    "{% if item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Folder of a random Qwen3-VL as a SentenceTransformer: last token, length 1."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp("qwen") / "base"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *special])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.padding_side = "left"
    ids = {name: vocabulary[f"<|{name}|>"] for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 16}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size=size), tokenizer,
        Qwen3VLVideoProcessor(patch_size=16, size=size), chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    sentence = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    sentence.save(str(folder.parent / "sentence"))
    return folder.parent / "sentence"


def test_a_qwen3_vl_embedding_model_makes_an_index(qwen, videos, tmp_path, capsys):
    from camoe_search.cli import main

    (tmp_path / "bank.txt").write_text("a blue disc\ntwo kids\na beach\n")
    command = ["index", str(videos), "--model", str(qwen), "--index", str(tmp_path / "index"), "--device", "cpu"]
    main([*command, "--num-workers", "0", "--bank", str(tmp_path / "bank.txt"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], report["moments"], report["skipped"]) == (6, 6, [])
    index = VideoIndex.load(tmp_path / "index", device="cpu")
    table = index.table()
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert len({tuple(vector.round(4)) for vector in vectors}) == 6  # the clips differ, and so do their vectors
    texts = index.encoder.encode_texts(QUERIES)
    for n, query in enumerate(QUERIES):
        hits = index.search(query, k=6, correction="none")
        assert [hit.score for hit in hits] == pytest.approx(sorted(vectors @ texts[n], reverse=True), abs=1e-5)
    bank = index.encoder.encode_texts(["a blue disc", "two kids", "a beach"])
    expected = 0.05 * np.log(np.exp(bank @ vectors.T / 0.05).mean(axis=0))
    np.testing.assert_allclose(table["bias"].to_pylist(), expected, atol=1e-5)
    best = index.search_like(str(videos / "clip_3.mp4"))[0]
    assert best.path.endswith("clip_3.mp4") and best.score == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_that_are_decoded_together_have_the_same_vectors_to_the_bit(tmp_path, encoder, workers):
    """In batches that begin inside of files, whole files and a damaged one between them."""
    pictures = [np.full((48, 64, 3), 3 * i % 256, np.uint8) for i in range(160)]
    long = str(write_video(tmp_path / "long.mp4", 160, pictures=pictures))
    short = str(write_video(tmp_path / "short.mp4", 12))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    clips = [Clip(long, start / 2, start / 2 + 1.0) for start in range(9)]
    clips[4:4] = [Clip(short), Clip(str(tmp_path / "bad.mp4"), 0.0, 1.0)]
    together = list(encoder.encode_clips(clips, 4, workers))
    alone = list(iter_encoded_videos(encoder.model, encoder.processor, clips, batch_size=4, on_bad_video="skip"))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.indices == theirs.indices and np.array_equal(ours.vectors, theirs.vectors.numpy())
        assert ours.bad == {bad.index: bad.cause for bad in theirs.bad}
