"""Activations that are made again: by fused layers where they fit, else by the model itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.errors import BaseError
from lorakit.infer import PackedModel
from lorakit.layers import Handle
from lorakit.tasks.names import Recompute


def recomputing(model: nn.Module, handle: Handle | None, recompute: Recompute) -> PackedModel:
    """A language model for training; its notes say what was decided against what was asked.

    Where no layer can run fused, the model's own gradient checkpointing is turned on and stays
    so; see ``train.mode``.

    Raises:
        BaseError: this model can make nothing again, or nothing can be offloaded here.
    """
    offload = recompute == "offload"
    packed = PackedModel(
        model, handle, recompute="layers" if recompute == "offload" else recompute, offload=offload
    )
    if recompute == "none" or packed.fused is not None:
        return packed
    first = packed.notes
    checkpoint_layers_(model, "; ".join(first))
    note = (
        f"the model's own gradient checkpointing is on, for all of each layer: {recompute!r} "
        "needs fused layers"
    )
    packed = PackedModel(model, handle)
    packed.notes[:] = [note, *first, *(other for other in packed.notes if other not in first)]
    return packed


def checkpoint_layers_(model: nn.Module, why: str) -> None:
    """Turn a model's own gradient checkpointing on.

    Args:
        why: what else was tried, for the message.

    Raises:
        BaseError: it has none.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise BaseError(
            f"{type(model).__name__} cannot make its activations again ({why}). "
            "Leave --recompute out; a smaller --micro-batch-tokens saves memory too"
        )
    enable({"use_reentrant": False})
