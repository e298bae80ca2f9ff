"""Kinds by name, as ``--task`` and section ``task`` of run.yaml have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.errors import InputError
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.task import Kind

#: name → what makes the kind of its settings
KINDS: dict[str, Callable[..., Kind]] = {"causal": lambda: CAUSAL}


def named(kind: Kind) -> dict[str, Any]:
    """Section ``task`` of run.yaml."""
    return {"name": kind.name, **kind.settings()}


def kind_of(section: Mapping[str, Any] | None) -> Kind:
    """The inverse of :func:`named`; ``None`` is the causal language model.

    Raises:
        InputError: no such kind, or it has no such settings.
    """
    if section is None:
        return CAUSAL
    settings = dict(section)
    name = settings.pop("name", None)
    if name not in KINDS:
        raise InputError(
            f"the task is {name!r}; lorakit knows {', '.join(sorted(KINDS))}. A run of another "
            "program is resumed by that program"
        )
    try:
        return KINDS[name](**settings)
    except TypeError as error:
        raise InputError(f"run.yaml's section task does not fit {name!r}: {error}") from error
