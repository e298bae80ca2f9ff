"""OLoRA: orthonormal columns from W's QR (Büyükakyüz, arXiv 2406.01775, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.inits.factors import Factors


def olora(weight: Tensor, rank: int) -> Factors:
    """``B = Q[:, :r]`` and ``A = R[:r]`` of ``W = Q R``.

    Q's first columns come from W's first columns alone, and ``R[:r] = Q[:, :r]ᵀ W``; no larger
    decomposition is made.

    Args:
        weight: W [d_out, n].
    """
    weight = weight.detach().double()
    Q = torch.linalg.qr(weight[:, :rank]).Q
    return Factors(Q.T @ weight, Q, moves_base=True)
