"""Routings: which rows of a batch use which adapters, with which weights.

A :class:`Routing` is what the user says. A :class:`Plan` is the same for one forward, with the
row count known: what the sites read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import RoutingError

#: one row's adapters with their weights; empty is the bare base
Mix = tuple[tuple[str, float], ...]
#: what a user may write for one row
MixLike = str | None | Mapping[str, float]
Axis = Literal["uniform", "row", "token"]
Order = Literal["interleave", "tile"]


def as_mix(value: MixLike) -> Mix:
    """``None`` → the bare base; a name → weight one; a mapping → a blend.

    Raises:
        RoutingError: it is none of these, or a weight is not finite.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return ((value, 1.0),)
    if isinstance(value, Mapping):
        mix = tuple((str(name), float(weight)) for name, weight in value.items())
        for name, weight in mix:
            if not math.isfinite(weight):
                raise RoutingError(
                    f"the weight of adapter {name!r} is {weight}, which is not finite"
                )
        return mix
    raise RoutingError(
        f"a row's adapters are {value!r}; expected a name, None for the bare base, "
        'or weights such as {"a": 0.7, "b": 0.3}'
    )


@dataclass(frozen=True)
class Routing:
    """Which rows use which adapters; made with ``uniform``, ``rows`` or ``tokens``."""

    axis: Axis
    mixes: tuple[Mix, ...]
    """One for ``uniform``, one per row, or one per run of tokens."""
    lengths: tuple[int, ...] = ()
    """Tokens in each run, for ``token``."""
    expand: int = 1
    """How many times a caller may multiply the rows: beams, guidance."""
    order: Order = "interleave"
    """``interleave``: r0 r0 r1 r1 (beams); ``tile``: r0 r1 r0 r1 (guidance)."""
    dropout_keys: Tensor | None = field(default=None, compare=False)
    """int64, one per token in the shape of the token ids; see ``layers.dropout``."""

    @classmethod
    def uniform(cls, mix: MixLike) -> Routing:
        """Every row alike."""
        return cls("uniform", (as_mix(mix),))

    @classmethod
    def rows(
        cls, mixes: Sequence[MixLike], *, expand: int = 1, order: Order = "interleave"
    ) -> Routing:
        """One entry per row of the batch, multiplied at most ``expand`` times by the caller."""
        if isinstance(mixes, (str, Mapping)) or not mixes:
            raise RoutingError(f"rows is {mixes!r}; expected a list with one entry per row")
        if expand < 1 or order not in ("interleave", "tile"):
            raise RoutingError(
                f"expand is {expand!r} and order {order!r}; expected a number of at least 1 "
                'and "interleave" or "tile"'
            )
        return cls("row", tuple(map(as_mix, mixes)), expand=expand, order=order)

    @classmethod
    def tokens(cls, runs: Sequence[tuple[MixLike, int]]) -> Routing:
        """Contiguous runs of a packed batch: (adapters, number of tokens)."""
        if not runs or any(length < 1 for _, length in runs):
            raise RoutingError("every run of a token routing needs at least one token")
        return cls("token", tuple(as_mix(m) for m, _ in runs), tuple(n for _, n in runs))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for mix in self.mixes for name, _ in mix)

    def with_expand(self, expand: int) -> Routing:
        """The same, declared to be multiplied by beams.

        Raises:
            RoutingError: the rows are tiled already; no order describes both.
        """
        if self.axis != "row" or expand == 1:
            return self
        if self.expand > 1 and self.order == "tile":
            raise RoutingError("rows that are tiled (guidance) cannot be multiplied by beams too")
        return replace(self, expand=self.expand * expand, order="interleave")

    def with_dropout_keys(self, keys: Tensor) -> Routing:
        """The same with keyed dropout."""
        return replace(self, dropout_keys=keys)


class Share(NamedTuple):
    """The rows of one adapter at one site."""

    name: str
    rows: Tensor | None
    """int64 indices; ``None`` means all of them."""
    weight: float | Tensor
    """One weight for all, or one per row."""


class Stretch(NamedTuple):
    """Tokens of a packed row that use an adapter."""

    name: str
    start: int
    stop: int
    """Behind the last."""
    weight: float


class Plan:
    """A routing for one forward.

    Args:
        routing: what the user said.
        batch: rows of the forward's input, if known.
        widths: second dimensions of its inputs; a site that sees ``batch · width`` rows sees
            the tokens flattened.

    Raises:
        RoutingError: the batch does not fit the routing.
    """

    def __init__(self, routing: Routing, batch: int | None, widths: frozenset[int]) -> None:
        self.routing = routing
        self.batch = batch
        self.widths = widths
        self.dropout_keys = routing.dropout_keys
        self.uniform: tuple[Share, ...] | None = None
        if routing.axis == "uniform":
            self.uniform = tuple(Share(name, None, w) for name, w in routing.mixes[0])
        elif len(set(routing.mixes)) == 1 and routing.axis == "row":
            # every row alike, but the count was declared and is still checked below
            self.uniform = tuple(Share(name, None, w) for name, w in routing.mixes[0])
        if batch is not None and routing.axis == "row":
            self._factor(batch)  # raises at the entry rather than at the first site
        self._shares: dict[tuple[int, torch.device, bool], tuple[Share, ...]] = {}
        self._stretches: dict[int, tuple[Stretch, ...]] = {}

    def stretches(self, count: int) -> tuple[Stretch, ...]:
        """What a packed row of ``count`` tokens uses, from its begin to its end.

        A routing by rows has no meaning there, unless all rows are alike.

        Raises:
            RoutingError: the routing does not cover the row.
        """
        if count not in self._stretches:
            self._stretches[count] = tuple(_stretches(self.routing, count))
        return self._stretches[count]

    def _factor(self, rows: int) -> int:
        """How often the declared rows are repeated in ``rows``."""
        declared, expand = len(self.routing.mixes), self.routing.expand
        for factor in {1, expand}:
            if rows == declared * factor:
                return factor
        also = f" or {declared * expand} (×{expand})" if expand > 1 else ""
        raise RoutingError(
            f"the batch has {rows} rows; the routing was given for {declared}{also}. Give one "
            "entry per row; where the caller multiplies rows (guidance), declare it: "
            'use(rows=[…], expand=2, order="tile")'
        )

    def _mix_of(self, count: int, *, flattened: bool = False) -> Tensor:
        """int64 [count]: which of the routing's mixes each row (or token) at a site has."""
        numbers = torch.arange(len(self.routing.mixes))
        if self.routing.axis == "token":
            numbers = numbers.repeat_interleave(torch.tensor(self.routing.lengths))
            if count != len(numbers):
                raise RoutingError(
                    f"a site sees {count} tokens; the routing covers {len(numbers)}. A site that "
                    "sees a part of the tokens needs a uniform routing"
                )
            return numbers
        per_row = 1
        if flattened:
            rows = len(self.routing.mixes) if self.batch is None else self.batch
            if count % rows:
                raise RoutingError(
                    f"a site sees {count} tokens of {rows} rows, which do not have equally many; "
                    "it needs a uniform routing"
                )
            per_row, count = count // rows, rows
        elif self.batch is not None and count != self.batch:
            for width in self.widths:
                if count == self.batch * width:
                    per_row, count = width, self.batch
                    break
        factor = self._factor(count)
        if self.routing.order == "tile":
            numbers = numbers.repeat(factor)
        else:
            numbers = numbers.repeat_interleave(factor)
        return numbers.repeat_interleave(per_row)

    def shares(
        self, count: int, device: torch.device, *, flattened: bool = False
    ) -> tuple[Share, ...]:
        """The adapters in use at a site that sees ``count`` rows (or tokens), with their rows.

        Args:
            flattened: the site sees the tokens of all rows one behind the other.
        """
        if self.uniform is not None:
            return self.uniform
        key = (count, device, flattened)
        if key not in self._shares:
            numbers = self._mix_of(count, flattened=flattened)
            shares = []
            for name in dict.fromkeys(n for mix in self.routing.mixes for n, _ in mix):
                per_mix = [dict(mix).get(name) for mix in self.routing.mixes]
                uses = torch.tensor([weight is not None for weight in per_mix])[numbers]
                rows = uses.nonzero().flatten()
                used = {weight for weight in per_mix if weight is not None}
                weight: float | Tensor = next(iter(used))
                if len(used) > 1:
                    each = torch.tensor([w or 0.0 for w in per_mix], dtype=torch.float64)
                    weight = each[numbers[rows]].to(device)
                everywhere = len(rows) == count
                shares.append(Share(name, None if everywhere else rows.to(device), weight))
            self._shares[key] = tuple(shares)
        return self._shares[key]

    def matrix(self, names: Sequence[str]) -> Tensor:
        """float64 [rows, K]: the weight of each adapter for each row, as compiled code reads it.

        One row where all are alike and their number is not known.
        """
        column = {name: k for k, name in enumerate(names)}
        per_mix = torch.zeros(len(self.routing.mixes), len(names), dtype=torch.float64)
        for i, mix in enumerate(self.routing.mixes):
            for name, weight in mix:
                per_mix[i, column[name]] += weight
        if self.routing.axis == "uniform":
            return per_mix.repeat(self.batch or 1, 1)
        if self.routing.axis == "token":
            return per_mix[self._mix_of(sum(self.routing.lengths))]
        return per_mix[self._mix_of(self.batch or len(self.routing.mixes))]


def _stretches(routing: Routing, count: int) -> list[Stretch]:
    if routing.axis != "token":
        return [Stretch(name, 0, count, weight) for name, weight in routing.mixes[0]]
    if sum(routing.lengths) != count:
        raise RoutingError(
            f"a packed row has {count} tokens; the routing covers {sum(routing.lengths)}"
        )
    found: list[Stretch] = []
    start = 0
    for mix, length in zip(routing.mixes, routing.lengths, strict=True):
        for name, weight in mix:
            before = found[-1] if found else None
            if (
                before is not None
                and len(mix) == 1
                and (before.name, before.stop, before.weight) == (name, start, weight)
            ):
                found[-1] = before._replace(stop=start + length)
            else:
                found.append(Stretch(name, start, start + length, weight))
        start += length
    return found
