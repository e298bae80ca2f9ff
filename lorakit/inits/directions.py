"""The leading directions of a stream of vectors, such as the inputs of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

#: width up to which every direction is kept, in a matrix [d, d]
EXACT_WIDTH = 4096


class InputDirections:
    """Right singular vectors of all rows seen so far, not centred.

    Up to :data:`EXACT_WIDTH` they are the eigenvectors of Σ xᵀx. Beyond it the rows are kept as
    ``keep`` scaled directions, which each update decomposes anew together with the new rows
    (incremental SVD, Ross et al., 2008, without the mean): exact while the rows have no more
    directions than that.

    Args:
        width: d.
        keep: directions kept above :data:`EXACT_WIDTH`.
    """

    def __init__(self, width: int, keep: int) -> None:
        self.width, self.keep = width, min(keep, width)
        self.total = 0.0
        """Σ x², over all rows and numbers."""
        self._square: Tensor | None = None
        self._scaled: Tensor | None = None

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in more rows [N, d]."""
        rows = rows.detach().reshape(-1, self.width)
        self.total += float(rows.double().square().sum())
        if self.width <= EXACT_WIDTH:
            rows = rows.double()
            square = rows.T @ rows
            self._square = square if self._square is None else self._square.add_(square)
            return
        rows = rows.float()
        both = rows if self._scaled is None else torch.cat([self._scaled, rows])
        values, vectors = _right(both, min(self.keep, *both.shape))
        self._scaled = values[:, None] * vectors

    @torch.no_grad()
    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """The first directions, orthonormal [count, d], and their shares of Σ x² [count]."""
        if self._square is not None:
            values, vectors = torch.linalg.eigh(self._square)
            shares = values.flip(0)[:count].clamp(min=0)
            return vectors.flip(1)[:, :count].T.contiguous(), shares / max(self.total, 1e-300)
        assert self._scaled is not None
        values, vectors = _right(self._scaled, min(count, len(self._scaled)))
        missing = count - len(vectors)
        if missing:  # fewer rows than directions: complete them, so that none of A is zero
            generator = torch.Generator().manual_seed(0)
            more = torch.randn(missing, self.width, generator=generator, dtype=torch.float64)
            more = more.to(vectors.device)
            more -= (more @ vectors.T) @ vectors
            vectors = torch.cat([vectors, torch.linalg.qr(more.T).Q.T])
            values = torch.cat([values, values.new_zeros(missing)])
        return vectors, values.double().square() / max(self.total, 1e-300)


def _right(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values [count] and right vectors [count, d] of rows [N, d], float64."""
    rows = rows.double()
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return values.flip(0)[:count].clamp(min=0).sqrt(), vectors.flip(1)[:, :count].T
    _, values, Vt = torch.linalg.svd(rows, full_matrices=False)
    return values[:count], Vt[:count]
