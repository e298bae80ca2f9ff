"""Storing a base in fewer bits while it is loaded: bitsandbytes, torchao, or as bfloat16."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import BaseError
from lorakit.optional import require

Quantize = Literal["nf4", "int8", "int8-torchao", "int4-torchao", "bf16"]
CHOICES = ("nf4", "int8", "int8-torchao", "int4-torchao", "bf16")
#: those that transformers makes while it reads the file; the others are made of the loaded model
BY_BITSANDBYTES = ("nf4", "int8")


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
    with quiet_transformers():  # it warns of kernels that it looks for and can do without
        require("bitsandbytes", extra="quant", purpose=f"quantize={quantize!r}")
    require("accelerate", extra="train", purpose=f"quantize={quantize!r}")
    config = require("transformers").BitsAndBytesConfig
    if quantize == "int8":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_bytes_in_order_(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights in the first forward without gradients.

    On CPUs with avx512_bf16 it does (0.50), rounds their scales to bfloat16, and the operator that
    reads them afterwards has no backward: training after an evaluation would go on with wrong
    gradients (69 % off on a small Llama), and the base would have changed.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_quantised(model: nn.Module) -> None:
    """Raise if this bitsandbytes computes wrongly with a linear of ``model``.

    The CPU kernel of 0.50 reads the scale of the wrong block where a row is not a whole number of
    blocks: weights off by 20 to 40 %, without an error. So each width in the model is tried.

    Raises:
        BaseError: with the widths.
    """
    widths = set()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            widths.add((int(state.shape[-1]), module.weight.device, state.dtype, state.quant_type))
    wrong = sorted({width for width, *how in widths if not _unpacks_rightly(width, *how)})
    if wrong:
        version = require("bitsandbytes").__version__
        raise BaseError(
            f"bitsandbytes {version} computes wrongly on this device with 4-bit linears of "
            f"{', '.join(map(str, wrong))} inputs, which is not a multiple of 64. Use "
            "quantize='int8' or no quantisation, or another device."
        )


def _unpacks_rightly(width: int, device: torch.device, dtype: torch.dtype, kind: str) -> bool:
    """Whether a matrix of this width survives 4 bits, which cost it about 10 %."""
    bnb = require("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    # rows of growing size, so that a scale of another row is far off
    dense = torch.randn(64, width, generator=generator) * torch.logspace(0, 4, 64, 2).unsqueeze(1)
    dense = dense.to(device, dtype)
    packed, state = bnb.quantize_4bit(dense, blocksize=64, quant_type=kind)
    again = bnb.dequantize_4bit(packed, state)
    by_row = (again - dense).float().norm(dim=1) / dense.float().norm(dim=1)
    return bool(by_row.median() < 0.3)
