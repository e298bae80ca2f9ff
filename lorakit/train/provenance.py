"""What an adapter says about its own making: data, settings, results, versions.

All of it is a function of the run's inputs: no times, no durations, no paths, so that the same
run gives the same file.
"""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from lorakit.core.adapter import Adapter
from lorakit.tasks.task import Examples
from lorakit.train.job import Job

#: settings that cannot change the adapter
_WITHOUT_EFFECT = ("checkpoint_every", "keep_checkpoints", "samples", "sample_tokens")
_PACKAGES = ("lorakit", "torch", "transformers")


def provenance(
    job: Job, data: Examples, validation: Examples | None, start: Adapter | None
) -> dict[str, Any]:
    """JSON data for ``Adapter.provenance``, about the job's present weights."""
    settings = {
        name: value for name, value in job.settings.to_dict().items() if name not in _WITHOUT_EFFECT
    }
    found: dict[str, Any] = {
        "data": _about(data),
        "train": settings,
        "metrics": _results(job, text=not hasattr(data.report, "facts")),
        "versions": _versions(),
    }
    if validation is not None:
        found["validation"] = _about(validation)
    if start is not None:
        found["continued_from"] = dict(start.provenance)
    return found


def _about(data: Examples) -> dict[str, Any]:
    report = data.report
    found = {"digest": data.digest, "examples": len(data)}
    if hasattr(report, "facts"):  # of a kind that is not text
        return {**found, **report.facts()}
    return {
        **found,
        # a local path says where somebody keeps files; a hub id says what the data is
        "files": [Path(f).name if Path(f).exists() else str(f) for f in report.files],
        "kind": report.kind,
        "columns": dict(report.columns),
        "format": report.format,
        "loss_on": report.loss_on,
        "template": report.template,
        "system": report.system,
    }


def _results(job: Job, *, text: bool) -> dict[str, Any]:
    best = job.best
    if best is None or best.step != job.weights_step:
        return {"step": job.weights_step, "training_loss": _finite(job.last_loss)}
    return {
        "step": best.step,
        "validation_loss": best.loss,
        **({"perplexity": _finite(_perplexity(best.loss))} if text else {}),
        "validation_loss_before": _finite(job.start_loss),
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
