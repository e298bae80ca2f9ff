"""What a run folder says: read back as one value, whatever part of it is missing.

::

    run.yaml        settings, one section per component; besides them these sections of facts:
                    data_report, validation_report (DataReport.to_dict()), hardware, versions
    metrics.jsonl   rows of kind step, eval, note
    samples.jsonl   {"prompt", "reference", "base", "adapter"}: answers on validation items;
                    reference is a text or a list of texts
    adapter/        the kept adapter, a PEFT folder

A run that is still going, was killed, or made no evaluation is a run too. What could not be read
is listed in ``Record.missing`` with its reason, so that the report can say it.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lorakit.core.adapter import Adapter
from lorakit.errors import InputError, LorakitError

#: sections of run.yaml that are facts about the run and not settings of it
FACT_SECTIONS = ("data_report", "validation_report", "hardware", "versions")

_PACKAGES = ("lorakit", "torch", "transformers", "safetensors", "numpy", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class Record:
    """One run, as its folder tells it."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sections of run.yaml without the facts."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The sections named in FACT_SECTIONS; all are there, perhaps empty."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """Rows of kind step, one per step, in order."""
    evals: tuple[Mapping[str, Any], ...] = ()
    """Rows of kind eval, one per step, in order."""
    notes: tuple[str, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    adapter: Adapter | None = None
    missing: tuple[str, ...] = ()
    """What could not be read, a sentence each."""

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the lowest finite loss; the first of equals."""
        finite = [row for row in self.evals if is_finite(row.get("loss"))]
        return min(finite, key=lambda row: float(row["loss"]), default=None)

    @property
    def start_eval(self) -> Mapping[str, Any] | None:
        """The evaluation before the first step: that of the base, or of the adapter that the run
        went on with."""
        return next((row for row in self.evals if row.get("step") == 0), None)

    @property
    def is_full(self) -> bool:
        """Whether all weights of the base were trained."""
        return _is_full(self.settings)

    @property
    def seconds(self) -> float:
        """Wall time of all steps and evaluations."""
        rows = (*self.steps, *self.evals)
        return sum(float(r["seconds"]) for r in rows if is_finite(r.get("seconds")))

    @property
    def train_seconds(self) -> float:
        """Wall time of the steps alone."""
        return self.total("seconds")

    def total(self, name: str) -> float:
        """Sum of one number over the steps."""
        return sum(float(r[name]) for r in self.steps if is_finite(r.get(name)))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """``(steps, values)`` of one number over the steps, where it is finite."""
        rows = [row for row in self.steps if is_finite(row.get(name))]
        return [float(r["step"]) for r in rows], [float(r[name]) for r in rows]

    def at(self, *names: str) -> Any:
        """A setting by section and name, ``None`` where there is none: ``at("train", "lr")``."""
        value: Any = self.settings
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def is_finite(value: object) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: str | os.PathLike[str], *, with_adapter: bool = True) -> Record:
    """Read a run folder.

    Args:
        folder: the run folder.
        with_adapter: also load the adapter's tensors.

    Raises:
        InputError: there is no such folder, or it holds neither settings nor metrics.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give the --out folder of a training run.")
    if not (path / "run.yaml").exists() and not (path / "metrics.jsonl").exists():
        raise InputError(
            f"{path} is no run folder: it has neither run.yaml nor metrics.jsonl. Give the --out "
            "folder of a training run."
        )
    missing: list[str] = []
    settings = _read_settings(path / "run.yaml", missing)
    rows = _read_rows(path / "metrics.jsonl", missing)
    facts = {name: _mapping(settings.pop(name, None)) for name in FACT_SECTIONS}
    return Record(
        folder=path,
        settings=settings,
        facts=facts,
        steps=_last_per_step(rows, "step"),
        evals=_last_per_step(rows, "eval"),
        notes=tuple(dict.fromkeys(str(r.get("text", "")) for r in rows if r.get("kind") == "note")),
        samples=tuple(
            row for row in _read_rows(path / "samples.jsonl", missing, optional=True) if row
        ),
        adapter=_read_adapter(path / "adapter", missing)
        if with_adapter and not _is_full(settings)
        else None,
        missing=tuple(missing),
    )


def _is_full(settings: Mapping[str, Any]) -> bool:
    return "lora" in settings and settings["lora"] is None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names; what is no plain value becomes its text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, str | int | float | bool)
            flat[f"{prefix}{name}"] = value if plain else str(value)
    return flat


def environment() -> dict[str, dict[str, Any]]:
    """The machine and the versions, as run.yaml keeps them: ``{"hardware": …, "versions": …}``."""
    import torch

    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    memory = _memory_gb()
    if memory is not None:
        hardware["memory_gb"] = memory
    if torch.cuda.is_available():
        hardware["gpus"] = [
            f"{torch.cuda.get_device_name(i)}, "
            f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GB"
            for i in range(torch.cuda.device_count())
        ]
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {"hardware": hardware, "versions": versions}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None  # not a POSIX system


def _read_settings(path: Path, missing: list[str]) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append("run.yaml is not there, so the settings are unknown.")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        missing.append(f"run.yaml cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        missing.append("run.yaml holds no sections, so the settings are unknown.")
        return {}
    return {str(name): section for name, section in value.items()}


def _read_rows(path: Path, missing: list[str], *, optional: bool = False) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        if not optional:
            missing.append(f"{path.name} is not there, so there are no curves.")
        return []
    except OSError as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return []
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        missing.append(
            f"{path.name} has {len(broken)} unreadable row(s), the first in line {broken[0]}; "
            "a run that was killed may leave its last row unfinished."
        )
    return rows


def _last_per_step(rows: list[dict[str, Any]], kind: str) -> tuple[dict[str, Any], ...]:
    """One row per step; a resumed run may have written a step twice, and the last one counts."""
    by_step = {
        int(row["step"]): row
        for row in rows
        if row.get("kind") == kind and is_finite(row.get("step"))
    }
    return tuple(by_step[step] for step in sorted(by_step))


def _read_adapter(path: Path, missing: list[str]) -> Adapter | None:
    if not path.is_dir():
        missing.append("adapter/ is not there: the run has not kept an adapter yet.")
        return None
    from lorakit.formats import load_adapter

    try:
        return load_adapter(path)
    except (LorakitError, OSError) as error:
        missing.append(f"adapter/ cannot be read: {error}")
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
