# SPDX-License-Identifier: Apache-2.0
"""What a query bank is worth, against corrections that see the test queries, and which bank: one table a test.

    python training/study.py banks --checkpoint runs/demo --home data/motion_ablations \
        --tests '{long-tailed: data/motion_long_tailed}' --output training/results/banks.json

For both directions, R@1 and its difference to no correction on the same queries. Every temperature is chosen on the
validation split of `home` with a bank from its training split. Two questions beside the comparison:
- assignment or hubs? A prior of only a random half of the other test queries cannot know which clip each of the rest
  will claim, but sees every hub;
- single-query Sinkhorn (arXiv 2311.08143) normalises the bank's rows and the candidates in turn; here without the
  query itself, which is one row among thousands, so that it folds into an index as the query bank does.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data.errors import UserError
from data.files import write_json
from evaluation.protocol import Ranks, paired_test, recalls
from evaluation.ranks import SINKHORN_ITERATIONS
from modeling_camoe.encode import encode_texts
from modeling_camoe.hubs import dual_softmax, query_bank_bias
from modeling_camoe.retrieval import similarity

from .ablation_tests import TestInputs
from .evaluation_options import EvaluationOptions
from .recipe import option


TAUS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)  # in units of the score
DIRECTIONS = ("text_to_video", "video_to_text")


@dataclass
class StudyOptions:
    """What is compared, and where it goes."""

    checkpoint: str = option(help="trained CAMoE")
    home: str = option(help="data set that it was trained on: its validation and training splits are used")
    tests: dict = option(help="name -> data set whose test split is scored")
    output: str = option(help="JSON file for the results")
    sizes: list = option([256, 1000, 3000, 10000], "sizes of the banks")
    frame_cache: str | None = option(None, "folder in which sampled frames are kept")
    seed: int = option(0, "of what is drawn")


def sinkhorn_bias(bank_scores: torch.Tensor, tau: float) -> torch.Tensor:
    """Biases of the candidates that bring exp(scores / tau) of the bank to uniform marginals, (Q,C) -> (C,)."""
    scores, of_queries = bank_scores / tau, bank_scores.new_zeros(len(bank_scores))
    for _ in range(SINKHORN_ITERATIONS):
        of_candidates = torch.logsumexp(scores - of_queries[:, None], dim=0)
        of_queries = torch.logsumexp(scores - of_candidates, dim=1)
    return tau * of_candidates


def prior_of_others(scores: torch.Tensor, share: float, tau: float, generator: torch.Generator) -> torch.Tensor:
    """Scores minus the query bank's bias of a random share of the other test queries: (N,N) -> (N,N).

    Each query has as many others, never itself: without itself among all the others, its clip would be the only one
    that nobody claims.
    """
    count = len(scores)
    places = torch.randperm(count, generator=generator)
    distances = (places[None] - places[:, None]) % count  # on a ring in random order
    used = ((distances > 0) & (distances <= share * count)).double()  # (N,N): query, other query
    levels = scores.double() / tau
    top = levels.amax(dim=0)
    sums = used @ (levels - top).exp()
    return scores - tau * (top + sums.clamp_min(1e-300).log())


def ranks_of(scores: torch.Tensor) -> Ranks:
    """Query n belongs to candidate n: (N,N) -> ranks."""
    if not scores.isfinite().all():  # a rank among such scores means nothing
        raise ValueError("A score is not a finite number.")
    own = scores.diagonal()[:, None]
    others = ~torch.eye(len(scores), dtype=torch.bool)
    above, equal = ((compare(scores, own) & others).sum(dim=1) for compare in (torch.gt, torch.eq))
    return Ranks(above.numpy(), equal.numpy())


class Study:
    """All corrections of one direction.

    Args:
        banks: name -> vectors. side: "text_to_video" or "video_to_text". scale: exp(logit_scale). seed: of the shares.
    """

    def __init__(self, banks: dict[str, torch.Tensor], scale: float, seed: int):
        self.banks, self.scale, self.seed = banks, scale, seed

    def methods(self) -> dict:
        """Name -> a function of queries (N,K), candidates (N,K) and a temperature -> corrected scores (N,N)."""

        def of_bank(name, bias):
            return lambda q, c, tau: similarity(q, c) - bias(similarity(self.banks[name], c), tau)

        def of_others(share):
            return lambda q, c, tau: prior_of_others(
                similarity(q, c), share, tau, torch.Generator().manual_seed(self.seed)
            )

        methods = {
            "dual softmax": lambda q, c, tau: dual_softmax(self.scale * similarity(q, c), self.scale * tau),
            "a random half of the other test queries": of_others(0.5),
            "a random tenth of them": of_others(0.1),
        }
        methods |= {f"query bank, {name}": of_bank(name, query_bank_bias) for name in self.banks}
        return methods | {f"single-query Sinkhorn, {name}": of_bank(name, sinkhorn_bias) for name in self.banks}

    def choose(self, queries, candidates) -> dict[str, float]:
        """The temperature of each method with the best R@1 of validation data, among equals the larger."""
        chosen = {}
        for name, method in self.methods().items():
            tried = {tau: recalls(ranks_of(method(queries, candidates, tau)))["R@1"] for tau in TAUS}
            chosen[name] = max(tried, key=lambda tau: (tried[tau], tau))
        return chosen

    def score(self, queries, candidates, chosen: dict[str, float]) -> dict[str, dict]:
        """R@1 of each method with the chosen temperatures, and its paired difference to no correction."""
        uncorrected = ranks_of(similarity(queries, candidates))
        first = np.bincount(similarity(queries, candidates).argmax(dim=1), minlength=len(candidates))
        hubs = {"most_firsts": int(first.max()), "never_first": int((first == 0).sum())}
        results = {"none": {"R@1": recalls(uncorrected)["R@1"], **hubs}}
        for name, method in self.methods().items():
            ranks = ranks_of(method(queries, candidates, chosen[name]))
            test = paired_test(ranks, uncorrected)
            results[name] = {"R@1": recalls(ranks)["R@1"], "tau": chosen[name]}
            results[name] |= {key: test[key] for key in ("difference", "ci95", "p_value")}
        return results


def run(options: StudyOptions):
    """Writes the results and prints them."""
    common = EvaluationOptions(
        checkpoint=options.checkpoint,
        dataset_name=options.home,
        frame_cache=options.frame_cache,
        num_workers=0,
        bank=max(options.sizes),
        seed=options.seed,
    )
    tests = [{"name": name, "dataset_name": folder} for name, folder in options.tests.items()]
    inputs = TestInputs(common, Accelerator(), tests)
    validation = inputs.own[0]
    clips = inputs.banks(validation)["video_bank"]
    own = {" ".join(text.lower().split()) for text in inputs.test_captions}
    texts, streams, _ = inputs._read(common.train_split).flat("all")
    kept = [n for n, text in enumerate(texts) if " ".join(text.lower().split()) not in own]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(options.seed))[: max(options.sizes)]
    experts = inputs.model.config.experts
    tagged = [dict(zip(experts, streams[kept[n]], strict=True)) for n in order.tolist()]
    captions = encode_texts(inputs.model, inputs.processor, tagged, progress="captions of the bank")
    # Among texts, and among clips, the experts count alike: the gate is the candidate's.
    plain_clips = torch.nn.functional.normalize(clips.unflatten(1, (len(experts), -1)), dim=-1).flatten(1)
    results = {"settings": dataclasses.asdict(options), "tests": {}}
    for direction in DIRECTIONS:
        by_text = direction == "text_to_video"
        usual, other = (captions, plain_clips) if by_text else (clips, captions / len(experts))
        names = ("captions", "clips") if by_text else ("clips", "captions")
        banks = {
            f"{size:,} {name}": bank[:size]
            for name, bank in zip(names, (usual, other), strict=True)
            for size in sorted({min(size, len(bank)) for size in options.sizes})
        }
        study = Study(banks, inputs.scale, options.seed)

        def sides(data, by_text=by_text):
            if not torch.equal(data.video_of_text, torch.arange(len(data.text_vectors))):
                raise UserError("this study takes one caption per clip, in the order of the clips")
            pair = data.text_vectors, data.video_vectors
            return pair if by_text else pair[::-1]

        chosen = study.choose(*sides(validation))
        for name, data in {"validation": validation, **inputs.tests}.items():
            results["tests"].setdefault(name, {})[direction] = study.score(*sides(data), chosen)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    print(table(results))


def table(results: dict) -> str:
    """Markdown of the results, a table a test."""
    parts = []
    for name, directions in results["tests"].items():
        lines = ["| correction | " + " | ".join(f"{d.replace('_', ' ')} | gain" for d in DIRECTIONS) + " |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        rows = dict.fromkeys(row for direction in DIRECTIONS for row in directions[direction])
        for row in rows:
            cells = []
            for direction in DIRECTIONS:
                found = directions[direction].get(row)
                cells.append("" if found is None else f"{found['R@1']:.1f}")
                low, high = (found or {}).get("ci95", (math.nan, math.nan))
                cells.append("" if math.isnan(low) else f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
            lines.append(f"| {row} | {' | '.join(cells)} |")
        parts.append(f"{name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)
