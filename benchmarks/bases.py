"""Bases stored in 4, 8, 16 and 32 bits: the same training, its memory, and the adapter merged.

All begin with one adapter and see the same rows in the same order. Afterwards each trained adapter
is evaluated on the base that it was trained on, and once more merged into that base's weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, hardware, take_turns
from benchmarks.train import _initial_adapter

VARIANTS = (
    "nf4", "int8", "int4-torchao", "int8-torchao", "bf16", "bf16+layers", "float32+mlp",
    "float32+layers", "float32",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "e2e_dev.csv"))
    parser.add_argument("--test", default=str(shared / "e2e_test.csv"), help="held out")
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="the last: measure")
    parser.add_argument("--out", help="folder for bases.json and bases.md")


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "base": options.base,
            "data": str(Path(options.data).resolve()),
            "steps": options.steps,
            "batch_size": options.batch_size,
            "start": str(_initial_adapter(options.base, Path(folder) / "start")),
            "adapters": folder,
        }
        print("preparing and taking turns …", file=sys.stderr)
        names = [f"stored_loop:{variant}" for variant in options.variants]
        results = take_turns(names, task, steps=options.steps)
        rows = []
        for variant, measured in zip(options.variants, results, strict=True):
            row = _summary(variant, measured)
            if "+" not in variant:  # what is made again changes no adapter
                row |= _evaluated(options, variant, Path(folder) / variant)
            rows.append(row)
    report = {"hardware": hardware(), "steps": options.steps, "bases": rows}
    text = _table(rows)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "bases.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "bases.md").write_text(text + "\n")
    return 0


def _summary(variant: str, measured: Measured) -> dict[str, Any]:
    return {
        "base": variant,
        "tokens_per_second": round(measured.tokens_per_second, 1),
        "loaded_mb": round(measured.loaded_mb),
        "peak_mb": round(measured.peak_mb),
        "losses": [round(row["loss"], 4) for row in measured.rows],
    }


def _evaluated(options: argparse.Namespace, variant: str, adapter: Path) -> dict[str, float]:
    """Loss on held-out rows: of the bare base, with the adapter, and merged."""
    import lorakit
    from lorakit.data import DataSpec, load_data
    from lorakit.evaluate import loss
    from lorakit.formats import load_adapter

    stored = None if variant == "float32" else variant
    base = lorakit.load_base(options.base, dtype="float32", quantize=stored)  # type: ignore[arg-type]
    columns = {"prompt": "mr", "completion": "ref"}
    spec = DataSpec(path=(options.test,), map=columns, format="plain")
    data = load_data(spec, base.tokenizer)
    rows = range(min(options.test_rows, len(data)))
    trained = load_adapter(adapter)
    found = {"base": loss(base.model, None, None, data, rows).loss}
    handle = lorakit.attach(base.model, trained, "a", allow_other_base=True)
    found["adapter"] = loss(base.model, handle, "a", data, rows).loss
    handle.detach()
    lorakit.merge(base.model, trained, allow_other_base=True)
    found["merged"] = loss(base.model, None, None, data, rows).loss
    del base
    gc.collect()
    return {f"test_loss_{name}": round(value, 4) for name, value in found.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| base | tokens/s | loaded MB | peak MB | above | first loss | last 5 | test: base | "
        "adapter | merged |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        last = row["losses"][-5:]
        tests = [row.get(f"test_loss_{name}", "") for name in ("base", "adapter", "merged")]
        values = [
            row["base"], row["tokens_per_second"], row["loaded_mb"], row["peak_mb"],
            row["peak_mb"] - row["loaded_mb"], row["losses"][0],
            round(sum(last) / len(last), 4), *tests,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)
