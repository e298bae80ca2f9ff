"""Dropout whose mask is a function of what is dropped, not of when.

The mask of an element depends on (seed, step, example, site, position, feature) alone, so gradient
accumulation, how a batch is split, who else is in it, and the world size do not change it.

The caller makes one int64 key per token with :func:`token_keys`; a site mixes in its own number
and the feature's index. The mixing is the finaliser of splitmix64 (Steele, Lea & Flood, 2014).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping); shifts are logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def token_keys(seed: int, step: int, example: Tensor, position: Tensor) -> Tensor:
    """One key per token.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        example: int64, any shape: the example's stable number, per token.
        position: int64, same shape: the token's position in its example.
    """
    key = torch.full_like(example, seed)
    for part in (torch.full_like(example, step), example, position):
        key = _mix(key * _GOLDEN + part + 1)
    return key


def keys_of(x: Tensor, keys: Tensor) -> Tensor:
    """Keys in the shape of what a site sees, ``x [..., d]``: int64 ``x.shape[:-1]``.

    Args:
        keys: one per token, in any shape of as many elements; or one per row of the batch, of
            which a site sees several positions each (tokens, patches, pixels, or rows multiplied
            in place). A position's key then is that of its row, mixed with its number there, so
            that padding behind it changes nothing.
    """
    wanted = x.shape[:-1]
    if keys.shape == wanted:
        return keys
    if keys.dim() == 1 and len(keys) and x.shape[0] % len(keys) == 0:
        positions = torch.arange(wanted.numel() // len(keys), device=keys.device)
        return _mix(keys[:, None] * _GOLDEN + positions + 1).reshape(wanted)
    return keys.reshape(wanted)


def site_number(path: str) -> int:
    """A number for a site that is the same in every process."""
    return zlib.crc32(path.encode())


def expert_keys(keys: Tensor, expert: Tensor) -> Tensor:
    """Keys of tokens that several experts see, so that each drops inputs of its own; int64 [S]."""
    return _mix(keys * _GOLDEN + expert + 1)


def keyed_dropout(x: Tensor, keys: Tensor, site: int, p: float) -> Tensor:
    """Drop elements of ``x [..., d]`` with probability ``p``, scale the rest by 1/(1−p).

    Args:
        keys: int64 [...], one per token.
        site: from :func:`site_number`.
    """
    features = torch.arange(x.shape[-1], device=x.device)
    token = _mix(keys + site * _GOLDEN % (1 << 62))
    bits = _mix(token.unsqueeze(-1) + features * _GOLDEN)
    # 53 uniform bits, compared as an integer threshold
    kept = (bits & ((1 << 53) - 1)) >= int(p * (1 << 53))
    return x * (kept.to(x.dtype) * (1.0 / (1.0 - p)))
