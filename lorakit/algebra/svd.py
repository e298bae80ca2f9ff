"""The singular value decomposition of one site, from its factors or from a dense change.

Legend: r rank, ``n`` inputs of the change (d_in, vocabulary, or c_in·kernel), ``m`` outputs,
``G`` groups of a convolution (1 elsewhere). Each group of outputs has r/G directions of its own, so
the change of a site is G matrices ``[m/G, n]`` one above the other, each of rank r/G. Fused experts
are such groups too; the outputs of all are ``m``, and each has r directions.

The best approximation of rank k of a matrix in Frobenius norm keeps its k largest singular values
(Eckart & Young, 1936); its error is the root of the sum of the squares of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.core.sites import LowRank


def num_groups(site: LowRank) -> int:
    """Groups of the convolution that the site adapts, or experts; 1 for everything else."""
    if site.kind == "experts":
        return int(site.A.shape[0])
    return int(site.A.shape[0] // site.B.shape[1])


def num_directions(site: LowRank) -> int:
    """Directions that each group has."""
    return directions_at(site, site.rank)


def directions_at(site: LowRank, rank: int) -> int:
    """Directions that each group has at a rank of the site; at least one."""
    return rank if site.kind == "experts" else max(1, rank // num_groups(site))


def by_group(site: LowRank) -> list[tuple[Tensor, Tensor]]:
    """``(A [r/G, n], B [m/G, r/G])`` of each group in float64, kernels flattened."""
    if site.kind == "experts":
        return list(zip(site.A.detach().double(), site.B.detach().double(), strict=True))
    groups = num_groups(site)
    A = site.A.detach().double().flatten(1).chunk(groups)
    B = site.B.detach().double().flatten(1).chunk(groups)
    return list(zip(A, B, strict=True))


def dense(site: LowRank) -> Tensor:
    """scaling·B·A, float64 [m, n]; for an embedding [d, V], the transpose of the table's change."""
    return torch.cat([B @ A for A, B in by_group(site)]) * site.scaling


@dataclass(frozen=True, eq=False)
class Spectrum:
    """B·A = U diag(S) Vᵀ by group, float64, without the scaling."""

    U: tuple[Tensor, ...]
    """[m/G, q] each."""
    S: tuple[Tensor, ...]
    """[q] each, largest first, q = min(r/G, m/G, n)."""
    V: tuple[Tensor, ...]
    """[n, q] each."""

    @property
    def gains(self) -> list[float]:
        """How much of ‖B·A‖² each further direction of every group brings; never rising."""
        return torch.stack([s.square() for s in self.S]).sum(0).tolist()


def spectrum(site: LowRank) -> Spectrum:
    """The decomposition by two thin QR and the SVD of an r×r matrix."""
    parts = []
    for A, B in by_group(site):
        q_b, r_b = torch.linalg.qr(B)
        q_a, r_a = torch.linalg.qr(A.T.contiguous())
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        parts.append((q_b @ u, s, q_a @ vh.T))
    U, S, V = zip(*parts, strict=True)
    return Spectrum(U, S, V)


def truncated(site: LowRank, whole: Spectrum, directions: int) -> LowRank:
    """The site with its largest ``directions`` in each group, same dtypes.

    √S goes to both factors, so that neither leaves the range of a narrow dtype before the other.
    """
    A = torch.cat(
        [
            s[:directions, None].sqrt() * v[:, :directions].T
            for s, v in zip(whole.S, whole.V, strict=True)
        ]
    )
    B = torch.cat(
        [u[:, :directions] * s[:directions].sqrt() for u, s in zip(whole.U, whole.S, strict=True)]
    )
    return _like(site, A, B, site.A.dtype, site.B.dtype)


def cut_to(site: LowRank, rank: int) -> LowRank:
    """The best site of at most ``rank``; a site that has no more is returned as it is."""
    directions = directions_at(site, rank)
    if directions >= num_directions(site):
        return site
    return truncated(site, spectrum(site), directions)


@dataclass(frozen=True)
class Loss:
    """What was lost at one site."""

    error: float
    """‖before − after‖ (Frobenius), of the factors in the dtype in which they are kept."""
    norm: float
    """‖before‖."""

    @property
    def relative(self) -> float:
        """``error / norm``; 0 where both are 0."""
        return self.error / self.norm if self.norm else (0.0 if not self.error else math.inf)


def total(losses: Iterable[Loss]) -> Loss:
    """That of all sites together."""
    each = list(losses)
    return Loss(math.hypot(*(one.error for one in each)), math.hypot(*(one.norm for one in each)))


def from_dense(change: Tensor, like: LowRank, rank: int, dtype: torch.dtype) -> LowRank:
    """The best site of ``rank`` for a dense change, scaling 1.

    The leading left singular vectors U are eigenvectors of the smaller Gram matrix; the other
    factor is the projection Uᵀ·change, so nothing is divided by a small singular value.

    Args:
        change: float64 [m, n].
        like: a site whose kind, kernel and groups the result has.
        rank: rounded down to a multiple of the groups, and cut to what the shape can have.
    """
    groups = num_groups(like)
    factors = [
        _leading(part, min(directions_at(like, rank), *part.shape)) for part in change.chunk(groups)
    ]
    A = torch.cat([a for a, _ in factors])
    B = torch.cat([b for _, b in factors])
    return replace(_like(like, A, B, dtype, dtype), scaling=1.0, bias=None)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(A [rank, n], B [m, rank])`` of the best approximation, balanced."""
    m, n = matrix.shape
    if m > n:
        B, A = _leading(matrix.T, rank)
        return A.T, B.T
    U = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    projected = U.T @ matrix
    root = torch.linalg.vector_norm(projected, dim=1).sqrt()
    divisor = torch.where(root > 0, root, torch.ones_like(root))
    return projected / divisor[:, None], U * root


def _like(
    site: LowRank, A: Tensor, B: Tensor, dtype_a: torch.dtype, dtype_b: torch.dtype
) -> LowRank:
    """The site with flat factors in the shapes of its kind."""
    if site.kind == "experts":
        A = A.reshape(len(site.A), -1, A.shape[-1])
        B = B.reshape(len(site.B), -1, B.shape[-1])
    else:
        A = A.reshape(A.shape[0], *site.A.shape[1:])
        B = B.reshape(*B.shape, *site.B.shape[2:])
    A, B = A.to(dtype_a).contiguous(), B.to(dtype_b).contiguous()
    return replace(site, A=A, B=B)


def norm(site: LowRank) -> float:
    """‖scaling·B·A‖ (Frobenius), from the factors."""
    return _stacked_norm([(site, 1.0)])


def distance(first: LowRank, second: LowRank) -> float:
    """‖ΔW₁ − ΔW₂‖ (Frobenius), from the factors; the sites have one shape and as many groups."""
    return _stacked_norm([(first, 1.0), (second, -1.0)])


def _stacked_norm(parts: Sequence[tuple[LowRank, float]]) -> float:
    squares = 0.0
    groups = [by_group(site) for site, _ in parts]
    for members in zip(*groups, strict=True):
        A = torch.cat([a for a, _ in members])
        B = torch.cat(
            [
                b * (sign * site.scaling)
                for (_, b), (site, sign) in zip(members, parts, strict=True)
            ],
            dim=1,
        )
        r_b = torch.linalg.qr(B, mode="r").R
        r_a = torch.linalg.qr(A.T.contiguous(), mode="r").R
        squares += float((r_b @ r_a.T).square().sum())
    return math.sqrt(squares)
