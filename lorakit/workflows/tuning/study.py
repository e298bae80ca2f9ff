"""Optuna: what to try next, and a study that records it.

``OUT/study.db`` (SQLite) holds a trial for each candidate with its losses by step, for Optuna's
own tools; the list of candidates is read from there when a search goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.optional import require
from lorakit.workflows.tuning.space import Choices, Range, Space, spread
from lorakit.workflows.tuning.table import Candidate

#: the study's name in the file
NAME = "lorakit tune"
#: user attribute with a candidate's values as JSON
_VALUES = "values"


def _optuna() -> Any:
    optuna = require("optuna", extra="tune", purpose="lorakit tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """The candidates of a search, on disk.

    Raises:
        MissingDependencyError: Optuna is not installed.
        InputError: the file is no study.
    """

    def __init__(self, path: Path, space: Space) -> None:
        self._optuna = _optuna()
        self._space = space
        self._distributions = distributions(space)
        # three slashes and an absolute path
        storage = f"sqlite:///{path.resolve().as_posix()}"
        with _readable(path):
            self._study = self._optuna.create_study(
                storage=storage, study_name=NAME, direction="minimize", load_if_exists=True
            )

    def candidates(self) -> list[dict[str, Any]]:
        """The values of each, in the order of their numbers."""
        return [json.loads(trial.user_attrs[_VALUES]) for trial in self._trials()]

    def _trials(self) -> list[Any]:
        """Those of this search; a person may have added others with Optuna's tools."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if _VALUES in trial.user_attrs]

    def add(self, values: Mapping[str, Any]) -> None:
        """A new candidate."""
        # values outside of the space, as the defaults may be, stand in the attribute alone
        inside = {n: v for n, v in values.items() if v in self._space[n]}
        trial = self._optuna.create_trial(  # in one write: a kill leaves it whole or absent
            state=self._optuna.trial.TrialState.RUNNING,
            params=inside,
            distributions={name: self._distributions[name] for name in inside},
            user_attrs={_VALUES: json.dumps(dict(values))},
        )
        self._study.add_trial(trial)

    def decision(self, place: int) -> list[int] | None:
        """Who goes on from a rung, if that was decided."""
        found = self._study.user_attrs.get(f"from rung {place}")
        return None if found is None else list(found)

    def decide(self, place: int, numbers: Sequence[int]) -> None:
        """Write down who goes on from a rung."""
        self._study.set_user_attr(f"from rung {place}", list(numbers))

    @property
    def seconds(self) -> float:
        """Wall time of the search until it was last stopped."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._study.set_user_attr("seconds", value)

    def record(self, candidates: Sequence[Candidate]) -> None:
        """Write the losses and ends of those that have ended, once each."""
        states = self._optuna.trial.TrialState
        ends = {"finished": states.COMPLETE, "left": states.PRUNED, "failed": states.FAIL}
        trials = self._trials()
        for candidate in candidates:
            frozen = trials[candidate.number]
            if frozen.state.is_finished():
                continue
            # the way back to a trial that an earlier process began
            trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
            for step, losses in sorted(candidate.losses.items()):
                if losses.finite and step not in frozen.intermediate_values:
                    trial.report(losses.mean, step)
            if candidate.end == "waiting":
                continue
            if candidate.reason:
                trial.set_user_attr("reason", candidate.reason)
            kept = candidate.kept
            state, value = ends[candidate.end], None
            if state == states.COMPLETE:
                state, value = (states.FAIL, None) if kept is None else (state, kept.mean)
            self._study.tell(trial, value, state=state)


def propose(
    space: Space, seen: Sequence[tuple[Mapping[str, Any], float]], number: int, seed: int
) -> list[dict[str, Any]]:
    """More candidates, where TPE expects the most (Bergstra et al., 2011).

    Each proposal is taken to come out as the mean of what was seen, so that the next ones look
    elsewhere (a constant liar; Ginsbourger et al., 2010).

    Args:
        seen: values and loss of each candidate so far, all at the same step.
        number: how many; fewer come where the space has no more that are new.
    """
    optuna = _optuna()
    known = distributions(space)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, n_ei_candidates=64)
    study = optuna.create_study(sampler=sampler)
    finite = [loss for _, loss in seen if math.isfinite(loss)]
    worst, mean = max(finite, default=0.0), sum(finite) / max(1, len(finite))

    def tell(values: Mapping[str, Any], loss: float) -> None:
        inside = {n: v for n, v in values.items() if v in space[n]}
        if inside.keys() == space.keys():
            study.add_trial(optuna.create_trial(params=inside, distributions=known, value=loss))

    for values, loss in seen:
        tell(values, loss if math.isfinite(loss) else 2 * abs(worst) + 1)
    made: list[dict[str, Any]] = []
    before = [dict(values) for values, _ in seen]
    for _ in range(5 * number):
        if len(made) == number:
            return made
        asked = study.ask(known)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # its loss is told below
        values = {name: _rounded(one, asked.params[name]) for name, one in space.items()}
        if values not in before and values not in made:
            made.append(values)
            tell(values, mean)
    # where it insists on what is known already, an even spread may have something new
    for values in spread(space, 4 * number, seed):
        if len(made) < number and values not in before and values not in made:
            made.append(values)
    return made


def _rounded(dimension: Choices | Range, value: Any) -> Any:
    return dimension.near(value) if isinstance(dimension, Range) else value


def distributions(space: Space) -> dict[str, Any]:
    """The space in Optuna's words."""
    of = _optuna().distributions
    return {
        name: of.CategoricalDistribution(one.values)
        if isinstance(one, Choices)
        else of.FloatDistribution(one.low, one.high, log=one.log)
        for name, one in space.items()
    }


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("sqlalchemy"):
            first = str(error).partition("\n")[0]
            raise InputError(
                f"{path} cannot be read as an Optuna study: {first}. Put the file back that was "
                "there; or search again in a new folder."
            ) from error
        raise
