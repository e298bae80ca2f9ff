"""A model's own gradient checkpointing, which a run may turn on, as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def own_checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """After the block the modules' gradient checkpointing is as it was before."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, {name: module.__dict__[name] for name in names if name in module.__dict__})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, had in before:
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)
