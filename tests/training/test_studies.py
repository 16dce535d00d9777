# SPDX-License-Identifier: Apache-2.0
"""The studies of banks and of experts, on vectors whose answers are known."""

import itertools
import math

import pytest
import study
import torch
import torch.nn.functional as F

from data.errors import UserError
from engine.recipe import parse_options
from evaluation import bank_study, expert_study


def unit_vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_sinkhorn_of_a_bank_gives_every_candidate_the_same_share():
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    bias = bank_study.sinkhorn_bias(scores, tau=0.7)
    shares = ((scores - bias) / 0.7).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(shares, torch.full((12,), 1 / 12), atol=2e-3, rtol=0)
    plain = (scores / 0.7).softmax(dim=1).mean(dim=0)
    assert (plain - 1 / 12).abs().max() > 0.01


def test_the_prior_of_others_is_of_as_many_queries_and_never_the_one_that_is_asked():
    scores = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    corrected = bank_study.prior_of_others(scores, 0.5, 0.5, torch.Generator().manual_seed(1))
    for query in range(8):
        others = [n for n in range(8) if n != query]
        fits = [
            chosen
            for chosen in itertools.combinations(others, 4)
            if torch.allclose(
                corrected[query],
                (scores[query] - 0.5 * torch.logsumexp(scores[list(chosen)] / 0.5, dim=0)).double(),
                atol=1e-5,
            )
        ]
        assert len(fits) == 1
    sharp = bank_study.prior_of_others(30 * scores, 0.5, 0.005, torch.Generator().manual_seed(1))
    assert sharp.isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        bank_study.ranks_of(scores * math.nan)


def test_ranks_count_the_candidates_above_and_equal():
    scores = torch.tensor([[3.0, 1, 2], [1, 1, 0], [5, 4, 3]])
    ranks = bank_study.ranks_of(scores)
    assert (ranks.above.tolist(), ranks.equal.tolist()) == ([0, 0, 2], [0, 1, 0])


def test_a_bank_corrects_a_hub_that_its_queries_show():
    clips = unit_vectors(30, 8, 0)
    texts = F.normalize(clips + 0.2 * unit_vectors(30, 8, 1), dim=-1)
    hub = F.normalize(clips.mean(dim=0, keepdim=True) + clips[:1], dim=-1)
    clips = torch.cat([2.5 * hub, clips[1:]])  # longer than the others: first for many queries
    bank = F.normalize(unit_vectors(30, 8, 0).repeat(8, 1) + 0.3 * unit_vectors(240, 8, 2), dim=-1)
    banks = bank_study.Study({"240 captions": bank}, scale=20.0, seed=0)
    chosen = banks.choose(texts, clips)
    found = banks.score(texts, clips, chosen)
    assert set(found) == {"none", *banks.methods()}
    assert found["none"]["most_firsts"] > 5
    for name in ("query bank, 240 captions", "single-query Sinkhorn, 240 captions", "dual softmax"):
        assert found[name]["difference"] == pytest.approx(found[name]["R@1"] - found["none"]["R@1"])
        assert found[name]["difference"] > 10
    page = bank_study.table({"tests": {"hubs": dict.fromkeys(bank_study.DIRECTIONS, found)}})
    assert page.startswith("hubs\n\n| correction | text to video | gain |")
    assert f"| none | {found['none']['R@1']:.1f} |  |" in page


def folded(texts: torch.Tensor, videos: torch.Tensor, gates: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return texts.flatten(1), (torch.tensor(gates)[:, None] * videos).flatten(1)


def test_an_expert_that_says_the_same_of_every_clip_is_seen_by_its_spread():
    alive = unit_vectors(20, 6, 0)
    dead = unit_vectors(1, 6, 1).expand(20, -1)
    texts, videos = torch.stack([dead, alive], dim=1), torch.stack([-dead, alive], dim=1)
    found = expert_study.study(*folded(texts, videos, [0.25, 0.75]), ["dead", "alive"])
    assert found["mixture"]["R@1"] == found["alive"]["R@1_alone"] == found["dead"]["R@1_without"] == 100
    assert found["dead"]["spread"] < 1e-6 < 0.1 < found["alive"]["spread"]
    assert (found["dead"]["gate"], found["alive"]["gate"]) == pytest.approx((0.25, 0.75))
    assert found["dead"]["cosine_of_pairs"] == pytest.approx(-1) == found["dead"]["cosine_of_others"]
    assert found["alive"]["cosine_of_pairs"] == pytest.approx(1) and found["alive"]["R@1_without"] < 20
    assert "| dead | 0.250 | -1.000 | -1.000 | 0.000 |" in expert_study.table(found)


def test_queries_are_told_apart_by_the_values_of_a_column():
    alive = unit_vectors(4, 6, 0)
    videos = alive[[0, 1, 3, 2]]  # the last two are confused
    vectors = folded(alive[:, None], videos[:, None], [1.0])
    found = expert_study.by_value(*vectors, ["all"], ["a", "a", "b", "b"])
    assert found == {
        "a": {"queries": 2, "mixture": 100.0, "all": 100.0},
        "b": {"queries": 2, "mixture": 0.0, "all": 0.0},
    }


@pytest.mark.parametrize("name", ["banks", "experts"])
def test_each_study_names_what_it_needs(name, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse_options(study.STUDIES[name][0], ["--help"], description=study.__doc__)
    assert "--output" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["study.py", name[:-1]])
    with pytest.raises(UserError, match=f"banks or experts, not '{name[:-1]}'"):
        study.main()
