"""What an initialisation gives, and the singular vectors that most of them need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: the smaller side of a matrix up to which its singular vectors are computed exactly
EXACT_SIDE = 2048
#: more directions than asked for, and passes, of the randomised method for larger ones
_MORE, _PASSES = 32, 8


class Factors(NamedTuple):
    """The factors that one weight begins with."""

    A: Tensor
    """[r, n], float64."""
    B: Tensor
    """[d_out, r], float64."""
    moves_base: bool
    """Whether ``scaling·B A`` has to be taken off, so that the first forward is the base's."""


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest singular values and their vectors, in float64.

    Exact up to rounding where the smaller side is at most :data:`EXACT_SIDE`: eigenvectors of the
    product with its own transpose, which in float64 leaves the large ones all their digits. Above
    it randomised with power iterations (Halko et al., arXiv 0909.4061, algorithm 4.4) from a fixed
    seed.

    Args:
        matrix: [m, n], m and n at least ``count``.

    Returns:
        U [m, count], values [count] and Vᵀ [count, n].
    """
    matrix = matrix.detach().double()
    if min(matrix.shape) > EXACT_SIDE:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            size = min(count + _MORE, *matrix.shape)
            U, values, V = torch.svd_lowrank(matrix, q=size, niter=_PASSES)
        return U[:, :count], values[:count], V[:, :count].T
    if matrix.shape[0] > matrix.shape[1]:
        V, values, Ut = leading(matrix.T, count)
        return Ut.T, values, V.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    U = vectors.flip(1)[:, :count]
    scaled = U.T @ matrix
    values = torch.linalg.vector_norm(scaled, dim=1)
    # a direction that the matrix does not have stays zero on this side
    return U, values, scaled / torch.where(values > 0, values, 1.0)[:, None]
