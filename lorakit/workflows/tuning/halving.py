"""Successive halving: at which steps candidates are compared, and which of them go on.

(Jamieson & Talwalkar, arXiv 1502.07943.) All candidates of a rung have made the same steps, so
that the weak ones are known together; Optuna's pruner, which decides about each trial as it
reports, would let the order in which they report decide.

A candidate's schedule is that of the whole run, so an early rung compares unfinished decays. Short
horizons favour low rates (Wu et al., arXiv 1803.02021): a high rate is noisy until it has
decayed. Hence four things. The first rung is no earlier than an eighth of the run, and only half of
the candidates leave at each. The best of those with at least twice the leader's rate always goes
on; a neighbour of the leader, which is often next to it anyway, would be no guard. Nothing but runs
that are finished is chosen from. And the default settings are never left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

#: no rung is earlier: fewer steps say little
LEAST_STEPS = 20
#: rungs before the last at most
MOST_HALVINGS = 3
#: the leader's rate times this is a rate that a short horizon may have spoken against
HIGHER = 2.0


def rungs(steps: int) -> tuple[int, ...]:
    """Steps after which candidates are compared; each is twice the one before, the last the end.

    All but the last are multiples of the first, at which evaluations can be.
    """
    halvings = 0
    while halvings < MOST_HALVINGS and steps >= LEAST_STEPS << (halvings + 1):
        halvings += 1
    first = -(-steps // (1 << halvings))
    return (*(first << k for k in range(halvings)), steps)


def places(candidates: int, rung: int, num_rungs: int) -> int:
    """How many of so many candidates go on from a rung, the first being 0; two reach the end."""
    if rung >= num_rungs - 1:
        return 0
    return max(2, -(-candidates // (2 << rung)))


def survivors(
    losses: Mapping[int, float],
    rates: Mapping[int, float],
    keep: int,
    *,
    always: Set[int] = frozenset(),
) -> list[int]:
    """Who goes on from a rung, the best first.

    Args:
        losses: candidate → loss at the rung; whoever has none that is finite leaves.
        rates: candidate → learning rate.
        keep: how many go on by their loss.
        always: who goes on in any case.
    """
    order = sorted((n for n in losses if math.isfinite(losses[n])), key=lambda n: (losses[n], n))
    if not order:
        return []
    kept = order[:keep]
    above = [n for n in order if rates[n] >= HIGHER * rates[order[0]]]
    if above and above[0] not in kept:
        kept.append(above[0])
    return kept + [n for n in order if n in always and n not in kept]
