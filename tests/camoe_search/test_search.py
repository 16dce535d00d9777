# SPDX-License-Identifier: Apache-2.0
"""What a search returns, compared with the explicit formulas on the full matrix."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from camoe_search import bank as bank_module
from camoe_search import faiss_store
from camoe_search.bank import QueryBank, hub_bias
from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from camoe_search.store import column_matrix, read_bank, write_index
from modeling_camoe.hubs import dynamic_query_bank, hubs_of_bank, query_bank_bias
from modeling_camoe.retrieval import similarity
from tests.camoe_search.random_index import DIM, EXPERTS, random_index, random_texts, random_videos


COUNT, TAU = 40, 0.05


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("index") / "index", COUNT, TAU)


def explicit(index, correction: str, texts: torch.Tensor) -> torch.Tensor:
    """The full (N,B) score matrix, in the index's row order."""
    vectors = torch.tensor(column_matrix(index.moments.data.table, "vector"))
    bank_scores = similarity(torch.tensor(read_bank(index.folder, index.description).vectors), vectors)
    scores, bias = similarity(texts, vectors), query_bank_bias(bank_scores, TAU)
    if correction == "query_bank":
        return scores - bias
    if correction == "dynamic":
        return dynamic_query_bank(scores, bias, hubs_of_bank(bank_scores))
    return scores


@pytest.mark.parametrize("correction", ["none", "query_bank", "dynamic"])
def test_single_queries_rank_like_the_formula_on_the_full_matrix(index, correction):
    texts = random_texts(25)
    expected = explicit(index, correction, texts)
    for n, text in enumerate(texts):
        hits = index.search_vectors(text[None].numpy(), k=COUNT, correction=correction)[0]
        assert [hit.row for hit in hits] == expected[n].argsort(descending=True).tolist()
        np.testing.assert_allclose([hit.score for hit in hits], expected[n].sort(descending=True).values, atol=1e-6)


def test_the_three_corrections_differ_on_these_queries(index):
    """Otherwise the test above would prove nothing."""
    best = {c: explicit(index, c, random_texts(25)).argmax(dim=1).tolist() for c in ("none", "query_bank", "dynamic")}
    assert best["none"] != best["query_bank"] and best["query_bank"] != best["dynamic"] != best["none"]


def test_a_batch_returns_the_same_as_single_queries(index):
    texts = random_texts(7).numpy()
    batch = index.search_vectors(texts, k=5, correction="dynamic")
    for text, hits in zip(texts, batch, strict=True):
        assert [h.row for h in index.search_vectors(text[None], k=5, correction="dynamic")[0]] == [h.row for h in hits]


def test_hits_name_file_and_time_of_their_row(index):
    for hit in index.search_vectors(random_texts(1).numpy(), k=10)[0]:
        number = int(hit.path[-7:-4])
        assert (hit.path, hit.start, hit.end) == (f"/videos/{number % 4}/{number:03}.mp4", number, 2 * number + 1)


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
    expected = explicit(index, "none", weighted.view(1, -1))[0]
    assert [hit.row for hit in hits] == expected.argsort(descending=True).tolist()


def test_expert_scores_add_up_to_the_score(index):
    text = random_texts(1).numpy()
    hit = index.search_vectors(text, 1, correction="none")[0][0]
    shares = index.expert_scores(text[0], hit.row)
    assert list(shares) == EXPERTS and sum(shares.values()) == pytest.approx(hit.score, abs=1e-6)


@pytest.mark.parametrize("faiss", ["flat", "hnsw", "ivf"])
def test_filters_keep_the_best_of_the_moments_that_pass(tmp_path, faiss):
    index = random_index(tmp_path / "index", COUNT, TAU, faiss)
    text = random_texts(1).numpy()
    everything = index.search_vectors(text, COUNT, correction="none")[0]
    some = index.search_vectors(text, 5, correction="none", path="VIDEOS/1", min_seconds=5, max_seconds=30)[0]
    wanted = [h for h in everything if "/videos/1/" in h.path and 5 <= h.end - h.start <= 30]
    assert [hit.row for hit in some] == [hit.row for hit in wanted][:5] and len(wanted) > 5
    assert index.search_vectors(text, 5, path="nothing is called so") == [[]]


def test_splitting_rows_between_threads_does_not_change_the_results(index, monkeypatch):
    texts = random_texts(2).numpy()
    expected = index.search_vectors(texts, k=15)
    monkeypatch.setattr(faiss_store, "MIN_ROWS_TO_SPLIT", 0)
    monkeypatch.setattr(faiss_store.faiss, "omp_get_max_threads", lambda: 3)  # parts of 13 or 14: fewer than k
    found = index.search_vectors(texts, k=15)
    assert [[hit.row for hit in hits] for hits in found] == [[hit.row for hit in hits] for hits in expected]
    assert [hit.score for hit in found[0]] == pytest.approx([hit.score for hit in expected[0]], abs=1e-6)


def test_ties_are_ordered_by_path_however_many_threads_search(tmp_path, monkeypatch):
    index = random_index(tmp_path / "index", COUNT)
    table = index.moments.data.table
    same = pa.concat_tables([table.slice(3, 1)] * 6)  # one vector six times
    same = same.set_column(same.schema.get_field_index("path"), "path", [[f"/videos/{c}.mp4" for c in "fbadce"]])
    write_index(index.folder, index.description, pa.concat_tables([table, same]), None)
    index = VideoIndex(index.folder)
    text = index.similar_vector(3)[None]
    names = [f"/videos/{c}.mp4" for c in "abcdef"]
    for rows in (10**9, 0):
        monkeypatch.setattr(faiss_store, "MIN_ROWS_TO_SPLIT", rows)
        monkeypatch.setattr(faiss_store.faiss, "omp_get_max_threads", lambda: 4)
        hits = [hit for hit in index.search_vectors(text, k=12)[0] if hit.path in names]
        assert [hit.path for hit in hits] == names and len({hit.score for hit in hits}) == 1


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


def test_biases_and_hubs_do_not_depend_on_the_block_size(monkeypatch):
    monkeypatch.setattr(bank_module, "BLOCK", 7)
    queries, (vectors, _) = random_texts(30), random_videos(COUNT)
    bias, is_hub = hub_bias(QueryBank([], queries.numpy(), TAU), vectors.numpy())
    scores = similarity(queries, vectors)
    np.testing.assert_allclose(bias, query_bank_bias(scores, TAU), atol=1e-6)
    assert is_hub.tolist() == hubs_of_bank(scores).tolist() and 0 < is_hub.sum() < COUNT
