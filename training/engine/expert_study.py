# SPDX-License-Identifier: Apache-2.0
"""What each expert of a model does: is one dead, and which queries does the mixture win?

    python training/study.py experts --checkpoints '{demo: runs/demo}' --dataset_name data/motion_ablations \
        --split validation --columns '[action]' --output training/results/experts.json

For every expert: its mean gate weight, the mean cosine of a caption with its clip and with other clips, R@1 text to
video of the expert alone and of the mixture without it, and how far it spreads the scores of one query (standard
deviation over clips of gate times cosine): the loss of the fused score sees differences between clips only, so a
cosine may be negative without harm, but an expert whose contribution hardly differs from clip to clip decides nothing.
With `columns`, R@1 of the mixture and of each expert for the queries of each value.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from data.captioned_clips import load_split
from data.files import write_json

from .ablation_tests import TestInputs
from .evaluation_options import EvaluationOptions
from .recipe import option


@dataclass
class StudyOptions:
    """What is looked at, and where it goes."""

    checkpoints: dict = option(help="name -> trained CAMoE")
    dataset_name: str = option(help="data set whose split is encoded")
    output: str = option(help="JSON file for the results")
    split: str = option("validation", "its split")
    columns: list = option([], "columns of the data set by whose values queries are told apart")
    frame_cache: str | None = option(None, "folder in which sampled frames are kept")


def hits(scores: torch.Tensor) -> torch.Tensor:
    """(N,N) scores, query n belongs to clip n -> (N,) whether it comes first."""
    return scores.argmax(dim=1) == torch.arange(len(scores))


def study(text_vectors: torch.Tensor, video_vectors: torch.Tensor, experts: list[str]) -> dict[str, dict]:
    """Expert -> its numbers, from folded vectors (N,K) of captions and their clips."""
    texts, videos = (vectors.unflatten(1, (len(experts), -1)) for vectors in (text_vectors, video_vectors))  # (N,E,D)
    gates = videos.norm(dim=-1)  # (N,E): a folded clip is its gate times unit vectors
    parts = torch.einsum("ned,med->enm", texts, videos)  # (E,N,N)
    cosines = parts / gates.T[:, None]
    other = ~torch.eye(len(texts), dtype=torch.bool)
    fused = parts.sum(dim=0)
    found = {
        "mixture": {"R@1": _percent(hits(fused)), "spread": fused.std(dim=1).mean().item()},
    }
    for number, name in enumerate(experts):
        found[name] = {
            "gate": gates[:, number].mean().item(),
            "gate_deviation": gates[:, number].std().item(),
            "cosine_of_pairs": cosines[number].diagonal().mean().item(),
            "cosine_of_others": cosines[number][other].mean().item(),
            "spread": parts[number].std(dim=1).mean().item(),
            "R@1_alone": _percent(hits(cosines[number])),
            "R@1_without": _percent(hits(fused - parts[number])),
        }
    return found


def by_value(text_vectors, video_vectors, experts: list[str], values: list) -> dict[str, dict[str, float]]:
    """Value -> R@1 of the mixture and of each expert alone, for the queries with that value."""
    texts, videos = (vectors.unflatten(1, (len(experts), -1)) for vectors in (text_vectors, video_vectors))
    parts = torch.einsum("ned,med->enm", texts, videos)
    right = {"mixture": hits(parts.sum(dim=0))}
    right |= {name: hits(parts[n] / videos[:, n].norm(dim=-1)) for n, name in enumerate(experts)}
    return {
        str(value): {"queries": values.count(value)}
        | {name: _percent(of[torch.tensor([each == value for each in values])]) for name, of in right.items()}
        for value in sorted(set(values))
    }


def _percent(right: torch.Tensor) -> float:
    return 100 * right.float().mean().item()


def run(options: StudyOptions):
    """Writes the results and prints them."""
    results = {"settings": dataclasses.asdict(options), "checkpoints": {}}
    rows = load_split(options.dataset_name, options.split)
    for name, checkpoint in options.checkpoints.items():
        common = EvaluationOptions(
            checkpoint=checkpoint,
            dataset_name=options.dataset_name,
            validation_split=options.split,
            frame_cache=options.frame_cache,
            num_workers=0,
        )
        inputs = TestInputs(common, Accelerator(), [])
        vectors, experts = (inputs.own[0].text_vectors, inputs.own[0].video_vectors), inputs.model.config.experts
        found = {"experts": study(*vectors, experts)}
        for column in options.columns:
            found[f"by_{column}"] = by_value(*vectors, experts, list(rows[column]))
        results["checkpoints"][name] = found
        print(f"{name}\n{table(found['experts'])}\n")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)


def table(experts: dict[str, dict]) -> str:
    """Markdown, one line an expert."""
    columns = ("gate", "cosine_of_pairs", "cosine_of_others", "spread", "R@1_alone", "R@1_without")
    lines = [f"| expert | {' | '.join(name.replace('_', ' ') for name in columns)} |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name, found in experts.items():
        cells = [f"{found[c]:.1f}" if "R@1" in c else f"{found[c]:.3f}" for c in columns if c in found]
        if name == "mixture":
            cells = ["", "", "", f"{found['spread']:.3f}", f"{found['R@1']:.1f}", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
