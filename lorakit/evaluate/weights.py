"""How many bytes the weights of a model or an adapter take on the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: which files of a folder hold weights; the first pattern that is met counts, for a folder may
#: hold the same weights twice, and states of an optimizer
_OF_ADAPTERS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*.safetensors",
    "*.gguf",
    "*.bin",
)
_OF_MODELS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "*.gguf",
    "*.safetensors",
)


def adapter_bytes(ref: str) -> int | None:
    """Bytes of an adapter's weights: a folder, a file, or a hub id that was downloaded."""
    return _bytes(Path(os.path.expanduser(ref)), ref, _OF_ADAPTERS, "adapter_config.json")


def model_bytes(location: str, revision: str | None = None) -> int | None:
    """Bytes of a model's weights: a folder, a ``.gguf`` file, or a hub id that was downloaded."""
    return _bytes(Path(location), location, _OF_MODELS, "config.json", revision)


def _bytes(
    path: Path, ref: str, patterns: Sequence[str], config: str, revision: str | None = None
) -> int | None:
    if not os.path.exists(path):  # where a name is too long, a Path raises
        cached = _cached(ref, config, revision)
        if cached is None:
            return None
        path = cached
    try:
        if path.is_file():
            return path.stat().st_size
        for pattern in patterns:
            files = [p for p in path.glob(pattern) if not _apart(p.name, config)]
            if files:
                return sum(p.stat().st_size for p in files)
    except OSError:  # it was there to be loaded; its size is no reason to stop
        pass
    return None


def _apart(name: str, config: str) -> bool:
    return config == "config.json" and name.startswith(("adapter_", "optimizer", "mmproj"))


def _cached(ref: str, config: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the hub's cache."""
    try:
        from huggingface_hub import try_to_load_from_cache

        repo_id, _, named = ref.partition("@")
        found = try_to_load_from_cache(repo_id, config, revision=revision or named or None)
    except (ImportError, ValueError):  # no hub library, or no id that it allows
        return None
    return Path(found).parent if isinstance(found, str) else None
