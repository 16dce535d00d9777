# SPDX-License-Identifier: Apache-2.0
"""What a search returns, compared with the explicit formulas on the full matrix."""

import numpy as np
import pytest
import torch

from camoe_search import approximate, exact, segments, writer
from camoe_search.bank import subsample
from camoe_search.errors import SearchError
from camoe_search.exact import Part, best_rows
from camoe_search.index import VideoIndex
from camoe_search.results import Filters, Grouping
from camoe_search.writer import IndexWriter, StoredWindow
from modeling_camoe.hubs import dynamic_query_bank, hubs_of_bank, query_bank_bias
from modeling_camoe.retrieval import similarity
from tests.camoe_search.random_index import (
    DIM,
    EXPERTS,
    make_index,
    moment,
    number,
    random_bank,
    random_index,
    random_texts,
    random_videos,
)


COUNT, TAU = 40, 0.05


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("index") / "index", COUNT, TAU)


def explicit(correction: str, texts: torch.Tensor, count: int = COUNT, tau: float = TAU) -> torch.Tensor:
    """The full (N,B) score matrix."""
    vectors, _ = random_videos(count)
    bank_scores = similarity(torch.tensor(random_bank(tau).vectors), vectors)
    scores, bias = similarity(texts, vectors), query_bank_bias(bank_scores, tau)
    if correction == "query_bank":
        return scores - bias
    if correction == "dynamic":
        return dynamic_query_bank(scores, bias, hubs_of_bank(bank_scores))
    return scores


def numbers(hits) -> list[int]:
    return [number(hit) for hit in hits]


def test_a_least_score_is_optional_where_windows_are_not_merged(index):
    """Also where a store is asked directly, as `VideoIndex` never does."""
    queries, corrected = random_texts(3).numpy(), np.zeros(3, bool)
    windows = index.store.search(queries, 5, Filters(), corrected)
    assert index.store.search_moments(queries, 5, Filters(), corrected, False, Grouping(merge=False)) == windows


@pytest.mark.parametrize("correction", ["none", "query_bank", "dynamic"])
def test_single_queries_rank_like_the_formula_on_the_full_matrix(index, correction):
    texts = random_texts(25)
    expected = explicit(correction, texts)
    for n, text in enumerate(texts):
        hits = index.search_vectors(text[None].numpy(), k=COUNT, correction=correction)[0]
        assert numbers(hits) == expected[n].argsort(descending=True).tolist()
        np.testing.assert_allclose([hit.score for hit in hits], expected[n].sort(descending=True).values, atol=1e-6)


def test_the_three_corrections_differ_on_these_queries():
    """Otherwise the test above would prove nothing."""
    best = {c: explicit(c, random_texts(25)).argmax(dim=1).tolist() for c in ("none", "query_bank", "dynamic")}
    assert best["none"] != best["query_bank"] and best["query_bank"] != best["dynamic"] != best["none"]


def test_a_batch_returns_the_same_as_single_queries(index):
    texts = random_texts(7).numpy()
    batch = index.search_vectors(texts, k=5, correction="dynamic")
    for text, hits in zip(texts, batch, strict=True):
        alone = index.search_vectors(text[None], k=5, correction="dynamic")[0]
        assert [hit.key for hit in alone] == [hit.key for hit in hits]


def test_hits_name_file_and_time_of_their_moment(index):
    for hit in index.search_vectors(random_texts(1).numpy(), k=10)[0]:
        i = number(hit)
        assert (hit.path, hit.start, hit.end) == (f"/videos/{i % 4}/{i:03}.mp4", i, 2 * i + 1)
        assert index.store.locate(hit.key) == hit._replace(score=0.0)


@pytest.mark.parametrize(("count", "size", "expected"), [(5, 3, [0, 1, 3]), (3, 5, [0, 1, 2]), (4982, 1000, None)])
def test_a_bank_is_spread_evenly_over_its_texts(count, size, expected):
    chosen = [int(text) for text in subsample([str(i) for i in range(count)], size)]
    assert len(chosen) == min(count, size) and (expected is None or chosen == expected)
    assert chosen[-1] >= count - 1 - count // size  # to the end, not only the first 80 %


def test_the_default_correction_is_the_bank_where_there_is_one(index, tmp_path):
    text = random_texts(1).numpy()
    assert index.search_vectors(text) == index.search_vectors(text, correction="query_bank")
    without = random_index(tmp_path / "index", COUNT, tau=None)
    assert without.search_vectors(text) == without.search_vectors(text, correction="none")
    with pytest.raises(SearchError, match="camoe calibrate"):
        without.search_vectors(text, correction="query_bank")


def test_expert_weights_scale_the_parts_of_the_score(index):
    text = random_texts(1)
    weighted = text.clone().view(len(EXPERTS), DIM)
    weighted[EXPERTS.index("action")] *= 2
    weighted[EXPERTS.index("scene")] = 0
    hits = index.search_vectors(text.numpy(), COUNT, correction="none", experts={"action": 2.0, "scene": 0.0})[0]
    expected = explicit("none", weighted.view(1, -1))[0]
    assert numbers(hits) == expected.argsort(descending=True).tolist()


def test_expert_scores_add_up_to_the_score(index):
    text = random_texts(1).numpy()
    hit = index.search_vectors(text, 1, correction="none")[0][0]
    shares = index.expert_scores(text[0], hit.key)
    assert list(shares) == EXPERTS and sum(shares.values()) == pytest.approx(hit.score, abs=1e-6)


@pytest.mark.parametrize("kind", [None, "hnsw", "ivf"])
def test_filters_keep_the_best_of_the_moments_that_pass(tmp_path, kind):
    index = random_index(tmp_path / "index", COUNT, TAU)
    text = random_texts(1).numpy()
    everything = index.search_vectors(text, COUNT, correction="none")[0]
    if kind is not None:
        index.optimize(kind)
    some = index.search_vectors(text, 5, correction="none", path="VIDEOS/1", min_seconds=5, max_seconds=30)[0]
    wanted = [h for h in everything if "/videos/1/" in h.path and 5 <= h.end - h.start <= 30]
    assert [hit.key for hit in some] == [hit.key for hit in wanted][:5] and len(wanted) > 5
    assert index.search_vectors(text, 5, path="nothing is called so") == [[]]


def test_ties_are_ordered_by_path(tmp_path):
    with make_index(tmp_path / "index") as writer:
        vectors = random_videos(COUNT)[0].numpy()
        writer.add_moments("/videos", [moment(i) for i in range(COUNT)], vectors)
        same = [StoredWindow(f"{c}.mp4", 0.0, 1.0, 1, 1, c * 32) for c in "fbadce"]
        writer.add_moments("/videos", same, np.repeat(vectors[3:4], 6, axis=0))  # one vector six times
    index = VideoIndex(tmp_path / "index")
    hits = index.search_vectors(index.similar_vector(moment(3).hash + ".0")[None], k=12)[0]
    hits = [hit for hit in hits if hit.path[8] in "abcdef"]
    assert [hit.path for hit in hits] == [f"/videos/{c}.mp4" for c in "abcdef"]
    assert len({hit.score for hit in hits}) == 1


def test_k_above_the_number_of_moments_returns_all_of_them(index):
    assert len(index.search_vectors(random_texts(1).numpy(), k=1000)[0]) == COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": {"acton": 2.0}}, "did you mean action"),
        ({"correction": "dsl"}, "choose from none, query_bank, dynamic"),
        ({"k": 0}, "ask for one result or more"),
    ],
)
def test_errors_about_wrong_options_name_the_right_ones(index, options, message):
    with pytest.raises(SearchError, match=message):
        index.search_vectors(random_texts(1).numpy(), **options)


# --- exact search in blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_blocks_find_what_the_whole_matrix_finds(monkeypatch, count, share):
    monkeypatch.setattr(exact, "BLOCK_SCORES", 16 * count)
    random = np.random.default_rng(0)
    vectors, bias = random.standard_normal((3, 50, 6), np.float32), random.standard_normal((3, 50), np.float32)
    allowed = random.random((3, 50)) < share
    queries, corrected = random.standard_normal((count, 6), np.float32), np.arange(count) % 2 == 0
    parts = [Part(100 * i, vectors[i], bias[i], allowed[i]) for i in range(3)]
    scores, rows = best_rows(parts, queries, 7, corrected)
    expected = np.einsum("nk,pbk->npb", queries, vectors) - corrected[:, None, None] * bias
    expected[:, ~allowed] = -np.inf
    flat = expected.reshape(count, -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :7]
    best = np.take_along_axis(flat, order, axis=1)
    numbers = order // 50 * 100 + order % 50
    numbers[np.isneginf(best)] = -1
    np.testing.assert_allclose(scores, best, atol=1e-5)
    assert rows.tolist() == numbers.tolist()


def test_float16_vectors_are_searched_as_they_are_stored(tmp_path):
    index = random_index(tmp_path / "index", COUNT, TAU, dtype="float16")
    assert (tmp_path / "index" / "segment-000001.vectors").stat().st_size == 2 * COUNT * len(EXPERTS) * DIM
    stored = random_videos(COUNT)[0].half().float()
    texts = random_texts(4)
    for text, hits in zip(texts, index.search_vectors(texts.numpy(), 5, correction="none"), strict=True):
        assert [h.score for h in hits] == pytest.approx((text @ stored.T).sort(descending=True).values[:5], abs=1e-6)


# --- the query bank --------------------------------------------------------------------------------------------------


def hub_numbers(index) -> set[int]:
    table = index.table().to_pylist()
    return {int(row["path"][-7:-4]) for row in table if row["is_hub"]}


def expected_hubs(kept: list[int]) -> set[int]:
    vectors = random_videos(COUNT)[0][kept]
    flags = hubs_of_bank(similarity(torch.tensor(random_bank(TAU).vectors), vectors))
    return {i for i, flag in zip(kept, flags.tolist(), strict=True) if flag}


def test_biases_and_hubs_are_the_same_however_the_rows_came(tmp_path, monkeypatch):
    """One by one, in another order, over several segments, with a bank that came later."""
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 16)
    monkeypatch.setattr(writer, "SEGMENT_ROWS", 16)
    monkeypatch.setattr("camoe_search.rows.SEGMENT_ROWS", 16)
    monkeypatch.setattr(writer, "BLOCK_ROWS", 5)
    vectors = random_videos(COUNT)[0].numpy()
    bias = query_bank_bias(torch.tensor(random_bank(TAU).vectors @ vectors.T), TAU)

    def check(folder):
        index = VideoIndex(folder)
        rows = {int(row["path"][-7:-4]): row["bias"] for row in index.table().to_pylist()}
        np.testing.assert_allclose([rows[i] for i in range(COUNT)], bias, atol=1e-6)
        assert hub_numbers(index) == expected_hubs(list(range(COUNT))) and 0 < len(hub_numbers(index)) < COUNT

    with make_index(tmp_path / "one by one", TAU) as change:
        for i in reversed(range(COUNT)):
            change.add_moments("/videos", [moment(i)], vectors[i : i + 1])
        check(tmp_path / "one by one")
        change.tidy()
        assert change.connection.execute("SELECT count(*) FROM bias").fetchone() == (3,)  # one per segment
        check(tmp_path / "one by one")
    with make_index(tmp_path / "bank later", None) as change:
        change.add_moments("/videos", [moment(i) for i in range(COUNT)], vectors)
        change.set_bank(random_bank(TAU))
    check(tmp_path / "bank later")


def test_removing_a_hub_makes_the_next_best_moment_one(tmp_path):
    index = random_index(tmp_path / "index", COUNT, TAU)
    kept = sorted(set(range(COUNT)) - set(list(hub_numbers(index))[:2]))
    index.remove([f"*/{i:03}.mp4" for i in set(range(COUNT)) - set(kept)])
    assert hub_numbers(index) == expected_hubs(kept)  # looked up by the reader
    with IndexWriter(tmp_path / "index") as change:
        change.refresh_hubs()
        assert change.connection.execute("SELECT count(*) FROM bank WHERE best IS NULL").fetchone() == (0,)
    assert hub_numbers(index) == expected_hubs(kept)  # kept by the writer


def test_rows_that_move_do_not_go_with_the_next_segment_that_is_compacted(tmp_path, monkeypatch):
    """Two segments with many dead rows, of which the second has room for what moves out of the first."""
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 16)
    monkeypatch.setattr(writer, "SEGMENT_ROWS", 16)
    monkeypatch.setattr("camoe_search.rows.SEGMENT_ROWS", 16)
    kept = list(range(0, 24, 2))
    index = random_index(tmp_path / "index", 24, TAU)
    index.remove([f"*/{i:03}.mp4" for i in range(24) if i not in kept])
    rows = {int(row["path"][-7:-4]): row["vector"] for row in VideoIndex(tmp_path / "index").table().to_pylist()}
    assert sorted(rows) == kept
    np.testing.assert_array_equal([rows[i] for i in kept], random_videos(24)[0].numpy()[kept])


# --- approximate indexes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_what_came_and_not_what_went(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(approximate, "NPROBE", 1000)  # every list: then nothing is approximate
    monkeypatch.setattr(approximate, "EF_SEARCH", 1000)
    vectors = random_videos(COUNT)[0].numpy()
    with make_index(tmp_path / "index", TAU) as change:
        change.add_moments("/videos", [moment(i) for i in range(30)], vectors[:30])
    index = VideoIndex(tmp_path / "index")
    recall = index.optimize(kind)
    assert recall == pytest.approx(1.0) and index.info()["approximate"] == {"kind": kind, "recall": recall}
    index.remove(["*/003.mp4", "*/017.mp4"])
    with IndexWriter(tmp_path / "index") as change:
        change.add_moments("/videos", [moment(i) for i in range(30, COUNT)], vectors[30:])
    texts = random_texts(6)
    for correction in ("none", "query_bank"):
        expected = explicit(correction, texts)
        expected[:, [3, 17]] = -torch.inf
        for n, hits in enumerate(index.search_vectors(texts.numpy(), 8, correction=correction)):
            assert {3, 17}.isdisjoint(numbers(hits))
            assert numbers(hits) == expected[n].argsort(descending=True)[:8].tolist()
    assert index.optimize(None) is None and index.info()["approximate"] is None
    assert not list((tmp_path / "index").glob("cache-*"))


def test_a_new_bank_makes_an_approximate_index_invalid(tmp_path):
    index = random_index(tmp_path / "index", COUNT, TAU)
    index.optimize("ivf")
    with IndexWriter(tmp_path / "index") as change:
        change.set_bank(random_bank(0.2))
    assert index.info()["approximate"] is None
    texts = random_texts(3)
    for n, hits in enumerate(index.search_vectors(texts.numpy(), 5)):
        assert numbers(hits) == explicit("query_bank", texts, tau=0.2)[n].argsort(descending=True)[:5].tolist()


def test_float16_rows_score_as_their_float32_values():
    generator = np.random.default_rng(0)
    vectors = (generator.standard_normal((700, 768)) * 10.0 ** generator.uniform(-7, 0, (700, 1))).astype(np.float16)
    assert (np.abs(vectors[vectors != 0]) < 6e-5).any()  # subnormal ones, too
    for count in (1, 3):
        queries = generator.standard_normal((count, 768)).astype(np.float32)
        part = Part(0, vectors, np.zeros(700, np.float32))
        scores, rows = best_rows([part], queries, 700, np.zeros(count, bool))
        expected = queries.astype(np.float64) @ vectors.astype(np.float64).T
        np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), rtol=1e-4, atol=1e-6)
