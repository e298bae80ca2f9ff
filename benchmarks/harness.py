"""One harness: each contestant lives in a process of its own, and they take turns.

A contestant is a module with ``prepare(task) -> state`` and ``step(state, i) -> dict``. Only one
of them runs at any moment, so that they share the machine's noise and not its cores; the peak
memory of each is its own process's, counted from after its preparation.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """What one contestant did."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Per step, in the order they were taken."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """What its steps returned: ``loss``, ``tokens``."""
    loaded_mb: float = 0.0
    """Resident memory when it was ready."""
    peak_mb: float = 0.0
    """Highest resident memory while it ran."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return sum(row["tokens"] for row in self.rows) / sum(self.seconds)


def take_turns(names: Sequence[str], task: dict[str, Any], *, steps: int) -> list[Measured]:
    """Run ``steps`` steps of each contestant, one step each in turn, after one to warm up.

    Args:
        names: modules of ``benchmarks.contestants``; what stands behind a colon is the task's
            ``variant``.
        task: plain data, given to each ``prepare``.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(name, task, theirs), daemon=True)
        process.start()
        workers.append((Measured(name), ours, process))
        _answer(name, ours)  # prepared before the next one begins
    for i in range(steps + 1):
        order = workers if i % 2 else workers[::-1]
        for measured, pipe, _ in order:
            pipe.send(i)
            seconds, row = _answer(measured.name, pipe)
            if i:  # the first step warms up; its loss is still part of the curve
                measured.seconds.append(seconds)
            measured.rows.append(row)
    for measured, pipe, process in workers:
        pipe.send(None)
        measured.loaded_mb, measured.peak_mb = _answer(measured.name, pipe)
        measured.rows = measured.rows[1:]
        process.join(10)
    return [measured for measured, _, _ in workers]


def _answer(name: str, pipe: Connection) -> Any:
    kind, value = pipe.recv()
    if kind == "error":
        raise RuntimeError(f"contestant {name} failed:\n{value}")
    return value


def _serve(name: str, task: dict[str, Any], pipe: Connection) -> None:
    """The contestant's process."""
    import traceback

    try:
        of, _, variant = name.partition(":")
        module = importlib.import_module(f"benchmarks.contestants.{of}")
        state = module.prepare({**task, "variant": variant} if variant else task)
        loaded = _held_mb()
        _forget_peak()
        pipe.send(("ready", None))
        while (i := pipe.recv()) is not None:
            started = time.perf_counter()
            row = module.step(state, i)
            # a contestant may leave out what its users would not have to do
            pipe.send(("step", (row.pop("seconds", time.perf_counter() - started), row)))
        pipe.send(("memory", (loaded, _held_mb(peak=True))))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _held_mb(*, peak: bool = False) -> float:
    """What this process holds of the GPU if it uses one, else of the memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return held / 2**20
    return _resident_mb("VmHWM" if peak else "VmRSS")


def _resident_mb(key: str = "VmRSS") -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _forget_peak() -> None:
    """Start the high-water marks anew, so that loading does not count."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
