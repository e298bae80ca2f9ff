"""The best low-rank approximation of the difference of two weights, block of rows by block.

By Eckart and Young (1936), no matrix of rank r is closer to D in the Frobenius norm than its first
r singular triples, and the distance is the root of the squares of the others. With D = U S Vᵀ
taller than wide, V and S are those of DᵀD, and D V = U S; so a weight needs its two stored
tensors, a square of its shorter side and the factors, never its whole difference in float64.

Legend: D [l, s] the difference, turned so that l ≥ s; r rank; k = s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: numbers in a block of rows, 32 MB in float64
_BLOCK = 1 << 22
#: a difference of at most this many numbers is decomposed whole
DENSE = 1 << 20


@dataclass(frozen=True)
class Difference:
    """``after - before``, computed in float64 when it is needed.

    Two matrices of one shape [m, n] in any float dtype; they may be views.
    """

    before: Tensor
    after: Tensor

    @property
    def turned(self) -> bool:
        """Whether D is the transposed difference."""
        return self.before.shape[0] < self.before.shape[1]

    def blocks(self) -> Iterator[Tensor]:
        """The rows of D in order, float64, some at a time."""
        before, after = (t.T if self.turned else t for t in (self.before, self.after))
        rows = max(1, _BLOCK // max(1, before.shape[1]))
        for start in range(0, before.shape[0], rows):
            part = slice(start, start + rows)
            yield after[part].double() - before[part].double()

    def squared_norm(self) -> float:
        """‖D‖², Frobenius; NaN or Inf where a weight holds one."""
        return math.fsum(float(block.square().sum()) for block in self.blocks())


@dataclass(frozen=True)
class Spectrum:
    """Singular values of D and the singular vectors of its shorter side."""

    squares: Tensor
    """σ², float64 [k], largest first."""
    vectors: Tensor
    """Right singular vectors of D, float64 [s, k], orthonormal."""
    rank: int
    """How many singular values can be told from rounding."""

    def tail(self, rank: int) -> float:
        """√Σ σ² beyond ``rank``: the smallest error that a matrix of this rank can have."""
        return math.sqrt(float(self.squares[rank:].sum()))

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of Σ σ², at least 1."""
        kept = self.squares.cumsum(0)
        wanted = energy * float(kept[-1])
        return min(self.rank, int((kept < wanted).sum()) + 1)


def decompose(difference: Difference, *, dense: int = DENSE) -> Spectrum:
    """The singular values of D, and its right singular vectors.

    Up to ``dense`` numbers by a singular value decomposition; above by the eigenvectors of DᵀD in
    float64. Squaring leaves values below √eps·σ₁ = 1.5e-8·σ₁ undetermined; the error that a rank
    has exceeds the best possible by at most about √(r·eps)·‖D‖, as :func:`residual` measures.
    """
    eps = torch.finfo(torch.float64).eps
    if difference.before.numel() <= dense:
        D = torch.cat(list(difference.blocks()))
        _, values, right = torch.linalg.svd(D, full_matrices=False)
        squares, vectors, smallest = values.square(), right.T, eps * max(D.shape)
    else:
        gram = sum(block.T @ block for block in difference.blocks())
        assert isinstance(gram, Tensor)
        rising, turned = torch.linalg.eigh(gram)
        squares, vectors, smallest = rising.flip(0).clamp(min=0), turned.flip(1), eps**0.5
    values = squares.sqrt()
    return Spectrum(squares, vectors, int((values > smallest * values[0]).sum()))


def factors_of(difference: Difference, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """``(left [m, r], right [n, r])`` in float64 with left·rightᵀ the best of this rank.

    Each takes the root of every singular value, so that neither is larger than the other.

    Args:
        rank: at most ``spectrum.rank``; 0 gives factors without columns.
    """
    V = spectrum.vectors[:, :rank]
    long = torch.cat([block @ V for block in difference.blocks()])  # U S
    roots = long.norm(dim=0).sqrt()
    long, short = long / roots, V * roots
    return (short, long) if difference.turned else (long, short)


def residual(difference: Difference, left: Tensor, right: Tensor) -> float:
    """‖D - left·rightᵀ‖², Frobenius, in float64, of factors as they are stored."""
    long, short = (right, left) if difference.turned else (left, right)
    at, total = 0, []
    for block in difference.blocks():
        part = long[at : at + len(block)].to(block) @ short.to(block).T
        total.append(float((block - part).square().sum()))
        at += len(block)
    return math.fsum(total)
