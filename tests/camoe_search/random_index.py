# SPDX-License-Identifier: Apache-2.0
"""An index of random vectors: searching needs no videos and no model."""

import torch

from camoe_search.bank import QueryBank
from camoe_search.database import Description, create
from camoe_search.index import VideoIndex
from camoe_search.writer import IndexWriter, StoredWindow
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


def random_bank(tau: float, seed: int = 2) -> QueryBank:
    return QueryBank([f"query {i}" for i in range(30)], random_texts(30, seed).numpy(), tau)


def moment(i: int) -> StoredWindow:
    """StoredWindow i is seconds i to 2i+1 of /videos/<i % 4>/<i>.mp4."""
    return StoredWindow(f"{i % 4}/{i:03}.mp4", float(i), 2.0 * i + 1, i, i, f"{i:032x}")


def make_index(folder, tau: float | None = 0.05, **settings) -> IndexWriter:
    """An empty index, open for writing."""
    folder.mkdir(exist_ok=True)
    create(folder, Description("nowhere", "no weights", EXPERTS, DIM, 12, "uniform", **settings))
    writer = IndexWriter(folder)
    writer.set_bank(None if tau is None else random_bank(tau))
    return writer


def random_index(folder, count: int = 40, tau: float | None = 0.05, **settings) -> VideoIndex:
    """`count` moments as `moment` says; tau None: without a query bank."""
    with make_index(folder, tau, **settings) as writer:
        writer.add_moments("/videos", [moment(i) for i in range(count)], random_videos(count)[0].numpy())
        writer.tidy()
    return VideoIndex(folder)


def number(hit) -> int:
    """Of a moment that was found."""
    return int(hit.path[-7:-4])
