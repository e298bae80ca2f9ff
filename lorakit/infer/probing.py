"""Two ways to compute the same, tried on short sequences, and what would make them differ.

Such are encodings of positions that depend on a sequence's length, and int8 linears whose own
kernel rounds what it multiplies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases.stored import packed_weight

#: largest difference of logits, relative to the largest logit, that rounding explains; tokens
#: that see a neighbour they should not differ by far more
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
_ROUNDING_HALF = 3e-2


def probe_sequences(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Two sequences of different length and content, the same for every call."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = embedding.weight.shape[0] if embedding is not None else 2
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, vocabulary, (length,), generator=generator).to(device) for length in (7, 4)
    ]


def close(mine: Tensor, reference: Tensor) -> bool:
    """Whether logits differ by no more than rounding explains."""
    scale = reference.abs().max().clamp_min(1e-30)
    limit = _ROUNDING.get(reference.dtype, _ROUNDING_HALF)
    return bool((mine - reference).abs().max() <= limit * scale)


def rope_kinds(model: nn.Module) -> set[str]:
    """Kinds of rotary position encoding that the configs name, for all layers or some."""
    kinds = set()
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = ("rope_parameters", "rope_scaling")
    found = [getattr(config, name, None) for config in configs for name in names]
    while found:
        settings = found.pop()
        if isinstance(settings, dict):
            kinds |= {str(settings[name]) for name in ("rope_type", "type") if name in settings}
            found += settings.values()
    return kinds


def int8_linears(model: nn.Module) -> list[nn.Module]:
    """Modules whose weight is stored in int8."""
    return [
        module
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dtype == torch.int8
    ]


@contextlib.contextmanager
def unpacked_int8(model: nn.Module) -> Iterator[None]:
    """LLM.int8 linears multiply by their unpacked weights, as fused layers do.

    Their own kernel rounds the activations too, and by columns that depend on all rows of a
    forward, so it is no measure for other ways of computing the same.
    """

    def product(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> Tensor:
        packed = packed_weight(module)
        assert packed is not None
        x, bias = inputs[0], getattr(module, "bias", None)
        return F.linear(x, packed.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    hooks = [module.register_forward_hook(product) for module in int8_linears(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
