"""How much of full fine-tuning an extracted adapter keeps, by rank.

For each rank: the share of the loss improvement (base → fully fine-tuned) on held-out rows that the
adapter has, beside its Frobenius error and the smallest error that any adapter of this rank has.
At full rank, with the remainder kept, the logits must be those of the fine-tuned model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--tuned", required=True, help="from benchmarks full_finetune")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_test.csv"), help="held out")
    parser.add_argument("--rows", type=int, default=200, help="rows of it; 0 means all")
    parser.add_argument("--ranks", nargs="+", default=["8", "64", "256", "full"])
    parser.add_argument("--targets", nargs="+", help="as of lorakit extract; default: everything")
    parser.add_argument("--out", help="folder for extract.json and extract.md")


def run(options: argparse.Namespace) -> int:
    from lorakit.bases import context_length, load_base, resolve_base
    from lorakit.data import DataSpec, load_data, order
    from lorakit.evaluate.losses import loss

    base = load_base(options.base, dtype="float32")
    spec = DataSpec(path=(options.data,), map={"prompt": "mr", "completion": "ref"})
    data = load_data(spec, base.tokenizer, context_length=context_length(base.model))
    rows = order(len(data), 0, 0).tolist()[: options.rows or None]
    tuned = load_base(resolve_base(options.tuned), dtype="float32").model
    before = loss(base.model, None, None, data, rows).loss
    after = loss(tuned, None, None, data, rows).loss
    print(f"base {before:.4f}, fine-tuned {after:.4f}", file=sys.stderr)
    results = []
    for rank in options.ranks:
        for keep in (False, True):
            row = _measure(options, base.model, tuned, data, rows, rank, keep=keep)
            row["share"] = (before - row["loss"]) / (before - after)
            results.append(row)
            print(json.dumps(row), file=sys.stderr)
    report = {
        "rows": len(rows),
        "targets": options.targets,
        "base_loss": before,
        "tuned_loss": after,
        "ranks": results,
        "hardware": hardware(),
    }
    text = _table(report)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "extract.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "extract.md").write_text(text + "\n")
    return 0


def _measure(
    options: argparse.Namespace, model: Any, tuned: Any, data: Any, rows: list[int], rank: str,
    *, keep: bool,
) -> dict[str, Any]:  # fmt: skip
    """One adapter: extracted, attached, measured, taken off again."""
    from lorakit import attach, extract
    from lorakit.evaluate.losses import loss

    started = time.perf_counter()
    adapter = extract(
        options.base,
        options.tuned,
        rank="full" if rank == "full" else int(rank),
        targets=options.targets,
        remainder="keep" if keep else "report",
    )
    seconds = time.perf_counter() - started
    facts = adapter.provenance["extract"]
    handle = attach(model, adapter, "extracted")
    try:
        found = loss(model, handle, "extracted", data, rows).loss
        apart = _apart(model, tuned, data, rows[:8])
    finally:
        handle.detach()
    return {
        "rank": rank,
        "remainder": "kept" if keep else "left out",
        "parameters": adapter.num_parameters,
        "loss": found,
        "error": facts["error"],
        "best_error": facts["best_error"],
        "largest_logit_difference": apart,
        "seconds": round(seconds, 1),
    }


def _apart(model: Any, tuned: Any, data: Any, rows: list[int]) -> float:
    """The largest difference of logits from the fine-tuned model, over a few examples."""
    import torch

    worst = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(data[row].ids.tolist())[None]
            difference = model(input_ids=ids).logits - tuned(input_ids=ids).logits
            worst = max(worst, float(difference.abs().max()))
    return worst


def _table(report: dict[str, Any]) -> str:
    kind = report["hardware"]
    lines = [
        f"{kind['cpu']}, {kind['cores']} cores, torch {kind['torch']}; {report['rows']} held-out "
        f"rows: base loss {report['base_loss']:.4f}, fully fine-tuned {report['tuned_loss']:.4f}",
        "",
        "| rank | norms | parameters | loss | improvement kept | error | best possible "
        "| logits apart | extracted in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["ranks"]:
        lines.append(
            f"| {row['rank']} | {row['remainder']} | {row['parameters']:,} | {row['loss']:.4f} "
            f"| {row['share']:.1%} | {row['error']:.3%} | {row['best_error']:.3%} "
            f"| {row['largest_logit_difference']:.1e} | {row['seconds']} s |"
        )
    return "\n".join(lines)
