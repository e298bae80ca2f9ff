"""What is searched: settings by name, each a list of values or a range, as people write them.

::

    rank=4,8,16,64  lr=1e-4..1e-2  targets=attention,all-linear  dropout=0,0.1

A candidate's *values* are plain: numbers and text, one for each searched setting. ``targets`` that
are several are written with a plus, ``q_proj+v_proj``; ``alpha/r`` stands for the alpha that gives
this scaling at the candidate's rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError, collected
from lorakit.train.settings import TrainSettings

#: a candidate's searched settings
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at a place in (0, 1); on a border between two, the one that was named first."""
        return self.values[max(0, math.ceil(share * len(self.values)) - 1)]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(shown(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A setting that takes any number between two; by ratio if ``log``."""

    low: float
    high: float
    log: bool = True

    def at(self, share: float) -> float:
        """The number at a place in [0, 1), to two digits."""
        if self.log:
            return self.near(self.low * (self.high / self.low) ** share)
        return self.near(self.low + (self.high - self.low) * share)

    def near(self, value: float) -> float:
        """``value`` to two digits, inside of the range."""
        return min(self.high, max(self.low, float(f"{value:.2g}")))

    def place(self, value: float) -> float:
        """Where a number lies: 0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{shown(self.low)}..{shown(self.high)}"


#: searched settings by name
Space = Mapping[str, Choices | Range]


@dataclass(frozen=True)
class _Setting:
    home: type
    parse: Callable[[str], Any]
    expected: str
    log: bool | None = None
    """How a range of it is spread; ``None`` if there can be none."""


def _whole(text: str) -> int:
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_LORA, _TRAIN = LoRASpec, TrainSettings
#: what can be searched. What changes the cost of a step or the rows of it is not among them: at
#: equal steps, losses would then not compare
_SETTINGS = {
    "lr": _Setting(_TRAIN, _number, "a number", True),
    "rank": _Setting(_LORA, _whole, "a whole number", True),
    "alpha": _Setting(_LORA, _number, "a number", True),
    "alpha/r": _Setting(_LORA, _number, "a number", True),
    "targets": _Setting(_LORA, str, "text"),
    "layers": _Setting(_LORA, str, "text"),
    "dropout": _Setting(_LORA, _number, "a number", False),
    "scaling": _Setting(_LORA, str, "text"),
    "init": _Setting(_LORA, str, "text"),
    "variant": _Setting(_LORA, str, "text"),
    "bias": _Setting(_LORA, str, "text"),
    "lora_plus_ratio": _Setting(_TRAIN, _number, "a number", True),
    "weight_decay": _Setting(_TRAIN, _number, "a number", True),
    "schedule": _Setting(_TRAIN, str, "text"),
    "warmup": _Setting(_TRAIN, _whole, "a whole number"),
    "optimizer": _Setting(_TRAIN, str, "text"),
    "clip": _Setting(_TRAIN, _number, "a number", True),
    "eps": _Setting(_TRAIN, _number, "a number", True),
}
SEARCHABLE = tuple(_SETTINGS)

#: the default range of the rate, as factors on the rate that is chosen by width. Few steps want a
#: high one: the best rate falls as a run gets longer (Bjorck et al., arXiv 2409.19913)
RATE_BELOW, RATE_ABOVE = 4.0, 8.0


def default_space(rate: float, *, quick: bool) -> dict[str, Choices | Range]:
    """What is searched where nobody said.

    alpha is not among it: beside the rate it moves nearly the same thing, and kept fixed it makes
    the best rate nearly independent of the rank.

    Args:
        rate: the default learning rate.
        quick: the rate alone.
    """
    rates = Range(float(f"{rate / RATE_BELOW:.2g}"), float(f"{rate * RATE_ABOVE:.2g}"))
    if quick:
        return {"lr": rates}
    return {
        "lr": rates,
        "rank": Choices((4, 16, 64)),
        "targets": Choices(("all-linear", "attention")),
    }


# --- reading -----------------------------------------------------------------------------------


def parse_search(texts: Sequence[str]) -> dict[str, Choices | Range]:
    """What ``--search`` says, in the order it is said.

    Raises:
        SpecError: a name is unknown or given twice, or a value cannot be read. All are listed.
    """
    found: dict[str, Choices | Range] = {}
    problems = []
    for part in itertools.chain.from_iterable(text.split() for text in texts):
        name, equals, rest = part.partition("=")
        if not equals or not rest:
            problems.append(f"{part!r} is not NAME=VALUES, such as rank=4,16 or lr=1e-4..1e-2")
        elif name not in _SETTINGS:
            problems.append(f"{name!r} cannot be searched; what can is {', '.join(SEARCHABLE)}")
        elif name in found:
            problems.append(f"{name} is given twice; give it once")
        else:
            try:
                found[name] = _dimension(name, rest)
            except ValueError as error:
                problems.append(f"{part!r}: {error}")
    if "alpha" in found and "alpha/r" in found:
        problems.append("alpha and alpha/r say the same thing twice; give one of them")
    if problems:
        raise SpecError(collected("This search cannot be made", problems))
    return found


def _dimension(name: str, text: str) -> Choices | Range:
    setting = _SETTINGS[name]
    low, dots, high = text.partition("..")
    if not dots:
        values = tuple(dict.fromkeys(_value(setting, one) for one in text.split(",") if one))
        if not values:
            raise ValueError("no value is given")
        return Choices(values)
    if setting.log is None:
        raise ValueError("it has no range; list its values with commas")
    ends = _value(setting, low), _value(setting, high)
    if ends[0] >= ends[1]:
        raise ValueError("the first end of a range must be below the second")
    if setting.log and ends[0] <= 0:
        raise ValueError("a range by ratio must begin above 0; list values that may be 0")
    if setting.parse is _whole:  # 4..64 is 4, 8, 16, 32, 64
        doubled = (ends[0] * 2**k for k in itertools.count())
        return Choices((*itertools.takewhile(lambda v: v < ends[1], doubled), ends[1]))
    return Range(*ends, log=setting.log)


def _value(setting: _Setting, text: str) -> Any:
    try:
        return setting.parse(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} given; expected {setting.expected}") from None


def space_to_dict(space: Space) -> dict[str, Any]:
    """Plain data: a list of values, or ``{low, high, log}``."""
    return {
        name: list(one.values) if isinstance(one, Choices) else dataclasses.asdict(one)
        for name, one in space.items()
    }


def space_from_dict(data: Mapping[str, Any]) -> dict[str, Choices | Range]:
    """The inverse of :func:`space_to_dict`."""
    return {
        name: Choices(tuple(one)) if isinstance(one, list) else Range(**one)
        for name, one in data.items()
    }


# --- using -------------------------------------------------------------------------------------


def assign(
    values: Values, spec: LoRASpec, settings: TrainSettings
) -> tuple[LoRASpec, TrainSettings]:
    """The settings with a candidate's values in their place.

    Raises:
        SpecError: a value is impossible, or switches another setting off.
    """
    lora = {n: v for n, v in values.items() if _SETTINGS[n].home is LoRASpec and n != "alpha/r"}
    if "targets" in lora:
        lora["targets"] = as_targets(lora["targets"])
    spec = dataclasses.replace(spec, **lora)
    if "alpha/r" in values:
        spec = dataclasses.replace(spec, alpha=spec.alpha_of(spec.rank, values["alpha/r"]))
    train = {n: v for n, v in values.items() if _SETTINGS[n].home is TrainSettings}
    return spec, dataclasses.replace(settings, **train)


def as_targets(text: str) -> str | tuple[str, ...]:
    """``"q_proj+v_proj"`` → both names."""
    parts = tuple(text.split("+"))
    return parts if len(parts) > 1 else text


def values_of(space: Space, spec: LoRASpec, settings: TrainSettings) -> dict[str, Any]:
    """What these settings are, as values of the searched settings."""

    def value(name: str) -> Any:
        if name == "alpha/r":
            return spec.scaling_of(spec.rank, spec.alpha)
        found = getattr(spec if _SETTINGS[name].home is LoRASpec else settings, name)
        return "+".join(found) if isinstance(found, tuple) else found

    return {name: value(name) for name in space}


def check_space(space: Space, spec: LoRASpec, settings: TrainSettings) -> None:
    """Refuse a space that holds nothing to choose from, or a value that is impossible.

    Raises:
        SpecError: all problems are listed.
    """
    problems = []
    if not any(isinstance(one, Range) or len(one.values) > 1 for one in space.values()):
        problems.append("there is nothing to choose from; give a range, or several values")
    for name, one in space.items():
        for value in one.values if isinstance(one, Choices) else (one.low, one.high):
            try:
                assign({name: value}, spec, settings)
            except SpecError as error:
                lines = str(error).splitlines()
                problems += [f"{name}={shown(value)}: {line.strip(' -')}" for line in lines[1:]]
    if problems:
        raise SpecError(collected("This search cannot be made", problems))


def extremes(space: Space, spec: LoRASpec, settings: TrainSettings) -> Iterator[LoRASpec]:
    """A spec for each choice of modules, at the highest rank: what must fit the model."""
    names = [n for n in ("targets", "layers", "bias") if isinstance(space.get(n), Choices)]
    ranks = space.get("rank")
    rank = {"rank": max(ranks.values)} if isinstance(ranks, Choices) else {}
    for chosen in itertools.product(*(space[name].values for name in names)):  # type: ignore[union-attr]
        yield assign({**rank, **dict(zip(names, chosen, strict=True))}, spec, settings)[0]


def spread(space: Space, number: int, seed: int) -> list[dict[str, Any]]:
    """Candidates that fill the space evenly: the most even of some Latin hypercubes.

    In each setting alone they are as evenly spread as ``number`` can be (McKay et al., 1979); of
    :data:`_DRAWN` such designs, the one whose nearest two are the farthest apart is taken.

    Returns:
        By ascending rate, where one is searched.
    """
    if not number:
        return []
    draw = np.random.default_rng(seed)
    designs = [
        np.stack([(draw.permutation(number) + 0.5) / number for _ in space], axis=1)
        for _ in range(_DRAWN)
    ]
    best = max(designs, key=_nearest)
    made = [
        {name: one.at(share) for (name, one), share in zip(space.items(), row, strict=True)}
        for row in best.tolist()
    ]
    unlike = [one for place, one in enumerate(made) if one not in made[:place]]
    return sorted(unlike, key=lambda one: one.get("lr", 0.0))


_DRAWN = 200


def _nearest(design: np.ndarray) -> float:
    apart = ((design[:, None] - design[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    return float(apart.min())


def shown(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, float):
        return (
            f"{value:.0e}".replace("e-0", "e-")
            if 0 < value < 1e-3 and _one_digit(value)
            else (f"{value:g}")
        )
    return str(value)


def _one_digit(value: float) -> bool:
    return float(f"{value:.0e}") == value


def described(values: Values) -> str:
    """``lr 0.002, rank 16, targets attention``."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())
