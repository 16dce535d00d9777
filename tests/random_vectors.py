# SPDX-License-Identifier: Apache-2.0
"""Vectors for tests of ranks: random directions."""

import torch


def random_vectors(*sizes, seed=0, k=8):
    """Unit vectors, (n,k) of each size n."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, k, generator=generator), dim=1) for n in sizes]
