"""What a training run will take: peak memory by component, and time, before anything is loaded.

``estimate_shape`` reads widths off a model without weights, ``estimate_memory`` and
``estimate_time`` are the formulas, ``estimate_machine`` measures this machine or knows a GPU, and
``estimate_advice`` says what to change. Here they are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorakit.evaluate.estimate_machine import Rates
from lorakit.evaluate.estimate_memory import Memory, Part, Setting, peak_memory, plain_reason
from lorakit.evaluate.estimate_shape import AdapterShape, ModelShape
from lorakit.evaluate.estimate_time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """A run's forwards, as far as they matter."""

    steps: int
    largest: Part
    """The forward that needs most."""
    typical: tuple[tuple[Part, ...], ...]
    """The forwards of some of the run's steps."""
    tokens_per_step: float
    """Mean."""
    supervised_total: int
    """Supervised tokens of the data, each example once."""
    batch_size: int
    longest: int
    """Tokens of the longest example."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    memory: Memory
    step: StepTime | None
    """Mean seconds of a step; ``None`` where the device's speed is not known."""
    steps: int
    tokens_per_step: float
    num_trained: int
    available: int | None
    """Bytes that the device has; ``None`` if that is not known."""
    device: str
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        """Whether the peak is below what is there; ``None`` if that is not known."""
        return None if self.available is None else self.memory.needed <= self.available

    @property
    def seconds(self) -> float | None:
        """Of all steps; loading, evaluations and samples come on top."""
        return None if self.step is None else self.steps * self.step.total

    @property
    def tokens_per_second(self) -> float | None:
        """While it trains."""
        return None if self.step is None else self.tokens_per_step / self.step.total


def estimate(
    model: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    plan: Plan,
    *,
    rates: Rates | None,
    available: int | None,
    device: str,
) -> Estimate:
    """Predict a run.

    Args:
        rates: of the device; ``None`` predicts memory alone.
        available: bytes of the device's memory.
        device: its name.
    """
    step = None if rates is None else mean_step(model, adapter, setting, plan.typical, rates)
    reason = plain_reason(model, adapter)
    notes = [] if reason is None else [f"the layers run in the plain path: {reason}"]
    return Estimate(
        memory=peak_memory(model, adapter, setting, plan.largest),
        step=step,
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        num_trained=adapter.num_parameters,
        available=available,
        device=device,
        notes=tuple(notes),
    )


def mean_step(
    model: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    steps: Sequence[Sequence[Part]],
    rates: Rates,
) -> StepTime:
    """The mean over some steps, each given by its forwards."""
    found = [step_time(model, adapter, setting, parts, rates) for parts in steps]
    names = list(StepTime.__dataclass_fields__)
    return StepTime(**{n: sum(getattr(one, n) for one in found) / len(found) for n in names})
