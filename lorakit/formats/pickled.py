"""``adapter_model.bin``, PEFT's older file: tensors only, never code."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import FormatError

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
    _check_unpacked_size(path)
    try:
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
    logger.info("%s is a pickle; save the adapter again to have safetensors", path.name)
    return {key: value.detach() for key, value in content.items()}


def _check_unpacked_size(path: Path) -> None:
    """Refuse an archive that would become far larger than the file.

    Raises:
        FormatError: its entries take more than the limit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the older kind of file, or a damaged one, which the unpickler refuses
    if size > MAX_BYTES:
        raise FormatError(
            f"{path} unpacks to {size} bytes; files of this old kind are read up to {MAX_BYTES}."
        )
