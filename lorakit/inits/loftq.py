"""LoftQ: the factors begin with what quantising lost (Li et al., arXiv 2310.08659, section 3)."""

from __future__ import annotations

from torch import Tensor

from lorakit.inits.factors import Factors
from lorakit.inits.pissa import pissa


def loftq(weight: Tensor, quantised: Tensor, rank: int, scaling: float) -> Factors:
    """``Q + s·B A`` is as near to W as this rank allows.

    One step of the paper's algorithm 1. Its further steps quantise ``W − s·B A`` anew, which would
    change the stored base, and with Q fixed they change nothing.

    Args:
        weight: W [d_out, n] as it was before it was quantised.
        quantised: Q [d_out, n], the numbers that the stored base means.
        scaling: s, above zero.
    """
    lost = weight.detach().double() - quantised.detach().double()
    return pissa(lost, rank, scaling)._replace(moves_base=False)
