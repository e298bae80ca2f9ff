"""The product of queries, keys and values, as the attention functions that we register compute it.

Legend: ``H`` query heads, ``H_kv`` key heads, ``n`` queries, ``m`` keys, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: (q, k, v, mask, dropout, scaling) → [B, H, n, d_v]
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor]


def computed_in(like: Tensor, softcap: float | None = None) -> torch.dtype:
    """The dtype in which a whole text's attention is computed: on a CPU float32 instead of half
    precision, in which PyTorch's kernel takes three to five times as long to go back."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and like.is_cpu and softcap is None else like.dtype


def product(softcap: float | None) -> Product:
    """The function for one attention layer.

    Args:
        softcap: bound of the scores, ``softcap · tanh(score / softcap)`` (Gemma 2).
    """
    return fused if softcap is None else softcapped(softcap)


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """PyTorch's kernel; q [B, H, n, d], k and v [B, H_kv, m, d], mask broadcast to [B, H, n, m] or
    ``None`` for a causal one."""
    grouped = q.shape[1] != k.shape[1]
    mask = None if mask is None else mask.to(q.device)
    if grouped and mask is not None and q.is_cuda:
        # with a mask, grouped heads would take the slow unfused path on CUDA
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        grouped = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )


def softcapped(softcap: float) -> Product:
    """The same with bounded scores, for which PyTorch has no kernel on every device."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
    ) -> Tensor:
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        mask = mask.to(q.device)
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
        precision = torch.promote_types(torch.float32, q.dtype)
        weights = F.softmax(scores, dim=-1, dtype=precision).to(q.dtype)
        return F.dropout(weights, dropout, training=dropout > 0) @ v

    return attention


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key or value heads [B, H_kv, m, d] repeated to [B, H, m, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
