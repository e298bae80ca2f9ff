"""Linears whose weights are stored in bfloat16 and computed with in the model's dtype.

The weight is cast for the moment of each product, in the forward and again in the backward, so
that no wide copy waits between them. bfloat16 has the exponents of float32; most bases are
published in it, and nothing is lost of those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: the name of this storage
NAME = "bf16"


class HalfLinear(nn.Linear):
    """A linear whose weight is bfloat16 and whose bias, input and output are not."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x @ W.T`` in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *([x] if weight.requires_grad else []))
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, *x = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if x and ctx.needs_input_grad[1]:
            dw = (dy.flatten(0, -2).T @ x[0].flatten(0, -2)).to(weight.dtype)
        return dx, dw


@torch.no_grad()
def store_half_(model: nn.Module, dtype: torch.dtype) -> int:
    """Store the weights of the linears in a model's numbered blocks in bfloat16; heads stay.

    Args:
        dtype: of all other parameters, and of the computation.

    Returns:
        How many linears there were.
    """
    halved: set[int] = set()
    for path, module in model.named_modules():
        in_block = any(part.isdigit() for part in path.split("."))
        if type(module) is nn.Linear and in_block:
            module.weight.data = module.weight.data.to(torch.bfloat16)
            module.__class__ = HalfLinear
            halved.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in halved and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return len(halved)
