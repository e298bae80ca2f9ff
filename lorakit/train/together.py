"""``train_together``: several runs on one base, each as if it were alone; or one.

::

    results = train_together([Trainer(base, LoRASpec(rank=r), data, settings, f"runs/{r}")
                              for r in (4, 16, 64)])

Runs join while there is room: so many that their batches fill a forward and the memory holds them,
or ``max_concurrent``. One that ends leaves its place to the next. What stops a run (a loss that is
not finite, a row that fits no memory, a callback that fails) stops that run alone; a signal stops
all of them at the same moment, from which they go on together bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorakit.errors import InputError, LorakitError, SpecError
from lorakit.train.callbacks import RunResult
from lorakit.train.checkpoint import checkpoint_path, list_checkpoints, moments
from lorakit.train.distributed import PeerLost
from lorakit.train.heap import StillHeap
from lorakit.train.host import Host, hosting
from lorakit.train.interrupt import StopRequest
from lorakit.train.loop import Loop, Stopped
from lorakit.train.room import MARGIN, available_bytes
from lorakit.train.run import Moment, Run

if TYPE_CHECKING:
    from lorakit.train.trainer import Trainer

logger = logging.getLogger(__name__)

#: bytes of each trained parameter: itself, its gradient, and what the optimizer keeps
_BYTES = {"adamw": 16, "adamw8bit": 10, "paged-adamw8bit": 10, "sgd": 8}

_NOBODY = (
    "no run is under way and there is none to begin, yet the trainers have not ended: they gave "
    "None, which means to ask again after others' next step"
)

Outcome = RunResult | Exception


def train_together(
    trainers: Iterable[Trainer | None],
    *,
    max_concurrent: int | None = None,
    token_budget: int | None = None,
    on_result: Callable[[Trainer, Outcome], None] | None = None,
    stop: StopRequest | None = None,
) -> list[Outcome]:
    """Run trainers of one base, several of them in each forward.

    Args:
        trainers: drawn one by one, each when there is room for it; ``None`` means that there is
            none yet, and is asked for again after the next step of the others.
        max_concurrent: how many run at the same time at most. ``None``: while their batches leave
            room in a forward.
        token_budget: tokens of one shared forward at most; by default the largest
            ``micro_batch_tokens`` of those in it. A run's own limit holds for its own share.
        on_result: called when a run has ended, with its result or with what stopped it.
        stop: a request that the caller has entered, to see afterwards whether a signal came: no
            outcome tells of one that came when the last run was ending.

    Returns:
        In the order of the trainers, each one's result or what stopped it: the exception that
        :meth:`Trainer.run` would raise. After a signal, trainers that were not drawn yet are left
        in the iterable.

    Raises:
        SpecError: a limit below 1.
        KeyboardInterrupt: a second signal came.
        Exception: what the iterable raises, once all runs under way are saved.
    """
    for name, value in (("max_concurrent", max_concurrent), ("token_budget", token_budget)):
        if value is not None and value < 1:
            raise SpecError(f"{name} is {value}; it must be at least 1")
    session = _Session(iter(trainers), max_concurrent, token_budget, on_result)
    with contextlib.ExitStack() as closing:
        session.run(stop or closing.enter_context(StopRequest()))
    return session.outcomes


@dataclass(eq=False)
class _Place:
    """One run under way."""

    number: int
    trainer: Trainer
    run: Run
    closing: contextlib.ExitStack
    fresh: bool = True
    """Whether it has made no step since it joined."""


@dataclass
class _Session:
    """The runs of one call."""

    waiting: Iterator[Trainer | None]
    max_concurrent: int | None
    budget: int | None
    on_result: Callable[[Trainer, Outcome], None] | None
    outcomes: list[Outcome] = field(default_factory=list)
    _next: Trainer | None = None
    _drawn: int = 0
    _exhausted: bool = False
    _places: list[_Place] = field(default_factory=list)
    _loop: Loop | None = None
    _heap: StillHeap = field(default_factory=StillHeap)
    _group: str = field(default_factory=lambda: uuid.uuid4().hex)
    _round: int = 0

    def run(self, stop: StopRequest) -> None:
        """Until nobody runs and nobody waits, or somebody asked to stop."""
        with contextlib.ExitStack() as closing:
            first = self._draw()
            if first is None and self._exhausted:
                return
            if first is None:
                raise InputError(_NOBODY)
            host = closing.enter_context(hosting(first.base.model))
            closing.enter_context(self._heap)
            try:
                try:
                    self._go_on(host, first, stop)
                except Stopped:
                    self._interrupt("a request" if stop.received is None else stop.received.name)
            except BaseException as error:  # an interrupt at once
                for place in self._places:
                    with contextlib.suppress(Exception):
                        place.closing.__exit__(type(error), error, error.__traceback__)
                raise

    def _go_on(self, host: Host, first: Trainer, stop: StopRequest) -> None:
        while True:
            self._fill(host, first, stop)
            loop = self._loop
            if loop is None or not self._places:
                if stop.received is not None or (self._exhausted and self._next is None):
                    return
                if not self._places and self._next is None:
                    raise InputError(_NOBODY)
                continue
            for place in list(self._places):
                if place.run.evaluation_due:
                    with self._ending_alone(place):
                        loop.evaluate(place.run)
            for place in list(self._places):
                if place.run.job.done:
                    with self._ending_alone(place):
                        self._end(place, place.trainer.finish(place.run, host))
                elif place.trainer.leaving is not None:
                    with self._ending_alone(place):
                        self._end(place, place.trainer.left(place.run))
            self._save_if_due()
            if not self._places:
                continue
            self._heap.between_rounds()
            self._round += 1
            failed = loop.round()
            for place in list(self._places):
                place.fresh = False
                if place.run in failed:
                    self._end(place, failed[place.run])

    # --- joining ---------------------------------------------------------------------------

    def _draw(self) -> Trainer | None:
        """The trainer that waits, drawn if there is none; ``None`` if none is to be had now."""
        if self._next is None and not self._exhausted:
            try:
                self._next = next(self.waiting)
            except StopIteration:
                self._exhausted = True
            except Exception as error:
                self._interrupt(f"{type(error).__name__} in making the next run")
                raise
        return self._next

    def _fill(self, host: Host, first: Trainer, stop: StopRequest) -> None:
        while (stop.received is None or not self._drawn) and self._has_place():
            trainer = self._draw()
            if trainer is None or not self._fits(trainer):
                return
            self._next = None
            number = self._drawn
            self._drawn += 1
            self.outcomes.append(LorakitError("this run has not ended"))
            self._join(host, first, trainer, number, stop)

    def _has_place(self) -> bool:
        if not self._places or self._loop is None:
            return True
        if self.max_concurrent is not None:
            return len(self._places) < self.max_concurrent
        return self._loop.num_free() > 0

    def _fits(self, trainer: Trainer) -> bool:
        """Whether the memory has room for its adapter, beside a full forward."""
        if not self._places or self._loop is None:
            return True
        free = _free_bytes(trainer)
        if free is None:
            return True
        try:
            each = _BYTES[trainer.settings.optimizer]
            needed = each * trainer.num_parameters()
        except LorakitError:  # it is raised again when it joins
            return True
        if needed + self._loop.bytes_per_token * self._loop.budget <= MARGIN * free:
            return True
        text = (
            f"the next run waits: its adapter needs about {needed / 2**20:,.0f} MB, and "
            f"{free / 2**20:,.0f} MB are free"
        )
        logger.info("%s", text)
        return False

    def _join(
        self, host: Host, first: Trainer, trainer: Trainer, number: int, stop: StopRequest
    ) -> None:
        closing = contextlib.ExitStack()
        try:
            self._check_joins(first, trainer)
            run = trainer.enter(host, closing)
            place = _Place(number, trainer, run, closing)
            if self._loop is None:
                kind = trainer.kind
                task, _ = host.task(kind, trainer.settings.recompute, list)
                self._loop = Loop(
                    task, world=trainer.world, stop=stop, budget=self.budget, kind=kind
                )
            self._places.append(place)
            self._heap.changed()
        except Exception as error:
            self._close(closing, error)
            self._tell(number, trainer, error)
            return
        except BaseException as error:
            closing.__exit__(type(error), error, error.__traceback__)
            raise
        with self._ending_alone(place):
            self._loop.enter(run)

    def _check_joins(self, first: Trainer, trainer: Trainer) -> None:
        if trainer.base.model is not first.base.model:
            raise InputError(
                f"{trainer.out} has another base object than the first run; runs that are trained "
                "together share one. Load the base once and give it to all"
            )
        if trainer is not first and (trainer.is_full or first.is_full):
            which = trainer if trainer.is_full else first
            raise SpecError(
                f"{which.out} trains all weights of the base that the others share and need as it "
                "was. Train it alone, on a base of its own"
            )
        if self._places and (trainer.world.size > 1 or first.world.size > 1):
            raise SpecError(
                "several processes train one run; runs that are trained together need one process. "
                "Start each with torchrun alone, or all without it"
            )

    # --- saving ----------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """All runs, if one of them wants it: so there is a moment from which all go on."""
        stepped = [place for place in self._places if not place.fresh]
        if any(place.run.checkpoint_due(len(self._places)) for place in stepped):
            self._save_all()

    def _save_all(self) -> None:
        moment = None
        if len(self._places) > 1:
            members = tuple(place.run.folder.path.name for place in self._places)
            moment = Moment(f"{self._group}/{self._round}", members)
        for place in list(self._places):
            with self._ending_alone(place):
                place.run.save(moment)

    # --- leaving ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ending_alone(self, place: _Place) -> Iterator[None]:
        """What goes wrong inside ends this run, and no other."""
        try:
            yield
        except Stopped:
            raise
        except PeerLost as error:
            place.run.job.clear_gradient()
            with contextlib.suppress(LorakitError):
                place.run.save()
            self._end(place, error)
        except Exception as error:
            self._end(place, error)

    def _end(self, place: _Place, outcome: Outcome) -> None:
        if place not in self._places:
            return
        self._places.remove(place)
        self._heap.changed()
        if self._loop is not None:
            self._loop.leave(place.run)
        failure = self._close(place.closing, outcome if isinstance(outcome, Exception) else None)
        self._tell(place.number, place.trainer, failure or outcome)

    def _tell(self, number: int, trainer: Trainer, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        if self.on_result is not None:
            self.on_result(trainer, outcome)

    @staticmethod
    def _close(closing: contextlib.ExitStack, error: Exception | None) -> Exception | None:
        """Undo what a run has done to the model; what goes wrong in that."""
        try:
            closing.__exit__(
                None if error is None else type(error),
                error,
                None if error is None else error.__traceback__,
            )
        except Exception as failure:
            return failure if error is None else None
        return None

    def _interrupt(self, why: str) -> None:
        """Everybody is saved, at one moment, and has ended."""
        for place in self._places:
            place.run.job.clear_gradient()
        self._save_all()
        for place in list(self._places):
            with self._ending_alone(place):
                self._end(place, place.trainer.interrupted(place.run, why))


def _free_bytes(trainer: Trainer) -> int | None:
    device = trainer.base.placement.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_bytes()


# --- going on together -------------------------------------------------------------------------


def aligned(trainers: Sequence[Trainer]) -> list[Trainer]:
    """Runs that were interrupted together, each to go on from the last moment they have in common.

    Where a process was killed while it saved, some have a checkpoint of a later moment; it is left
    aside. Runs that were not saved together go on from their own last checkpoint, and so does a
    group of which one has ended since: its forwards are composed in another way then, which is a
    matter of rounding.

    Returns:
        The same trainers, those of a group in its order.
    """
    by_name = {trainer.out.name: trainer for trainer in trainers}
    if len(by_name) < len(trainers):
        return list(trainers)
    found = {name: moments(t.out / "checkpoints") for name, t in by_name.items()}
    order: list[Trainer] = []
    for name, trainer in by_name.items():
        if trainer in order:
            continue
        members = _common(name, found, by_name)
        for member in members or [name]:
            by_name[member].until = None if members is None else members[member]
            order.append(by_name[member])
    return order


def _common(
    name: str,
    found: dict[str, dict[str, tuple[int, tuple[str, ...]]]],
    by_name: dict[str, Trainer],
) -> dict[str, int] | None:
    """Member → step of the last moment that all of its members have; ``None`` without one."""
    for moment, (_, members) in reversed(found[name].items()):
        if not all(moment in found.get(member, {}) for member in members):
            continue
        steps = {member: found[member][moment][0] for member in members}
        group = moment.partition("/")[0]
        if all(_only_later(by_name[m], found[m], step, group) for m, step in steps.items()):
            return steps
    return None


def _only_later(
    trainer: Trainer, found: dict[str, tuple[int, tuple[str, ...]]], step: int, group: str
) -> bool:
    """Whether all checkpoints after a step are of the same group, so that none is lost that was
    made alone."""
    folder = trainer.out / "checkpoints"
    theirs = {
        checkpoint_path(folder, at) for m, (at, _) in found.items() if m.startswith(f"{group}/")
    }
    later = [path for path in list_checkpoints(folder) if path > checkpoint_path(folder, step)]
    return all(path in theirs for path in later)
