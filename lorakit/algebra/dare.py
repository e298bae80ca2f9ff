"""DARE, drop and rescale (Yu et al., 2023, arXiv 2311.03099, section 3.2).

Each number of a change is dropped with probability p = 1 − density, and the others are divided by
1 − p, so that the expectation stays. What is dropped depends on the seed, the adapter's place in
the list, the site and the tensor alone: not on the other sites, nor on their order.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def drop_and_rescale(change: Tensor, density: float, *key: object) -> Tensor:
    """The change with a share ``density`` of its numbers, divided by ``density``.

    Args:
        key: what the random numbers depend on, such as seed, place and path.
    """
    if density == 1.0:
        return change
    kept = torch.rand(change.shape, generator=_generator(key), dtype=torch.float64) < density
    return change * kept / density


def _generator(key: tuple[object, ...]) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)
