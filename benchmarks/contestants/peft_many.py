"""K adapters with PEFT, one after the other: a plain loop for each, as its users would.

All are on the model at once, and each step switches to the next, which separate runs would not have
to: only what is between is measured.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.contestants import task as shared
from benchmarks.contestants.peft_loop import step as one_step


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    base, data, batches = shared.load(task)
    return {"task": task, "base": base, "data": data, "batches": batches, "states": None}


def _begin(state: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    task, base, data = state["task"], state["base"], state["data"]
    ranks = task["ranks"]
    model: Any = None
    for number, rank in enumerate(ranks):
        config = LoraConfig(
            r=rank,
            lora_alpha=shared.ALPHA,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if model is None:
            model = get_peft_model(base.model, config, adapter_name=f"job{number}")
        else:
            model.add_adapter(f"job{number}", config)
    model.train()
    batch = task["batch_size"] // len(ranks)
    rows = shared.job_rows(state["batches"], len(ranks))
    states = []
    for number in range(len(ranks)):
        own = f".job{number}."
        parameters = [p for n, p in model.named_parameters() if own in n]
        states.append(
            {
                "model": model,
                "data": data,
                "batches": [
                    rows[number][i * batch : (i + 1) * batch] for i in range(task["steps"] + 1)
                ],
                "optimizer": torch.optim.AdamW(parameters, lr=shared.LR, weight_decay=0.0),
                "parameters": parameters,
                "pad": base.tokenizer.pad_token_id,
            }
        )
    state["states"], state["model"] = states, model


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    if state["states"] is None:
        _begin(state)
    rows, seconds = [], 0.0
    for number, one in enumerate(state["states"]):
        _switch(state["model"], f"job{number}", one["parameters"])
        began = time.perf_counter()
        rows.append(one_step(one, i))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
    tokens = sum(row["tokens"] for row in rows)
    return {
        "loss": sum(row["loss"] for row in rows) / len(rows),
        "tokens": tokens,
        "seconds": seconds,
    }


def _switch(model: Any, name: str, parameters: list[Any]) -> None:
    """As separate runs would find it: one adapter active, which receives gradients."""
    model.set_adapter(name)
    for parameter in parameters:
        parameter.requires_grad_(True)
