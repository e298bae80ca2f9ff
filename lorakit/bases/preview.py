"""What can be known of a base without its weights: where it lies, its config, its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from lorakit.bases.failures import explained
from lorakit.bases.fetch import loading_options
from lorakit.bases.gguf_cache import cached_if_there
from lorakit.bases.gguf_file import read_header
from lorakit.bases.gguf_tokenizer import gguf_tokenizer
from lorakit.bases.load import locate
from lorakit.bases.quiet import quiet_transformers
from lorakit.bases.source import Source, find_source
from lorakit.bases.tokenizers import ensure_pad_token, read_tokenizer
from lorakit.errors import BaseError
from lorakit.optional import require

_log = logging.getLogger(__name__)


def resolve_base(
    ref: str | PathLike[str],
    *,
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """The local folder or the hub id that ``ref`` means; a GGUF is dequantised if need be.

    Raises:
        BaseError: there is no such base, or the GGUF cannot be used.
    """
    return locate(find_source(ref, revision), say or _log.info).location


def load_tokenizer(
    ref: str | PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a base, without its weights; a GGUF is not dequantised for it.

    Raises:
        BaseError: the base is not found, or has no tokenizer.
    """
    require("transformers", extra="train", purpose="reading a tokenizer")
    source = find_source(ref, revision)
    options = loading_options(source, trust_remote_code=trust_remote_code)
    folder = _made_already(source)
    if folder is not None:
        return read_tokenizer(folder, **options)[0]
    if source.kind == "gguf":
        return _tokenizer_of_gguf(Path(source.location))
    return read_tokenizer(source.location, how_to_get=source.how_to_get, **options)[0]


def base_config(
    ref: str | PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers config of a base, without its weights.

    Raises:
        BaseError: the base is not found, or has no config.
    """
    require("transformers", extra="train", purpose="reading a model's config")
    from transformers import AutoConfig

    source = find_source(ref, revision)
    options = loading_options(source, trust_remote_code=trust_remote_code)
    location = _made_already(source) or source.location
    with (
        quiet_transformers(),
        explained(location, "the config", how_to_get=source.how_to_get),
    ):
        if source.kind == "gguf" and location == source.location:
            gguf = Path(location)
            read_header(gguf)
            return AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        return AutoConfig.from_pretrained(location, **options)


def _made_already(source: Source) -> str | None:
    if source.kind != "gguf":
        return None
    cached = cached_if_there(Path(source.location))
    return str(cached.folder) if cached else None


def _tokenizer_of_gguf(gguf: Path) -> Any:
    header = read_header(gguf)
    if not header.has_tokenizer:
        raise BaseError(f"{gguf} holds no tokenizer. Give the model's folder or hub id instead.")
    with quiet_transformers(stderr=True), explained(str(gguf), "the tokenizer"):
        tokenizer, notes = gguf_tokenizer(gguf, header)
    for note in [*notes, *ensure_pad_token(tokenizer)]:
        _log.info("%s", note)
    return tokenizer
