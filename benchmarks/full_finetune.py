"""Full fine-tuning in a plain loop: every weight in float32, AdamW, packed batches.

What ``benchmarks extract`` needs: a checkpoint of all weights, beside the base it came from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_dev.csv"))
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4, help="highest rate; it ends at a tenth")
    parser.add_argument("--warmup", type=int, default=8, help="steps of rising rate")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    import torch

    from lorakit.bases import context_length, load_base
    from lorakit.data import DataSpec, load_data, order, pack

    torch.manual_seed(options.seed)
    base = load_base(options.base, dtype="float32")
    spec = DataSpec(path=(options.data,), map={"prompt": "mr", "completion": "ref"})
    data = load_data(spec, base.tokenizer, context_length=context_length(base.model))
    rows = order(len(data), options.seed, 0).tolist()
    if len(rows) < options.steps * options.batch_size:
        raise SystemExit(f"{len(rows)} rows are not enough for {options.steps} steps")
    model = base.model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    losses, started = [], time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.warmup, options.lr)
        chosen = rows[step * options.batch_size : (step + 1) * options.batch_size]
        losses.append(_step(model, pack([data[row] for row in chosen]), optimizer))
        if step % 10 == 0 or step == options.steps - 1:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(
                f"step {step + 1}: loss {losses[-1]:.4f}, {seconds:.1f} s a step", file=sys.stderr
            )
    model.eval().save_pretrained(options.out)
    base.require_tokenizer().save_pretrained(options.out)
    facts = {"steps": options.steps, "batch_size": options.batch_size, "lr": options.lr}
    print(json.dumps({**facts, "first_loss": losses[0], "last_loss": losses[-1]}))
    return 0


def rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Rises over the first steps, then falls along a straight line to a tenth."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (1.0 - 0.9 * (step - warmup) / max(1, steps - warmup))


def _step(model, batch, optimizer) -> float:
    """One step on the mean loss of the supervised tokens."""
    import torch

    # without a mask, transformers keeps examples apart where the positions begin anew
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.supervised,
    ).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
