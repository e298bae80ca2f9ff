"""Quantising a base while it is loaded, with bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lorakit.errors import BaseError
from lorakit.optional import require

Quantize = Literal["nf4", "int8"]
CHOICES = ("nf4", "int8")


def quantization_config(quantize: Quantize, device: torch.device, dtype: torch.dtype) -> Any:
    """The settings that make transformers quantise the linears of a model.

    Args:
        quantize: ``"nf4"`` (4 bits, double quantised) or ``"int8"`` (8 bits).
        device: where the model goes.
        dtype: what it computes in.

    Raises:
        BaseError: bitsandbytes cannot do it on this device.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if device.type == "mps":
        raise BaseError(
            f"quantize={quantize!r} needs a CUDA GPU or a CPU; Apple's GPU cannot do it. "
            "Leave it out, or pass --device cpu."
        )
    require("bitsandbytes", extra="quant", purpose=f"quantize={quantize!r}")
    require("accelerate", extra="quant", purpose=f"quantize={quantize!r}")
    config = require("transformers").BitsAndBytesConfig
    if quantize == "int8":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
