"""K adapters in one step: jointly, one by one, with PEFT, and a single one over the same tokens.

Contestants take turns, each in a process of its own. A step is one optimizer step of every adapter,
each over its own ``--sequences`` sequences. The last row, PEFT's runs one after the other, is the
measure of speed; loading and switching on of PEFT's adapters is not counted against it. Memory is
that above the loaded base, the adapters included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, hardware, take_turns

CONTESTANTS = (
    "joint_loop:joint",
    "joint_loop:one_by_one",
    "joint_loop:one_adapter",
    "peft_many",
)
#: ranks of the jobs, again from the start where there are more
RANKS = (16, 4, 8, 32, 16, 64, 8, 4)


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="as of train, or random:SHAPE")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_dev.csv"))
    parser.add_argument("--dtype", default="float32", help="of a base that is not random")
    parser.add_argument("--device", default="cpu", help="of a random base")
    parser.add_argument("--length", type=int, default=512, help="longest row of a random base")
    parser.add_argument("--jobs", type=int, default=8, help="K")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--sequences", type=int, default=1, help="of each job in a step")
    parser.add_argument("--steps", type=int, default=11, help="measured steps of each")
    parser.add_argument("--token-budget", type=int, help="of a shared forward; default: 2048")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--out", help="folder for joint.json and joint.md")


def run(options: argparse.Namespace) -> int:
    if options.base.startswith("random:") and options.dtype != "float32":
        print("a random base has the dtype of its device; leave --dtype out", file=sys.stderr)
        return 2
    task: dict[str, Any] = {
        "base": options.base,
        "data": str(Path(options.data).resolve()),
        **({} if options.base.startswith("random:") else {"dtype": options.dtype}),
        "device": options.device,
        "length": options.length,
        "steps": options.steps,
        "batch_size": options.jobs * options.sequences,
        "ranks": [options.ranks[i % len(options.ranks)] for i in range(options.jobs)],
        "token_budget": options.token_budget,
    }
    print("preparing and taking turns …", file=sys.stderr)
    results = take_turns(options.contestants, task, steps=options.steps)
    report = {
        "task": {key: value for key, value in task.items() if key != "data"},
        "hardware": hardware(),
        "contestants": [summary(one, results) for one in results],
    }
    text = table(report)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "joint.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "joint.md").write_text(text + "\n")
    return 0


def summary(measured: Measured, all_of_them: list[Measured]) -> dict[str, Any]:
    """Numbers of a contestant; ratios are medians over the turns."""
    found = {
        "name": measured.name,
        "seconds_per_step": round(measured.median, 4),
        "tokens_per_step": round(sum(r["tokens"] for r in measured.rows) / len(measured.rows), 1),
        "tokens_per_second": round(measured.tokens_per_second, 1),
        "loaded_mb": round(measured.loaded_mb),
        "peak_mb": round(measured.peak_mb),
        "above_loaded_mb": round(measured.peak_mb - measured.loaded_mb),
        "last_loss": round(measured.rows[-1]["loss"], 4),
    }
    for other in all_of_them:
        ratios = sorted(
            theirs / mine for theirs, mine in zip(other.seconds, measured.seconds, strict=True)
        )
        found[f"speed_against_{other.name}"] = round(ratios[len(ratios) // 2], 3)
    return found


def table(report: dict[str, Any]) -> str:
    task, machine, rows = report["task"], report["hardware"], report["contestants"]
    last = rows[-1]["name"]
    jobs = len(task["ranks"])
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['threads']} threads; {jobs} jobs × {task['batch_size'] // jobs}, ranks "
        f"{', '.join(map(str, task['ranks']))}; {task['steps']} steps each, taken in turn",
        "",
        f"| | s/step | tokens/step | tok/s | against {last} | loaded MB | peak MB | above MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['seconds_per_step']} | {row['tokens_per_step']:.0f} "
            f"| {row['tokens_per_second']} | {row[f'speed_against_{last}']}× | {row['loaded_mb']} "
            f"| {row['peak_mb']} | {row['above_loaded_mb']} |"
        )
    by_name = {row["name"]: row for row in rows}
    joint, one = by_name.get("joint_loop:joint"), by_name.get("joint_loop:one_adapter")
    if joint and one:
        slower = one["speed_against_joint_loop:joint"]
        lines += [
            "",
            f"A joint step takes {slower:.2f}× of a step of one adapter over as many sequences "
            f"({joint['tokens_per_step'] / one['tokens_per_step']:.2f}× of its tokens). Memory "
            f"above the base: {joint['above_loaded_mb'] / max(1, one['above_loaded_mb']):.2f}×.",
        ]
    return "\n".join(lines)
