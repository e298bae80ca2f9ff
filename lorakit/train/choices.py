"""What is chosen before a run: which examples train and which evaluate, and every setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakit.bases import Base, context_length
from lorakit.data import order, split
from lorakit.errors import DataError, InputError, SpecError
from lorakit.tasks.task import Examples
from lorakit.train.beginning import Beginning
from lorakit.train.full import full_notes
from lorakit.train.settings import LEAST_TO_HOLD_OUT, Facts, TrainSettings


@dataclass(frozen=True)
class Choices:
    """Of one run."""

    settings: TrainSettings
    """With every choice made."""
    training: np.ndarray
    """Which examples of the data are trained on."""
    validation: tuple[Examples, Sequence[int]] | None
    """What is evaluated on, and which of it; ``None``: nothing."""
    notes: tuple[str, ...]
    """What was chosen, each with its reason."""


def choose(
    base: Base,
    beginning: Beginning,
    data: Examples,
    validation: Examples | None,
    settings: TrainSettings,
    *,
    processes: int,
    out: Path,
) -> Choices:
    """Split the data and resolve the settings.

    Args:
        validation: what to evaluate on; ``None``: a part of the data.
        processes: those that share a batch.
        out: the run folder, for what is said of its size.

    Raises:
        DataError: there is nothing to train on.
        SpecError, InputError: settings that cannot act here.
    """
    if not len(data):
        raise DataError("there is no example to train on; see lorakit preview")
    training, held, notes = _split(data, validation, settings, beginning.is_full)
    fraction = settings.held_out(len(data)) if validation is None else 0.0
    settings = dataclasses.replace(settings, validation_fraction=fraction)
    _check_room(base, beginning, data, validation)
    facts = Facts(
        num_examples=len(training),
        num_validation=len(held),
        hidden_size=getattr(getattr(base.model, "config", None), "hidden_size", None),
        device=base.placement.device.type,
        init=beginning.init,
        full=beginning.is_full,
        prefix=beginning.num_virtual_tokens > 0,
    )
    resolved, reasons = settings.resolve(facts)
    if resolved.batch_size < processes:
        raise SpecError(
            f"batch_size is {resolved.batch_size} and there are {processes} processes; a batch is "
            "shared among them, so some would have nothing to do. Start fewer, or raise "
            "--batch-size"
        )
    notes += reasons
    if beginning.is_full:
        notes += full_notes(base, out, resolved)
    evaluated = _some(held, resolved.eval_rows, settings.seed)
    source = data if validation is None else validation
    return Choices(resolved, training, (source, evaluated) if evaluated else None, tuple(notes))


def _split(
    data: Examples, validation: Examples | None, settings: TrainSettings, is_full: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Indices to train on (of the data) and to evaluate on (of what that is from); and why."""
    everything, none = np.arange(len(data)), np.arange(0)
    if validation is not None:
        if settings.validation_fraction:
            raise InputError(
                f"validation_fraction is {settings.validation_fraction:g}, but there is "
                "validation data; give one of them"
            )
        if not len(validation):
            raise DataError("the validation data holds no example that can be used")
        return everything, np.arange(len(validation)), []
    fraction = settings.held_out(len(everything))
    if not fraction:
        kept = f"so the {'model' if is_full else 'adapter'} kept is that of the last step"
        if settings.validation_fraction == 0:
            return everything, none, [f"there is no validation, {kept}"]
        note = (
            f"there is no validation (some rows are held out from {LEAST_TO_HOLD_OUT} on, "
            f"and there are {len(everything)}), {kept}. Give --valid F, or hold some out "
            "anyway with --validation-fraction 0.2"
        )
        return everything, none, [note]
    training, held = split(data, fraction, settings.seed)
    if len(held):
        note = (
            f"{len(held)} of {len(everything)} rows are held out for validation, in whole "
            "prompts (no validation data was given)"
        )
    else:
        note = (
            "there is no validation (all rows share one prompt), so what is kept is from the "
            "last step"
        )
    return training, held, [note]


def _check_room(
    base: Base, beginning: Beginning, data: Examples, validation: Examples | None
) -> None:
    """A text and the prefix in front of it share the positions of the base's context."""
    taken, room = beginning.num_virtual_tokens, context_length(base.model)
    if not taken or room is None:
        return
    for one in (data, validation):
        longest = 0 if one is None or not len(one) else int(one.lengths.max())
        if longest + taken > room:
            raise SpecError(
                f"a prefix of {taken} virtual tokens leaves {room - taken} of the {room} "
                f"positions of this base, and the longest example has {longest} tokens. Give "
                f"--max-length {max(room - taken, 1)}, or a shorter prefix"
            )


def _some(indices: np.ndarray, rows: int | None, seed: int) -> list[int]:
    """``rows`` of ``indices``, always the same ones, in their own order; all if 0."""
    if rows and rows < len(indices):
        indices = indices[np.sort(order(len(indices), seed, 0)[:rows])]
    return [int(index) for index in indices]
