"""LoRA-GA: aligned with the full weight's gradient (Wang et al., arXiv 2407.05000, section 3)."""

from __future__ import annotations

from torch import Tensor

from lorakit.inits.factors import Factors, leading

#: the γ of the authors' code
GAMMA = 16.0


def lora_ga(gradient: Tensor, rank: int, gamma: float = GAMMA) -> Factors:
    """The first step of the factors moves B A in the direction in which W would move.

    With ``U Σ Vᵀ`` of the gradient, ``A = c·V[:, :r]ᵀ`` and ``B = c·U[:, r:2r]`` with
    ``c = ⁴√d_out / √γ`` (theorems 3.1 and 3.2, algorithm 1).

    Args:
        gradient: of the loss by W, [d_out, n]; only its directions matter.
    """
    U, _, Vt = leading(gradient, 2 * rank)
    scale = gradient.shape[0] ** 0.25 / gamma**0.5
    return Factors(scale * Vt[:rank], scale * U[:, rank:], moves_base=True)
