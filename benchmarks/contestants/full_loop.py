"""Full fine-tuning in a plain PyTorch loop: padded batches, AdamW over all weights."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contestants import task as shared
from benchmarks.contestants.peft_loop import step

__all__ = ["prepare", "step"]

#: a usual rate for all weights; the curve is another one
LR = 1e-4


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    base, data, batches = shared.load(task)
    model = base.model.requires_grad_(True).train()
    parameters = list(model.parameters())
    return {
        "model": model,
        "data": data,
        "batches": batches,
        "optimizer": torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
        "parameters": parameters,
        "pad": base.tokenizer.pad_token_id,
    }
