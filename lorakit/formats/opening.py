"""From a path to a :class:`~lorakit.formats.format.Source`: which file of a folder is meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import FormatError
from lorakit.formats.folder import CONFIG, PICKLED, WEIGHTS, adapter_in
from lorakit.formats.format import Source
from lorakit.formats.peft.read import read_json

#: names under which tools store an adapter in a folder, the first that is there counts
_NAMES = (
    WEIGHTS,
    PICKLED,
    "adapters.safetensors",  # MLX
    "pytorch_lora_weights.safetensors",  # diffusers
    "pytorch_lora_weights.bin",
    "lit_model.pth.lora",  # litgpt
)
SUFFIXES = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".lora")


def open_source(path: str | os.PathLike[str]) -> Source:
    """What a path names; only a config is read.

    Raises:
        FormatError: nothing is there, it is no file of tensors, or a folder holds several and
            does not say which is meant.
    """
    path = adapter_in(Path(os.path.expanduser(path)))
    if not os.path.exists(path):  # where a name is too long, a Path raises
        raise FormatError(missing(path))
    if path.is_dir():
        weights = _weights_in(path)
    elif path.name == CONFIG:
        weights = _weights_in(path.parent)
    else:
        weights = path
        if not path.is_file() or (path.suffix not in SUFFIXES and not _is_gguf(path)):
            raise FormatError(
                f"{path} is no adapter. Give an adapter's folder, or its file "
                f"({', '.join(SUFFIXES)})."
            )
    return Source(path, weights, _config_beside(weights))


def _is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def _config_beside(weights: Path) -> Mapping[str, Any]:
    config = weights.parent / CONFIG
    return read_json(config) if config.is_file() else {}


def _weights_in(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    whole_model = (folder / "config.json").exists() or (folder / "model_index.json").exists()
    if len(found) == 1 and not whole_model:
        return found[0]
    if found and not whole_model and not (folder / CONFIG).exists():
        raise FormatError(
            f"{folder} holds {len(found)} files of tensors. Give one of: "
            + ", ".join(str(p) for p in found[:6])
        )
    raise FormatError(no_adapter(folder))


def missing(path: Path) -> str:
    """The message for a path that does not exist, with what is close to it."""
    names = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {path.parent / close[0]}?" if close else "Check the path."
    return f"{path} does not exist, and is no hub id (owner/name). {hint}"


def no_adapter(folder: Path) -> str:
    """Why a folder is no adapter, and what is."""
    if (folder / CONFIG).exists():
        return (
            f"{folder} has {CONFIG} but no {WEIGHTS}. The adapter was copied in part; copy or "
            "download it again."
        )
    inside = sorted(p.parent for p in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")])
    if inside:
        paths = ", ".join(str(p) for p in inside[:5])
        return f"{folder} is no adapter itself, but holds some. Give one of: {paths}"
    if (folder / "config.json").exists() or (folder / "model_index.json").exists():
        return (
            f"{folder} is a whole model, not an adapter (it has config.json and no {CONFIG}). "
            "Give it as the base, and an adapter beside it."
        )
    names = sorted(p.name for p in folder.iterdir())
    there = ", ".join(names[:6]) or "nothing"
    return f"{folder} has no {CONFIG}; it holds {there}. Give the folder of an adapter."
