"""A quantised model made dense: ``nn.Linear`` with the numbers that its linears stood for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.bases.half import HalfLinear
from lorakit.bases.stored import packed_modules
from lorakit.errors import LorakitError
from lorakit.layers.handle import handle_of


def to_dense_(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Make every linear that is stored in fewer bits an ordinary one, in place.

    Args:
        dtype: of the new weights.

    Returns:
        The paths of what was replaced.

    Raises:
        LorakitError: adapters are attached.
        BaseError: a weight that cannot be read.
    """
    if handle_of(model) is not None:
        raise LorakitError("adapters are attached to this model; take them off: handle.detach()")
    replaced: list[str] = []
    halves: list[str] = []
    module: Any
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        if type(module) is HalfLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.weight.data = module.weight.data.to(dtype)
            halves.append(path)
    for path, module, packed in list(packed_modules(model)):
        d_out, d_in = packed.shape
        with torch.device("meta"):
            linear = nn.Linear(d_in, d_out, bias=module.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(packed.dense(torch.float32).to(dtype), requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        linear.train(module.training)
        parent, _, own = path.rpartition(".")
        model.get_submodule(parent).add_module(own, linear)
        replaced.append(path)
    config: Any = getattr(model, "config", None)
    if replaced and hasattr(config, "quantization_config"):  # or it would be saved as quantised
        del config.quantization_config
    # transformers remembers how it read the weights, and would write them in the opposite way
    conversions = model.__dict__.get("_weight_conversions")
    if replaced and conversions:
        model.__dict__["_weight_conversions"] = [c for c in conversions if not _quantises(c)]
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer"):
        if replaced and name in model.__dict__:
            setattr(model, name, None if name == "hf_quantizer" else False)
    return [*halves, *replaced]


def _quantises(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any("bitsandbytes" in type(one).__module__ for one in operations)
