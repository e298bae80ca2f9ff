"""``Run``: one job with its folder. What is written and told of it, alone or among others.

A run makes no forwards and does not know who else is trained: ``loop`` makes them, for one run or
for several at once, and hands over losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import TrainingError, collected
from lorakit.evaluate import LossResult
from lorakit.tasks.task import Examples, Kind, Task
from lorakit.train.callbacks import Callback, EvalMetrics, StepMetrics
from lorakit.train.checkpoint import (
    Checkpoint,
    forget_after,
    forget_bests,
    read_best,
    write_best,
    write_checkpoint,
)
from lorakit.train.distributed import World
from lorakit.train.folder import MetricsFile, RunFolder
from lorakit.train.job import Job, Window
from lorakit.train.memory import peak_vram_mb, resident_mb
from lorakit.train.origin import check_settings
from lorakit.train.randomness import random_tensors, set_random_tensors

#: seconds between two checkpoints where the steps between them are not given …
CHECKPOINT_SECONDS = 60.0
#: … and the share of the time that writing them may take
CHECKPOINT_SHARE = 0.01


@dataclass(frozen=True)
class Moment:
    """A moment at which several runs are saved; from there they go on together bit for bit."""

    name: str
    members: tuple[str, ...]
    """Names of their folders, in the order in which they share forwards."""


class Run:
    """One job, its folder, and those who are told.

    Args:
        task, kind: what its forwards go through; all runs on a model share them.
        continued: whether the adapter was there before the run, and so is not the base.
        validation: data to evaluate on, and which of it; ``None`` for none.
        events: who is told.
        folder, metrics: where rows and checkpoints go; no metrics in a process that writes none.
        keep: saves the job's adapter; called at each new best.
        decided: the settings that a checkpoint belongs to.
        hold: makes random numbers this run's own.
        world: the processes that train together.
    """

    def __init__(
        self,
        job: Job,
        *,
        task: Task,
        kind: Kind,
        world: World,
        continued: bool,
        validation: tuple[Examples, Sequence[int]] | None,
        events: Callback,
        folder: RunFolder,
        metrics: MetricsFile | None,
        keep: Callable[[Job], None],
        decided: Mapping[str, Any],
        hold: Callable[[], None],
    ) -> None:
        self.job = job
        self.task = task
        self.kind = kind
        self.continued = continued
        self.validation = validation
        self.events = events
        self.folder = folder
        self.adapted = job.trained.adapted
        """Paths of the modules that are in training mode in its forwards."""
        self._world = world
        self._metrics = metrics
        self._keep = keep
        self._decided = decided
        self.hold = hold
        self._seconds_before = 0.0
        self._began = time.perf_counter()
        self._saved_step: int | None = None
        self._saved_at = self._began
        self._writing_seconds = 0.0

    # --- state -----------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, that before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; those of later steps are deleted.

        Raises:
            InputError: it was made with other settings.
            TrainingError: the best weights that it names are missing or damaged.
        """
        check_settings(checkpoint.state["settings"], self._decided)
        job = {
            name.removeprefix("job."): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith("job.")
        }
        self.job.load(job, checkpoint.state["job"])
        folder = self.folder.checkpoints
        if self._world.first and self.job.best is not None:
            read_best(folder, self.job.best.step)
        if self._world.first:
            forget_after(folder, checkpoint.step)
        self.hold()
        set_random_tensors(checkpoint.tensors)
        self._seconds_before = float(checkpoint.state["seconds"])
        self._saved_step = checkpoint.step

    def save(self, moment: Moment | None = None) -> Path | None:
        """Write a checkpoint of this moment; ``None`` if the last one is of this step, or if it
        is another process that writes."""
        if self._metrics is None or self._saved_step == self.job.step:
            return None
        started = time.perf_counter()
        self._metrics.sync()
        self.hold()
        state: dict[str, Any] = {
            "job": self.job.state(),
            "metrics_length": self._metrics.length,
            "seconds": self.seconds,
            "settings": self._decided,
        }
        if moment is not None:
            state["together"] = {"moment": moment.name, "members": list(moment.members)}
        tensors = {f"job.{name}": tensor for name, tensor in self.job.tensors().items()}
        checkpoint = Checkpoint(self.job.step, {**tensors, **random_tensors()}, state)
        folder = self.folder.checkpoints
        path = write_checkpoint(folder, checkpoint, keep=self.job.settings.keep_checkpoints or 1)
        forget_bests(folder, None if self.job.best is None else self.job.best.step)
        self._saved_step = self.job.step
        self._saved_at = time.perf_counter()
        self._writing_seconds = self._saved_at - started
        self.events.on_checkpoint(path)
        return path

    def checkpoint_due(self, sharers: int = 1) -> bool:
        """Whether to save now, after a step.

        Args:
            sharers: runs that are saved together, and share the time that writing may take.
        """
        if self._saved_step == self.job.step:
            return False
        every = self.job.settings.checkpoint_every
        if every is not None:
            return self.job.step % every == 0
        pause = max(CHECKPOINT_SECONDS, sharers * self._writing_seconds / CHECKPOINT_SHARE)
        return time.perf_counter() - self._saved_at >= pause

    # --- what is told ----------------------------------------------------------------------

    def note(self, text: str, **facts: Any) -> None:
        """Tell, and keep a row."""
        self.row({"kind": "note", "text": text, **facts})
        self.events.on_note(text)

    def row(self, row: Mapping[str, Any]) -> None:
        """Keep a row of the metrics."""
        if self._metrics is not None:
            self._metrics.append(row)

    # --- a step ----------------------------------------------------------------------------

    def step(self, window: Window, loss: float, norm: float, started: float) -> None:
        """Move the weights, and tell.

        Args:
            loss, norm: of the window and of its gradient, which the job holds; both finite.
            started: when the step began, by ``time.perf_counter``.

        Raises:
            TrainingError: weights would not be finite; the state before the step is saved.
        """
        job = self.job
        try:
            rate = job.take_step(loss, norm)
        except FloatingPointError as error:
            job.clear_gradient()
            self.save()
            raise TrainingError(
                f"Stopped in step {window.step + 1}: {error}, so it was not made. The state after "
                f"step {job.step} is saved in {self.folder.checkpoints}. Start a new run with a "
                "lower --lr."
            ) from error
        seconds = time.perf_counter() - started
        metrics = StepMetrics(
            step=job.step,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens=window.num_tokens,
            supervised=window.num_supervised,
            seconds=seconds,
            tokens_per_second=window.num_tokens / seconds,
            rss_mb=resident_mb(),
            vram_mb=peak_vram_mb(),
        )
        self.row(metrics.to_row())
        self.events.on_step(metrics)

    def not_finite(
        self, window: Window, loss: float, norm: float, problem_of: Callable[[Any], str | None]
    ) -> TrainingError:
        """Save the state before this step, find the examples, and say what happened.

        Args:
            problem_of: what is wrong with an example alone, ``None`` if nothing.
        """
        job = self.job
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what = f"the gradient's norm is {norm}"
        job.clear_gradient()
        self.save()
        rows = [
            f"{job.where(example)}: its {problem}"
            for example in window.examples
            if (problem := problem_of(example)) is not None
        ]
        job.clear_gradient()
        stopped = f"Stopped in step {window.step + 1}, before the weights moved: {what}"
        found = f"{stopped}, though that of each of its rows alone is finite."
        if rows:
            found = collected(f"{stopped}. The rows behind it", rows)
        return TrainingError(
            f"{found}\nThe state after step {job.step} is saved in {self.folder.checkpoints}. "
            "Look at these rows, lower --lr, or use --dtype float32; then start a new run."
        )

    # --- evaluations -----------------------------------------------------------------------

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate now: before the first step, or where a stop cut it off."""
        return self.validation is not None and self.job.evaluation_due()

    def evaluated(self, result: LossResult, base_loss: float, seconds: float) -> None:
        """Take note of a validation loss, tell, and keep the adapter if it is the best.

        Args:
            base_loss: that of the base, before the first step.
            seconds: that the evaluation took.
        """
        job = self.job
        if job.step == 0:
            job.base_loss = base_loss
        others = dict(result.metrics)
        metrics = EvalMetrics(
            step=job.step,
            loss=result.loss,
            perplexity=others.pop("perplexity", None),
            best=job.observe(result.loss),
            seconds=seconds,
            examples=(result.sums, result.counts),
            metrics=others,
        )
        self.row(metrics.to_row())
        if not math.isfinite(result.loss):
            self._say_not_finite(result)
        if metrics.best:
            if self._metrics is not None:
                write_best(self.folder.checkpoints, job.step, job.flat)
                forget_bests(self.folder.checkpoints, job.step)
            if job.step:  # the first one changes nothing yet
                self._keep(job)
        self.events.on_eval(metrics)

    def _say_not_finite(self, result: LossResult) -> None:
        assert self.validation is not None
        data, indices = self.validation
        rows = [data.where(indices[place]) for place in result.not_finite]
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        self.note(
            f"the validation loss after step {self.job.step} is {result.loss}, so it cannot be "
            f"the best; the rows behind it: {', '.join(rows[:3])}{more}"
        )

    def restore_best(self) -> None:
        """Go back to the weights of the best evaluation; without one the present ones stay.

        Raises:
            TrainingError: their file is missing or damaged.
        """
        job = self.job
        if job.best is None:
            return
        step = job.best.step
        job.restore(read_best(self.folder.checkpoints, step) if self._world.first else None, step)
