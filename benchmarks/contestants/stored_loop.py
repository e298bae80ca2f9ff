"""lorakit's step on a base that is stored in another way: ``stored_loop:nf4``, ``…:bf16+layers``.

Before the ``+`` stands how the base's linears are stored (``float32``: as they are), behind it
what is made again in the backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import task as shared
from benchmarks.contestants.lorakit_loop import step as plain_step


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    from lorakit.formats import load_adapter
    from lorakit.infer.packed import PackedModel
    from lorakit.layers import attach

    stored, _, recompute = task["variant"].partition("+")
    base, data, batches = shared.load(task, None if stored == "float32" else stored)
    handle = attach(
        base.model, load_adapter(shared.start(task)), "a", trainable=True, allow_other_base=True
    )
    flat = handle.flat("a")
    packed = PackedModel(base.model, handle, recompute=recompute or "none")  # type: ignore[arg-type]
    if packed.fused is None:
        raise RuntimeError(f"{stored} does not run fused: {packed.notes}")
    return {
        "packed": packed,
        "data": data,
        "batches": batches,
        "flat": flat,
        "optimizer": torch.optim.AdamW([flat], lr=shared.LR, weight_decay=0.0, fused=True),
        "handle": handle,
        "last": task["steps"],
        "out": Path(task["adapters"]) / task["variant"],
    }


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    from lorakit.formats import save_adapter

    row = plain_step(state, i)
    if i == state["last"]:
        save_adapter(state["handle"].snapshot("a"), state["out"])
    return row
