"""``config.json`` of a base as plain data, without its weights and without transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.bases.source import ALIASES, find_source
from lorakit.errors import BaseError

#: a config above this is no config
_MAX_BYTES = 50_000_000

#: field of a GGUF behind its architecture → field of a config
_GGUF_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}


def read_config(ref: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The config of a base: a folder, its ``config.json``, a GGUF's header, or a hub id.

    Raises:
        BaseError: there is none; from the hub, also where it cannot be reached.
    """
    path = Path(os.path.expanduser(ref))
    if path.suffix == ".json" and path.is_file():
        return _read_json(path)
    source = find_source(ref)
    if source.kind == "gguf":
        return _of_gguf(Path(source.location))
    if source.kind == "folder":
        return _read_json(Path(source.location) / "config.json")
    cached = _cached(source.location, source.revision)
    if cached is not None:
        return _read_json(cached)
    from lorakit.bases.preview import base_config  # asks the hub

    config: dict[str, Any] = base_config(ref).to_dict()
    return config


def find_config(ref: str) -> Mapping[str, Any] | None:
    """The same where it is on this machine; ``None`` elsewhere. Nothing is downloaded."""
    if os.path.exists(ref) or ref in ALIASES:
        return read_config(ref)
    alias = next((name for name, alias in ALIASES.items() if alias.hub_id == ref), None)
    if alias is not None and find_source(alias).kind == "gguf":
        return read_config(alias)
    cached = _cached(ref, None)
    return None if cached is None else _read_json(cached)


def _cached(repo_id: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except (ImportError, ValueError):  # no hub library, or no id that it allows
        return None
    return Path(found) if isinstance(found, str) else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BaseError(f"{path} has {path.stat().st_size} bytes; that is no config.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"{path} is no config ({error}). Copy it again.") from error
    if not isinstance(config, dict):
        raise BaseError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    return config


def _of_gguf(path: Path) -> Mapping[str, Any]:
    """The fields that a GGUF's header has of a config."""
    from lorakit.core.gguf_file import read_gguf

    file = read_gguf(path)
    architecture = file.fields.get("general.architecture")
    config: dict[str, Any] = {"model_type": architecture}
    for theirs, ours in _GGUF_FIELDS.items():
        value = file.fields.get(f"{architecture}.{theirs}")
        if value is not None:
            config[ours] = value
    config["tie_word_embeddings"] = "output.weight" not in file.entries
    return config
