# SPDX-License-Identifier: Apache-2.0
"""What each expert of a model does: is one dead, and which queries does the mixture win? For `study.py experts`.

For every expert: its mean gate weight, the mean cosine of a caption with its clip and with other clips, R@1 text to
video of the expert alone and of the mixture without it, and how far it spreads the scores of one query (standard
deviation over clips of gate times cosine): the loss of the fused score sees differences between clips only, so a
cosine may be negative without harm, but an expert whose contribution hardly differs from clip to clip decides nothing.
"""

import torch


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
