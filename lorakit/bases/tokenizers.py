"""The tokenizer of a base: found, checked, and given a padding token without a new embedding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lorakit.bases.failures import explained
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import BaseError

_log = logging.getLogger(__name__)

#: files of which every tokenizer has at least one
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.model",
    "merges.txt",
    "tokenizer_config.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a local folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES) or any(folder.glob("*.tiktoken"))


def read_tokenizer(
    location: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    how_to_get: str | None = None,
) -> tuple[Any, list[str]]:
    """Load the tokenizer of a folder or a hub id.

    Args:
        local_files_only: take it from the hub's cache alone.
        how_to_get: what to do where the hub cannot be reached.

    Returns:
        The tokenizer, and what the user should know about it.

    Raises:
        BaseError: there is none, or it cannot be loaded.
    """
    folder = Path(location)
    if folder.is_dir() and not has_tokenizer(folder):
        # transformers would make one with an empty vocabulary
        raise BaseError(
            f"{location} holds no tokenizer (no {', '.join(_FILES[:4])}, …). Copy the tokenizer's "
            "files there from the model that it was made of."
        )
    from transformers import AutoTokenizer

    with quiet_transformers(), explained(location, "the tokenizer", how_to_get=how_to_get):
        tokenizer = AutoTokenizer.from_pretrained(
            location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BaseError(
            f"The tokenizer of {location} has no vocabulary: its files are incomplete. Copy them "
            "again from the model that it was made of."
        )
    return tokenizer, ensure_pad_token(tokenizer)


def ensure_pad_token(tokenizer: Any) -> list[str]:
    """Let a tokenizer without a padding token pad with one that it has.

    A new token would need a new row in the embedding, and padding is masked in any case.

    Returns:
        What was chosen.
    """
    if tokenizer.pad_token is not None:
        return []
    for name, kind in (("eos_token", "end of text"), ("unk_token", "unknown")):
        token = getattr(tokenizer, name)
        if token is not None:
            tokenizer.pad_token = token
            return [f"the tokenizer has no padding token; {token!r} ({kind}) pads instead"]
    return ["the tokenizer has no padding token and none that could stand for it"]
