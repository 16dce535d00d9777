# SPDX-License-Identifier: Apache-2.0
"""Ranks in tiles against double loops over the full matrix."""

import math
import threading

import numpy as np
import pytest
import torch

from evaluation import rank_counts, score_tiles
from evaluation.retrieval_ranks import CORRECTIONS, rank_retrieval, recalls
from evaluation.scoring import score_retrieval
from modeling_camoe.hubs import dual_softmax, dynamic_query_bank, hubs_of_bank, query_bank_bias
from tests.random_vectors import random_vectors


DIRECTIONS = ("text_to_video", "video_to_text", "video_to_text_caption_max")


def rank(own, others):
    """1-based, middle on ties. Two float64 ways to one number agree to 12 digits."""
    tolerance = [1e-12 * max(abs(own), abs(other)) for other in others]
    greater = sum(other > own + slack for other, slack in zip(others, tolerance, strict=True))
    equal = sum(abs(other - own) <= slack for other, slack in zip(others, tolerance, strict=True))
    return 1 + greater + equal / 2


def naive_ranks(by_text, by_video, video_of_text):
    """Double loops over (N,M) levels that rank videos, and (M,N) levels that rank texts."""
    by_text, by_video, video_of_text = (np.asarray(values).tolist() for values in (by_text, by_video, video_of_text))
    texts, videos = range(len(by_text)), range(len(by_video))
    text_to_video = [
        rank(by_text[n][video_of_text[n]], [by_text[n][m] for m in videos if m != video_of_text[n]]) for n in texts
    ]
    captions = {m: [n for n in texts if video_of_text[n] == m] for m in videos if m in video_of_text}
    best_caption, caption_max = [], []
    for m, own in captions.items():
        best = {other: max(by_video[m][n] for n in group) for other, group in captions.items()}
        best_caption.append(rank(best[m], [by_video[m][n] for n in texts if n not in own]))
        caption_max.append(rank(best[m], [best[other] for other in captions if other != m]))
    return dict(zip(DIRECTIONS, map(np.array, (text_to_video, best_caption, caption_max)), strict=True))


def assert_same_ranks(ranks, expected):
    assert "text_to_video" in ranks
    for direction, values in ranks.items():
        np.testing.assert_array_equal(values, expected[direction], err_msg=direction)


@pytest.fixture
def float32_tiles(monkeypatch):
    """Small sets, which would be float64 throughout, take the way of large ones."""
    monkeypatch.setattr(score_tiles, "FLOAT64_LIMIT", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_ranks_equal_a_double_loop_on_200_matrices_with_ties_and_many_captions():
    rng = np.random.default_rng(0)
    several = 0
    for _ in range(200):
        num_texts, num_videos = rng.integers(1, 14, size=2)
        matrix = rng.integers(-2, 3, size=(num_texts, num_videos)).astype(rng.choice(["float32", "float64", "int64"]))
        video_of_text = rng.integers(num_videos, size=num_texts)
        ranks = rank_retrieval(matrix, None, video_of_text, corrections=(), block_size=5).ranks["none"]
        assert_same_ranks(ranks, naive_ranks(matrix, matrix.T, video_of_text))
        several += len(ranks) == 3
        assert (len(ranks) == 3) == (len(set(video_of_text)) < num_texts)
    assert 50 < several < 200


def corrected_levels(texts, videos, text_bank, video_bank, scale, temp, tau):
    """correction -> levels (N,M) and (M,N), from the full-matrix functions of the library in float64."""
    texts, videos, text_bank, video_bank = (vectors.double() for vectors in (texts, videos, text_bank, video_bank))
    s, bank_s, video_bank_s = texts @ videos.T, text_bank @ videos.T, video_bank @ texts.T
    bias, video_bias = query_bank_bias(bank_s, tau), query_bank_bias(video_bank_s, tau)
    log_rows, log_columns = torch.zeros(len(texts), 1), torch.zeros(1, len(videos))
    for _ in range(5):
        log_columns = torch.logsumexp(s / tau - log_rows, dim=0, keepdim=True)
        log_rows = torch.logsumexp(s / tau - log_columns, dim=1, keepdim=True)
    return {
        "none": (s, s.T),
        "dual_softmax": (dual_softmax(scale * s, temp), dual_softmax(scale * s.T, temp)),
        "query_bank": (s - bias, s.T - video_bias),
        "dynamic_query_bank": (
            dynamic_query_bank(s, bias, hubs_of_bank(bank_s)),
            dynamic_query_bank(s.T, video_bias, hubs_of_bank(video_bank_s)),
        ),
        "sinkhorn": (s / tau - log_columns, s.T / tau - log_rows.T),
    }


@pytest.mark.parametrize("tiles", ["float64", "float32"])
@pytest.mark.parametrize("temp", [0.2, 1.0, 30.0])
def test_corrections_in_blocks_equal_the_full_matrix_formulas(tiles, temp, request):
    if tiles == "float32":
        request.getfixturevalue("float32_tiles")
    for seed in range(4):
        texts, videos, text_bank, video_bank = random_vectors(23, 11, 9, 7, seed=seed)
        video_of_text = torch.from_numpy(np.random.default_rng(seed).integers(9, size=23))  # two videos without texts
        options = {"scale": 10.0, "dual_softmax_temp": temp, "tau": 0.1, "sinkhorn_temp": 0.1}
        expected = corrected_levels(texts, videos, text_bank, video_bank, scale=10.0, temp=temp, tau=0.1)
        ranked = rank_retrieval(
            texts,
            videos,
            video_of_text,
            corrections=list(expected),
            text_bank=text_bank,
            video_bank=video_bank,
            block_size=4,
            **options,
        )
        assert list(ranked.ranks) == list(CORRECTIONS)
        for correction, levels in expected.items():
            assert_same_ranks(ranked.ranks[correction], naive_ranks(*levels, video_of_text))

        from_scores = rank_retrieval(
            texts.double() @ videos.double().T,
            None,
            video_of_text,
            corrections=list(expected),
            text_bank=text_bank.double() @ videos.double().T,
            video_bank=video_bank.double() @ texts.double().T,
            **options,
        )
        for correction, ranks in ranked.ranks.items():
            assert_same_ranks(from_scores.ranks[correction], ranks)


@pytest.mark.parametrize("tiles", ["float64", "float32"])
def test_block_size_does_not_change_the_results(tiles, request):
    if tiles == "float32":
        request.getfixturevalue("float32_tiles")
    texts, videos, bank = random_vectors(300, 120, 50, seed=1)
    video_of_text = torch.arange(300) * 7 % 120
    results = [
        score_retrieval(
            texts,
            videos,
            video_of_text,
            corrections=("dual_softmax", "query_bank"),
            scale=20.0,
            text_bank=bank,
            video_bank=bank,
            block_size=block_size,
        ).to_dict()
        for block_size in (16, 37, 1152)
    ]
    assert results[0] == results[1] == results[2]


def test_float32_tiles_rank_duplicate_videos_as_ties(float32_tiles, monkeypatch):
    texts, videos = random_vectors(200, 100, seed=2, k=64)
    videos = torch.cat([videos, videos, videos[:50]])
    fast = rank_retrieval(texts, videos, torch.arange(200), scale=30.0, block_size=64)
    monkeypatch.setattr(score_tiles, "FLOAT64_LIMIT", 2**22)
    exact = rank_retrieval(texts, videos, torch.arange(200), scale=30.0)
    for correction in exact.ranks:
        assert_same_ranks(fast.ranks[correction], exact.ranks[correction])
    assert np.unique(exact.ranks["none"]["text_to_video"] % 1).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("tiles", ["float64", "float32"])
def test_a_constant_model_scores_chance(tiles, request):
    if tiles == "float32":
        request.getfixturevalue("float32_tiles")
    vectors = random_vectors(1, k=64)[0].expand(500, 64)
    everything = ("dual_softmax", "query_bank", "sinkhorn")
    ranked = rank_retrieval(vectors, vectors, corrections=everything, text_bank=vectors[:9], video_bank=vectors[:5])
    for ranks in ranked.ranks.values():
        for values in ranks.values():
            assert (values == 250.5).all()
    metrics = recalls(rank_retrieval(np.zeros((500, 500)), None).ranks["dual_softmax"]["video_to_text"])
    assert metrics == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "Rsum": 0.0, "MdR": 250.5, "MnR": 250.5}


def test_dual_softmax_keeps_the_order_of_its_logarithm_where_the_product_underflows():
    texts, videos = random_vectors(40, 40, seed=3)
    s = texts.double() @ videos.double().T
    logits = 100 * s / 0.01  # the priors go down to exp(-20000)

    def level(logits, s):
        return s.sign() * (1e6 + s.abs().log() + logits - torch.logsumexp(logits, dim=0))  # 1e6: the sign goes first

    with_scale = rank_retrieval(texts, videos, scale=100.0, dual_softmax_temp=0.01).ranks["dual_softmax"]
    expected = naive_ranks(level(logits, s), level(logits.T, s.T), np.arange(40))
    assert_same_ranks(with_scale, expected)


def test_texts_in_any_order_get_their_own_ranks():
    texts, videos = random_vectors(60, 20, seed=4)
    video_of_text = torch.arange(60) // 3
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(60))
    in_order = rank_retrieval(texts, videos, video_of_text)
    out_of_order = rank_retrieval(texts[shuffled], videos, video_of_text[shuffled])
    for correction, ranks in in_order.ranks.items():
        found = out_of_order.ranks[correction]
        np.testing.assert_array_equal(found["text_to_video"], ranks["text_to_video"][shuffled])
        np.testing.assert_array_equal(found["video_to_text"], ranks["video_to_text"])
    np.testing.assert_array_equal(out_of_order.groups["text_to_video"], video_of_text[shuffled])


def test_a_video_without_a_text_is_a_distractor_and_no_query():
    matrix = np.array([[0.5, 0.9, 0.1], [0.2, 0.9, 0.4]])
    ranks = rank_retrieval(matrix, None, np.array([0, 2]), corrections=()).ranks["none"]
    assert ranks["text_to_video"].tolist() == [2, 2]
    assert ranks["video_to_text"].tolist() == [1, 1]


def test_processes_that_share_the_work_each_get_the_result_of_one():
    texts, videos, bank = random_vectors(90, 30, 20, seed=5)
    video_of_text = torch.arange(90) % 30
    everything = ("dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
    options = {"corrections": everything, "text_bank": bank, "video_bank": bank, "block_size": 16, "scale": 5.0}
    alone = score_retrieval(texts, videos, video_of_text, **options)

    barrier, parts, results = threading.Barrier(2), [None, None], [None, None]

    def process(index):
        def gather(tensor):
            parts[index] = tensor
            barrier.wait()
            gathered = list(parts)
            barrier.wait()
            return gathered

        results[index] = score_retrieval(texts, videos, video_of_text, shard=(index, 2), gather=gather, **options)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results[0].to_dict() == results[1].to_dict() == alone.to_dict()


def test_threads_do_not_change_the_ranks(float32_tiles):
    texts, videos, bank = random_vectors(900, 700, 300, seed=11, k=16)
    video_of_text = torch.arange(900) % 700
    everything = ("dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
    options = {"corrections": everything, "text_bank": bank, "video_bank": bank, "block_size": 256, "scale": 5.0}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rank_retrieval(texts, videos, video_of_text, **options)
        torch.set_num_threads(3)
        shared = rank_retrieval(texts, videos, video_of_text, **options)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for correction, ranks in alone.ranks.items():
        assert_same_ranks(shared.ranks[correction], ranks)


def test_tiles_that_numpy_cannot_see_give_the_same_ranks(float32_tiles, monkeypatch):
    texts, videos, bank = random_vectors(300, 200, 90, seed=12, k=16)
    video_of_text = torch.arange(300) % 200
    options = {"corrections": ("dual_softmax", "query_bank"), "text_bank": bank, "block_size": 64, "scale": 5.0}
    expected = rank_retrieval(texts, videos, video_of_text, **options)
    for module in (score_tiles, rank_counts):
        monkeypatch.setattr(module, "as_array", lambda tensor: tensor)  # as of a GPU's tensor
    found = rank_retrieval(texts, videos, video_of_text, **options)
    for correction, ranks in expected.ranks.items():
        assert_same_ranks(found.ranks[correction], ranks)


@pytest.mark.parametrize(("rows", "columns"), [(3, 50), (255, 2040), (256, 2041), (700, 9), (2, 5000)])
@pytest.mark.parametrize("axis", [0, 1])
def test_flags_are_counted_and_told_apart(rows, columns, axis):
    generator = np.random.default_rng(rows)
    s = generator.random((rows, columns), dtype=np.float32)
    s[1], s[:, 1] = 1, 1  # a whole row and a whole column above both thresholds
    flags = score_tiles.Flags(rows, columns, torch.device("cpu"))
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        flags.compare(part, s[part], np.float32(0.6), np.float32(0.4))
    assert np.array_equal(flags.sum(axis), [(s > 0.6).sum(axis), (s >= 0.4).sum(axis)])
    places = np.arange(0, (columns, rows)[axis], 2)
    between = (s >= 0.4) & (s <= 0.6)
    between[(slice(None), slice(1, None, 2))[:: 1 if axis == 0 else -1]] = False  # every other one was not asked for
    found = np.zeros_like(between)
    found[flags.differing(axis, places)] = True
    assert np.array_equal(found, between) and between.any()


def test_a_machine_whose_float32_products_are_coarser_is_scored_in_float64(float32_tiles, monkeypatch, caplog):
    load = score_tiles.VectorScores.load

    def coarse(self, rows, dtype):
        rows = load(self, rows, dtype)
        return rows.bfloat16().float() if dtype == torch.float32 else rows

    texts, videos = random_vectors(80, 80, seed=6, k=32)
    expected = rank_retrieval(texts, videos).ranks["none"]
    monkeypatch.setattr(score_tiles.VectorScores, "load", coarse)
    assert_same_ranks(rank_retrieval(texts, videos).ranks["none"], expected)
    assert "scoring in float64" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named(value):
    matrix = torch.zeros(5, 4)
    matrix[3, 2] = matrix[4, 0] = value
    with pytest.raises(ValueError, match=r"\(text 3, video 2\) is not a finite number"):
        rank_retrieval(matrix, None, [0, 1, 2, 3, 0])

    texts, videos = random_vectors(5, 5)
    videos[2, 0] = value
    with pytest.raises(ValueError, match=r"\(text 0, video 2\)"):
        rank_retrieval(texts, videos)
    texts[0, 0] = value
    with pytest.raises(ValueError, match=r"\(text 0, video 0\)"):
        rank_retrieval(texts, videos)
    texts, videos = random_vectors(5, 5)
    texts[3] = value
    with pytest.raises(ValueError, match=r"\(text 3, video 0\)"):
        rank_retrieval(texts, videos)


def test_what_does_not_fit_is_an_error_with_its_remedy():
    texts, videos = random_vectors(5, 4)
    right = [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="5 texts and 4 videos do not pair up by position"):
        rank_retrieval(texts, videos)
    with pytest.raises(ValueError, match="Text 3 belongs to video 7, but the videos are 0 to 3"):
        rank_retrieval(texts, videos, [0, 1, 2, 7, 0])
    with pytest.raises(ValueError, match="5 integers"):
        rank_retrieval(texts, videos, [0, 1])
    with pytest.raises(ValueError, match="Did you mean dual_softmax"):
        rank_retrieval(texts, videos, right, corrections=("dualsoftmax",))
    with pytest.raises(ValueError, match="needs a bank of training captions"):
        rank_retrieval(texts, videos, right, corrections=("query_bank",))
    with pytest.raises(ValueError, match="same K"):
        rank_retrieval(texts, videos[:, :3], right)
    with pytest.raises(ValueError, match="not empty"):
        rank_retrieval(texts, videos[:0], [])
