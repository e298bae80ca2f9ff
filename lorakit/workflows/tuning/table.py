"""What is known of every candidate: its values, its losses by step, and why it left.

Losses are compared in pairs: all candidates are evaluated on the same rows, so the difference of
two has a far smaller error than either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

#: how a candidate ended
End = Literal["finished", "left", "failed", "waiting"]


@dataclass(frozen=True)
class Losses:
    """An evaluation: one entry a prompt, whose rows are no independent witnesses."""

    sums: np.ndarray = field(repr=False)
    """float64: summed negative log-likelihood of the prompt's supervised tokens, in nats."""
    counts: np.ndarray = field(repr=False)
    """int64: their number."""

    @property
    def mean(self) -> float:
        """Mean over all supervised tokens; not finite if one is not."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Difference:
    """How much higher one loss is than another, on the same prompts."""

    mean: float
    """Nats a token; below zero: the first is the better."""
    error: float
    """Its standard error; infinite with fewer than two prompts."""

    @property
    def equal(self) -> bool:
        """Whether it is within one standard error of nothing."""
        return abs(self.mean) <= self.error

    def __str__(self) -> str:
        return f"{abs(self.mean):.4f} ± {self.error:.4f}"


def difference(one: Losses, other: Losses) -> Difference:
    """The difference of two means over tokens, paired by prompt.

    The error is that of a ratio estimator: the residual of a prompt is its difference less what
    its tokens would have at the mean difference (Cochran, Sampling Techniques, §6.4).
    """
    assert np.array_equal(one.counts, other.counts), "not the same prompts"
    apart, tokens = one.sums - other.sums, one.counts.sum()
    mean = float(apart.sum() / tokens)
    number = len(apart)
    if number < 2:
        return Difference(mean, math.inf)
    residuals = apart - mean * one.counts
    error = math.sqrt(number / (number - 1) * float((residuals**2).sum())) / float(tokens)
    return Difference(mean, error)


@dataclass(frozen=True)
class Candidate:
    """One set of values, and what came of it."""

    number: int
    """0: the default settings."""
    values: Mapping[str, Any]
    """One for each searched setting."""
    losses: Mapping[int, Losses] = field(default_factory=dict)
    """Steps made → the evaluation then, without that before the first step."""
    end: End = "waiting"
    reason: str = ""
    """Why it left or failed, for people."""
    lr: float = 0.0
    rank: int = 0
    parameters: int | None = None
    """That are trained; known once it has begun."""
    start: Losses | None = None
    """Its evaluation before the first step."""

    @property
    def steps(self) -> int:
        """At its last evaluation."""
        return max(self.losses, default=0)

    @property
    def default(self) -> bool:
        return self.number == 0

    def best(self, upto: int | None = None) -> Losses | None:
        """The lowest of its evaluations after a step."""
        seen = [one for step, one in self.losses.items() if upto is None or step <= upto]
        return min((one for one in seen if one.finite), key=lambda one: one.mean, default=None)

    @property
    def kept(self) -> Losses | None:
        """The evaluation of the adapter that is left of it: of a finished run the lowest of all,
        which may be the one before the first step."""
        best = self.best()
        if best is None or self.end != "finished" or self.start is None or not self.start.finite:
            return best
        return best if best.mean < self.start.mean else self.start

    @property
    def improved(self) -> bool:
        """Whether the adapter that is left of it is one of after a step."""
        return self.kept is not None and self.kept is not self.start

    def with_(self, **changes: Any) -> Candidate:
        """The same with other fields."""
        return dataclasses.replace(self, **changes)
