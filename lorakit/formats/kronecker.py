"""Factors of changes that are products of products, as LyCORIS makes them.

Legend: ``L [m, r]``, ``R [r, n]`` are factors of a matrix ``L R``; ⊙ is the product by element, ⊗
Kronecker's, ∗ that of rows with rows (Khatri–Rao)::

    (L₁R₁) ⊙ (L₂R₂) = (L₁ ∗ L₂)(R₁ᵀ ∗ R₂ᵀ)ᵀ       of rank r₁·r₂ (LoHa, arXiv 2108.06098)
    (L₁R₁) ⊗ (L₂R₂) = (L₁ ⊗ L₂)(R₁ ⊗ R₂)          of rank r₁·r₂ (LoKr, arXiv 2309.14859)

All in float64. Nothing of the size of the weight is made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def hadamard(first: Factors, second: Factors) -> Factors:
    """Factors of the product by element of two matrices."""
    (l1, r1), (l2, r2) = first, second
    left = (l1.unsqueeze(2) * l2.unsqueeze(1)).flatten(1)
    right = (r1.unsqueeze(1) * r2.unsqueeze(0)).flatten(0, 1)
    return left, right


def kronecker(first: Factors, second: Factors) -> Factors:
    """Factors of Kronecker's product of two matrices."""
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def of_full(matrix: Tensor) -> Factors:
    """Factors of a matrix that has none: it and the unit matrix of its shorter side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best factors of a rank, and their relative error in the Frobenius norm.

    QR of both sides and the SVD of what is between them.
    """
    left, right = factors
    q_l, r_l = torch.linalg.qr(left)
    q_r, r_r = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_l @ r_r.T)
    root = s[:rank].sqrt()
    kept = (q_l @ u[:, :rank] * root, root.unsqueeze(1) * (vh[:rank] @ q_r.T))
    return kept, _error(s, s[:rank])


def truncated_kronecker(first: Factors, second: Factors, rank: int) -> tuple[Factors, float]:
    """The same for a Kronecker product, whose singular values are all products of the two's."""
    (u1, s1, v1), (u2, s2, v2) = _svd(first), _svd(second)
    products = torch.outer(s1, s2).flatten()
    order = products.argsort(descending=True, stable=True)[:rank]
    i, j = order // len(s2), order % len(s2)
    root = products[order].sqrt()
    left = (u1[:, i].unsqueeze(1) * u2[:, j].unsqueeze(0)).flatten(0, 1) * root
    right = (v1[i].unsqueeze(2) * v2[j].unsqueeze(1)).flatten(1) * root.unsqueeze(1)
    return (left, right), _error(products, products[order])


def _svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    left, right = factors
    q_l, r_l = torch.linalg.qr(left)
    q_r, r_r = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_l @ r_r.T, full_matrices=False)
    return q_l @ u, s, vh @ q_r.T


def _error(values: Tensor, kept: Tensor) -> float:
    whole = float(values.square().sum())
    return math.sqrt(max(0.0, 1 - float(kept.square().sum()) / whole)) if whole else 0.0
