"""Training steps on a GPU: lorakit beside PEFT, and PEFT with Liger's kernels where installed.

Llama shapes with random weights in bfloat16 and random tokens, so that nothing is downloaded.
Memory is what the GPU's allocator held at the peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.contestants.task import ALPHA, RANK, SHAPES, random_model
from benchmarks.harness import hardware, take_turns
from benchmarks.train import summary, table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="of the Llama (1b)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest example")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--out", help="folder for gpu.json and gpu.md")


def run(options: argparse.Namespace) -> int:
    import torch

    from lorakit import LoRASpec, attach, save_adapter

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --shape tiny shows that it runs")
        return 2
    names = ["lorakit_loop", "peft_loop"]
    if importlib.util.find_spec("liger_kernel") and options.device.startswith("cuda"):
        names.insert(1, "peft_liger")
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(options.shape, options.device)
        handle = attach(model, LoRASpec(rank=RANK, alpha=ALPHA))
        save_adapter(handle.snapshot(), Path(folder) / "start")
        handle.detach()
        del model, handle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        task = {
            "base": f"random:{options.shape}",
            "device": options.device,
            "length": options.length,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "start": str(Path(folder) / "start"),
        }
        print("preparing and taking turns …", file=sys.stderr)
        results = take_turns(names, task, steps=options.steps)
    report = {
        "task": {k: v for k, v in task.items() if k != "start"},
        "hardware": hardware(),
        "contestants": [summary(r, results[-1]) for r in results],
    }
    text = table(report)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu.md").write_text(text + "\n")
    return 0
