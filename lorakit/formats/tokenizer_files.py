"""Which files of a folder are the tokenizer's, so that changes to it travel with the adapter."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.errors import FormatError

_NAMES = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "target.spm",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
#: transformers keeps further chat templates in this folder
_TEMPLATES = "additional_chat_templates"
_TEMPLATE = re.compile(rf"{_TEMPLATES}/[\w.-]+\.jinja")

#: a tokenizer above this is no tokenizer; the largest known ones have some 40 MB
MAX_BYTES = 200_000_000


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, relative to the adapter's folder, is a tokenizer's."""
    return name in _NAMES or _TEMPLATE.fullmatch(name) is not None


def tokenizer_files_in(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files by name.

    Raises:
        FormatError: one is too large to be a tokenizer's, or cannot be read.
    """
    found = {}
    for path in sorted([*folder.glob("*"), *folder.glob(f"{_TEMPLATES}/*")]):
        name = path.relative_to(folder).as_posix()
        if not is_tokenizer_file(name) or not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_BYTES:
                raise FormatError(
                    f"{path} has {path.stat().st_size} bytes; a tokenizer's file has at most "
                    f"{MAX_BYTES}. Remove it if it does not belong to the adapter."
                )
            found[name] = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    return found
