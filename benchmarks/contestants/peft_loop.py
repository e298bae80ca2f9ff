"""A plain PyTorch loop around PEFT, as its documentation shows: padded batches, AdamW."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contestants import task as shared


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    from peft import PeftModel

    base, data, batches = shared.load(task)
    model = PeftModel.from_pretrained(base.model, str(shared.start(task)), is_trainable=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=shared.LR, weight_decay=0.0)
    pad = base.tokenizer.pad_token_id
    return {
        "model": model,
        "data": data,
        "batches": batches,
        "optimizer": optimizer,
        "parameters": parameters,
        "pad": pad,
    }


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    examples = [state["data"][row] for row in state["batches"][i]]
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), state["pad"])
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids, dtype=torch.long)
        mask[row, :n] = 1
        labels[row, :n] = torch.where(
            torch.tensor(example.supervised), ids[row, :n], labels[row, :n]
        )
    device = next(state["model"].parameters()).device
    ids, mask, labels = (t.to(device) for t in (ids, mask, labels))
    loss = state["model"](input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state["parameters"], 1.0)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    return {"loss": loss.item(), "tokens": float(mask.sum())}
