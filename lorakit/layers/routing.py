"""Routings: which rows of a batch use which adapters, with which weights.

A :class:`Routing` is what the user says. A :class:`Plan` is the same for one forward, with the
row count known: what the sites read.
"""

from __future__ import annotations

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
    """``None`` → the bare base; a name → weight one; a mapping → a blend."""
    if value is None:
        return ()
    if isinstance(value, str):
        return ((value, 1.0),)
    if isinstance(value, Mapping):
        return tuple((str(name), float(weight)) for name, weight in value.items())
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

    def with_expand(self, expand: int, order: Order = "interleave") -> Routing:
        """The same, declared to be multiplied by its caller."""
        if self.axis != "row" or expand == 1:
            return self
        return replace(self, expand=self.expand * expand, order=order)

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
        self._shares: dict[tuple[int, torch.device], tuple[Share, ...]] = {}

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

    def _row_mixes(self, count: int) -> tuple[Mix, ...]:
        """One mix for each of ``count`` rows at a site."""
        mixes = self.routing.mixes
        if self.routing.axis == "token":
            spread = [m for m, n in zip(mixes, self.routing.lengths, strict=True) for _ in range(n)]
            if count != len(spread):
                raise RoutingError(
                    f"a site sees {count} tokens; the routing covers {len(spread)}. A site that "
                    "sees a part of the tokens needs a uniform routing"
                )
            return tuple(spread)
        per_row = 1
        if self.batch is not None and count != self.batch:
            for width in self.widths:
                if count == self.batch * width:
                    per_row, count = width, self.batch
                    break
        factor = self._factor(count)
        if self.routing.order == "tile":
            mixes = mixes * factor
        else:
            mixes = tuple(m for m in mixes for _ in range(factor))
        return tuple(m for m in mixes for _ in range(per_row))

    def shares(self, count: int, device: torch.device) -> tuple[Share, ...]:
        """The adapters in use at a site that sees ``count`` rows (or tokens), with their rows."""
        if self.uniform is not None:
            return self.uniform
        key = (count, device)
        if key not in self._shares:
            rows: dict[str, list[int]] = {}
            weights: dict[str, list[float]] = {}
            for i, mix in enumerate(self._row_mixes(count)):
                for name, weight in mix:
                    rows.setdefault(name, []).append(i)
                    weights.setdefault(name, []).append(weight)
            self._shares[key] = tuple(
                Share(
                    name,
                    None if len(indices) == count else torch.tensor(indices, device=device),
                    weights[name][0]
                    if len(set(weights[name])) == 1
                    else torch.tensor(weights[name], dtype=torch.float64, device=device),
                )
                for name, indices in rows.items()
            )
        return self._shares[key]

    def matrix(self, names: Sequence[str]) -> Tensor:
        """float64 [rows, K]: the weight of each adapter for each row, as compiled code reads it."""
        if self.routing.axis == "uniform":
            mixes = self.routing.mixes * (self.batch or 1)
        else:
            mixes = self._row_mixes(
                sum(self.routing.lengths)
                if self.routing.axis == "token"
                else self.batch or len(self.routing.mixes)
            )
        column = {name: k for k, name in enumerate(names)}
        matrix = torch.zeros(len(mixes), len(names), dtype=torch.float64)
        for i, mix in enumerate(mixes):
            for name, weight in mix:
                matrix[i, column[name]] += weight
        return matrix
