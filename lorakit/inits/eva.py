"""EVA: the directions in which a weight's inputs vary (Paischer et al., arXiv 2410.07170)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.inits.factors import Factors


def eva(directions: Tensor, d_out: int) -> Factors:
    """A holds the inputs' leading right singular vectors, and B is zero (section 3.2).

    Args:
        directions: orthonormal [r, n], the most important first.
    """
    A = directions.detach().double()
    return Factors(A, A.new_zeros(d_out, len(A)), moves_base=False)


def redistributed(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks in proportion to what they explain (section 3.3).

    The ``budget`` directions of the largest shares, over all sites, are used; a site's rank is how
    many of them are its own, perhaps none.

    Args:
        shares: site → explained shares of its own directions, descending, float64 [≤ r·ρ].
        budget: the sum of all ranks.
    """
    paths = list(shares)
    which = torch.cat([torch.full((len(shares[p]),), i) for i, p in enumerate(paths)])
    everything = torch.cat([shares[p].cpu() for p in paths])
    # stable: of equal shares the first site's come first
    chosen = which[torch.sort(everything, descending=True, stable=True).indices[:budget]]
    counts = torch.bincount(chosen, minlength=len(paths))
    return {path: int(count) for path, count in zip(paths, counts, strict=True)}
