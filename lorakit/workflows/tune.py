"""``tune``: many candidates trained together, the weak ones leave, the best is trained out.

The course of a search::

    1. the default settings, and candidates that fill the space evenly, to the first rung
    2. as many again, where TPE expects the most after these, to the first rung too
    3. at each rung the better half goes on (``tuning.halving`` says how it is kept fair)
    4. of those that are trained out one is chosen, with reasons (``tuning.choice``)

Every decision follows from the candidates' losses, which are on disk, or is written down itself
where it also depends on the clock. So a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.bases import Base
from lorakit.core.spec import LoRASpec
from lorakit.data import TokenData
from lorakit.errors import Interrupted, SpecError, TargetError
from lorakit.layers.targets import resolve_targets
from lorakit.train import Origin, Trainer, TrainSettings, train_together
from lorakit.train.beginning import Calibrate
from lorakit.train.origin import (
    check_content,
    content_hashes,
    plain,
    spec_from_dict,
    spec_to_dict,
)
from lorakit.workflows.tuning.choice import LEAST_PROMPTS, Choice, choose, too_few
from lorakit.workflows.tuning.field import Field, Means, Watcher, prompts_of
from lorakit.workflows.tuning.folder import TuneFolder
from lorakit.workflows.tuning.halving import places, rungs, survivors
from lorakit.workflows.tuning.report import result_to_dict, write_pages
from lorakit.workflows.tuning.space import (
    Choices,
    Space,
    assign,
    check_space,
    default_space,
    extremes,
    shown,
    space_from_dict,
    space_to_dict,
    spread,
    values_of,
)
from lorakit.workflows.tuning.study import Study, propose
from lorakit.workflows.tuning.table import Candidate

#: candidates where nobody said
CANDIDATES, CANDIDATES_QUICK = 12, 7
#: rows of an evaluation: as many as cost about a fifth of the training up to the first rung, whose
#: backward, through a frozen base, takes about the forward's time
_EVAL_SHARE = 0.4
_LEAST_ROWS, _MOST_ROWS = 64, 256


@dataclass(frozen=True)
class Plan:
    """What a search may try, and how much."""

    quick: bool = False
    """Search the learning rate alone."""
    candidates: int | None = None
    """How many are tried, the default settings among them. ``None``: 12, or 7 if ``quick``."""
    max_seconds: float | None = None
    """When to be done, about: fewer begin and fewer go on. ``None``: no limit."""
    search: Space = field(default_factory=dict)
    """Replaces or adds to what is searched."""
    fixed: tuple[str, ...] = ()
    """Settings that are not searched, because somebody said what they are."""

    def __post_init__(self) -> None:
        problems = []
        if self.candidates is not None and self.candidates < 2:
            problems.append(f"candidates is {self.candidates}; a search needs at least 2")
        if self.max_seconds is not None and not self.max_seconds > 0:
            problems.append(f"max_seconds is {self.max_seconds}; give more than 0")
        if problems:
            raise SpecError("; ".join(problems))

    @property
    def number(self) -> int:
        """How many candidates."""
        if self.candidates is not None:
            return self.candidates
        return CANDIDATES_QUICK if self.quick else CANDIDATES


@dataclass(frozen=True)
class TuneResult:
    """What a search came to."""

    out: Path
    adapter: Path
    """The chosen adapter, in PEFT's format."""
    run: Path
    """The chosen candidate's run folder."""
    choice: Choice
    candidates: tuple[Candidate, ...]
    spec: LoRASpec
    settings: TrainSettings
    """With the chosen values."""
    seconds: float
    """Wall time, that before a resume included."""


def tune(
    base: Base,
    data: TokenData,
    spec: LoRASpec | None = None,
    settings: TrainSettings | None = None,
    out: str | os.PathLike[str] = "tune",
    *,
    plan: Plan | None = None,
    validation: TokenData | None = None,
    watcher: Watcher | None = None,
    origin: Origin | None = None,
    calibrate: Callable[[int], Calibrate] | None = None,
    max_concurrent: int | None = None,
    token_budget: int | None = None,
    resume: bool = False,
) -> TuneResult:
    """Find learning rate, rank and targets for some data, and train with them.

    All candidates share the base, the data, the rows they are evaluated on and the seed, so that
    their losses compare in pairs.

    Args:
        base, data, validation, origin: as of :class:`lorakit.train.Trainer`.
        spec, settings: the default candidate, and what all have where nothing is searched.
        out: the folder to make.
        plan: what is tried.
        watcher: is told what happens.
        calibrate: for initialisations that need more than the weights; is given the seed.
        max_concurrent, token_budget: as of :func:`lorakit.train.train_together`.
        resume: go on with a search in ``out`` that began with the same arguments, if one is there.

    Raises:
        SpecError: settings that are impossible, or searched although they are fixed.
        TargetError: targets that do not fit the base.
        DataError: there is nothing to train or to evaluate on.
        InputError: ``out`` is taken, or its search began with other arguments.
        Interrupted: Ctrl-C or SIGTERM; ``resume_tune(out)`` goes on.
        TrainingError: no candidate came to a finite loss.
    """
    plan = plan or Plan()
    folder = TuneFolder(out)
    resume = resume and folder.settings.exists()
    if not resume:
        folder.check_new()
    means = Means(
        base=base,
        data=data,
        validation=validation,
        origin=origin or Origin.of(base, data, validation),
        spec=spec or LoRASpec(),
        settings=_prepared(settings or TrainSettings(), plan.fixed),
        calibrate=calibrate,
    )
    limits = {"max_concurrent": max_concurrent, "token_budget": token_budget}
    means, fixed_rate, prompts = _resolved(means, folder)
    space = _space(plan, means, fixed_rate)
    _check_targets(space, means)
    sections = {
        **means.origin.to_dict(base),
        "lora": spec_to_dict(means.spec),
        "train": means.settings.to_dict(),
        "search": {
            "quick": plan.quick,
            "candidates": plan.number,
            "max_seconds": plan.max_seconds,
            "space": plain(space_to_dict(space)),
            **limits,
        },
        "content": content_hashes(base, data, validation),
    }
    if resume:
        folder.check_same(sections)
    else:
        folder.create(sections)
    watcher = watcher or Watcher()
    if prompts < LEAST_PROMPTS:
        watcher.on_note(too_few(prompts))
    return _Search(folder, means, plan, space, watcher, limits).run()


def resume_tune(
    out: str | os.PathLike[str],
    *,
    base: Base | None = None,
    data: TokenData | None = None,
    validation: TokenData | None = None,
    watcher: Watcher | None = None,
    calibrate: Callable[[Base, int], Calibrate] | None = None,
) -> TuneResult:
    """Go on with a search where it stopped; of one that has ended, the end is made again.

    Args:
        base, data, validation: to spare their loading, or where a program made them.

    Raises:
        InputError: there is no search, or data whose origin it did not record is not given again.
        DataError, BaseError: data or base changed since it began.
    """
    folder = TuneFolder(out)
    sections = folder.read()
    origin = Origin.from_dict(sections)
    base = base or origin.load_base()
    data = data if data is not None else origin.load_data(base)
    if validation is None:
        validation = origin.load_validation(base)
    check_content(sections["content"], content_hashes(base, data, validation))
    search: Mapping[str, Any] = sections["search"]
    made = None if calibrate is None else lambda seed: calibrate(base, seed)
    means = Means(
        base=base,
        data=data,
        validation=validation,
        origin=origin,
        spec=spec_from_dict(sections["lora"]),
        settings=TrainSettings.from_dict(sections["train"]),
        calibrate=made,
    )
    plan = Plan(search["quick"], search["candidates"], search["max_seconds"])
    space = space_from_dict(search["space"])
    limits = {name: search.get(name) for name in ("max_concurrent", "token_budget")}
    return _Search(folder, means, plan, space, watcher or Watcher(), limits).run()


# --- what is searched --------------------------------------------------------------------------


def _prepared(settings: TrainSettings, fixed: Collection[str] = ()) -> TrainSettings:
    """Settings of candidates, as far as they follow from nothing else.

    Args:
        fixed: names of those that somebody chose, be they as the defaults.

    Raises:
        SpecError: what cannot act in a search.
    """
    if settings.patience:
        raise SpecError(
            f"patience is {settings.patience}, but in a search the others decide who stops early; "
            "leave it out"
        )
    if settings.eval_every is not None:
        raise SpecError("eval_every is given, but a search evaluates at its rungs; leave it out")
    usual = TrainSettings()
    # what somebody chose stays; the defaults are those of a run that is alone
    if settings.samples == usual.samples and "samples" not in fixed:
        settings = dataclasses.replace(settings, samples=0)
    if settings.keep_checkpoints == usual.keep_checkpoints:
        settings = dataclasses.replace(settings, keep_checkpoints=1)
    return settings


def _resolved(means: Means, folder: TuneFolder) -> tuple[Means, bool, int]:
    """The means with steps, evaluations and rate chosen, whether the rate was given, and the
    prompts that there are to compare on."""
    given = means.settings.lr is not None
    first = _trainer(means, folder)
    _, prompts = prompts_of(first)
    steps = first.settings.steps
    assert steps is not None
    rung = rungs(steps)[0]
    settings = dataclasses.replace(
        means.settings,
        steps=steps,
        epochs=None,
        lr=first.settings.lr,
        eval_every=rung if rung < steps else None,
    )
    if settings.eval_rows is None:
        rows = int(_EVAL_SHARE * rung * settings.batch_size)
        rows = min(_MOST_ROWS, max(_LEAST_ROWS, rows))
        settings = dataclasses.replace(settings, eval_rows=rows)
    return dataclasses.replace(means, settings=settings), given, prompts


def _trainer(means: Means, folder: TuneFolder) -> Trainer:
    calibrate = None if means.calibrate is None else means.calibrate(means.settings.seed)
    return Trainer(
        means.base,
        means.spec,
        means.data,
        means.settings,
        folder.run(0),
        validation=means.validation,
        origin=means.origin,
        calibrate=calibrate,
    )


def _space(plan: Plan, means: Means, fixed_rate: bool) -> Space:
    """What is searched: the defaults, less what was fixed, with what the plan adds.

    Raises:
        SpecError: nothing is left to choose from, or a value is impossible.
    """
    assert means.settings.lr is not None
    usual = default_space(means.settings.lr, quick=plan.quick)
    told = {n for n in ("rank", "targets") if getattr(means.spec, n) != getattr(LoRASpec(), n)}
    for name in {*told, *plan.fixed, *(["lr"] if fixed_rate else [])}:
        usual.pop(name, None)  # somebody said what it is
    space = {**usual, **plan.search}
    check_space(space, means.spec, means.settings)
    return space


def _check_targets(space: Space, means: Means) -> None:
    """Check that every choice of modules fits the base, at the highest rank.

    Raises:
        TargetError: one does not; says which ranks would, if any.
    """

    def check(space: Space) -> None:
        for one in extremes(space, means.spec, means.settings):
            resolve_targets(means.base.model, one)

    try:
        check(space)
    except TargetError as error:
        ranks = space.get("rank")
        fitting = []
        for rank in ranks.values if isinstance(ranks, Choices) else ():
            with contextlib.suppress(TargetError):
                check({**space, "rank": Choices((rank,))})
                fitting.append(rank)
        if not fitting:
            raise
        flag = f"--rank {fitting[0]}"
        if len(fitting) > 1:
            flag = f'--search "rank={shown(Choices(tuple(fitting)))}"'
        raise TargetError(f"{error}\nOf the ranks that are searched these fit: {flag}") from None


# --- the search --------------------------------------------------------------------------------


class _Search:
    """One search, from its folder to its result."""

    def __init__(
        self,
        folder: TuneFolder,
        means: Means,
        plan: Plan,
        space: Space,
        watcher: Watcher,
        limits: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._means = means
        self._plan = plan
        self._space = space
        self._watcher = watcher
        steps = means.settings.steps
        assert steps is not None
        self._steps = steps
        self._rungs = rungs(steps)
        self._field = Field(folder, means, watcher, together=train_together, **limits)
        self._began = time.perf_counter()

    def run(self) -> TuneResult:
        """Search, or go on with it."""
        with self._folder.locked():
            self._study = Study(self._folder.study, self._space)
            self._before = self._study.seconds
            try:
                return self._run()
            except Interrupted as error:
                stopped = Interrupted(
                    f"the search was stopped, with the state of every candidate saved. Go on "
                    f"with: {self._folder.resuming()}"
                )
                stopped.said = error.said
                raise stopped from None
            finally:
                self._study.seconds = self._seconds
                self._study.record(self._field.candidates)

    def _run(self) -> TuneResult:
        self._begin()
        self._tell()
        going = self._first_rung()
        for place, step in enumerate(self._rungs[:-1]):
            going = self._halve(place, step, going)
            self._advance(going, self._rungs[place + 1])
        return self._end()

    @property
    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def _begin(self) -> None:
        """Enter the first round: the defaults, then an even spread."""
        known = self._study.candidates()
        # of the rate alone, a few more even ones tell more than proposals after too few
        share = 2 / 3 if len(self._space) == 1 else 1 / 2
        first = max(2, math.ceil(share * self._plan.number))
        default = values_of(self._space, self._means.spec, self._means.settings)
        even = spread(self._space, first - 1, self._means.settings.seed)
        wanted = [default, *(values for values in even if values != default)]
        for values in wanted[len(known) :]:
            self._study.add(values)
        known = self._study.candidates()
        for values in known:
            self._field.enter(values)
        self._first = len(wanted)

    def _tell(self) -> None:
        whole = self._steps
        self._watcher.on_note(
            f"up to {self._plan.number} candidates of {whole} steps, compared after "
            f"{', '.join(map(str, self._rungs))}; searched: "
            + "  ".join(f"{name}={one}" for name, one in self._space.items())
        )

    def _first_rung(self) -> list[int]:
        """Train everyone to the first rung: an even spread, then twice what that suggests."""
        rung, number = self._rungs[0], self._plan.number
        self._advance(range(self._first), rung)
        known = self._first
        for upto in (known + -(-(number - known) // 2), number):
            if upto > known and self._may_begin(rung):
                self._propose(known, upto)
                known = min(upto, len(self._field.candidates))
                self._advance(range(known), rung)
        self._advance(range(len(self._field.candidates)), rung)
        for candidate in list(self._field.candidates):
            if candidate.end == "waiting" and not candidate.losses:
                self._field.end(candidate.number, "left", "not begun, for the time")
        return [c.number for c in self._field.candidates if c.losses]

    def _propose(self, known: int, upto: int) -> None:
        """Enter candidates until there are ``upto``, by what the first ``known`` came to."""
        field, rung = self._field, self._rungs[0]
        seen = [(c.values, field.loss_at(c.number, rung)) for c in field.candidates[:known]]
        # the same again after a resume, so those that were entered before are not made twice
        made = propose(self._space, seen, upto - known, self._means.settings.seed + known)
        for values in made[len(field.candidates) - known :]:
            self._study.add(values)
            field.enter(values)

    def _halve(self, place: int, step: int, going: list[int]) -> list[int]:
        """Who goes on from a rung; the others leave."""
        chosen = self._study.decision(place)
        if chosen is None:
            losses = {n: self._field.loss_at(n, step) for n in going}
            rates = {n: self._field.candidates[n].lr for n in going}
            wanted = places(len(self._field.candidates), place, len(self._rungs))
            keep = min(wanted, self._affordable(place, wanted))
            if keep < wanted:
                self._watcher.on_note(
                    f"{keep} instead of {wanted} candidates go on from step {step}, for the time"
                )
            chosen = survivors(losses, rates, keep, always={0})
            self._study.decide(place, chosen)
        for number in going:
            if number not in chosen and self._field.candidates[number].end == "waiting":
                self._field.change(number, end="left", reason=f"weaker at step {step}")
        return [n for n in chosen if self._field.candidates[n].end in ("waiting", "finished")]

    def _end(self) -> TuneResult:
        field = self._field
        choice = choose(field.candidates, self._space, self._steps)
        self._folder.take(choice.number)
        for candidate in field.candidates:
            if candidate.end in ("left", "failed"):
                self._folder.forget_checkpoints(candidate.number)
        values = field.candidates[choice.number].values
        spec, settings = assign(values, self._means.spec, self._means.settings)
        result = TuneResult(
            out=self._folder.path,
            adapter=self._folder.adapter,
            run=self._folder.run(choice.number),
            choice=choice,
            candidates=tuple(field.candidates),
            spec=spec,
            settings=settings,
            seconds=self._seconds,
        )
        for note in write_pages(self._folder, result, self._space, self._rungs):
            self._watcher.on_note(note)
        self._folder.write_result(result_to_dict(result, self._space, self._rungs))
        return result

    # --- time ------------------------------------------------------------------------------

    def _advance(self, numbers: Iterable[int], until: int) -> None:
        self._field.advance(numbers, until, more=lambda: self._may_begin(until))
        self._study.seconds = self._seconds

    @property
    def _left(self) -> float | None:
        """Seconds until the search should be done; ``None`` without a limit."""
        limit = self._plan.max_seconds
        return None if limit is None else limit - self._seconds

    def _pace(self) -> float | None:
        """Seconds for one step of one candidate, evaluations included, as it was so far."""
        made = sum(c.steps for c in self._field.candidates)
        return self._seconds / made if made else None

    def _may_begin(self, until: int) -> bool:
        """Whether another candidate fits: half of the time is for the first rung."""
        left = self._left
        if left is None or self._plan.max_seconds is None or until != self._rungs[0]:
            return True
        return left > 0.5 * self._plan.max_seconds

    def _affordable(self, place: int, wanted: int) -> int:
        """How many candidates may go on from a rung, at the pace so far; at least one."""
        left, pace = self._left, self._pace()
        if left is None or pace is None:
            return wanted
        start = self._rungs[place]
        for keep in range(wanted, 1, -1):
            # half of them leave at each rung, down to two; the default goes on besides
            steps, before, number = 0, start, keep
            for until in self._rungs[place + 1 :]:
                steps += (number + 1) * (until - before)
                before, number = until, max(2, -(-number // 2))
            if steps * pace <= left:
                return keep
        return 1
