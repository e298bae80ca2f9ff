"""Candidates as runs: made when there is room, trained together, leaving at their rung."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.bases import Base
from lorakit.core.spec import LoRASpec
from lorakit.data import TokenData
from lorakit.errors import (
    BaseError,
    DataError,
    Interrupted,
    LorakitError,
    SpecError,
    TargetError,
    TrainingError,
)
from lorakit.train import (
    Callback,
    EvalMetrics,
    Origin,
    RunInfo,
    RunResult,
    StepMetrics,
    Trainer,
    TrainSettings,
)
from lorakit.train.beginning import Calibrate
from lorakit.train.interrupt import StopRequest
from lorakit.workflows.tuning.folder import TuneFolder, from_row, to_row
from lorakit.workflows.tuning.space import assign
from lorakit.workflows.tuning.table import Candidate, End, Losses


class Watcher:
    """Is told what happens in a search; every method does nothing until a subclass overrides it."""

    def on_note(self, text: str) -> None:
        """A choice with its reason."""

    def on_rung(self, step: int, candidates: Sequence[int], steps: int) -> None:
        """So many candidates are about to be trained until ``step`` of a whole run's ``steps``."""

    def on_step(self, number: int, metrics: StepMetrics) -> None:
        """A candidate has made a step."""

    def on_eval(self, number: int, metrics: EvalMetrics) -> None:
        """A candidate was evaluated."""

    def on_end(self, candidate: Candidate) -> None:
        """A candidate has finished, left or failed."""


@dataclasses.dataclass(frozen=True)
class Means:
    """What every candidate shares."""

    base: Base
    data: TokenData
    validation: TokenData | None
    origin: Origin
    spec: LoRASpec
    settings: TrainSettings
    """With steps, evaluations, and the rate of candidates where none is searched."""
    calibrate: Callable[[int], Calibrate] | None = None
    """Makes what some initialisations need; is given the seed."""


class Field:
    """Candidates and their run folders.

    Args:
        together: trains several; :func:`lorakit.train.train_together`.
    """

    def __init__(
        self,
        folder: TuneFolder,
        means: Means,
        watcher: Watcher,
        *,
        together: Callable[..., list[Any]],
        max_concurrent: int | None = None,
        token_budget: int | None = None,
    ) -> None:
        self._folder = folder
        self._means = means
        self._watcher = watcher
        self._together = together
        self._limits = {"max_concurrent": max_concurrent, "token_budget": token_budget}
        self._units: tuple[np.ndarray, int] | None = None
        self.candidates: list[Candidate] = []

    # --- the table -------------------------------------------------------------------------

    def enter(self, values: Mapping[str, Any]) -> None:
        """Add a candidate, with what its files already tell; one whose values are impossible
        together has failed."""
        spec, settings = self._means.spec, self._means.settings
        number = len(self.candidates)
        lr, rank = values.get("lr", settings.lr), values.get("rank", spec.rank)
        self.candidates.append(Candidate(number, dict(values), lr=lr, rank=rank))
        self._refresh(number)
        try:
            assign(values, spec, settings)
        except SpecError as error:  # the same again whenever the search goes on
            self.change(number, end="failed", reason=str(error))

    def change(self, number: int, **changes: Any) -> None:
        """Set fields of a candidate; tells when it ends."""
        before = self.candidates[number]
        self.candidates[number] = before.with_(**changes)
        if before.end == "waiting" and self.candidates[number].end != "waiting":
            self._watcher.on_end(self.candidates[number])

    def end(self, number: int, how: End, reason: str) -> None:
        """End a candidate, and write it down: it does not follow from its losses."""
        self._folder.add(number, {how: reason})
        self.change(number, end=how, reason=reason)

    def loss_at(self, number: int, step: int) -> float:
        """The lowest loss after a step, up to a certain one."""
        best = self.candidates[number].best(step)
        return math.nan if best is None else best.mean

    def _refresh(self, number: int) -> None:
        losses: dict[int, Losses] = {}
        changes: dict[str, Any] = {}
        for row in self._folder.rows(number):
            if "sums" in row and row["step"]:
                losses[int(row["step"])] = from_row(row)
            elif "sums" in row:
                changes["start"] = from_row(row)
            elif "parameters" in row:
                changes["parameters"] = row["parameters"]
            else:
                for end in row.keys() & {"failed", "left"}:
                    changes = {**changes, "end": end, "reason": row[end]}
        if (self._folder.run(number) / "result.json").is_file():
            changes["end"] = "finished"
        self.change(number, losses=losses, **changes)

    # --- training --------------------------------------------------------------------------

    def advance(self, numbers: Iterable[int], until: int, *, more: Callable[[], bool]) -> None:
        """Train candidates until they have made ``until`` steps; those that have stay as they are.

        Args:
            more: asked before each begins; once it says no, those left over are not begun.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; all states are saved.
            LorakitError: something that is no candidate's fault, such as a full disk; or all of
                them failed, and this is how the first did.
        """
        waiting = [
            n
            for n in numbers
            if self.candidates[n].end == "waiting"
            # the last evaluation is not yet the end of a run
            and (self.candidates[n].steps < until or until == self._steps)
        ]
        if not waiting:
            return
        self._watcher.on_rung(until, waiting, self._steps)
        begun: dict[Trainer, int] = {}
        errors: list[Exception] = []

        def trainers() -> Iterator[Trainer]:
            for number in waiting:
                if (begun and not more()) or not all(map(_of_candidate, errors)):
                    return
                try:
                    trainer = self._trainer(number, until)
                except LorakitError as error:
                    noted(number, error)
                    continue
                begun[trainer] = number
                yield trainer

        def on_result(trainer: Trainer, result: RunResult | Exception) -> None:
            self._refresh(begun[trainer])
            if isinstance(result, Exception):
                noted(begun[trainer], result)

        def noted(number: int, error: Exception) -> None:
            errors.append(error)
            if _of_candidate(error):
                self.end(number, "failed", str(error))

        with StopRequest() as stop:
            self._together(trainers(), on_result=on_result, stop=stop, **self._limits)
        for error in errors:  # among them a wish to stop
            if not _of_candidate(error):
                raise error
        if stop.received is not None:  # when all were at their rung
            raise Interrupted(f"stopped by {stop.received.name} after step {until}")
        if errors and all(c.end == "failed" for c in self.candidates):
            raise errors[0]

    @property
    def _steps(self) -> int:
        steps = self._means.settings.steps
        assert steps is not None
        return steps

    def _trainer(self, number: int, until: int) -> Trainer:
        means, out = self._means, self._folder.run(number)
        leave = _Leave(self, number, until)
        trainer: Trainer
        if (out / "run.yaml").exists():
            trainer = Trainer.reopened(
                out,
                base=means.base,
                data=means.data,
                validation=means.validation,
                callbacks=[leave],
            )
        else:
            trainer = self.trainer(self.candidates[number].values, out, [leave])
        leave.trainer = trainer
        return trainer

    def trainer(
        self, values: Mapping[str, Any], out: Any, callbacks: Sequence[Callback] = ()
    ) -> Trainer:
        """A new run with these values."""
        means = self._means
        spec, settings = assign(values, means.spec, means.settings)
        return Trainer(
            means.base,
            spec,
            means.data,
            settings,
            out,
            validation=means.validation,
            callbacks=callbacks,
            origin=means.origin,
            calibrate=None if means.calibrate is None else means.calibrate(settings.seed),
        )

    # --- what a run tells ------------------------------------------------------------------

    def record(self, number: int, trainer: Trainer, metrics: EvalMetrics) -> None:
        """Keep an evaluation, prompt by prompt."""
        assert metrics.examples is not None
        sums, counts = metrics.examples
        units, total = self._unit_of(trainer)
        losses = Losses(
            np.bincount(units, weights=sums, minlength=total),
            np.bincount(units, weights=counts, minlength=total).astype(np.int64),
        )
        self._folder.add(number, to_row(metrics.step, losses))
        self._watcher.on_eval(number, metrics)

    def begun(self, number: int, run: RunInfo) -> None:
        """Keep how large a candidate is."""
        if not run.first_step:
            self._folder.add(number, {"parameters": run.num_trainable})

    def stepped(self, number: int, metrics: StepMetrics) -> None:
        """Tell of a step."""
        self._watcher.on_step(number, metrics)

    def _unit_of(self, trainer: Trainer) -> tuple[np.ndarray, int]:
        """Each evaluated row → its prompt, and how many prompts there are."""
        if self._units is None:
            self._units = prompts_of(trainer)
        return self._units


def _of_candidate(error: Exception) -> bool:
    """Whether a failure is that of a candidate, which would fail again; not that of a disk, of a
    package that is missing, of a callback, or a wish to stop."""
    if isinstance(error, TrainingError):  # those of a disk or a callback come from another error
        return error.__cause__ is None or isinstance(error.__cause__, FloatingPointError)
    return isinstance(error, SpecError | TargetError | DataError | BaseError)


def prompts_of(trainer: Trainer) -> tuple[np.ndarray, int]:
    """Each evaluated row → the number of its prompt, and how many there are.

    Raises:
        DataError: nothing is evaluated.
    """
    if trainer.validation is None:
        raise DataError(
            "candidates are compared on rows that none of them trains on, and there are none. "
            "Give --valid F, or hold some out with --validation-fraction 0.2"
        )
    data, indices = trainer.validation
    keys = [data.prompt_key(int(index)) for index in indices]
    numbers = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64), len(numbers)


class _Leave(Callback):
    """Records a candidate's evaluations, and lets it leave at its rung."""

    def __init__(self, field: Field, number: int, until: int) -> None:
        self._field = field
        self._number = number
        self._until = until
        self.trainer: Trainer | None = None

    def on_start(self, run: RunInfo) -> None:
        self._field.begun(self._number, run)

    def on_step(self, metrics: StepMetrics) -> None:
        self._field.stepped(self._number, metrics)

    def on_eval(self, metrics: EvalMetrics) -> None:
        assert self.trainer is not None
        self._field.record(self._number, self.trainer, metrics)
        if self._until <= metrics.step < (self.trainer.settings.steps or 0):
            self.trainer.leave(f"step {metrics.step} is a rung of the search")
