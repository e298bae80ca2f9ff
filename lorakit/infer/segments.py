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
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers import prefix
from lorakit.layers.attention import computed_in, product

#: the name under which both functions are registered with transformers
NAME = "lorakit_packed"

#: key and value, [n, H_kv, d], that stand in front of each segment; ``None``: nothing does
Fronts = tuple[tuple[Tensor, Tensor] | None, ...]

#: rows of a mask that are looked at together; bounds the memory for a very long segment
_ROWS = 1024

#: of longer segments, what was found to be plainly causal, by :func:`_key`; the oldest go first
_causal: dict[tuple[Any, ...], None] = {}
_REMEMBERED = 1024

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

    prefix.ASKING.add(NAME)
    ALL_ATTENTION_FUNCTIONS.register(NAME, segment_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, segment_mask)


@contextlib.contextmanager
def running(model: nn.Module, lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """One packed forward: the model's attention layers use our functions until the block ends.

    The choice is written into the configs that the modules hold, not into their parents', and
    is taken back however the block ends.
    """
    with _chosen(model) as configs:
        try:
            for key in configs:
                _running[key] = (tuple(lengths), device)
            yield
        finally:
            for key in configs:
                _running.pop(key, None)


@contextlib.contextmanager
def _chosen(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The configs that the modules inside hold, by id; they name our functions meanwhile."""
    held: list[Any] = [getattr(one, "config", None) for one in module.modules()]
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield configs
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextlib.contextmanager
def reading(layer: nn.Module) -> Iterator[None]:
    """One layer runs again, with the :class:`Segments` that it got in its packed forward."""
    with _chosen(layer):
        yield


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

    def seen(rows: Tensor) -> Tensor:
        found = mask_function(zero, zero, rows[None, None, :, None], index[None, None, None, :])
        return found.expand(1, 1, len(rows), length)[0, 0]

    key = _key(mask_function, start, length) if length > _ROWS else None
    if key is not None and key in _causal:
        return None
    blocks = torch.split(index, _ROWS)
    if not all(bool((seen(rows) == (rows[:, None] >= index)).all()) for rows in blocks):
        return torch.cat([seen(rows) for rows in blocks])
    if key is not None:
        _causal[key] = None
        if len(_causal) > _REMEMBERED:
            _causal.pop(next(iter(_causal)), None)
    return None


def _key(mask_function: Any, start: int, length: int) -> tuple[Any, ...] | None:
    """All that a mask function depends on inside one segment; ``None`` if that is not clear.

    That is its code and what it closes over: numbers, further functions, and tensors over the
    row, which inside the segment are all one value or count up.
    """
    key: list[Any] = [start, length]
    open_ = [mask_function]
    while open_:
        value = open_.pop()
        if isinstance(value, FunctionType) and not value.__kwdefaults__:
            key.append(value.__code__)
            open_ += [cell.cell_contents for cell in value.__closure__ or ()]
            open_ += value.__defaults__ or ()
        elif isinstance(value, tuple):
            key.append(len(value))
            open_ += value
        elif isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] >= start + length:
            part = value[:, start : start + length].long()
            step = part[:, 1:] - part[:, :-1]
            low, high = int(step.min()), int(step.max())
            if value.is_floating_point() or len(value) > 1 or low != high:
                return None
            key.append((int(part[0, 0]), low))
        elif value is None or isinstance(value, bool | int | float | str):
            key.append((type(value), value))
        else:
            return None
    return tuple(key)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    fronts: Fronts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What the attention layers call.

    Args:
        query: [1, H, N, d].
        key: [1, H_kv, N, d]; ``value`` [1, H_kv, N, d_v].
        attention_mask: a :class:`Segments`.
        softcap: bound of the scores, ``softcap · tanh(score / softcap)`` (Gemma 2).
        fronts: keys and values in front of each segment, where the caller knows them; else they are
            those that the forward's routing gives to this module (:mod:`lorakit.layers.prefix`).

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
    dtype, computed = query.dtype, computed_in(query, softcap)
    query, key, value = query.to(computed), key.to(computed), value.to(computed)
    if fronts is None:
        fronts = fronts_of(prefix.stretches(module, lengths), len(lengths))
    parts = zip(
        torch.split(query, lengths, dim=2),
        torch.split(key, lengths, dim=2),
        torch.split(value, lengths, dim=2),
        attention_mask.masks,
        fronts,
        strict=True,
    )
    one = product(softcap)
    done = []
    for q, k, v, mask, front in parts:
        if front is not None:
            k, v, mask = prefix.in_front(front, k, v, mask)
        done.append(one(q, k, v, mask, dropout, scaling).transpose(1, 2))
    return torch.cat(done, dim=1).to(dtype), None


def fronts_of(
    stretches: prefix.Stretches | None, count: int, tensors: Sequence[Tensor] | None = None
) -> Fronts:
    """The keys and values in front of each of ``count`` segments.

    Args:
        tensors: what stands for :meth:`Stretches.parameters`, by default they themselves.
    """
    if stretches is None:
        return (None,) * count
    given = stretches.parameters() if tensors is None else tensors
    return tuple(None if i is None else (given[2 * i], given[2 * i + 1]) for i in stretches.of)
