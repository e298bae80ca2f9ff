"""Attention inside each segment of a packed row, through transformers' own attention registry.

A packed row is several examples one behind the other, [1, N]. For every kind of attention layer
(full, sliding, chunked) the model asks the registry for a mask; ours answers with a value that
lists the segments and what each may see. The model hands it to its attention layers as it would
a mask, and there our attention function runs one fused kernel for each segment. So no mask of
size N × N exists, no token sees another example, and a window is the model's own.

Legend: ``N`` tokens in the row, ``n`` in a segment, ``H`` query heads, ``H_kv`` key heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: the name under which both functions are registered with transformers
NAME = "lorakit_packed"

#: rows of a mask that are looked at together; bounds the memory for a very long segment
_ROWS = 1024

#: id of a model's config → lengths and device of the forward that is running on it
_running: dict[int, tuple[tuple[int, ...], torch.device]] = {}


@dataclass(frozen=True)
class Segments:
    """What stands in the place of an attention mask."""

    lengths: tuple[int, ...]
    """Tokens of each segment, in order."""
    masks: tuple[Tensor | None, ...]
    """What each segment may see, bool [n, n]; ``None`` where that is everything before."""


def register() -> None:
    """Make the two functions known to transformers; doing so again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, segment_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, segment_mask)


@contextlib.contextmanager
def running(model: nn.Module, lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """One packed forward: the model's attention layers use our functions until the block ends.

    The choice is written into the configs that the modules hold, not into their parents', and
    is taken back however the block ends.
    """
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for key, config in configs.items():
            config._attn_implementation_internal = NAME
            _running[key] = (tuple(lengths), device)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
            _running.pop(key, None)


def segment_mask(*_: Any, mask_function: Callable[..., Tensor], config: Any, **__: Any) -> Segments:
    """What the registry calls for a mask; see :class:`Segments`.

    Args:
        mask_function: whether query ``q`` sees key ``k``, from index tensors that broadcast.
        config: the config of the model that asks.
    """
    lengths, device = _running[id(config)]
    masks, start = [], 0
    for length in lengths:
        masks.append(_visible(mask_function, start, length, device))
        start += length
    return Segments(lengths, tuple(masks))


def _visible(
    mask_function: Callable[..., Tensor], start: int, length: int, device: torch.device
) -> Tensor | None:
    """The mask of one segment, bool [n, n], or ``None`` if it is plainly causal."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    index = torch.arange(start, start + length, device=device)
    blocks, causal = [], True
    for rows in torch.split(index, _ROWS):
        seen = mask_function(zero, zero, rows[None, None, :, None], index[None, None, None, :])
        seen = seen.expand(1, 1, len(rows), length)[0, 0]
        causal = causal and bool((seen == (rows[:, None] >= index)).all())
        blocks.append(seen)
    return None if causal else torch.cat(blocks)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What the attention layers call.

    Args:
        query: [1, H, N, d].
        key: [1, H_kv, N, d]; ``value`` [1, H_kv, N, d_v].
        attention_mask: a :class:`Segments`.
        softcap: bound of the scores, ``softcap · tanh(score / softcap)`` (Gemma 2).

    Returns:
        [1, N, H, d_v], and ``None`` for the weights, which never exist.

    Raises:
        NotImplementedError: the layer wants what this function cannot do.
    """
    if not isinstance(attention_mask, Segments):
        raise NotImplementedError("an attention layer does not use the mask of the registry")
    for name in ("position_bias", "s_aux", "head_mask"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError("attention to another sequence")
    lengths = list(attention_mask.lengths)
    parts = zip(
        torch.split(query, lengths, dim=2),
        torch.split(key, lengths, dim=2),
        torch.split(value, lengths, dim=2),
        attention_mask.masks,
        strict=True,
    )
    one = _fused if softcap is None else _softcapped(softcap)
    done = [one(q, k, v, mask, dropout, scaling).transpose(1, 2) for q, k, v, mask in parts]
    return torch.cat(done, dim=1), None


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # with a mask, grouped heads would take the slow unfused path on CUDA
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
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


def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
    ) -> Tensor:
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        precision = torch.promote_types(torch.float32, q.dtype)
        weights = F.softmax(scores, dim=-1, dtype=precision).to(q.dtype)
        return F.dropout(weights, dropout, training=dropout > 0) @ v

    return attention


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Key or value heads [1, H_kv, n, d] repeated to [1, H, n, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
