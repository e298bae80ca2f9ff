"""What is waited for before anything happens: imports, the base, attaching, many adapters.

Each number is the median of repetitions in fresh processes, beside PEFT's where it has the same
thing to do. PEFT is given fewer adapters: it walks the model once more for each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import json, sys, time
import lorakit
started = time.perf_counter()
base = lorakit.load_base("smollm2")
seen = {"base, second start (s)": time.perf_counter() - started}
attach, spec = lorakit.attach, lorakit.LoRASpec(rank=16)
started = time.perf_counter()
handle = attach(base.model, spec, name="a")
seen["attach 210 linears (ms)"] = (time.perf_counter() - started) * 1e3
lorakit.save_adapter(handle.snapshot("a"), sys.argv[1])
for upto in (50, 100):
    started = time.perf_counter()
    for number in range(upto - 50, upto):
        handle.add(lorakit.load_adapter(sys.argv[1]), name=f"n{number}")
    seen[f"adapters {upto - 49}-{upto} (s)"] = time.perf_counter() - started
print(json.dumps(seen))
"""

PEFTS = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, lorakit
model = lorakit.load_base("smollm2").model
from peft import LoraConfig, get_peft_model
config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
started = time.perf_counter()
model = get_peft_model(model, config)
seen = {"attach 210 linears (ms)": (time.perf_counter() - started) * 1e3}
for upto in (10, 20):
    started = time.perf_counter()
    for number in range(upto - 10, upto):
        model.load_adapter(sys.argv[1], adapter_name=f"n{number}")
    seen[f"adapters {upto - 9}-{upto} (s)"] = time.perf_counter() - started
print(json.dumps(seen))
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=5, help="processes of each kind (5)")


def run(options: argparse.Namespace) -> int:
    """Print one row for each number: median, smallest, largest."""
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = str(Path(folder) / "adapter")
        for turn in range(options.repeat):
            bare = _wall("pass")
            _note(rows, "import lorakit over bare Python (ms)", _wall("import lorakit") - bare)
            _note(rows, "lorakit --help (ms)", _wall_of("-m", "lorakit.cli.main", "--help"))
            if turn < max(1, options.repeat // 2):
                for name, value in _told(OURS, adapter).items():
                    rows.setdefault(name, []).append(value)
        for name, value in _told(PEFTS, adapter).items():
            rows.setdefault(f"PEFT: {name}", []).append(value)
    print("| | median | min | max |\n|---|---|---|---|")
    for name, values in rows.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.4g} | {min(values):.4g} | {max(values):.4g} |")
    return 0


def _note(rows: dict[str, list[float]], name: str, seconds: float) -> None:
    rows.setdefault(name, []).append(seconds * 1e3)


def _wall(code: str) -> float:
    return _wall_of("-c", code)


def _wall_of(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _told(code: str, adapter: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, adapter], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
