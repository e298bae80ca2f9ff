"""PiSSA: principal singular values and vectors (Meng et al., arXiv 2404.02948, section 3)."""

from __future__ import annotations

from torch import Tensor

from lorakit.inits.factors import Factors, leading


def pissa(weight: Tensor, rank: int, scaling: float) -> Factors:
    """The best approximation of W of this rank is trained; what is left of W is frozen.

    ``s·B A = U_r Σ_r V_rᵀ`` with Σ shared evenly: ``A = √(Σ/s) Vᵀ`` and ``B = U √(Σ/s)``.

    Args:
        weight: W [d_out, n].
        scaling: s, above zero.
    """
    U, values, Vt = leading(weight, rank)
    root = (values / scaling).sqrt()
    return Factors(root[:, None] * Vt, U * root, moves_base=True)
