"""Magnitude pruning: of an adapter's change, keep the largest numbers in size (Han et al., 2015,
arXiv 1506.02626; for changes of weights: TIES, arXiv 2306.01708, section 4, step 1).

The share that is kept is counted over the whole change, as TIES defines it on the flattened vector
of all parameters, or for each weight by itself, as PEFT and mergekit do it.

The k-th largest of a vector that is never in memory as a whole is found by its bits: those of
non-negative float32 numbers sort as the numbers do. One pass counts the upper 16 bits, a second the
lower 16 of the one bucket that holds the k-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def threshold(parts: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The size, as float32, of the k-th largest number, k = ⌊density · count⌋, at least 1.

    Args:
        parts: makes the tensors anew; it is called twice.
    """
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for part in parts():
        upper += torch.bincount(_bits(part) >> 16, minlength=1 << 15)
    wanted = max(1, int(density * int(upper.sum())))
    bucket, wanted = _bucket(upper, wanted)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts():
        bits = _bits(part)
        lower += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    rest, _ = _bucket(lower, wanted)
    return float(torch.tensor([(bucket << 16) | rest], dtype=torch.int32).view(torch.float32))


def keep_largest(change: Tensor, smallest: float) -> Tensor:
    """The numbers that are at least ``smallest`` in size (as float32); zero for the others.

    Numbers of equal size at the limit are all kept, so that the result depends on no order.
    """
    return torch.where(change.float().abs() >= smallest, change, torch.zeros_like(change))


def _bits(part: Tensor) -> Tensor:
    return part.detach().float().abs().reshape(-1).contiguous().view(torch.int32)


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Where the ``wanted``-th from the top is, and which one it is there."""
    above = counts.flip(0).cumsum(0).flip(0)  # numbers in this bucket and higher ones
    bucket = int((above >= wanted).nonzero().max())
    return bucket, wanted - int(above[bucket] - counts[bucket])
