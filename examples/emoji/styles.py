"""Three style adapters on the base, by one command of lorakit: 60 pictures each."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

#: our settings; everything else is the default of `lorakit images train`
TRAINING = {
    "--targets": "conv",  # a style is in the strokes, which attention at 8 × 8 cannot reach
    "--rank": "8",
    "--steps": "200",  # more of them learn the 60 pictures by heart, and draw nothing else
    "--batch-size": "20",
    "--lr": "1e-3",
    "--min-snr": "5",
    "--caption-dropout": "0.1",
    "--validation-fraction": "0",
    "--sample-guidance": "6",
    "--sample-every": "0",
}


def command(options: Any) -> list[str]:
    """What is run: a new training of all styles, or what is left of one that was stopped."""
    work = Path(options.work)
    out = work / "styles"
    words = [sys.executable, "-m", "lorakit", "images", "train"]
    if out.exists():
        return [*words, "--resume", str(out)]
    settings = {**TRAINING, "--steps": str(options.steps or TRAINING["--steps"])}
    return [
        *words,
        *("--base", str(options.base or work / "base")),
        *("--each", str(work / "data" / "styles")),
        *(word for pair in settings.items() for word in pair),
        *("--dtype", "float32"),
        *("--out", str(out)),
    ]


def run(options: Any) -> None:
    """The command."""
    words = command(options)
    print("$ lorakit", shlex.join(words[3:]), flush=True)
    environment = dict(os.environ)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(words, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
