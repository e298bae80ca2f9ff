"""The keys and values that a base computes by itself, which a prefix begins as.

They are seen through transformers' registry of attention functions: for one forward of the base
every attention module calls ours, which notes what it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import RoutingError, TargetError
from lorakit.layers.attention import product
from lorakit.layers.prefix import foreign, forward_names, seen_keys

#: the name under which the attention function is registered with transformers
CAPTURING = "lorakit_capturing"

#: id of an attention module → the keys and values that it has computed
_captured: dict[int, tuple[Tensor, Tensor]] | None = None


@functools.cache
def _register() -> None:
    """Make the function known to transformers, with masks that it can read."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(CAPTURING, _attention_captured)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CAPTURING, sdpa_mask)


def _attention_captured(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention itself, noting what it reads."""
    assert _captured is not None
    _captured[id(module)] = (key, value)
    if others.get("position_bias") is not None or others.get("s_aux") is not None:
        raise foreign(type(module).__name__, "its attention takes a bias or a sink")
    seen = seen_keys(module, query, key, attention_mask, others)
    out = product(others.get("softcap"))(query, key, value, seen, 0.0, scaling)
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def past_of(model: Any, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values that a causal language model computes for a text.

    Args:
        ids: int64 [n].

    Returns:
        Path of each attention module → [n, H_kv, d] and [n, H_kv, d_v], in the model's order.

    Raises:
        TargetError: it is none, or its attention does not go through transformers' registry.
    """
    global _captured
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(f"prefix: {name} is an encoder-decoder; a prefix needs a decoder alone")
    if not callable(getattr(model, "get_input_embeddings", None)):
        raise TargetError(f"prefix: {name} is no transformers model that reads token ids")
    _register()
    training = [module for module in model.modules() if module.training]
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    _captured = {}
    model.eval()
    try:
        for config in configs.values():
            config._attn_implementation_internal = CAPTURING
        options = {} if "use_cache" not in forward_names(type(model)) else {"use_cache": False}
        model(input_ids=ids[None].to(model.get_input_embeddings().weight.device), **options)
        found = _captured
    except RoutingError as error:
        raise TargetError(f"prefix: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise TargetError(
            f"prefix: {name} does not run on token ids alone ({type(error).__name__}: {error})"
        ) from error
    finally:
        _captured = None
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in training:
            module.training = True
    past = {
        path: tuple(t[0].transpose(0, 1).contiguous() for t in found[id(module)])
        for path, module in model.named_modules()
        if id(module) in found
    }
    if not past or any(k.shape[0] != len(ids) for k, _ in past.values()):
        raise TargetError(
            f"prefix: no attention of {name} goes through transformers' registry of attention "
            "functions, where keys and values can be put in front"
        )
    return past  # type: ignore[return-value]


def attention_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of a decoder's attention modules among its modules by path, by their number."""
    found: dict[int, str] = {}
    for path, module in modules.items():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and type(module).__name__.endswith("Attention"):
            found.setdefault(number, path)
    return [found[number] for number in sorted(found)]


def numbers_per_token(model: nn.Module) -> int:
    """Numbers of one virtual token's keys and values in all layers, by what the modules say."""
    modules = {path: module for path, module in model.named_modules() if path}
    total = 0
    for path in attention_modules(modules):
        attention: Any = modules[path]
        config: Any = getattr(attention, "config", None)
        heads = getattr(config, "num_attention_heads", None) or 1
        size = getattr(attention, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
        total += 2 * size * (getattr(config, "num_key_value_heads", None) or heads)
    return total
