"""What is asked of a tokenizer: ids of texts without additions, and what it would add."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from lorakit.errors import DataError


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, nothing added, nothing cut; equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        encoded = [e.ids for e in backend.encode_batch_fast(unique, add_special_tokens=False)]
    else:
        encoded = tokenizer(
            unique, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )["input_ids"]
    if len(unique) == len(texts):
        return list(encoded)
    found = dict(zip(unique, encoded, strict=True))
    return [found[text] for text in texts]


def added_before(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by itself: BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    raise DataError(
        "The tokenizer changes a text when it adds its special tokens, so examples cannot be "
        "put together from it. Use the tokenizer of a causal language model."
    )


def special_tokens(tokenizer: Any) -> list[str]:
    """Every text that becomes one special token, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    found = {str(token.content) for token in added.values() if token.special}
    found |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(found - {""}, key=lambda token: (-len(token), token))


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches any special token's text; nothing if there is none."""
    return _pattern(tuple(special_tokens(tokenizer)))


@functools.lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
