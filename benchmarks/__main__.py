"""``python -m benchmarks NAME``."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHMARKS = {
    "start": "what is waited for: imports, the base, attaching, a hundred adapters",
    "train": "training steps, beside a plain PEFT loop",
    "joint": "many adapters in one step, beside PEFT runs one after the other",
    "bases": "bases stored in 4, 8, 16 and 32 bits: loss, speed, memory, merging",
    "variants": "initialisations, DoRA, LoRA+: loss, time and memory at their default rates",
    "gpu": "training steps on a GPU, beside PEFT and Liger",
    "full_or_lora": "full fine-tuning beside LoRA, both tuned, over seeds, with forgetting",
    "beside": "LoRA, a prefix, biases and norms, each alone and together, over seeds",
    "classify": "a MiniLM classifier: LoRA, all weights, and a frozen base with a trained head",
    "full_finetune": "a fully fine-tuned checkpoint, in a plain loop",
    "extract": "what adapters extracted from such a checkpoint keep, by rank",
    "estimate": "predicted memory and time beside measured, for drawn settings",
    "tune": "lorakit tune beside an exhaustive grid of rates and ranks",
    "merge": "merge and undo: cycles, time, latency, logits",
    "merge_streaming": "a large checkpoint merged from file to file: its memory",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, line in BENCHMARKS.items():
        module = importlib.import_module(f"benchmarks.{name}")
        sub = names.add_parser(name, help=line, description=module.__doc__)
        module.configure(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
