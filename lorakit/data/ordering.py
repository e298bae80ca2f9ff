"""The order in which examples are seen: a pure function of the seed and the count.

The permutation is our own arithmetic rather than a random generator's, so that it stays the same
with every version of NumPy, and a run resumes with nothing but the number of examples it has
consumed.
"""

from __future__ import annotations

import functools

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def order(num: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(num)`` in this epoch, int64.

    Each place gets a 64-bit number from its index, the seed and the epoch (SplitMix64: Steele,
    Lea and Flood, 2014); sorting by these numbers is the shuffle.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed & _MASK)) ^ _mix(np.uint64((epoch + _GOLDEN) & _MASK))
        keys = _mix(np.arange(num, dtype=np.uint64) * np.uint64(_GOLDEN) + start)
    return np.argsort(keys, kind="stable").astype(np.int64)


def indices_at(num: int, seed: int, consumed: int, count: int) -> np.ndarray:
    """The ``count`` indices that come after ``consumed`` ones, epoch behind epoch, int64."""
    if num < 1:
        raise ValueError("there are no examples to order")
    found = []
    while count > 0:
        epoch, place = divmod(consumed, num)
        part = _cached(num, seed, epoch)[place : place + count]
        found.append(part)
        consumed += len(part)
        count -= len(part)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=4)
def _cached(num: int, seed: int, epoch: int) -> np.ndarray:
    permutation = order(num, seed, epoch)
    permutation.flags.writeable = False
    return permutation


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser, elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
