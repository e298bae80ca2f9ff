"""Frozen linears that share an input, with their adapters: forward and backward.

The low-rank products cost ``6 · N · r · (d_in + d_out)`` operations: two in the forward, whose
hidden ``A x`` is kept, and four in the backward. Of linears without dropout that share an input,
the A's are stacked, so that the input is read once. The gradient of a parameter that has a place
for it goes there and not through autograd (:mod:`lorakit.layers.gradients`).

Under a base of less precision the low-rank products are computed in the base's, where tensor cores
make them cheap, but on a CPU in that of the parameters: there such narrow products are no faster in
bfloat16, and parameters of float32 need not be rounded in each forward.

All runs inside of one node of the graph, where gradients are off.

Legend: ``N`` tokens, ``r`` rank; ``A [r, d_in]``, ``B [d_out, r]``, ``W [d_out, d_in]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers.dropout import keyed_dropout
from lorakit.layers.gradients import (
    gradient_product,
    gradient_products,
    gradient_sum,
    has_place,
    one_below_the_other,
)


class Part(NamedTuple):
    """One adapter's share of one linear, for a stretch of the tokens."""

    name: str
    start: int
    stop: int
    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    factor: float
    dropout: float

    @property
    def trained(self) -> bool:
        return self.A.requires_grad

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class Linear:
    """One frozen linear and who adapts it in this forward."""

    weight: Callable[[], Tensor]
    """[d_out, d_in], dense; made for the moment where it is stored in another way."""
    bias: Tensor | None
    number: int
    """Of the site, for its dropout."""
    parts: tuple[Part, ...] = ()

    @property
    def trained(self) -> bool:
        return any(part.trained for part in self.parts)


class _Run:
    """Parts of several linears that read the same rows of the input, stacked.

    Args:
        parts: of one adapter, each with the number of its linear.
    """

    def __init__(self, parts: Sequence[tuple[int, Part]]) -> None:
        _, first = parts[0]
        self.rows = slice(first.start, first.stop)
        self.trained = first.trained
        self.dropout = first.dropout
        self.members = tuple(parts)
        """(which linear, its part)."""
        self.factors = tuple(part.A for _, part in parts)
        self._together = one_below_the_other(self.factors)
        self._ranks = [part.rank for _, part in parts]
        others: list[nn.Parameter] = []
        for _, part in parts:
            others += [part.B] if part.bias is None else [part.B, part.bias]
        self.homeless = [p for p in (*self.factors, *others) if not has_place(p)]
        """Parameters whose gradients are given back, in their order."""

    def columns(self, hidden: Tensor) -> Sequence[Tensor]:
        """Each member's part of hidden values [N, Σ r], in its memory."""
        if len(self.members) == 1:
            return (hidden,)
        found: Sequence[Tensor] = torch.split_with_sizes(hidden, self._ranks, dim=1)
        return found

    def a(self, dtype: torch.dtype) -> Tensor:
        """The A's, one below the other: in their own memory where they lie so."""
        return _in(torch.cat(self.factors) if self._together is None else self._together, dtype)


class _Share(NamedTuple):
    """A part, and where the group finds what it reads."""

    run: int
    member: int
    part: Part
    Bt: Tensor
    """[r, d_out], its B."""


class Group:
    """Linears that share an input.

    Args:
        linears: in the order of their outputs.
        keys: int64 [N], of keyed dropout; ``None`` drops nothing.
    """

    def __init__(self, linears: Sequence[Linear], keys: Tensor | None = None) -> None:
        self.linears = tuple(linears)
        self.keys = keys
        self.runs = self._stacked()
        self._cuts = _cuts([run.rows for run in self.runs])
        self._shares: list[list[_Share]] = [[] for _ in self.linears]
        with torch.no_grad():
            for i, run in enumerate(self.runs):
                for j, (which, part) in enumerate(run.members):
                    self._shares[which].append(_Share(i, j, part, part.B.t()))

    @property
    def trained(self) -> bool:
        return any(linear.trained for linear in self.linears)

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that have no place, in the order of :meth:`backward`'s gradients."""
        return [parameter for run in self.runs for parameter in run.homeless]

    @property
    def adds_gradients(self) -> bool:
        """Whether the backward adds gradients of which autograd does not know."""
        return any(part.trained and has_place(part.A) for lin in self.linears for part in lin.parts)

    def rows(self, where: Tensor, count: int) -> Group:
        """The same for a selection of the tokens.

        Args:
            where: int64 [S], ascending, the tokens that are left.
            count: N.
        """
        if self.keys is None and all(
            part.start == 0 and part.stop == count for lin in self.linears for part in lin.parts
        ):
            edges = {0: 0, count: len(where)}
        else:
            borders = {e for lin in self.linears for p in lin.parts for e in (p.start, p.stop)}
            edges = {e: int((where < e).sum()) for e in borders}
        linears = []
        for linear in self.linears:
            parts = tuple(
                p._replace(start=edges[p.start], stop=edges[p.stop]) for p in linear.parts
            )
            linears.append(Linear(linear.weight, linear.bias, linear.number, parts))
        return Group(linears, None if self.keys is None else self.keys.index_select(0, where))

    def forward(self, x: Tensor, onto: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """All outputs, and the hidden ``A x`` of each run.

        Args:
            x: [N, d_in].
            onto: [N, d_out], what the first output is added to; a new tensor is made.
        """
        computed = self._computed(x)
        read = _in(x, computed) if self.runs else x
        inputs = self._of_runs(read)
        hidden = [
            F.linear(self._dropped(rows, run), run.a(computed))
            for run, rows in zip(self.runs, inputs, strict=True)
        ]
        del read, inputs  # before the outputs are there too
        columns = [run.columns(h) for run, h in zip(self.runs, hidden, strict=True)]
        outputs = []
        for linear, shares in zip(self.linears, self._shares, strict=True):
            if onto is None:
                y = F.linear(x, linear.weight(), linear.bias)
            else:
                y = torch.addmm(onto, x, linear.weight().t())
                y = y if linear.bias is None else y.add_(linear.bias)
            if shares:  # what changes nothing leaves it as it is, whatever it is computed in
                y = _in(y, computed)
                self._adapt(self._of_runs(y), shares, columns)
            outputs.append(_in(y, x.dtype))
        return outputs, hidden

    def backward(
        self,
        douts: Sequence[Tensor],
        x: Tensor,
        hidden: Sequence[Tensor],
        *,
        need_input: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The input's gradient, and those of :meth:`parameters`.

        Args:
            douts: gradient of each output, [N, d_out].
            x: the input of the forward.
            hidden: from the forward.
            need_input: whether anything below wants the input's gradient.
        """
        dtype, computed = x.dtype, self._computed(x)
        dx: Tensor | None = None
        if need_input:
            for dy, linear in zip(douts, self.linears, strict=True):
                weight = linear.weight()
                if dx is None:
                    dx = _in(dy @ weight, computed)
                elif computed == x.dtype:
                    dx.addmm_(dy, weight)
                else:
                    dx.add_(dy @ weight)
        dhs = [torch.empty_like(h) for h in hidden]
        columns = [run.columns(h) for run, h in zip(self.runs, hidden, strict=True)]
        into = [run.columns(dh) for run, dh in zip(self.runs, dhs, strict=True)]
        through_b: list[list[Tensor | None]] = [[] for _ in self.runs]
        for dy, shares in zip(douts, self._shares, strict=True):
            if not shares:
                continue
            rows = self._of_runs(_in(dy, computed))
            for i, j, part, _ in shares:
                through_b[i] += self._through_b(part, rows[i], columns[i][j], into[i][j])
        x = _in(x, computed) if any(run.trained for run in self.runs) else x
        inputs = self._of_runs(x)
        onto = [None] * len(self.runs) if dx is None else self._of_runs(dx)
        gradients: list[Tensor | None] = []
        for run, dh, rows_x, rows_dx, of_b in zip(
            self.runs, dhs, inputs, onto, through_b, strict=True
        ):
            gradients += self._through_a(run, dh, rows_x, rows_dx, of_b)
        return None if dx is None else _in(dx, dtype), gradients

    def _of_runs(self, tensor: Tensor) -> Sequence[Tensor]:
        """Each run's rows of a tensor [N, …], in its memory."""
        if self._cuts is None:
            return [tensor[run.rows] for run in self.runs]
        sizes, which = self._cuts
        # all views in one call: of many adapters they are many
        parts = torch.split_with_sizes(tensor, [*sizes, len(tensor) - sum(sizes)])
        return [parts[i] for i in which]

    @staticmethod
    def _adapt(
        rows: Sequence[Tensor], shares: Sequence[_Share], columns: Sequence[Sequence[Tensor]]
    ) -> None:
        """Add to the runs' rows of a linear's output what its parts change."""
        for i, j, part, Bt in shares:
            y = rows[i]
            y.addmm_(columns[i][j], _in(Bt, y.dtype), alpha=part.factor)
            if part.bias is not None:
                y.add_(_in(part.bias, y.dtype), alpha=part.factor)

    def _computed(self, x: Tensor) -> torch.dtype:
        """What the low-rank products are computed in."""
        parameters = [run.factors[0].dtype for run in self.runs] if x.is_cpu else []
        return functools.reduce(torch.promote_types, parameters, x.dtype)

    @staticmethod
    def _through_b(part: Part, dy: Tensor, h: Tensor, dh: Tensor) -> list[Tensor | None]:
        """Write the gradient of a part's hidden values [n, r]; gives those of B and the bias."""
        torch.addmm(dh, dy, _in(part.B, dy.dtype), beta=0, alpha=part.factor, out=dh)
        if not part.trained:
            return []
        gradients = [gradient_product(part.B, dy, h, part.factor)]
        if part.bias is not None:
            gradients.append(gradient_sum(part.bias, dy.sum(0).mul_(part.factor)))
        return gradients

    def _through_a(
        self,
        run: _Run,
        dh: Tensor,
        x: Tensor,
        dx: Tensor | None,
        through_b: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Add the input's gradient to dx; gives those of a run's parameters that have no place.

        Args:
            x: the run's rows of the input; ``dx`` alike.
        """
        gradients: list[Tensor | None] = [None] * len(run.homeless)
        if run.trained:
            through_a = gradient_products(run.factors, dh, self._dropped(x, run))
            gradients = [one for one in (*through_a, *through_b) if one is not None]
        if dx is not None:
            A = run.a(dh.dtype)
            if run.dropout and self.keys is not None:
                dx += self._dropped(dh @ A, run)
            else:
                dx.addmm_(dh, A)
        return gradients

    def _dropped(self, x: Tensor, run: _Run) -> Tensor:
        """Dropout with the run's mask; it is linear, so the backward applies it too."""
        if not run.dropout or self.keys is None:
            return x
        number = self.linears[run.members[0][0]].number
        return keyed_dropout(x, self.keys[run.rows], number, run.dropout)

    def _stacked(self) -> list[_Run]:
        runs: dict[tuple[object, ...], list[tuple[int, Part]]] = {}
        for which, linear in enumerate(self.linears):
            for part in linear.parts:
                if part.start == part.stop and not part.trained:
                    continue
                alone = part.dropout and self.keys is not None  # each site has its own mask
                key = (part.name, part.start, part.stop, part.trained, which if alone else None)
                runs.setdefault(key, []).append((which, part))
        return [_Run(parts) for parts in runs.values()]


def _cuts(rows: Sequence[slice]) -> tuple[list[int], list[int]] | None:
    """Sizes of the stretches of rows up to the last one, and which of them each one is.

    ``None`` if some overlap.
    """
    sizes: list[int] = []
    number: dict[tuple[int, int], int] = {}
    end = 0
    for start, stop in sorted({(one.start, one.stop) for one in rows}):
        if start < end:
            return None
        sizes.append(start - end)
        number[start, stop] = len(sizes)
        sizes.append(stop - start)
        end = stop
    return sizes, [number[one.start, one.stop] for one in rows]


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
