"""What could be changed so that a run fits, what each change gives, and what looks unwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.evaluate.estimate import Estimate
from lorakit.evaluate.estimate_shape import AdapterShape

#: examples of a step above which LoRA tends to lose against full fine-tuning (Schulman et al.,
#: "LoRA Without Regret", 2025)
LARGEST_BATCH = 32
#: changes that cost something of the result come behind those that cost only time
_FREE = ("micro_batch_tokens", "recompute")
#: gains below this share are not worth a line
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Option:
    """One change, or several together, and what they would give."""

    changes: Mapping[str, Any]
    """Name of a setting → its other value."""
    flags: str
    """The same as they are typed."""
    needed: int
    """Bytes at the peak, but for pages that the system can take back."""
    seconds_per_step: float | None
    fits: bool | None
    same_result: bool
    """Whether the adapter becomes the same, but for rounding."""


def options(
    now: Estimate,
    candidates: Sequence[Mapping[str, Any]],
    predict: Callable[[Mapping[str, Any]], Estimate],
) -> list[Option]:
    """What each change would give, those without cost to the result first.

    Args:
        candidates: settings that may be changed, by name; tried one at a time, and where none of
            them fits alone, together, one more each time.
        predict: the estimate with these changes.
    """
    found = [_option(change, predict(change)) for change in candidates]
    # the largest gain first, among those that leave the result as it is and among the others
    found = [one for one in found if one.needed < (1 - _LEAST_GAIN) * now.memory.needed]
    found.sort(key=lambda one: (not one.same_result, one.needed))
    if now.fits is False and not any(one.fits for one in found):
        together = _together(found, predict)
        found += [] if together is None else [together]
    return found


def _together(
    found: Sequence[Option], predict: Callable[[Mapping[str, Any]], Estimate]
) -> Option | None:
    """The changes one on top of the other until it fits, or all of them."""
    changes: dict[str, Any] = {}
    best: Option | None = None
    for one in found:
        if any(name in changes for name in one.changes):
            continue  # the strongest value of a setting came first
        changes |= one.changes
        best = _option(changes, predict(changes))
        if best.fits:
            break
    return best if len(changes) > 1 else None


def _option(changes: Mapping[str, Any], then: Estimate) -> Option:
    return Option(
        changes=dict(changes),
        flags=" ".join(_flag(name, value) for name, value in changes.items()),
        needed=then.memory.needed,
        seconds_per_step=None if then.step is None else then.step.total,
        fits=then.fits,
        same_result=all(name in _FREE for name in changes),
    )


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def warnings(
    adapter: AdapterShape, *, supervised: int, batch_size: int, rank_that_holds: int | None
) -> list[str]:
    """What looks unwise, whatever the machine.

    Args:
        supervised: tokens of the data that are learnt, each once.
        rank_that_holds: the least rank with at least as many parameters; ``None`` if none has.
    """
    found = []
    if not adapter.full and adapter.num_parameters < supervised:
        advice = "; more targets would give more"
        if rank_that_holds is not None:
            advice = f"; --rank {rank_that_holds} has as many"
        found.append(
            f"the adapter has {adapter.num_parameters:,} parameters and the data {supervised:,} "
            "supervised tokens. An adapter learns about one token with each parameter at the "
            f"least; below that it may learn less than full fine-tuning would{advice}"
        )
    if batch_size > LARGEST_BATCH:
        found.append(
            f"--batch-size {batch_size} is above {LARGEST_BATCH}, where LoRA tends to learn less "
            "than full fine-tuning from the same data; a smaller one takes more steps and no more "
            "memory"
        )
    return found
