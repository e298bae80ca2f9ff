"""Training steps: lorakit beside TRL and plain PyTorch loops, same rows, same start."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Measured, hardware, take_turns

CONTESTANTS = ("lorakit_loop", "trl_sft", "full_loop", "peft_loop")
#: what does not train the same adapter has another curve
OTHER_CURVE = ("full_loop",)


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_dev.csv"))
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), help="the last is the measure"
    )
    parser.add_argument("--out", help="folder for train.json and train.md")


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "base": options.base,
            "data": str(Path(options.data).resolve()),
            "steps": options.steps,
            "batch_size": options.batch_size,
            "start": str(_initial_adapter(options.base, Path(folder) / "start")),
        }
        print("preparing and taking turns …", file=sys.stderr)
        results = take_turns(options.contestants, task, steps=options.steps)
    report = {
        "task": {k: v for k, v in task.items() if k not in ("start", "data")},
        "hardware": hardware(),
        "contestants": [summary(r, results[-1]) for r in results],
    }
    text = table(report)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "train.md").write_text(text + "\n")
    return 0


def _initial_adapter(base: str, folder: Path) -> Path:
    from benchmarks.contestants.task import ALPHA, RANK
    from lorakit import LoRASpec, attach, load_base, save_adapter

    handle = attach(load_base(base, dtype="float32").model, LoRASpec(rank=RANK, alpha=ALPHA))
    save_adapter(handle.snapshot(), folder)
    return folder


def summary(measured: Measured, reference: Measured) -> dict[str, object]:
    above = measured.peak_mb - measured.loaded_mb
    ratios = sorted(r / m for r, m in zip(reference.seconds, measured.seconds, strict=True))
    return {
        "name": measured.name,
        "seconds_per_step": round(measured.median, 3),
        "tokens_per_second": round(measured.tokens_per_second, 1),
        "speed_against_last": round(ratios[len(ratios) // 2], 2),
        "speed_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "loaded_mb": round(measured.loaded_mb),
        "peak_mb": round(measured.peak_mb),
        "above_loaded_mb": round(above),
        "losses": [round(row["loss"], 5) for row in measured.rows],
    }


def table(report: dict) -> str:
    hardware = report["hardware"]
    lines = [
        f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"torch {hardware['torch']}, "
        f"{hardware['threads']} threads; {report['task']['steps']} steps each, taken in turn, "
        f"batch {report['task']['batch_size']}",
        "",
        "| | s/step | tok/s | speed (min–max) | loaded MB | peak MB | above MB "
        "| first loss | last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["contestants"]:
        low, high = row["speed_spread"]
        lines.append(
            f"| {row['name']} | {row['seconds_per_step']} | {row['tokens_per_second']} "
            f"| {row['speed_against_last']}× ({low}–{high}) | {row['loaded_mb']} "
            f"| {row['peak_mb']} | {row['above_loaded_mb']} "
            f"| {row['losses'][0]:.4f} | {row['losses'][-1]:.4f} |"
        )
    rows = report["contestants"]
    curves = [row["losses"] for row in rows if row["name"] not in OTHER_CURVE]
    apart = max(max(c) - min(c) for c in zip(*curves, strict=True))
    lines += ["", f"Largest difference between the adapters' loss curves: {apart:.1e}"]
    return "\n".join(lines)
