"""Tensors of a file by the module that they belong to, for formats with a key per factor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.errors import FormatError, collected

#: last names of embeddings; some formats do not say which of their sites are such
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in")


def by_module(
    tensors: Mapping[str, Tensor], key: re.Pattern[str], problems: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Module → part → tensor.

    Args:
        key: an expression with the groups module and part.
        problems: gets a line for each key that it does not match.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        match = key.fullmatch(name)
        if match is None:
            problems.append(f"{name}: unknown")
        else:
            found.setdefault(match[1], {})[match[2]] = tensors[name]
    return found


def missing_parts(
    parts: Mapping[str, Mapping[str, Tensor]], needed: Sequence[str]
) -> Iterable[str]:
    """A line for each part that a module lacks, and for each factor that is no matrix."""
    for module, own in parts.items():
        for name in needed:
            if name not in own:
                yield f"{module}.{name} is missing"
            elif own[name].dim() != 2 or 0 in own[name].shape:
                yield f"{module}.{name} has shape {list(own[name].shape)}; expected a matrix"


def refuse(title: str, problems: Sequence[str], advice: str = "") -> None:
    """Raise if there is any problem.

    Raises:
        FormatError: holds all of them.
    """
    if problems:
        raise FormatError(collected(title, problems) + (f"\n{advice}" if advice else ""))


def left_behind(adapter: Adapter, *, header: bool) -> tuple[list[str], dict[str, str]]:
    """What a file that holds tensors alone does not take along: notes, and losses.

    Args:
        header: whether the file has a place for our header (settings, base, provenance).
    """
    notes = []
    if not header:
        facts = {"settings": True, "base": adapter.base, "provenance": adapter.provenance}
        names = ", ".join(name for name, value in facts.items() if value)
        notes.append(f"the file has no place for what the adapter knows of its making ({names})")
    lost = {
        f"tokenizer file {name}": "this format has no place for it; keep it beside the file"
        for name in adapter.tokenizer_files
    }
    return notes, lost
