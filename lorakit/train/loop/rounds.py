"""Rounds: in each, every run that takes part makes an optimizer step."""

from __future__ import annotations

import math
import time
from functools import partial

import torch

from lorakit.errors import SpecError, collected
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.task import Example, Kind, Task
from lorakit.train.distributed import PeerLost, World
from lorakit.train.interrupt import StopRequest
from lorakit.train.job import Window
from lorakit.train.loop.forwards import Forwards, Share
from lorakit.train.loop.members import Failed, Members
from lorakit.train.loop.stopping import Stopping
from lorakit.train.loop.trial import Trial
from lorakit.train.loop.validation import Validation
from lorakit.train.mode import training_mode
from lorakit.train.run import Run


class Loop:
    """Runs on one model.

    Args:
        task: the model, with an adapter attached for each run. A run that enters while nobody
            takes part may bring another, of the same model.
        kind: of the task; names the metrics of an evaluation.
        stop: asked between two forwards.
        world: the processes that train together; where there are several, there is one run.
        budget: tokens of a forward of several runs; by default the largest
            ``micro_batch_tokens`` of those in it.
    """

    def __init__(
        self,
        task: Task,
        *,
        world: World,
        stop: StopRequest,
        budget: int | None = None,
        kind: Kind = CAUSAL,
    ) -> None:
        self._world = world
        self._wanted = budget
        self._stopping = Stopping(stop, world)
        self._members = Members()
        self._go_through(task, kind)

    def _go_through(self, task: Task, kind: Kind) -> None:
        """Let forwards be those of a task, of which nothing is known yet."""
        self._forwards = Forwards(task, kind, self._members, self._world, self._wanted)
        self._trial = Trial(self._forwards, self._members, self._world)
        self._validation = Validation(self._forwards, self._stopping, self._world)

    @property
    def runs(self) -> list[Run]:
        """Those that take part, in the order in which they came."""
        return list(self._members)

    @property
    def layers(self) -> str | None:
        """How the layers ran, if the task tells."""
        return self._forwards.task.layers

    @property
    def budget(self) -> float:
        """Tokens of a forward that all runs share."""
        return self._forwards.budget(self._members)

    @property
    def bytes_per_token(self) -> float:
        """Of a forward and its backward; 0 where it was not measured."""
        return self._trial.bytes_per_token

    def num_free(self) -> float:
        """Tokens that a shared forward has room for, beside the usual batches of the runs."""
        return self.budget - sum(run.job.usual_tokens for run in self._members)

    # --- runs come and go ------------------------------------------------------------------

    def enter(self, run: Run) -> None:
        """Let a run take part.

        Raises:
            SpecError: it needs its batch in one forward, which this loop would cut.
            TrainingError: the memory has no room for one of its examples.
            Stopped: somebody asked.
        """
        if run.task is not self._forwards.task:  # nobody is left to whom the other one belonged
            assert not len(self._members)
            self._go_through(run.task, run.kind)
        self._check_whole(run)
        self._members.add(run, self._forwards.task)
        try:
            if not run.job.done and not self._world.sharded:
                run.hold()
                self._trial.make(run)
            error = self._members.error_of(run)
            if error is not None:
                raise error
        except Failed as failed:
            self.leave(run)
            raise failed.error from None
        except BaseException:
            self.leave(run)
            raise

    def _check_whole(self, run: Run) -> None:
        """Refuse what would cut a batch that must be one forward.

        Raises:
            SpecError: another run, another process, or a limit on forwards.
        """
        why = self._forwards.task.whole
        if why is None:
            return
        problems = [
            text
            for is_so, text in (
                (len(self._members) > 0, "several runs share the model; train them one by one"),
                (self._world.size > 1, "several processes share each batch; start one"),
                (
                    run.job.settings.micro_batch is not None,
                    "micro_batch would cut it; leave it out",
                ),
            )
            if is_so
        ]
        if problems:
            raise SpecError(collected(f"A batch must be one forward, for {why}", problems))

    def leave(self, run: Run) -> None:
        """It takes part no more."""
        self._members.remove(run)
        run.job.clear_gradient()

    # --- what they do ----------------------------------------------------------------------

    def evaluate(self, run: Run) -> None:
        """Evaluate one run on its validation part.

        Raises:
            Stopped: somebody asked.
            LorakitError: as ``run.evaluated``; or its longest example does not fit.
        """
        self._validation.evaluate(run)

    def round(self) -> dict[Run, Exception]:
        """Every run makes a step.

        Returns:
            Those that cannot go on, each with its reason; the weights are as they were before it.

        Raises:
            Stopped: somebody asked; no run has moved.
        """
        started = time.perf_counter()
        with training_mode(self._forwards.task.model, self._members.adapted):
            windows, sums = self._stopping.together(self._accumulate)
        failed = self._members.take_failed()
        for run, window in windows.items():
            try:
                self._finish_step(run, window, sums[run] / window.num_supervised, started)
            except PeerLost as error:
                run.job.clear_gradient()
                run.save()
                failed[run] = error
            except Exception as error:
                run.job.clear_gradient()
                failed[run] = error
        return failed

    def _accumulate(self) -> tuple[dict[Run, Window], dict[Run, float]]:
        """Gradients of the windows' mean losses, as far as this process's share adds to them: the
        windows as they were cut in the end, and that part of each summed loss.

        Where the memory has no room for a forward, or a run fails in one, the round is begun again
        with smaller forwards or without it.
        """
        while True:
            windows: dict[Run, Window] = {}
            for run in self._members.going:
                run.job.clear_gradient()
                with self._members.failing_alone(run):
                    windows[run] = run.job.window()
            losses = dict.fromkeys(windows, 0.0)
            try:
                for shares in self._forwards.of(windows):
                    self._stopping.look()
                    sums = self._forwards.attempted(shares)
                    if sums is None:
                        break
                    for share, summed in zip(shares, sums, strict=True):
                        losses[share.run] += summed
                else:
                    for run, window in windows.items():
                        for _ in range(window.idle):  # with a weight of zero
                            shortest = min(window.examples, key=lambda e: e.size)
                            self._forwards.backward([Share(run, [shortest], math.inf)])
                    return windows, losses
            except Failed as failure:
                self._members.fail(failure.run, failure.error)

    def _finish_step(self, run: Run, window: Window, share: float, started: float) -> None:
        job = run.job
        loss = float(self._world.sum_(torch.tensor(share, dtype=torch.float64)))
        self._world.sum_(job.collect_gradient())
        norm = job.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise run.not_finite(window, loss, norm, partial(self._problem_of, run))
        run.step(window, loss, norm, started)

    def _problem_of(self, run: Run, example: Example) -> str | None:
        """What is not finite about an example alone."""
        with training_mode(self._forwards.task.model, run.adapted):
            run.job.clear_gradient()
            (loss,) = self._forwards.backward([Share(run, [example], 1)])
        norm = run.job.gradient_norm()
        if not math.isfinite(loss):
            return f"loss is {loss}"
        return None if math.isfinite(norm) else f"gradient's norm is {norm}"
