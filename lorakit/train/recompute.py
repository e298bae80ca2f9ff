"""Activations that are made again: by fused layers where they fit, else by the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorakit.errors import BaseError
from lorakit.infer import PackedModel
from lorakit.layers import Handle
from lorakit.train.settings import Recompute


def recomputing(
    model: nn.Module, handle: Handle | None, recompute: Recompute
) -> tuple[PackedModel, list[str]]:
    """The model for training, and what was decided against what was asked.

    Where no layer can run fused, the model's own gradient checkpointing is turned on; see
    :func:`own_checkpointing_kept`.

    Raises:
        BaseError: this model can make nothing again, or nothing can be offloaded here.
    """
    offload = recompute == "offload"
    packed = PackedModel(
        model, handle, recompute="layers" if recompute == "offload" else recompute, offload=offload
    )
    if recompute == "none" or packed.fused is not None:
        return packed, packed.notes
    first = packed.notes
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise BaseError(
            f"{type(model).__name__} cannot make its activations again ({'; '.join(first)}). "
            "Leave --recompute out; a smaller --micro-batch-tokens saves memory too"
        )
    enable({"use_reentrant": False})
    notes = [f"the model's own gradient checkpointing is on, for all of each layer: {recompute!r} "
             "needs fused layers"]  # fmt: skip
    packed = PackedModel(model, handle)
    return packed, [*notes, *first, *(note for note in packed.notes if note not in first)]


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
