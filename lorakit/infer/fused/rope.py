"""Rotary positions (Su et al., 2021, arXiv 2104.09864) in place, and their inverse.

The halves convention of transformers: component i turns with component i + R/2 by the angle whose
cosine and sine are given. R may be less than a head's size; the rest stays.
"""

from __future__ import annotations

from torch import Tensor


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``heads [N, H, d]`` in place.

    Args:
        cos: [N, R]; ``sin`` alike.
    """
    return _turn_(heads, cos, sin, backward=False)


def rotate_back_(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what :func:`rotate_` was given, in place: its transpose."""
    return _turn_(gradient, cos, sin, backward=True)


def _turn_(heads: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    before = first.clone()
    if backward:
        first.mul_(cos[..., :half]).addcmul_(second, sin[..., half:])
        second.mul_(cos[..., half:]).addcmul_(before, sin[..., :half], value=-1)
    else:
        first.mul_(cos[..., :half]).addcmul_(second, sin[..., :half], value=-1)
        second.mul_(cos[..., half:]).addcmul_(before, sin[..., half:])
    return heads
