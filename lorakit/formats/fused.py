"""Projections that one file holds joined and another apart, such as q, k and v.

Legend: ``A_i [r_i, d_in]``, ``B_i [d_i, r_i]`` of part i; n parts. All parts see the same input::

    joined  A = [A_1; …; A_n]  [Σr_i, d_in]      B = diag(B_1, …, B_n)  [Σd_i, Σr_i]

Parts with the same A share its rows, so what was trained joined comes back joined as it was. Going
apart, each part keeps those columns of B that act on it, so what was joined here comes apart as it
was. The deltas are the same values in both directions, without arithmetic, wherever the parts have
one scaling.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.sites import LowRank


def split(site: LowRank, sizes: Sequence[int]) -> list[LowRank | None]:
    """The parts of a joined linear site, each with its own rows of B.

    Args:
        site: joined; d_out = Σ sizes.
        sizes: outputs of each part, in the order of the rows.

    Returns:
        A site by part. ``None`` stands for a part that the site does not change while it changes
        others.

    Raises:
        ValueError: the sizes do not add up, or the site is no linear one.
    """
    if site.kind != "linear" or min(sizes) < 1 or sum(sizes) != site.B.shape[0]:
        raise ValueError(
            f"a {site.kind} site with {site.B.shape[0]} outputs is not split into {list(sizes)}"
        )
    blocks = _rows(site.B, sizes)
    columns = _columns(blocks, site.rank)
    biases = _parts_of(site.bias, sizes)
    magnitudes = _parts_of(site.magnitude, sizes)
    parts: list[LowRank | None] = []
    for block, kept, bias, magnitude in zip(blocks, columns, biases, magnitudes, strict=True):
        if kept is None and bias is None and magnitude is None:
            parts.append(None)
            continue
        rows = torch.tensor([0]) if kept is None else kept
        parts.append(
            replace(
                site,
                A=site.A[rows].contiguous(),
                B=block[:, rows].contiguous(),
                bias=bias,
                magnitude=magnitude,
            )
        )
    return parts


def _columns(blocks: Sequence[Tensor], rank: int) -> list[Tensor | None]:
    """The columns of B that each part keeps; ``None`` for a part that is not changed."""
    acts = torch.stack([(block != 0).any(dim=0) for block in blocks])  # [n, r]
    n = len(blocks)
    changed = acts.any(dim=1)
    if not changed.any():
        changed[:] = True  # a fresh adapter, whose B is zero
    every = torch.arange(rank)
    if rank % n == 0 and bool(changed.all()):
        # parts of one rank, whose own zero columns must not be taken for another's
        owner = every // (rank // n)
        if not bool((acts & (owner != torch.arange(n).unsqueeze(1))).any()):
            return [every[owner == i] for i in range(n)]
    used = acts.any(dim=0)
    if bool((acts | ~used).all(dim=1)[changed].all()):
        return [every if c else None for c in changed.tolist()]  # one A for all, dead rows kept
    return [every[row] if c else None for row, c in zip(acts, changed.tolist(), strict=True)]


def _parts_of(vector: Tensor | None, sizes: Sequence[int]) -> list[Tensor | None]:
    if vector is None:
        return [None] * len(sizes)
    return [part.contiguous() for part in _rows(vector, sizes)]


def _rows(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = list(itertools.accumulate(sizes))
    return [tensor[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def join(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    """The joined site of parts that see the same input; the inverse of :func:`split`.

    Args:
        parts: linear sites; ``None`` where one is not adapted.
        sizes: outputs of each part.

    Raises:
        ValueError: the parts do not fit together: different inputs, or only some have a DoRA
            magnitude, for which the others' weights would be needed.
    """
    there = [part for part in parts if part is not None]
    for part, size in zip(parts, sizes, strict=True):
        if part is not None and (part.kind != "linear" or part.B.shape[0] != size):
            raise ValueError(f"a {part.kind} part has {part.B.shape[0]} outputs; expected {size}")
    if not there or len({part.A.shape[1] for part in there}) != 1:
        raise ValueError("parts that are joined need one input")
    dora = [part.magnitude for part in parts if part is not None and part.magnitude is not None]
    if dora and len(dora) < len(parts):
        raise ValueError("some parts have a DoRA magnitude and some have none")
    scaling = there[0].scaling
    folded = [None if part is None else _at_scaling(part, scaling) for part in parts]
    shared = _distinct([part.A for part in folded if part is not None])
    dtype = _common_dtype([part.B for part in folded if part is not None])
    starts = [0]
    for A in shared:
        starts.append(starts[-1] + A.shape[0])
    B = torch.zeros(sum(sizes), starts[-1], dtype=dtype)
    row = 0
    for part, size in zip(folded, sizes, strict=True):
        if part is not None:
            i = next(i for i, A in enumerate(shared) if _same(A, part.A))
            B[row : row + size, starts[i] : starts[i + 1]] = part.B.to(dtype)
        row += size
    a_dtype = _common_dtype(shared)
    return LowRank(
        torch.cat([A.to(a_dtype) for A in shared]),
        B,
        scaling,
        bias=_joined(folded, sizes),
        magnitude=torch.cat(dora) if dora else None,
    )


def _at_scaling(part: LowRank, scaling: float) -> LowRank:
    """The same delta at another scaling: the ratio goes into B, in float32 where it would round."""
    if part.scaling == scaling:
        return part
    if scaling == 0:
        raise ValueError("parts with a scaling of 0 beside others cannot be joined")
    ratio = part.scaling / scaling

    def scaled(tensor: Tensor) -> Tensor:
        exact = tensor.double() * ratio
        same = exact.to(tensor.dtype)
        if torch.equal(same.double(), exact) or tensor.dtype == torch.float64:
            return same
        return exact.float()

    bias = None if part.bias is None else scaled(part.bias)
    return replace(part, B=scaled(part.B), scaling=scaling, bias=bias)


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for tensor in tensors:
        if not any(_same(tensor, other) for other in found):
            found.append(tensor)
    return found


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.dtype == second.dtype and torch.equal(first, second))


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _joined(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> Tensor | None:
    if all(part is None or part.bias is None for part in parts):
        return None
    biases = [None if part is None else part.bias for part in parts]
    dtype = _common_dtype([bias for bias in biases if bias is not None])
    return torch.cat(
        [
            torch.zeros(size, dtype=dtype) if bias is None else bias.to(dtype)
            for bias, size in zip(biases, sizes, strict=True)
        ]
    )
