"""Linear algebra of B·A from its factors; nothing of size d_out × d_in is ever made.

Legend: r rank, ``A [r, d_in]``, ``B [d_out, r]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.sites import LowRank


def factors(site: LowRank) -> tuple[Tensor, Tensor]:
    """``(A [r, n], B [m, r])`` in float64, kernels flattened.

    For an embedding the roles stay: ΔW = (B A)ᵀ, whose singular values are those of B A.
    A grouped convolution's B is laid out block-diagonally, which is what it computes. Experts stay
    apart: ``A [E, r, n]``, ``B [E, m, r]``.
    """
    if site.kind == "experts":
        return site.A.detach().double(), site.B.detach().double()
    A = site.A.detach().double().flatten(1)
    B = site.B.detach().double().flatten(1)
    rank = A.shape[0]
    if B.shape[1] != rank:
        groups = rank // B.shape[1]
        B = torch.block_diag(*B.chunk(groups, dim=0))  # type: ignore[no-untyped-call]
    return A, B


def singular_values(site: LowRank) -> Tensor:
    """Singular values of scaling·B·A, float64 [min(r, …)], largest first; of experts those of all.

    With B = Q_B R_B and Aᵀ = Q_A R_A, those of the r×r matrix R_B R_Aᵀ.
    """
    A, B = factors(site)
    r_b = torch.linalg.qr(B, mode="r").R
    r_a = torch.linalg.qr(A.mT.contiguous(), mode="r").R
    values = torch.linalg.svdvals(r_b @ r_a.mT) * abs(site.scaling)
    return values if values.dim() == 1 else values.flatten().sort(descending=True).values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, 2007)."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))
