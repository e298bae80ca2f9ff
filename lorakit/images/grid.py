"""``--grid "weight=0,0.5,1 seed=1,2,3"``: a table of pictures over one or two of their settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import InputError, SpecError, collected
from lorakit.images.drawing import Cell

AXES = ("weight", "adapter", "prompt", "seed", "step", "start")
#: more would be a sheet that nobody can look at
_MOST_CELLS = 400


@dataclass(frozen=True)
class Axis:
    """One side of a table."""

    name: str
    values: tuple[Any, ...]
    """``weight``: factors; ``adapter``: names, ``None`` for the base; ``prompt``: texts; ``seed``
    and ``step`` (denoising steps): whole numbers; ``start``: shares of the steps."""

    def labels(self) -> list[str]:
        """For the sheet."""
        if self.name == "prompt":
            return [str(value) for value in self.values]
        if self.name == "adapter":
            return ["base" if value is None else str(value) for value in self.values]
        if self.name in ("weight", "start"):
            return [f"{self.name} {value:g}" for value in self.values]
        return [f"{self.name} {value}" for value in self.values]  # to the last digit


def parse_grid(text: str, prompts: Sequence[str], adapters: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of a table: its rows first, its columns last.

    Args:
        text: axes with a space between; ``prompt`` and ``adapter`` may stand without values, which
            means all of them, and the base before the adapters.
        prompts: those that were given; the axis names them by number, from 1.
        adapters: names of those that were given.

    Raises:
        InputError: it names no such thing; everything wrong is listed.
    """
    parts = text.split()
    problems: list[str] = []
    axes: list[Axis] = []
    for part in parts:
        name, equals, tail = part.partition("=")
        if name not in AXES:
            problems.append(f"{part!r}: the axes are {', '.join(AXES)}")
            continue
        try:
            values = _values(name, tail if equals else None, prompts, adapters)
        except InputError as error:
            problems.append(f"{part}: {error}")
            continue
        axes.append(Axis(name, values))
    names = [axis.name for axis in axes]
    problems += [f"{name} is there twice" for name in AXES if names.count(name) > 1]
    if not problems and not 1 <= len(axes) <= 2:
        problems.append(f"{len(axes)} axes are given; a table has one or two")
    if not adapters and "weight" in names:
        problems.append("weight: there is no adapter to weigh; give --adapter")
    if not adapters and "start" in names:
        problems.append("start: there is no adapter that could; give --adapter")
    if problems:
        raise InputError(collected(f"--grid {text!r} is not understood", problems))
    size = len(axes[0].values) * (len(axes[1].values) if len(axes) > 1 else 1)
    if size > _MOST_CELLS:
        raise SpecError(f"--grid has {size} pictures; at most {_MOST_CELLS} fit a sheet")
    return tuple(axes) if len(axes) == 2 else (Axis("row", ("",)), axes[0])


def _values(
    name: str, text: str | None, prompts: Sequence[str], adapters: Sequence[str]
) -> tuple[Any, ...]:
    if text is None:
        if name == "prompt":
            return tuple(prompts)
        if name == "adapter":
            return (None, *adapters)
        raise InputError(f"it has no values; write {name}=…")
    words = [word for word in text.split(",") if word]
    if not words:
        raise InputError("it has no values")
    if name == "adapter":
        unknown = [word for word in words if word not in (*adapters, "base")]
        if unknown:
            there = ", ".join(adapters) or "none"
            raise InputError(f"no adapter is called {', '.join(unknown)}; there are: {there}, base")
        return tuple(None if word == "base" else word for word in words)
    if name == "weight":
        return tuple(_number(word) for word in words)
    if name == "start":
        return tuple(_share(word) for word in words)
    numbers = [_whole(word, 1 if name in ("step", "prompt") else 0) for word in words]
    if name == "prompt":
        beyond = [number for number in numbers if number > len(prompts)]
        if beyond:
            raise InputError(f"there are {len(prompts)} prompts, and no number {beyond[0]}")
        return tuple(prompts[number - 1] for number in numbers)
    return tuple(numbers)


def _number(word: str) -> float:
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", word) or abs(float(word)) > 1e6:
        raise InputError(f"{word!r} is no number")
    return float(word)


def _share(word: str) -> float:
    if not 0 <= (share := _number(word)) < 1:
        raise InputError(f"{word!r} is no share of the steps, from 0 to below 1")
    return share


def _whole(word: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,18}", word) or int(word) < least:
        raise InputError(f"{word!r} is no whole number of at least {least}")
    return int(word)


def cells_of(axes: tuple[Axis, ...], first: Cell, weights: Mapping[str, float]) -> list[list[Cell]]:
    """The table, [rows][columns].

    Args:
        first: what no axis says.
        weights: of the adapters; together, where no axis names one of them.
    """
    rows, columns = axes
    return [
        [_cell(first, {rows.name: row, columns.name: column}, weights) for column in columns.values]
        for row in rows.values
    ]


def _cell(first: Cell, chosen: Mapping[str, Any], weights: Mapping[str, float]) -> Cell:
    mix = dict(weights)
    if "adapter" in chosen:
        name = chosen["adapter"]
        mix = {} if name is None else {name: weights[name]}
    factor = chosen.get("weight", 1.0)
    mix = {name: weight * factor for name, weight in mix.items() if weight * factor}
    changes: dict[str, Any] = {"mix": mix or None}
    fields = {"prompt": "prompt", "seed": "seed", "step": "steps", "start": "start"}
    changes |= {name: chosen[axis] for axis, name in fields.items() if axis in chosen}
    return dataclasses.replace(first, **changes)
