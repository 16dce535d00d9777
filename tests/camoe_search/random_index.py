# SPDX-License-Identifier: Apache-2.0
"""An index of random vectors: searching needs no videos and no model."""

import torch

from camoe_search.bank import QueryBank
from camoe_search.index import VideoIndex
from camoe_search.store import Description, moments_table, write_index
from modeling_camoe.retrieval import fold_text, fold_video


EXPERTS, DIM = ["fusion", "action", "scene"], 8


def random_texts(count: int, seed: int = 1) -> torch.Tensor:
    """(N,K) folded."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(count, len(EXPERTS), DIM, generator=generator)
    return fold_text(torch.nn.functional.normalize(embeds, dim=-1))


def random_videos(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,K) folded and (B,E) gates. They share a direction, so that some are hubs."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(count, len(EXPERTS), DIM, generator=generator) + 0.5
    gates = torch.randn(count, len(EXPERTS), generator=generator).softmax(dim=1)
    return fold_video(torch.nn.functional.normalize(embeds, dim=-1), gates), gates


def random_index(folder, count: int = 40, tau: float | None = 0.05, faiss: str = "flat") -> VideoIndex:
    """Moment i is seconds i to 2i+1 of /videos/<i % 4>/<i>.mp4; tau None: without a query bank."""
    vectors, gates = random_videos(count)
    numbers = range(count)
    rows = {
        "path": [f"/videos/{i % 4}/{i:03}.mp4" for i in numbers],
        "start": [float(i) for i in numbers],
        "end": [2.0 * i + 1 for i in numbers],
        "size": list(numbers),
        "mtime_ns": list(numbers),
        "content_hash": [str(i) for i in numbers],
    }
    description = Description("nowhere", "no weights", EXPERTS, DIM, 12, "uniform", faiss=faiss)
    bank = None
    if tau is not None:
        queries = random_texts(30, seed=2)
        bank = QueryBank([f"query {i}" for i in range(30)], queries.numpy(), tau)
    folder.mkdir(exist_ok=True)
    write_index(folder, description, moments_table(rows, vectors.numpy(), gates.numpy()), bank)
    return VideoIndex(folder)
