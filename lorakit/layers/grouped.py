"""Rows times the matrix of their expert, with a gradient for both.

Legend: ``S`` rows sorted by expert, ``E`` experts, ``n`` and ``m`` features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: torch's kernel for groups wants rows that begin at multiples of so many bytes
_ALIGNMENT = 16


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x[s] @ weight[expert of s]`` for every row.

    Args:
        x: [S, n], sorted by expert.
        weight: [E, n, m], of the dtype of ``x``.
        ends: int32 [E], on the device of ``x``: behind each expert's last row.

    Returns:
        [S, m]; no product of ``n`` by ``m`` features exists but ``weight`` itself and its gradient.
    """
    out: Tensor = _Grouped.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _rows(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _rows(dy, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        dw = _outer(x, dy, ends, weight) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(x, weight.shape[1], weight.shape[2]):
        return F.grouped_mm(x.contiguous(), weight.contiguous(), offs=ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, begin, end in filled(ends):
        torch.mm(x[begin:end], weight[expert], out=out[begin:end])
    return out


def _outer(x: Tensor, dy: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``weight``, [E, n, m]; zero for experts without a row."""
    if _has_kernel(x, weight.shape[1], weight.shape[2]):
        return F.grouped_mm(x.contiguous().t(), dy, offs=ends)
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for expert, begin, end in filled(ends):
        torch.mm(x[begin:end].t(), dy[begin:end], out=out[expert])
    return out


def filled(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, begin, end) of the experts that have a row."""
    found, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            found.append((expert, begin, end))
        begin = end
    return found


def _has_kernel(x: Tensor, n: int, m: int) -> bool:
    """Whether one call of torch's does all experts: on CUDA, with aligned rows.

    On a CPU a product an expert is as fast, and takes any dtype and width.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in (n, m))
    return aligned and len(x) > 0
