"""Forwards: what examples they are of, and no larger than the memory has room for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from lorakit.errors import SpecError, TrainingError
from lorakit.tasks.task import Contrasting, Example, Kind, Stretch, Task
from lorakit.train.distributed import PeerLost, World
from lorakit.train.job import Job, Window
from lorakit.train.loop.members import Failed, Members
from lorakit.train.mode import training_mode
from lorakit.train.room import give_back_memory, is_memory_error, num_tokens
from lorakit.train.run import Run

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """One run's examples in a forward."""

    run: Run
    examples: Sequence[Example]
    divisor: float
    """What their summed loss is divided by: the weight of the run's window."""


class Forwards:
    """Forwards and backwards of one task.

    Args:
        task: the model, with an adapter attached for each run.
        kind: of the task; says what saves memory.
        budget: tokens of a forward of several runs; by default the largest
            ``micro_batch_tokens`` of those in it.
    """

    def __init__(
        self, task: Task, kind: Kind, members: Members, world: World, budget: int | None
    ) -> None:
        self.task = task
        self.kind = kind
        self._members = members
        self._world = world
        self._wanted = budget
        self._room = math.inf
        """Tokens of a shared forward that the memory has room for, once that was felt."""
        self.proven = 0
        """Tokens of the largest forward that went through."""

    # --- what they are of ------------------------------------------------------------------

    def of(self, windows: Mapping[Run, Window]) -> Iterator[list[Share]]:
        """The windows' examples as forwards: those of a run stand together, in their order."""
        queues: dict[Run, list[Example]] = {}
        for run, window in windows.items():
            if self.task.whole is not None:
                yield [Share(run, window.examples, window.num_supervised)]
            elif len(windows) == 1 or not self._members.shares(run):
                for part in window.parts:
                    yield [Share(run, part, window.num_supervised)]
            else:
                queues[run] = [example for part in window.parts for example in part][::-1]
        for kin in sorted({self._members.kin(run) for run in queues}):
            family = {r: queue for r, queue in queues.items() if self._members.kin(r) == kin}
            yield from self._filled(family, windows)

    def _filled(
        self, queues: dict[Run, list[Example]], windows: Mapping[Run, Window]
    ) -> Iterator[list[Share]]:
        """Forwards of examples, which are taken off the ends of their queues."""
        budget = self.budget(queues)
        while queues:
            shares: list[Share] = []
            room = budget
            for run, queue in list(queues.items()):
                examples = taken(queue, run.job, room, first=not shares)
                if examples:
                    room -= num_tokens(examples)
                    shares.append(Share(run, examples, windows[run].num_supervised))
                if not queue:
                    del queues[run]
            yield shares

    def budget(self, runs: Iterable[Run]) -> float:
        """Tokens of a forward that these share."""
        most = max((run.job.most_tokens or math.inf for run in runs), default=math.inf)
        return min(self._wanted or most, self._room)

    # --- one of them -----------------------------------------------------------------------

    def attempted(self, shares: Sequence[Share]) -> list[float] | None:
        """:meth:`with_room`; where a shared forward fails, each share is tried alone, and the
        round is to be begun again.

        Raises:
            Failed: one run's share fails.
        """
        try:
            return self.with_room(shares)
        except (Failed, PeerLost):
            raise
        except Exception as error:
            if len(shares) == 1:
                raise Failed(shares[0].run, error) from error
            logger.debug("a shared forward failed", exc_info=True)
            reason = f"a forward shared with others failed ({type(error).__name__}: {error})"
        for share in shares:
            share.run.job.clear_gradient()
        for share in shares:
            self.attempted([share])  # tells which of them it is
        for share in shares:
            self._members.keep_apart(share.run, reason)
        return None

    def with_room(self, shares: Sequence[Share], *, cut: bool = True) -> list[float] | None:
        """:meth:`backward`; ``None`` if it does not fit and forwards are to be smaller from now
        on.

        Args:
            cut: make forwards smaller then.

        Raises:
            Failed: it is one example.
        """
        try:
            return self.backward(shares)
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise  # sharded, the others are in the middle of this forward
            message = str(error).strip().split("\n")[0]
        # out here nothing refers any more to what the forward had made
        for share in shares:
            share.run.job.clear_gradient()
        give_back_memory()
        if cut:
            self.cut_smaller(
                shares, tokens_of(shares) // 2, f"the memory was too small ({message})"
            )
        return None

    def backward(self, shares: Sequence[Share]) -> list[float]:
        """Add the gradient of each share's losses / its divisor; gives the sums, float64."""
        with torch.enable_grad():
            sums = self.task.losses([share.run.job.stretch(share.examples) for share in shares])
            divisors = [share.divisor for share in shares]
            each = sums / torch.tensor(divisors, dtype=sums.dtype, device=sums.device)
            each.sum().backward()  # type: ignore[no-untyped-call]
        self.proven = max(self.proven, tokens_of(shares))
        found: list[float] = sums.detach().double().tolist()
        return found

    # --- smaller ones ----------------------------------------------------------------------

    def cut_smaller(self, shares: Sequence[Share], tokens: int, why: str) -> None:
        """Let no forward have more tokens than these, or tell that one example is too long.

        Raises:
            Failed: it is one example; the state before this step is saved.
        """
        if len(shares) > 1:
            before, self._room = self.budget(self._members), max(1, tokens)
            for share in shares:
                with self._members.failing_alone(share.run):
                    self._say_cut(share.run, shares, int(self._room), before, why)
            return
        run, part, _ = shares[0]
        job = run.job
        if self.task.whole is not None:
            run.save()
            told = f"{why}, and the batch must be one forward, for {self.task.whole}"
            raise Failed(run, TrainingError(f"Stopped: {told}. Lower --batch-size"))
        if len(part) == 1:
            run.save()
            told = f"Stopped in step {job.step + 1}: {_no_room(self.kind, job, part[0], why)}"
            raise Failed(run, TrainingError(told))
        before, job.most_tokens = job.most_tokens or math.inf, max(1, tokens)
        self._say_cut(run, shares, job.most_tokens, before, why)

    def _say_cut(
        self, run: Run, shares: Sequence[Share], now: int, before: float, why: str
    ) -> None:
        step = run.job.step + 1
        text = (
            f"{why}, for a forward of {tokens_of(shares)} tokens; from step {step} on it "
            f"has at most {now} (before: {before:g}), so that a batch goes through in "
            "more parts, with the same result"
        )
        run.note(text, step=step, micro_batch_tokens=now)
        if not self._world.first:
            logger.warning("process %d: %s", self._world.rank, text)


def tokens_of(shares: Sequence[Share]) -> int:
    """The size of a forward."""
    return sum(num_tokens(share.examples) for share in shares)


def taken(queue: list[Example], job: Job, room: float, *, first: bool) -> list[Example]:
    """The next examples of a run that fit a forward, taken off the end of ``queue``.

    Args:
        room: tokens that are left in the forward.
        first: whether it is empty, so that one longer example goes through alone.
    """
    most, tokens = job.settings.micro_batch or math.inf, 0
    room = min(room, job.most_tokens or math.inf)
    found: list[Example] = []
    while queue and len(found) < most:
        length = queue[-1].size
        if tokens + length > room and (found or not first):
            break
        found.append(queue.pop())
        tokens += length
    return found


def check_first_forward(task: Task, job: Job, kind: Kind) -> None:
    """Run one example, so that what cannot work is known before anything is written.

    Raises:
        SpecError: a batch is one example, which has nothing to be contrasted with.
        TargetError: adapted modules that are never called.
        BaseError: a model that computes no loss of this task.
        TrainingError: the memory has no room for it.
    """
    example = job.window().examples[0]
    alone = job.settings.batch_size == 1 and isinstance(task, Contrasting) and task.lonely(example)
    if alone:
        raise SpecError(
            "batch_size is 1, so a pair has no other of its batch to be contrasted with, and its "
            "loss is always 0. Raise --batch-size, or give rows with a negative each"
        )
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
