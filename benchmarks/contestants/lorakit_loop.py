"""lorakit's own step: packed batches, supervised positions only, the flat optimizer."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contestants import task as shared


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    from lorakit.formats import load_adapter
    from lorakit.infer.packed import PackedModel
    from lorakit.layers import attach

    base, data, batches = shared.load(task)
    handle = attach(base.model, load_adapter(shared.start(task)), "a", trainable=True)
    flat = handle.flat("a")
    optimizer = torch.optim.AdamW([flat], lr=shared.LR, weight_decay=0.0, fused=True)
    return {
        "packed": PackedModel(base.model, handle),
        "data": data,
        "batches": batches,
        "flat": flat,
        "optimizer": optimizer,
    }


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    from lorakit.data import pack
    from lorakit.layers import Routing

    batch = pack([state["data"][row] for row in state["batches"][i]])
    flat = state["flat"]
    flat.grad.zero_()
    total, count = state["packed"].supervised_loss(batch, Routing.uniform("a"))
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_([flat], 1.0)
    state["optimizer"].step()
    return {"loss": total.item() / count, "tokens": float(batch.input_ids.numel())}
