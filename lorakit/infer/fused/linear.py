"""Frozen linears that share an input, with their adapters: forward and backward.

The low-rank products cost ``6 · N · r · (d_in + d_out)`` operations: two in the forward, whose
hidden ``A x`` is kept, and four in the backward. Of linears without dropout that share an input,
the A's are stacked, so that the input is read once. A gradient is computed where its parameter
keeps memory for it (:mod:`lorakit.layers.gradients`): of many adapters in one forward, tensors of
their own would cost as much time as the products.

Legend: ``N`` tokens, ``r`` rank; ``A [r, d_in]``, ``B [d_out, r]``, ``W [d_out, d_in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers.dropout import keyed_dropout
from lorakit.layers.gradients import gradient_product


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

    def parameters(self) -> list[nn.Parameter]:
        """What the backward gives gradients for, in this order."""
        return [self.A, self.B, *([] if self.bias is None else [self.bias])]


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


class _Run(NamedTuple):
    """Parts of several linears that read the same rows of the input and can be stacked."""

    members: list[tuple[int, Part]]
    """(which linear, its part)."""


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

    @property
    def trained(self) -> bool:
        return any(linear.trained for linear in self.linears)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' tensors, in the order of :meth:`backward`'s gradients."""
        return [p for run in self.runs for _, part in run.members for p in part.parameters()]

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
        outputs = []
        for linear in self.linears:
            if onto is not None:
                y = torch.addmm(onto, x, linear.weight().t())
                y = y if linear.bias is None else y.add_(linear.bias)
            else:
                y = F.linear(x, linear.weight(), linear.bias)
            outputs.append(y)
        hidden = []
        for run in self.runs:
            first = run.members[0][1]
            h = F.linear(self._input(x, run), _cat([p.A.detach() for _, p in run.members], x.dtype))
            hidden.append(h)
            column = 0
            for which, part in run.members:
                mine = h[:, column : column + len(part.A)]
                column += len(part.A)
                y = outputs[which][first.start : first.stop]
                y.addmm_(mine, part.B.detach().to(x.dtype).t(), alpha=part.factor)
                if part.bias is not None:
                    y.add_(part.bias.detach().to(x.dtype), alpha=part.factor)
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
        dx: Tensor | None = None
        if need_input:
            for dy, linear in zip(douts, self.linears, strict=True):
                weight = linear.weight()
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        gradients: list[Tensor | None] = []
        for run, h in zip(self.runs, hidden, strict=True):
            gradients += self._run_backward(run, h, douts, x, dx)
        return dx, gradients

    def _run_backward(
        self, run: _Run, h: Tensor, douts: Sequence[Tensor], x: Tensor, dx: Tensor | None
    ) -> list[Tensor | None]:
        first = run.members[0][1]
        rows = slice(first.start, first.stop)
        dh = torch.empty_like(h)
        column = 0
        for_b: list[Tensor | None] = []
        for which, part in run.members:
            mine = slice(column, column + len(part.A))
            column += len(part.A)
            dy = douts[which][rows]
            B, into = part.B.detach().to(x.dtype), dh[:, mine]
            torch.addmm(into, dy, B, beta=0, alpha=part.factor, out=into)
            for_b.append(
                gradient_product(part.B, dy, h[:, mine], part.factor) if part.trained else None
            )
        A = _cat([p.A.detach() for _, p in run.members], x.dtype)
        entered = self._input(x, run) if any(part.trained for _, part in run.members) else None
        if dx is not None:
            if first.dropout and self.keys is not None:
                dx[rows] += self._dropped(dh @ A, run)
            else:
                dx[rows].addmm_(dh, A)
        gradients: list[Tensor | None] = []
        column = 0
        for (which, part), db in zip(run.members, for_b, strict=True):
            mine = slice(column, column + len(part.A))
            column += len(part.A)
            da = dbias = None
            if entered is not None and part.trained:
                da = gradient_product(part.A, dh[:, mine], entered)
            if part.bias is not None and part.trained:
                dbias = douts[which][rows].sum(0).mul_(part.factor)
            found: list[Tensor | None] = [da, db, *([] if part.bias is None else [dbias])]
            for parameter, gradient in zip(part.parameters(), found, strict=True):
                gradients.append(None if gradient is None else gradient.to(parameter.dtype))
        return gradients

    def _input(self, x: Tensor, run: _Run) -> Tensor:
        """What the A's of a run read: its rows of x, dropped."""
        first = run.members[0][1]
        return self._dropped(x[first.start : first.stop], run)

    def _dropped(self, x: Tensor, run: _Run) -> Tensor:
        """Dropout with the run's mask; it is linear, so the backward applies it too."""
        which, first = run.members[0]
        if not first.dropout or self.keys is None:
            return x
        keys = self.keys[first.start : first.stop]
        return keyed_dropout(x, keys, self.linears[which].number, first.dropout)

    def _stacked(self) -> list[_Run]:
        runs: dict[tuple[object, ...], _Run] = {}
        for which, linear in enumerate(self.linears):
            for part in linear.parts:
                if part.start == part.stop and not part.trained:
                    continue
                alone = part.dropout and self.keys is not None  # each site has its own mask
                key = (part.name, part.start, part.stop, which if alone else None)
                runs.setdefault(key, _Run([])).members.append((which, part))
        return list(runs.values())


def _cat(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype)
