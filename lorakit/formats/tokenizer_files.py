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

    A file of the folder may be a link, as in the hub's cache; one that leads elsewhere would copy
    whatever it points to into every folder that the adapter is saved in.

    Raises:
        FormatError: one is too large to be a tokenizer's, leads out of the folder, or cannot be
            read.
    """
    found = {}
    for path in sorted([*folder.glob("*"), *folder.glob(f"{_TEMPLATES}/*")]):
        name = path.relative_to(folder).as_posix()
        if not is_tokenizer_file(name) or not path.is_file():
            continue
        if _leads_out(path, folder):
            raise FormatError(
                f"{path} is a link to {path.resolve()}, outside of the adapter's folder. Put the "
                "tokenizer's file itself there, or remove the link."
            )
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


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a file lies neither in the folder nor in the store of the hub's cache around it.

    There ``models--owner--name/snapshots/<commit>/tokenizer.json`` is a link into
    ``models--owner--name/blobs``.
    """
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return False
    cached = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")
    return not cached
