"""A model as a forward needs it: in evaluation, given the options that it knows, and without a
memory of longer sequences."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), then each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def accepted(module: Any, **options: Any) -> dict[str, Any]:
    """The options that a module's forward names."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in options.items() if name in names}


def forget_longest(model: nn.Module, length: int) -> None:
    """Let the next forward, of ``length`` tokens, take the frequencies of its own length.

    A dynamic encoding keeps those of the longest sequence so far for shorter ones. It compares
    with what is set here: below its original length it goes back, otherwise it computes anew.
    """
    for module in model.modules():
        original = getattr(module, "original_max_seq_len", None)
        if original is not None and "dynamic" in str(getattr(module, "rope_type", "")):
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, math.inf if length < original else 0)
