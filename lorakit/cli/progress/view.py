"""What is known of a run: its steps, losses and speed so far. It knows no terminal."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorakit.train.callbacks import EvalMetrics, RunInfo, StepMetrics


@dataclass
class View:
    """A run so far."""

    run: RunInfo
    step: int = 0
    steps: list[int] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    """Per entry of ``steps``: mean of the losses so far, older ones weighing less and less."""
    evals: list[EvalMetrics] = field(default_factory=list)
    last: StepMetrics | None = None
    tokens_per_second: float | None = None
    """Smoothed like the loss."""
    ending: str | None = None
    _instants: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=512))
    _loss_sum: float = 0.0
    _rate_sum: float = 0.0
    _weight: float = 0.0

    def __post_init__(self) -> None:
        self.step = self.run.first_step

    def begin(self, now: float) -> None:
        """The clock starts: ``now`` in seconds, of any origin."""
        self._instants.clear()
        self._instants.append((self.step, now))

    def add_step(self, metrics: StepMetrics, now: float) -> None:
        """Take in a step that ended at ``now``."""
        self.step, self.last = metrics.step, metrics
        self._instants.append((metrics.step, now))
        if not math.isfinite(metrics.loss):
            return  # the loop stops on these; the mean of the others stays readable
        # the newest 5 % of the run weigh most, but never under 4 steps nor over 50
        keep = 1 - 1 / min(50.0, max(4.0, self.run.total_steps / 20))
        self._weight = keep * self._weight + 1 - keep
        self._loss_sum = keep * self._loss_sum + (1 - keep) * metrics.loss
        self._rate_sum = keep * self._rate_sum + (1 - keep) * metrics.tokens_per_second
        self.tokens_per_second = self._rate_sum / self._weight
        # the list that a drawing thread zips against must never be the longer one
        self.smoothed.append(self._loss_sum / self._weight)
        self.steps.append(metrics.step)

    def add_eval(self, metrics: EvalMetrics) -> None:
        """Take in an evaluation."""
        self.evals.append(metrics)

    @property
    def best(self) -> EvalMetrics | None:
        """The evaluation with the lowest loss."""
        finite = [e for e in list(self.evals) if math.isfinite(e.loss)]
        return min(finite, key=lambda e: e.loss, default=None)

    @property
    def before(self) -> EvalMetrics | None:
        """The evaluation before the first step."""
        return next((e for e in list(self.evals) if e.step == 0), None)

    def seconds_left(self, now: float) -> float | None:
        """By the pace of the last half of the steps, evaluations included; ``None`` at first."""
        instants = list(self._instants)
        if len(instants) < 2 or self.step >= self.run.total_steps:
            return None
        # the very first step pays for warming up; leave it out as soon as there are others
        start = instants[max(len(instants) // 2, 1 if len(instants) > 2 else 0)]
        if start == instants[-1]:
            start = instants[-2]
        (step_0, time_0), (step_1, time_1) = start, instants[-1]
        per_step = (time_1 - time_0) / max(1, step_1 - step_0)
        return max(0.0, per_step * (self.run.total_steps - self.step) - (now - time_1))


def view_of_rows(run: RunInfo, rows: Iterable[dict[str, Any]]) -> tuple[View, float]:
    """The view after these rows of ``metrics.jsonl``, and the seconds that they took."""
    view, now = View(run), 0.0
    view.begin(0.0)
    for row in rows:
        now += float(row.get("seconds") or 0.0)
        values = {name: value for name, value in row.items() if name != "kind"}
        for name in ("loss", "perplexity", "grad_norm"):  # null stands for a number not finite
            if name in values and values[name] is None:
                values[name] = math.nan
        with contextlib.suppress(TypeError):  # a row of another version, with other fields
            if row.get("kind") == "step":
                view.add_step(StepMetrics(**values), now)
            elif row.get("kind") == "eval":
                view.add_eval(EvalMetrics(**values))
    return view, now
