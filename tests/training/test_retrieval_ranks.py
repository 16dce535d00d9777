# SPDX-License-Identifier: Apache-2.0
"""Ranks in tiles against double loops over the full matrix."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch

from evaluation import ranks as engine
from evaluation.protocol import CORRECTIONS, Ranks, recalls
from evaluation.ranks import rank_retrieval
from evaluation.scoring import score_retrieval
from modeling_camoe.hubs import dual_softmax, dynamic_query_bank, hubs_of_bank, query_bank_bias
from tests.random_vectors import random_vectors


DIRECTIONS = ("text_to_video", "video_to_text", "video_to_text_caption_max")


def rank(own, others):
    """How many others are above, and how many equal. Two float64 ways to one number agree to 12 digits."""
    tolerance = [1e-12 * max(abs(own), abs(other)) for other in others]
    above = sum(other > own + slack for other, slack in zip(others, tolerance, strict=True))
    equal = sum(abs(other - own) <= slack for other, slack in zip(others, tolerance, strict=True))
    return above, equal


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
    ranks = (Ranks(*np.array(counts).T) for counts in (text_to_video, best_caption, caption_max))
    return dict(zip(DIRECTIONS, ranks, strict=True))


def assert_same_ranks(ranks, expected):
    assert "text_to_video" in ranks
    for direction, values in ranks.items():
        np.testing.assert_array_equal(values.above, expected[direction].above, err_msg=direction)
        np.testing.assert_array_equal(values.equal, expected[direction].equal, err_msg=direction)


@pytest.fixture
def float32_tiles(monkeypatch):
    """Small sets, which would be float64 throughout, take the way of large ones."""
    monkeypatch.setattr(engine, "FLOAT64_LIMIT", 0)


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
    monkeypatch.setattr(engine, "FLOAT64_LIMIT", 2**22)
    exact = rank_retrieval(texts, videos, torch.arange(200), scale=30.0)
    for correction in exact.ranks:
        assert_same_ranks(fast.ranks[correction], exact.ranks[correction])
    assert np.unique(exact.ranks["none"]["text_to_video"].equal).tolist() == [1, 2]


@pytest.mark.parametrize("tiles", ["float64", "float32"])
def test_a_constant_model_scores_k_of_n(tiles, request):
    if tiles == "float32":
        request.getfixturevalue("float32_tiles")
    vectors = random_vectors(1, k=64)[0].expand(500, 64)
    everything = ("dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn")
    options = {"corrections": everything, "text_bank": vectors[:9], "video_bank": vectors[:5]}
    ranked = [rank_retrieval(vectors, vectors, **options), rank_retrieval(np.zeros((500, 500)), None)]
    chance = {"R@1": 0.2, "R@5": 1.0, "R@10": 2.0, "Rsum": 3.2, "MdR": 250.5, "MnR": 250.5}
    for directions in (directions for one in ranked for directions in one.ranks.values()):
        assert list(directions) == ["text_to_video", "video_to_text"]
        for ranks in directions.values():
            assert recalls(ranks) == chance


def positions(scores, right):
    """The rank of the right candidate in every order of the candidates, each sorted by score with a stable sort."""
    orders = itertools.permutations(range(len(scores)))
    return np.array([1 + sorted(order, key=lambda c: -scores[c]).index(right) for order in orders])


@pytest.mark.parametrize("seed", range(10))
def test_tied_ranks_are_the_mean_over_all_orders_of_the_candidates(seed):
    rng = np.random.default_rng(seed)
    scores, video_of_text = rng.integers(0, 2, size=(6, 3)), rng.permutation([0, 0, 1, 1, 1, 2])
    ranks = rank_retrieval(scores, None, video_of_text, corrections=()).ranks["none"]
    expected = {direction: [] for direction in DIRECTIONS}
    for n in range(6):
        expected["text_to_video"].append(positions(scores[n], video_of_text[n]))
    for m in range(3):
        of_texts = scores[:, m]
        best = max(np.flatnonzero(video_of_text == m), key=lambda n: of_texts[n])
        listed = [best, *np.flatnonzero(video_of_text != m)]  # its other captions are no distractors
        expected["video_to_text"].append(positions(of_texts[listed], 0))
        highest = [of_texts[video_of_text == other].max() for other in range(3)]
        expected["video_to_text_caption_max"].append(positions(highest, m))
    for direction, of_queries in expected.items():
        for k in (1, 2, 3, 5):
            shares = [np.mean(all_ranks <= k) for all_ranks in of_queries]
            np.testing.assert_allclose(ranks[direction].hit_rate(k), shares, err_msg=f"{direction} {k}")
        np.testing.assert_allclose(ranks[direction].middle(), [np.mean(all_ranks) for all_ranks in of_queries])


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
        expected = {**ranks, "text_to_video": ranks["text_to_video"][shuffled]}
        assert_same_ranks(found, expected)
    np.testing.assert_array_equal(out_of_order.groups["text_to_video"], video_of_text[shuffled])


def test_a_video_without_a_text_is_a_distractor_and_no_query():
    matrix = np.array([[0.5, 0.9, 0.1], [0.2, 0.9, 0.4]])
    ranks = rank_retrieval(matrix, None, np.array([0, 2]), corrections=()).ranks["none"]
    assert ranks["text_to_video"].middle().tolist() == [2, 2]
    assert ranks["video_to_text"].middle().tolist() == [1, 1]


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


def test_a_machine_whose_float32_products_are_coarser_is_scored_in_float64(float32_tiles, monkeypatch, caplog):
    tile = engine.Scores.tile

    def coarse(self, rows, columns, dtype, out=None):
        s = tile(self, rows, columns, dtype, out)
        return s.copy_(s.bfloat16()) if dtype == torch.float32 else s

    texts, videos = random_vectors(80, 80, seed=6, k=32)
    expected = rank_retrieval(texts, videos).ranks["none"]
    monkeypatch.setattr(engine.Scores, "tile", coarse)
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
