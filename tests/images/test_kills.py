"""`lorakit images train` in processes that are killed: while it encodes, and while it trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.images import tiny

STEPS, PICTURES = 24, 90
#: what has to be equal, byte for byte, beside the names of what there is
KEPT = ("adapter/adapter_model.safetensors", "samples/*.png")


def command(data: Path, out: Path) -> list[str]:
    made = [sys.executable, "-m", "lorakit.cli.main", "images", "train"]
    if (out / "run.yaml").exists():
        return [*made, "--resume", str(out), "--quiet"]
    flags = {
        "--base": tiny.folder("sd"), "--device": "cpu", "--data": data, "--out": out,
        "--resolution": 16, "--steps": STEPS, "--batch-size": 2, "--rank": 2, "--lr": 1e-2,
        "--checkpoint-every": 3, "--sample-prompt": "a red thing", "--sample-every": 8,
        "--sample-steps": 2, "--targets": "attention", "--text-encoder-lr": 1e-3,
    }  # fmt: skip
    return [*made, *(str(part) for pair in flags.items() for part in pair), "--quiet"]


def process(arguments: Sequence[str], cache: Path) -> subprocess.Popen[bytes]:
    around = {**os.environ, "LORAKIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=around, stderr=subprocess.DEVNULL)


def killed_once(arguments: Sequence[str], cache: Path, ready: Callable[[], bool]) -> None:
    """Kill the command as soon as it is ready; it fails where the command ends before."""
    running = process(arguments, cache)
    try:
        while not ready():
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
    finally:
        running.kill()
        running.wait()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in KEPT
        for path in sorted(folder.glob(pattern))
    }


@pytest.mark.slow
def test_killed_while_encoding_and_while_training(tmp_path):
    data = tiny.pictures(tmp_path / "data", PICTURES)
    whole, out, cache = tmp_path / "whole", tmp_path / "out", tmp_path / "killed"
    assert process(command(data, whole), tmp_path / "cache").wait() == 0
    expected = files(whole)
    assert len(expected) == 1 + 1 + STEPS // 8 + 1  # adapter, sheets, and what is kept

    def encoded() -> int:
        return len(list(cache.rglob("*.safetensors")))

    for number in (1, 30, 60):
        killed_once(command(data, out), cache, lambda number=number: encoded() >= number)
        assert number <= encoded() < PICTURES
        assert not out.exists()

    metrics = out / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_text().count('"kind": "step"') if metrics.exists() else 0

    for number in (4, 9, 17, STEPS):  # the last one while the end is written
        killed_once(command(data, out), cache, lambda number=number: steps() >= number)
        assert not (out / "report.html").exists() or number == STEPS
    assert process(command(data, out), cache).wait() == 0
    assert files(out) == expected
    shutil.rmtree(out)  # and all that was encoded is used by a run from the start
    assert process(command(data, out), cache).wait() == 0
    assert files(out) == expected
