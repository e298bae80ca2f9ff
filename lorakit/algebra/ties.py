"""TIES, trim, elect sign and merge (Yadav et al., 2023, arXiv 2306.01708, algorithm 1).

Trimming is ``prune``. For each number the sign of the sum of the trimmed changes is elected, and
the mean is taken of those that have this sign; a trimmed number has none. The paper's λ is a weight
that all adapters share. Different weights, which the paper does not have, multiply the changes
before the election, so that an adapter with a negative weight votes against its own sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elect_and_merge(changes: Sequence[Tensor]) -> Tensor:
    """The disjoint mean of trimmed, weighted changes of one shape."""
    elected = sum(changes[1:], changes[0]).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in changes:
        agrees = (change.sign() == elected) & (change != 0)
        total += torch.where(agrees, change, torch.zeros_like(change))
        count += agrees
    return total / count.clamp_min(1)
