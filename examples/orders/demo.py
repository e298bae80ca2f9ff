"""The demo: SmolLM2-135M learns to turn a customer's message into a JSON record.

    make demo                                   # or: python examples/orders/demo.py

It runs the same commands that you would run on your own file, prints each before it starts, and
ends with base and adapter side by side on phrasings that training never saw. Stop it with Ctrl-C
and start it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

#: our settings; everything else is lorakit's default
TRAINING = {"--steps": "100", "--batch-size": "8", "--lr": "2e-3"}
#: metric of `lorakit eval` → what it means
METRICS = {
    "json_valid": "valid JSON",
    "json_fields": "fields right",
    "json_record": "whole records right",
}
NUM_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    started = time.monotonic()
    _say(
        "A shop's mail becomes records: SmolLM2-135M learns it from 1320 messages.",
        "About five minutes of training and two of judging on two CPU cores.",
    )
    _train(options, out)
    report, asked = _judge(options, out)
    for part in (
        beside_each_other(asked, NUM_SHOWN),
        table(report),
        next_steps(out, time.monotonic() - started),
    ):
        _say("", *part)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/orders", help="run folder")
    parser.add_argument("--base", default="smollm2", help="another base")
    parser.add_argument("--steps", default=TRAINING["--steps"], help="optimizer steps")
    parser.add_argument("--limit", default="160", help="messages to judge on")
    return parser


def _train(options: argparse.Namespace, out: Path) -> None:
    if (out / "run.yaml").exists():
        _lorakit("train", "--resume", out)
        return
    settings = {**TRAINING, "--steps": options.steps}
    _lorakit(
        "train",
        *("--base", options.base),
        *("--data", _short(HERE / "train.jsonl")),
        *(word for pair in settings.items() for word in pair),
        *("--out", out),
    )


def _judge(options: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `lorakit eval` found, and every message with both answers."""
    answers = out / "test_answers.jsonl"
    printed = _lorakit(
        "eval",
        *("--base", options.base),
        *("--adapter", out / "adapter"),
        *("--data", _short(HERE / "test.jsonl")),
        *("--limit", options.limit),
        *("--metrics", "json"),
        *("--save", answers),
        "--json",
        capture=True,
    )
    lines = answers.read_text(encoding="utf-8").splitlines()
    return json.loads(printed), [json.loads(line) for line in lines]


def beside_each_other(asked: Sequence[Mapping[str, Any]], num: int) -> list[str]:
    """``num`` messages with the answers of base and adapter; ✓ where the record is right."""
    lines = ["Messages that training never saw:"]
    num = min(num, len(asked))
    for one in (asked[i * len(asked) // num] for i in range(num)):
        before, after = (model["answer"] for model in one["models"])
        right = "✓" if same_record(after, one["references"][0]) else "✗"
        lines += [
            "",
            f"  message   {_line(one['row']['prompt'])}",
            f"  base      {_line(before)}",
            f"  adapter   {_line(after)}  {right}",
        ]
    return lines


def same_record(answer: str, reference: str) -> bool:
    """Whether both are the same JSON value."""
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return False


def table(report: Mapping[str, Any]) -> list[str]:
    """The three shares and the loss, base beside adapter."""
    base, adapter = report["models"]
    lines = [f"{'':22}{'base':>10}{'adapter':>10}"]
    for key, meaning in METRICS.items():
        first, second = base["metrics"][key], adapter["metrics"][key]
        lines.append(f"{meaning:22}{first:>9.0f}%{second:>9.0f}%")
    lines.append(f"{'loss per token':22}{base['loss']:>10.3f}{adapter['loss']:>10.3f}")
    return lines


def next_steps(out: Path, seconds: float) -> list[str]:
    """Where everything is, and what to do now."""
    return [
        f"Done in {seconds / 60:.1f} minutes.",
        f"  the report    {out / 'report.html'}  (open it in a browser)",
        f"  the adapter   {out / 'adapter'}  (a PEFT folder)",
        "",
        "Ask it something:",
        "  .venv/bin/lorakit generate --base smollm2 \\",
        f"      --adapter {out / 'adapter'} --prompt 'hey, I want to return my 2 blue hats, J1234'",
        "",
        "Your own data: a file with a prompt and a completion per row, then",
        "  .venv/bin/lorakit preview --base smollm2 --data mine.jsonl",
        "  .venv/bin/lorakit train --base smollm2 --data mine.jsonl --out runs/mine",
    ]


def _lorakit(*arguments: object, capture: bool = False) -> str:
    """Run a command after printing it; one that fails ends the demo with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ lorakit {shlex.join(words)}", flush=True)
    # Ctrl-C reaches the command too, which saves its state; this waits for it to end
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", *words],
            stdout=subprocess.PIPE if capture else None,
            encoding="utf-8",
            check=False,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    if done.returncode:
        if done.returncode == 130:
            _say("Stopped. `make demo` goes on where it was.")
        # a signal's number is negative here; shells say 128 and more
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return done.stdout or ""


def _short(path: Path) -> str:
    """From here, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
