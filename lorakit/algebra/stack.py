"""The exact weighted sum of low-rank changes of one weight, by rank stacking.

Σ wᵢ sᵢ Bᵢ Aᵢ = s · [c₁B₁ | c₂B₂ | …] · [A₁; A₂; …] with cᵢ = wᵢ sᵢ / s. The rank is the sum of the
ranks. Every A stays as it is. ``s`` is one of the wᵢ sᵢ, so its B stays as it is too, and it is
chosen so that as many as possible of the other cᵢ are powers of two, which lose nothing.

Where a product cᵢBᵢ does not fit the dtype of the factors, B is stored in float64, whose rounding
(2⁻⁵³ a number) is all the error there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lorakit.algebra.svd import num_groups
from lorakit.core.sites import LowRank

#: a site and its weight
Part = tuple[LowRank, float]


def stack(parts: Sequence[Part]) -> LowRank:
    """Σ weight·ΔW of sites of one kind, shape and number of groups.

    Where one alone acts, its tensors stay as they are and the weight goes to the scaling.
    """
    acting = [(site, weight) for site, weight in parts if weight * site.scaling != 0.0]
    acting = acting or [(parts[0][0], 0.0)]
    first = acting[0][0]
    products = [weight * site.scaling for site, weight in acting]
    if len(acting) == 1:
        return replace(first, scaling=products[0])
    scaling = _common(products)
    ratios = [product / scaling for product in products]
    sites = [site for site, _ in acting]
    A = _stack_a(sites)
    B = _joined([site.B for site in sites], ratios, 2 if first.kind == "experts" else 1)
    return LowRank(A, B, scaling, first.kind, _bias(sites, ratios))


def promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all of them."""
    return reduce(torch.promote_types, dtypes)


def exactly(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers in ``dtype`` if that loses nothing, else in float64."""
    narrow = exact.to(dtype)
    return narrow if torch.equal(narrow.double(), exact) else exact


def _common(products: Sequence[float]) -> float:
    """The product that most others are a power of two away from; of those the largest in size.

    Then no ratio to it is large, and B grows out of no dtype.
    """

    def num_exact(candidate: float) -> int:
        return sum(math.frexp(abs(product / candidate))[0] == 0.5 for product in products)

    return max(products, key=lambda product: (num_exact(product), abs(product)))


def _stack_a(sites: Sequence[LowRank]) -> Tensor:
    """[Σr, …], or of experts [E, Σr, n]; the directions of one group stay together."""
    dtype = promoted([site.A.dtype for site in sites])
    factors = [site.A.detach().to(dtype) for site in sites]
    if sites[0].kind == "experts":
        return torch.cat(factors, dim=1)
    chunks = [factor.chunk(num_groups(sites[0])) for factor in factors]
    return torch.cat([part for group in zip(*chunks, strict=True) for part in group])


def _joined(factors: Sequence[Tensor], ratios: Sequence[float], dim: int) -> Tensor:
    """[m, Σr/G, 1…], or of experts [E, m, Σr]; each times its ratio."""
    exact = torch.cat(
        [factor.detach().double() * ratio for factor, ratio in zip(factors, ratios, strict=True)],
        dim=dim,
    )
    return exactly(exact, promoted([factor.dtype for factor in factors]))


def _bias(sites: Sequence[LowRank], ratios: Sequence[float]) -> Tensor | None:
    """Σ cᵢ biasᵢ [m]; a site without one adds nothing."""
    own = [(s.bias, ratio) for s, ratio in zip(sites, ratios, strict=True) if s.bias is not None]
    if not own:
        return None
    exact = torch.stack([bias.detach().double() * ratio for bias, ratio in own]).sum(0)
    return exactly(exact, promoted([bias.dtype for bias, _ in own]))


def cast(site: LowRank, dtype: torch.dtype) -> LowRank:
    """The site with all tensors in another dtype."""
    bias = None if site.bias is None else site.bias.to(dtype)
    return replace(site, A=site.A.to(dtype), B=site.B.to(dtype), bias=bias)
