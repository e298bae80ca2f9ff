"""RMS norm (Zhang & Sennrich, 2019, arXiv 1910.07467), forward and backward.

``y = x / √(mean(x²) + ε) · w`` over the last dimension; statistics in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Norm:
    """One frozen norm."""

    weight: Tensor
    """[d], as it multiplies: of Gemma's norms, one more than what is stored."""
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] normalised."""
        wide = x.to(_wide(x))
        return (wide * self._scale(wide)).mul_(self.weight).to(x.dtype)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient of x [..., d]."""
        wide = x.to(_wide(x))
        scale = self._scale(wide)
        dn = dy.to(wide.dtype) * self.weight
        along = (dn * wide).mean(-1, keepdim=True).mul_(scale * scale)
        return dn.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype)

    def _scale(self, wide: Tensor) -> Tensor:
        """1 / √(mean(x²) + ε), [..., 1]."""
        squares: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        return squares.div_(wide.shape[-1]).add_(self.eps).rsqrt_()


def norm_of(module: Any) -> Norm | None:
    """The norm that a module computes; ``None`` if it is no RMS norm.

    Its class is not asked: a vector is put through it, and the formula must give the same.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if getattr(module, "bias", None) is not None:
        return None
    weight = weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        there = module(x)
    for offset in (0.0, 1.0):
        wide = weight.to(_wide(weight))
        norm = Norm(wide + offset if offset else wide, eps)
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
        if torch.allclose(norm.forward(x), there, rtol=tolerance, atol=tolerance):
            return norm
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, x.dtype)
