"""``adapter_model.bin``, PEFT's older file: tensors only, never code."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.names import odd_name
from lorakit.core.safetensors_io import DTYPES
from lorakit.errors import FormatError, collected
from lorakit.formats.opcodes import check_pickle

logger = logging.getLogger(__name__)

#: an adapter above this is better converted by whoever made it
MAX_BYTES = 4 * 2**30


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    The restricted unpickler of ``torch.load(weights_only=True)`` builds tensors and containers,
    and refuses everything else.

    Raises:
        FormatError: the file holds something else, is damaged, or is too large.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(
            f"{path} has {size} bytes; files of this old kind are read up to {MAX_BYTES}. Load "
            "it with PEFT and save it again, which writes safetensors."
        )
    try:
        check_pickle(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler anywhere
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} is damaged, or holds more than tensors, which is not loaded because it could "
            f"run code ({reason}). Ask for the safetensors file instead."
        ) from error
    if isinstance(content, dict) and len(content) == 1 and isinstance(content.get("model"), dict):
        content = content["model"]  # litgpt's, which keeps room for other things
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FormatError(f"{path} is no mapping of names to tensors.")
    problems = [f"{key!r}: {odd}" for key, value in content.items() if (odd := _odd(key, value))]
    total = sum(value.numel() * value.element_size() for value in content.values())
    if total > MAX_BYTES:
        problems.append(f"its tensors take {total} bytes; files of this old kind may {MAX_BYTES}")
    if problems:
        raise FormatError(collected(f"{path} holds what no adapter does", problems))
    logger.info("%s is a pickle; save the adapter again to have safetensors", path.name)
    return {key: value.detach() for key, value in content.items()}


def _odd(name: str, tensor: Tensor) -> str | None:
    """Why it is no plain tensor in the memory of the CPU; ``None`` if it is one."""
    if (odd := odd_name(name)) is not None:
        return odd
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return f"a tensor of the kind {tensor.layout} on {tensor.device}; expected plain numbers"
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        return (
            f"shape {list(tensor.shape)} takes {size} bytes, the file holds "
            f"{tensor.untyped_storage().nbytes()} of them"
        )
    if tensor.dtype not in DTYPES.values():
        return f"dtype {tensor.dtype}; expected one of {', '.join(map(str, DTYPES.values()))}"
    return None
