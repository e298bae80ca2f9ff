"""Initialisations, variants and unequal rates: each at its default rate, on the same rows.

Each is a ``lorakit train`` of its own process. Plain LoRA runs with several seeds, which shows how
much of a difference between two rows is chance; the rows that are held out are the same for all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import hardware

VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "gaussian": ["--init", "gaussian"],
    "orthogonal": ["--init", "orthogonal"],
    "rslora": ["--scaling", "alpha/sqrt(r)"],
    "pissa": ["--init", "pissa"],
    "olora": ["--init", "olora"],
    "eva": ["--init", "eva"],
    "eva-rho2": ["--init", "eva", "--eva-rho", "2"],
    "lora-ga": ["--init", "lora-ga"],
    "nf4": ["--quantize", "nf4"],
    "loftq": ["--quantize", "nf4", "--init", "loftq"],
    "dora": ["--variant", "dora"],
    "lora-plus": ["--lora-plus-ratio", "16"],
    "layer-rates": ["--lr-pattern", "q_proj=0.5", "k_proj=0.5"],
    "adamw8bit": ["--optimizer", "adamw8bit"],
}


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_dev.csv"))
    parser.add_argument("--map", default="prompt=mr,completion=ref", help="as lorakit train --map")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="runs of plain LoRA")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", help="folder for variants.json and variants.md")


def run(options: argparse.Namespace) -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = _held_out(options, Path(folder))
        for name in options.variants:
            for seed in range(options.seeds if name == "plain" else 1):
                print(f"{name}, seed {seed} …", file=sys.stderr)
                rows.append(_train(options, name, seed, data, Path(folder) / f"{name}-{seed}"))
    report = {"hardware": hardware(), "steps": options.steps, "runs": rows}
    text = _table(report)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "variants.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "variants.md").write_text(text + "\n")
    return 0


def _held_out(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The rows to train on and those to evaluate on, as files: what ``lorakit train`` would choose
    with seed 0, which a run of another seed would not."""
    from lorakit.bases import load_tokenizer
    from lorakit.data import DataSpec, load_data, order, split
    from lorakit.train import TrainSettings

    mapped = dict(pair.split("=") for pair in options.map.split(","))
    data = load_data(DataSpec(path=(options.data,), map=mapped), load_tokenizer(options.base))
    with open(options.data, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert len(rows) == len(data), "rows that cannot be used would shift the others"
    training, held = split(data, TrainSettings().held_out(len(data)), 0)
    chosen = held[np.sort(order(len(held), 0, 0)[: options.eval_rows])]
    files = folder / "train.csv", folder / "valid.csv"
    for path, indices in zip(files, (training, chosen), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *(rows[int(i)] for i in indices)])
    return files


def _train(
    options: argparse.Namespace, name: str, seed: int, data: tuple[Path, Path], out: Path
) -> dict[str, Any]:
    shared = {
        "base": options.base,
        "data": data[0],
        "valid": data[1],
        "map": options.map,
        "steps": options.steps,
        "batch-size": options.batch_size,
        "eval-rows": 0,
        "eval-every": 0,
        "samples": 0,
        "seed": seed,
        "out": out,
    }
    flags = [text for key, value in shared.items() for text in (f"--{key}", str(value))]
    subprocess.run(
        [sys.executable, "-m", "lorakit", "train", *flags, "--quiet", *VARIANTS[name]], check=True
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    return {
        "name": name,
        "seed": seed,
        "lr": max(step["lr"] for step in steps),
        "loss_before": evals[0]["loss"],
        "loss_after": evals[-1]["loss"],
        # the first steps warm caches up
        "seconds_per_step": statistics.median(
            s["seconds"] for s in steps[min(5, len(steps) - 1) :]
        ),
        "rss_mb": max(step["rss_mb"] for step in steps),
        "vram_mb": max((step.get("vram_mb") or 0) for step in steps),
    }


def _table(report: dict[str, Any]) -> str:
    machine = report["hardware"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['threads']} threads; {report['steps']} steps each, at the default rates",
        "",
        "| | seed | highest rate | loss before | after | s/step | resident MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        lines.append(
            f"| {run['name']} | {run['seed']} | {run['lr']:.2g} | {run['loss_before']:.4f} "
            f"| {run['loss_after']:.4f} | {run['seconds_per_step']:.2f} | {run['rss_mb']:.0f} |"
        )
    plain = [run["loss_after"] for run in report["runs"] if run["name"] == "plain"]
    if len(plain) > 1:
        spread = max(plain) - min(plain)
        lines += ["", f"Seeds alone move plain LoRA's loss by up to {spread:.4f}."]
    return "\n".join(lines)
