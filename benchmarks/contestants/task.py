"""The task that all contestants are given: the same base, rows, batches and start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LR = 1e-3
RANK, ALPHA = 16, 32.0


def load(task: dict[str, Any], quantize: Any = None) -> tuple[Any, Any, list[list[int]]]:
    """(base, token data, the rows of each step's batch)."""
    from lorakit.bases import context_length, load_base
    from lorakit.data import DataSpec, load_data, order

    torch.manual_seed(0)
    base = load_base(task["base"], dtype="float32", quantize=quantize)
    for parameter in base.model.parameters():
        parameter.sum()  # weights mapped from a file count as loaded, for everybody
    spec = DataSpec(path=(task["data"],), map={"prompt": "mr", "completion": "ref"})
    data = load_data(spec, base.tokenizer, context_length=context_length(base.model))
    rows = order(len(data), 0, 0).tolist()
    size = task["batch_size"]
    count = task["steps"] + 1
    return base, data, [rows[i * size : (i + 1) * size] for i in range(count)]


def start(task: dict[str, Any]) -> Path:
    """The folder of the initial adapter, the same for all."""
    return Path(task["start"])
