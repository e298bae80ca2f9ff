"""How a run ended, and the file that says so."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.train.callbacks import Ending, RunResult
from lorakit.train.folder import RunFolder
from lorakit.train.origin import plain
from lorakit.train.run import Run


def finished_run(out: str | os.PathLike[str]) -> RunResult | None:
    """The result of a run that has ended; ``None`` while it can go on.

    Raises:
        InputError: there is no run, or it is damaged.
    """
    folder = RunFolder(Path(out))
    is_full = folder.read_settings()["lora"] is None
    stored = folder.read_result()
    if stored is None:
        return None
    kept = folder.model if is_full else folder.adapter
    if not (kept / ("config.json" if is_full else "adapter_config.json")).is_file():
        raise InputError(
            f"{folder.path} has ended, but its {kept.name} is missing. Delete {folder.result} and "
            "resume the run: it is saved again from the last checkpoint."
        )
    found = {"adapter": None if is_full else kept, "model": kept if is_full else None}
    return RunResult(**{**stored, "out": folder.path, **found})


def result_of(run: Run, folder: RunFolder, ending: Ending) -> RunResult:
    """Of a run as it stands."""
    job = run.job
    return RunResult(
        out=folder.path,
        adapter=folder.adapter if folder.adapter.is_dir() else None,
        model=folder.model if folder.model.is_dir() else None,
        steps=job.step,
        ending=ending,
        last_loss=job.last_loss,
        base_loss=job.base_loss,
        best_loss=None if job.best is None else job.best.loss,
        best_step=None if job.best is None else job.best.step,
        seconds=run.seconds,
    )


def result_to_dict(result: RunResult) -> dict[str, Any]:
    """Plain data, with paths as text."""
    values: dict[str, Any] = plain(dataclasses.asdict(result))
    return values
