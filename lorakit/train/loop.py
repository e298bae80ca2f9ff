"""The loop: forwards and backwards of the runs on one model, and their evaluations.

Runs go through the model in rounds, and in a round every run makes one optimizer step::

    windows = each job's next examples, its share of them where there are several processes
    forwards of the examples of all runs    # each example's loss / its own window's tokens
    for each run:
        sum over all processes              # of the gradient, where there are several
        loss and gradient finite?           # before anything moves
        run.step(…)                         # clip, optimizer, count, row

A run alone is a round of one. Several runs put their examples behind one another, run by run, into
forwards of a common number of tokens, and the routing tells which adapter each stretch uses. As no
stretch reaches another's loss or gradient, each run's step is that which it would make alone, up to
the rounding of the products. Between two rounds no run is in the middle of a batch: there runs
join, leave, and are saved.

Every run makes a step a round, whatever its batch: runs that are compared are at the same step,
each goes at the pace that its settings say, and what a round is made of depends on the runs alone,
so that a set of runs that was saved together goes on bit for bit.

Between two forwards the loop looks whether somebody asked to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import SpecError, TrainingError, collected
from lorakit.evaluate import LossResult, example_losses, mean_loss
from lorakit.evaluate.losses import Losses
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.task import Example, Examples, Kind, Stretch, Task
from lorakit.train.distributed import PeerLost, World
from lorakit.train.interrupt import StopRequest
from lorakit.train.job import Job, Window
from lorakit.train.mode import training_mode
from lorakit.train.randomness import seeded
from lorakit.train.room import (
    MARGIN,
    PeakMemory,
    available_bytes,
    give_back_memory,
    is_memory_error,
    num_tokens,
)
from lorakit.train.run import Run

#: tokens from which a measured forward tells more of its tokens than of what any forward needs
_TELLING_TOKENS = 64

#: a run enters untried where so many times what a token was found to need would fit, as its ranks
#: and targets may differ from those that were measured
_BEYOND_DOUBT = 4

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Somebody asked to stop; every run stands between two steps."""


class Share(NamedTuple):
    """One run's examples in a forward."""

    run: Run
    examples: Sequence[Example]
    divisor: float
    """What their summed loss is divided by: the weight of the run's window."""


class _Failed(Exception):
    """One run cannot go on."""

    def __init__(self, run: Run, error: Exception) -> None:
        self.run = run
        self.error = error


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
        self._model = task.model
        self._world = world
        self._stop = stop
        self._wanted = budget
        self._apart: dict[Run, str | None] = {}
        """Who takes part, and why its forwards are its own; ``None`` where they are not."""
        self._kin: dict[Run, str] = {}
        """Those that share forwards do so with their kin."""
        self._failed: dict[Run, Exception] = {}
        """Who cannot go on, until the round tells it."""
        self._go_through(task, kind)

    def _go_through(self, task: Task, kind: Kind) -> None:
        """Let forwards be those of a task, of which nothing is known yet."""
        self._task, self._kind = task, kind
        self._room = math.inf
        """Tokens of a shared forward that the memory has room for, once that was felt."""
        self._base_losses: list[tuple[Examples, tuple[int, ...], LossResult]] = []
        self._proven = 0
        """Tokens of the largest forward that went through."""
        self.bytes_per_token = 0.0
        """Of a forward and its backward, where it was measured."""
        self._longest = 0
        """Tokens of the longest example of those that were measured, in full."""

    # --- runs come and go ------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """Those that take part, in the order in which they came."""
        return list(self._apart)

    @property
    def layers(self) -> str | None:
        """How the layers ran, if the task tells."""
        return self._task.layers

    def enter(self, run: Run) -> None:
        """Let a run take part.

        Raises:
            TrainingError: the memory has no room for one of its examples.
            Stopped: somebody asked.
        """
        if run.task is not self._task:  # nobody is left to whom the other one belonged
            assert not self._apart
            self._go_through(run.task, run.kind)
        adapter = run.job.snapshot()
        self._apart[run] = self._task.why_apart(adapter)
        self._check_whole(run)
        self._kin[run] = self._task.kin(adapter)
        if len(self._apart) > 1:
            for one, reason in self._apart.items():
                if reason is not None and (one is run or len(self._apart) == 2):
                    self._note_apart(one, reason)
        try:
            if not run.job.done and not self._world.sharded:
                run.hold()
                self._try_largest(run)
            if run in self._failed:
                raise self._failed[run]
        except _Failed as failed:
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
        why = self._task.whole
        if why is None:
            return
        settings = run.job.settings
        problems = [
            text
            for is_so, text in (
                (len(self._apart) > 1, "several runs share the model; train them one by one"),
                (self._world.size > 1, "several processes share each batch; start one"),
                (settings.micro_batch is not None, "micro_batch would cut it; leave it out"),
            )
            if is_so
        ]
        if problems:
            self._apart.pop(run)
            raise SpecError(collected(f"A batch must be one forward, for {why}", problems))

    def leave(self, run: Run) -> None:
        """It takes part no more."""
        self._apart.pop(run, None)
        self._kin.pop(run, None)
        self._failed.pop(run, None)
        run.job.clear_gradient()

    def _note_apart(self, run: Run, reason: str) -> None:
        with self._failing_alone(run):
            run.note(f"its forwards are its own: {reason}")

    @contextlib.contextmanager
    def _failing_alone(self, run: Run) -> Iterator[None]:
        """What goes wrong inside ends this run with the round, and no other."""
        try:
            yield
        except Exception as error:
            self._failed[run] = error

    # --- a round ---------------------------------------------------------------------------

    def round(self) -> dict[Run, Exception]:
        """Every run makes a step.

        Returns:
            Those that cannot go on, each with its reason; the weights are as they were before it.

        Raises:
            Stopped: somebody asked; no run has moved.
        """
        started = time.perf_counter()
        adapted = [path for run in self._apart for path in run.adapted]
        with training_mode(self._model, adapted):
            windows, sums = self._together(self._accumulate)
        failed, self._failed = self._failed, {}
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

    def _finish_step(self, run: Run, window: Window, share: float, started: float) -> None:
        job = run.job
        loss = float(self._world.sum_(torch.tensor(share, dtype=torch.float64)))
        self._world.sum_(job.collect_gradient())
        norm = job.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise run.not_finite(window, loss, norm, partial(self._problem_of, run))
        run.step(window, loss, norm, started)

    def look_for_stop(self) -> None:
        """Between two forwards.

        Raises:
            Stopped: somebody asked.
        """
        # with a sharded base the others could not go on without this process
        if self._stop.received is not None and not self._world.sharded:
            raise Stopped

    def _together(self, work: Callable[[], T]) -> T:
        """What this process makes of its share; if one was asked to stop, all do.

        Raises:
            Stopped: somebody asked one of the processes.
            PeerLost: another process has ended.
        """
        made: list[T] = []
        with self._world.guarded(), contextlib.suppress(Stopped):
            made.append(work())
        wish = self._world.sharded and self._stop.received is not None
        if self._world.any(wish or not made):
            raise Stopped
        return made[0]

    def _accumulate(self) -> tuple[dict[Run, Window], dict[Run, float]]:
        """Gradients of the windows' mean losses, as far as this process's share adds to them: the
        windows as they were cut in the end, and that part of each summed loss.

        Where the memory has no room for a forward, or a run fails in one, the round is begun again
        with smaller forwards or without it.
        """
        while True:
            windows: dict[Run, Window] = {}
            for run in [run for run in self._apart if run not in self._failed]:
                run.job.clear_gradient()
                with self._failing_alone(run):
                    windows[run] = run.job.window()
            losses = dict.fromkeys(windows, 0.0)
            try:
                for shares in self._forwards(windows):
                    self.look_for_stop()
                    sums = self._attempted(shares)
                    if sums is None:
                        break
                    for share, summed in zip(shares, sums, strict=True):
                        losses[share.run] += summed
                else:
                    for run, window in windows.items():
                        for _ in range(window.idle):  # with a weight of zero
                            shortest = min(window.examples, key=lambda e: e.size)
                            self._backward([Share(run, [shortest], math.inf)])
                    return windows, losses
            except _Failed as failure:
                self._failed[failure.run] = failure.error

    def _forwards(self, windows: Mapping[Run, Window]) -> Iterator[list[Share]]:
        """The windows' examples as forwards: those of a run stand together, in their order."""
        queues: dict[Run, list[Example]] = {}
        for run, window in windows.items():
            if self._task.whole is not None:
                yield [Share(run, window.examples, window.num_supervised)]
            elif len(windows) == 1 or self._apart[run] is not None:
                for part in window.parts:
                    yield [Share(run, part, window.num_supervised)]
            else:
                queues[run] = [example for part in window.parts for example in part][::-1]
        for kin in sorted({self._kin[run] for run in queues}):
            family = {run: queue for run, queue in queues.items() if self._kin[run] == kin}
            yield from self._filled(family, windows)

    def _filled(
        self, queues: dict[Run, list[Example]], windows: Mapping[Run, Window]
    ) -> Iterator[list[Share]]:
        """Forwards of examples, which are taken off the ends of their queues."""
        budget = self._budget(queues)
        while queues:
            shares: list[Share] = []
            room = budget
            for run, queue in list(queues.items()):
                taken = _taken(queue, run.job, room, first=not shares)
                if taken:
                    room -= num_tokens(taken)
                    shares.append(Share(run, taken, windows[run].num_supervised))
                if not queue:
                    del queues[run]
            yield shares

    def _budget(self, runs: Mapping[Run, Any]) -> float:
        most = max((run.job.most_tokens or math.inf for run in runs), default=math.inf)
        return min(self._wanted or most, self._room)

    @property
    def budget(self) -> float:
        """Tokens of a forward that all runs share."""
        return self._budget(self._apart)

    def num_free(self) -> float:
        """Tokens that a shared forward has room for, beside the usual batches of the runs."""
        usual = sum(run.job.usual_tokens for run in self._apart)
        return self._budget(self._apart) - usual

    # --- one forward -----------------------------------------------------------------------

    def _attempted(self, shares: Sequence[Share]) -> list[float] | None:
        """:meth:`_with_room`; where a shared forward fails, each share is tried alone, and the
        round is to be begun again.

        Raises:
            _Failed: one run's share fails.
        """
        try:
            return self._with_room(shares)
        except (_Failed, PeerLost):
            raise
        except Exception as error:
            if len(shares) == 1:
                raise _Failed(shares[0].run, error) from error
            logger.debug("a shared forward failed", exc_info=True)
            reason = f"a forward shared with others failed ({type(error).__name__}: {error})"
        for share in shares:
            share.run.job.clear_gradient()
        for share in shares:
            self._attempted([share])  # tells which of them it is
        for share in shares:
            self._apart[share.run] = reason
            self._note_apart(share.run, reason)
        return None

    def _with_room(self, shares: Sequence[Share], *, cut: bool = True) -> list[float] | None:
        """:meth:`_backward`; ``None`` if it does not fit and forwards are to be smaller from now
        on.

        Args:
            cut: make forwards smaller then.

        Raises:
            _Failed: it is one example.
        """
        try:
            return self._backward(shares)
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise  # sharded, the others are in the middle of this forward
            message = str(error).strip().split("\n")[0]
        # out here nothing refers any more to what the forward had made
        for share in shares:
            share.run.job.clear_gradient()
        give_back_memory()
        if cut:
            self._cut_smaller(shares, _tokens(shares) // 2, f"the memory was too small ({message})")
        return None

    def _cut_smaller(self, shares: Sequence[Share], tokens: int, why: str) -> None:
        """Let no forward have more tokens than these, or tell that one example is too long.

        Raises:
            _Failed: it is one example; the state before this step is saved.
        """
        if len(shares) > 1:
            before, self._room = self._budget(self._apart), max(1, tokens)
            for share in shares:
                with self._failing_alone(share.run):
                    self._say_cut(share.run, shares, int(self._room), before, why)
            return
        run, part, _ = shares[0]
        job = run.job
        if self._task.whole is not None:
            run.save()
            told = f"{why}, and the batch must be one forward, for {self._task.whole}"
            raise _Failed(run, TrainingError(f"Stopped: {told}. Lower --batch-size"))
        if len(part) == 1:
            run.save()
            told = f"Stopped in step {job.step + 1}: {_no_room(self._kind, job, part[0], why)}"
            raise _Failed(run, TrainingError(told))
        before, job.most_tokens = job.most_tokens or math.inf, max(1, tokens)
        self._say_cut(run, shares, job.most_tokens, before, why)

    def _say_cut(
        self, run: Run, shares: Sequence[Share], now: int, before: float, why: str
    ) -> None:
        step = run.job.step + 1
        text = (
            f"{why}, for a forward of {_tokens(shares)} tokens; from step {step} on it "
            f"has at most {now} (before: {before:g}), so that a batch goes through in "
            "more parts, with the same result"
        )
        run.note(text, step=step, micro_batch_tokens=now)
        if not self._world.first:
            logger.warning("process %d: %s", self._world.rank, text)

    def _backward(self, shares: Sequence[Share]) -> list[float]:
        """Add the gradient of each share's losses / its divisor; gives the sums, float64."""
        with torch.enable_grad():
            sums = self._task.losses([share.run.job.stretch(share.examples) for share in shares])
            divisors = [share.divisor for share in shares]
            each = sums / torch.tensor(divisors, dtype=sums.dtype, device=sums.device)
            each.sum().backward()  # type: ignore[no-untyped-call]
        self._proven = max(self._proven, _tokens(shares))
        found: list[float] = sums.detach().double().tolist()
        return found

    def _problem_of(self, run: Run, example: Example) -> str | None:
        """What is not finite about an example alone."""
        with training_mode(self._model, run.adapted):
            run.job.clear_gradient()
            (loss,) = self._backward([Share(run, [example], 1)])
        norm = run.job.gradient_norm()
        if not math.isfinite(loss):
            return f"loss is {loss}"
        return None if math.isfinite(norm) else f"gradient's norm is {norm}"

    # --- whether the largest forward fits --------------------------------------------------

    def _largest(self, run: Run) -> list[Share]:
        """The largest forward with this run in it."""
        own = run.job.largest_part()
        if self._task.whole is not None:
            return [Share(run, run.job.window().examples, 1)]
        shares, room = [Share(run, own, 1)], self._budget(self._apart) - num_tokens(own)
        for other in self._apart if self._apart[run] is None else ():
            together = self._kin[other] == self._kin[run]
            if other is not run and together and self._apart[other] is None and room > 0:
                try:
                    queue = list(other.job.largest_part())[::-1]
                except Exception:
                    logger.debug("an example cannot be had", exc_info=True)  # its round will tell
                    continue
                taken = _taken(queue, other.job, room, first=False)
                room -= num_tokens(taken)
                shares += [Share(other, taken, 1)] if taken else []
        return shares

    def _try_largest(self, run: Run) -> None:
        """Find out now whether the largest forward fits; nothing is changed by it."""
        if self._surely_fits(run):
            return
        adapted = [path for one in self._apart for path in one.adapted]
        shares: list[Share] = []
        held = self._held_back(run)
        with training_mode(self._model, adapted), seeded(run.job.settings.seed):
            try:
                while _tokens(shares := self._largest(run)) > self._proven:
                    if self._task.device.type == "cpu":
                        self._compare_with_free(shares)
                        break
                    if self._with_room(shares) is not None:
                        break
            except _Failed:
                raise
            except Exception:
                if len(shares) <= 1:
                    raise
                logger.debug("a shared forward failed", exc_info=True)  # its round will tell why
            finally:
                del held
                for one in self._apart:
                    one.job.clear_gradient()
                give_back_memory(collect=False)

    def _surely_fits(self, run: Run) -> bool:
        """Whether it does by far, on a CPU, after what was measured of an earlier run."""
        job = run.job
        if self._task.device.type != "cpu" or not self.bytes_per_token:
            return False
        if self._task.whole is not None or job.longest > self._longest:
            return False  # what a token needs may depend on how many there are, or on the text
        tokens = max(self._budget(self._apart), job.most_tokens or math.inf)
        free = self._free(run)
        return free is not None and _BEYOND_DOUBT * self.bytes_per_token * tokens <= MARGIN * free

    def _free(self, run: Run) -> int | None:
        """Bytes that this process may take beside the optimizer of a run; ``None``: not known."""
        free = available_bytes()
        if free is None:
            return None
        if self._world.size > 1:  # those of this machine share it
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", self._world.size))
        return max(0, free - run.job.bytes_to_come)

    def _held_back(self, run: Run) -> Tensor | None:
        """Memory that the optimizer takes from its first step on, held during the trial.

        Raises:
            _Failed: there is not as much.
        """
        size = run.job.bytes_to_come
        if self._task.device.type == "cpu":  # where it is subtracted from what is free
            return None
        try:
            return torch.empty(size, dtype=torch.uint8, device=self._task.device)
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            give_back_memory()
            told = (
                f"Not begun: the memory has no room for the optimizer's averages "
                f"({size / 2**20:,.0f} MB). What would help: --optimizer adamw8bit, or fewer "
                "trained parameters"
            )
            raise _Failed(run, TrainingError(told)) from error

    def _compare_with_free(self, shares: Sequence[Share]) -> None:
        """On a CPU the kernel ends a process that takes too much, so the need is told beforehand.

        It is measured on a shortened copy of the largest forward; if that leaves a doubt, on one
        twice as long too, whose difference tells what each token needs.
        """
        free = self._free(shares[0].run)
        tokens = _tokens(shares)
        small = self._smaller(shares, 1 / 8)
        needed = self._measured(small)
        if needed is not None and _tokens(small) >= _TELLING_TOKENS:
            self.bytes_per_token = max(self.bytes_per_token, needed / _tokens(small))
            self._longest = max(self._longest, *(share.run.job.longest for share in shares))
        if free is None or needed is None or needed * tokens <= MARGIN * free * _tokens(small):
            return
        larger, constant = self._smaller(shares, 1 / 4), 0.0
        each = needed / _tokens(small)
        if _tokens(larger) > _tokens(small) and 2 * needed < MARGIN * free:
            more = (self._measured(larger) or 0) - needed
            each = max(more, 0) / (_tokens(larger) - _tokens(small))
            constant = max(0.0, needed - each * _tokens(small))
        fit = int((MARGIN * free - constant) / each) if each else tokens
        if fit >= tokens:
            return
        fit = max(fit, 0)
        why = f"the memory that is free ({free / 2**20:,.0f} MB) has room for about {fit} tokens"
        run, part, divisor = shares[0]
        longest = max(part, key=lambda example: example.size)
        if longest.size > fit:
            shares = [Share(run, [longest], divisor)]
        self._cut_smaller(shares, fit, why)

    def _smaller(self, shares: Sequence[Share], part: float) -> list[Share]:
        """Shares that need about as much memory for each token."""
        return [
            share._replace(examples=self._task.smaller(share.examples, part)) for share in shares
        ]

    def _measured(self, shares: Sequence[Share]) -> int | None:
        """Bytes that a forward and its backward need at their peak; ``None``: not known."""
        proven = self._proven
        with PeakMemory() as memory:
            if self._with_room(shares, cut=False) is None:
                return None  # an allocator refuses, which the first step meets and handles
        self._proven = proven
        return memory.grown

    # --- evaluations -----------------------------------------------------------------------

    def evaluate(self, run: Run) -> None:
        """Evaluate one run on its validation part.

        Raises:
            Stopped: somebody asked.
            LorakitError: as ``run.evaluated``; or its longest example does not fit.
        """
        job = run.job
        run.hold()
        started = time.perf_counter()
        try:
            if job.step == 0 and not run.continued:
                result = base = self._base_loss(run)
            else:
                result = base = self._loss_of(run, job.trained.name)
                if job.step == 0:
                    base = self._loss_of(run, None)
        except _Failed as failed:
            raise failed.error from None
        run.evaluated(result, base.loss, time.perf_counter() - started)

    def _base_loss(self, run: Run) -> LossResult:
        """The loss of a run that begins as the base; once for all with one validation part."""
        assert run.validation is not None
        data, indices = run.validation
        for known, rows, result in self._base_losses:
            if known is data and rows == tuple(indices):
                return result
        result = self._loss_of(run, run.job.trained.name)
        self._base_losses.append((data, tuple(indices), result))
        return result

    def _loss_of(self, run: Run, adapter: str | None) -> LossResult:
        """The validation loss. Each process takes a share of the examples, unless all are
        needed for every forward."""
        assert run.validation is not None
        data, indices = run.validation
        world = self._world
        mine = slice(None) if world.sharded else slice(world.rank, None, world.size)
        # a process without a row of its own makes the first one's forward all the same, for the
        # form of its outputs; what it finds has no place below
        rows = indices[mine] if len(indices[mine]) else indices[:1]

        def losses() -> Losses:
            while True:
                found = self._losses_with_room(run, adapter, data, rows)
                if found is not None:
                    return found

        both = np.zeros((2, len(indices)))
        found = self._together(losses)
        both[:, mine] = found.sums, found.counts
        outputs = found.outputs
        if not world.sharded:
            world.sum_(torch.from_numpy(both))
            outputs = self._outputs_of_all(outputs, mine, len(indices))
        result = mean_loss(Losses(both[0], both[1].astype(np.int64), outputs))
        return dataclasses.replace(
            result, metrics=self._kind.metrics(result.loss, data, indices, outputs)
        )

    def _outputs_of_all(
        self, outputs: np.ndarray | None, mine: slice, count: int
    ) -> np.ndarray | None:
        """What all processes found, each for its own examples."""
        if outputs is None or self._world.size == 1:
            return outputs
        whole = np.zeros((count, *outputs.shape[1:]))
        whole[mine] = outputs
        self._world.sum_(torch.from_numpy(whole))
        return whole

    def _losses_with_room(
        self, run: Run, adapter: str | None, data: Examples, indices: Sequence[int]
    ) -> Losses | None:
        """Each example's loss; ``None`` if it does not fit and forwards are smaller from now on.

        Raises:
            _Failed: the longest example alone does not fit.
        """
        job = run.job
        try:
            return example_losses(
                self._model,
                self._task.handle,
                adapter,
                data,
                indices,
                token_budget=job.most_tokens,
                task=self._task,
                on_batch=lambda *_: self.look_for_stop(),
            )
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise
            message = str(error).strip().split("\n")[0]
        give_back_memory()
        examples = sorted((data[i] for i in indices), key=lambda e: e.size, reverse=True)
        alone = examples[0].size >= (job.most_tokens or math.inf)
        part = examples[:1] if alone else examples
        tokens = min(num_tokens(part), job.most_tokens or num_tokens(part)) // 2
        why = f"the memory was too small in an evaluation ({message})"
        self._cut_smaller([Share(run, part, 1)], tokens, why)
        return None


def _tokens(shares: Sequence[Share]) -> int:
    return sum(num_tokens(share.examples) for share in shares)


def _taken(queue: list[Example], job: Job, room: float, *, first: bool) -> list[Example]:
    """The next examples of a run that fit a forward, taken off the end of ``queue``.

    Args:
        room: tokens that are left in the forward.
        first: whether it is empty, so that one longer example goes through alone.
    """
    most, tokens = job.settings.micro_batch or math.inf, 0
    room = min(room, job.most_tokens or math.inf)
    taken: list[Example] = []
    while queue and len(taken) < most:
        length = queue[-1].size
        if tokens + length > room and (taken or not first):
            break
        taken.append(queue.pop())
        tokens += length
    return taken


def check_first_forward(task: Task, job: Job, kind: Kind) -> None:
    """Run one example, so that what cannot work is known before anything is written.

    Raises:
        TargetError: adapted modules that are never called.
        BaseError: a model that computes no loss of this task.
        TrainingError: the memory has no room for it.
    """
    example = job.window().examples[0]
    try:
        with training_mode(task.model, []), torch.no_grad():
            task.losses([Stretch([example], job.trained.name)])
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        told = _no_room(kind, job, example, f"the memory was too small ({error})")
        raise TrainingError(f"Not begun: {told}") from error


def _no_room(kind: Kind, job: Job, example: Example, why: str) -> str:
    return (
        f"{why}, and this example does not fit even alone: {job.where(example)}, "
        f"{example.size} tokens. What would help: {kind.memory_advice}."
    )
