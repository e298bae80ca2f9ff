"""Sharing a number of parameters among sites so that the most of the change is kept.

One more direction of a site costs ``n + m`` parameters (``G·n + m`` with G groups) and keeps the
square of its singular value. Every direction is one thing to pack, and the error that is left,
‖ΔW − ΔW'‖², is the sum over what stays outside: a knapsack. Sites of one shape have equal costs, so
among them the largest go first, and what remains is how many of each cost. With a few costs (a
language model has three to five) that is solved exactly, in steps of their greatest common divisor;
where it would take too long, by the gain for the cost, largest first, which is at most the gain of
one direction away from the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

#: inner steps of the exact way that are worth it: about a second
_STEPS = 1 << 29


def allocate(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    exact: bool | None = None,
) -> tuple[dict[str, int], bool]:
    """Directions of each site, and whether no other choice keeps more.

    Args:
        gains: site → what each further direction keeps; never rising within a site.
        costs: site → parameters of one direction.
        budget: most parameters of all.
        exact: solve exactly or by gain for cost; ``None`` decides by the time it takes.
    """
    classes: dict[int, list[tuple[float, str]]] = {}
    for path, own in gains.items():
        classes.setdefault(costs[path], []).extend((gain, path) for gain in own if gain > 0.0)
    for items in classes.values():
        items.sort(key=lambda item: -item[0])  # stable: a site's own stay in their order
    unit = math.gcd(*classes) if classes else 1
    if exact is None:
        steps = sum(min(len(items), budget // cost) for cost, items in classes.items())
        exact = steps * (budget // unit + 1) <= _STEPS
    counts = _exactly(classes, budget, unit) if exact else _by_density(classes, budget)
    found = dict.fromkeys(gains, 0)
    for cost, items in classes.items():
        for _, path in items[: counts[cost]]:
            found[path] += 1
    complete = all(counts[cost] == len(items) for cost, items in classes.items())
    return found, exact or complete


def _exactly(
    classes: Mapping[int, Sequence[tuple[float, str]]], budget: int, unit: int
) -> dict[int, int]:
    """How many of each cost: the best sum within every capacity, one cost after another."""
    capacity = budget // unit
    best = np.zeros(capacity + 1)
    choices: dict[int, np.ndarray] = {}
    for cost, items in classes.items():
        size = cost // unit
        grown, choice = best.copy(), np.zeros(capacity + 1, np.int32)
        kept = 0.0
        for number, (gain, _) in enumerate(items[: capacity // size], start=1):
            kept += gain
            candidate = best[: capacity + 1 - number * size] + kept
            better = candidate > grown[number * size :]
            grown[number * size :][better] = candidate[better]
            choice[number * size :][better] = number
        best, choices[cost] = grown, choice
    counts, left = {}, capacity
    for cost in reversed(list(classes)):
        counts[cost] = int(choices[cost][left])
        left -= counts[cost] * (cost // unit)
    return counts


def _by_density(classes: Mapping[int, Sequence[tuple[float, str]]], budget: int) -> dict[int, int]:
    """Largest gain for its cost first; what does not fit is passed over."""
    items = sorted((-gain / cost, cost) for cost, own in classes.items() for gain, _ in own)
    counts, left = dict.fromkeys(classes, 0), budget
    for _, cost in items:
        if cost <= left:
            counts[cost] += 1
            left -= cost
    return counts
