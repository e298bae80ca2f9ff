"""The folder of a search: what lies where, and what is read back when it goes on.

::

    tune.yaml      base, data, fixed settings and what is searched; enough to go on alone
    study.db       the candidates, as an Optuna study
    candidates/    a run folder each
    losses/        one file a candidate: its evaluations, each prompt by itself
    adapter/       the chosen one's
    tune.json, tune.png, report.html    written at the end
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.core.files import (
    atomic_folder,
    clear_disk_errors,
    new_folder,
    running_alone,
    write_atomic,
)
from lorakit.errors import InputError, collected
from lorakit.optional import require
from lorakit.train.folder import resuming
from lorakit.train.origin import check_content, plain
from lorakit.workflows.tuning.table import Losses

_SECTIONS = ("base", "data", "validation", "lora", "train", "content", "search")


class TuneFolder:
    """Paths of a search."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        self.settings = self.path / "tune.yaml"
        self.study = self.path / "study.db"
        self.losses = self.path / "losses"
        self.adapter = self.path / "adapter"
        self.result = self.path / "tune.json"
        self.plot = self.path / "tune.png"
        self.report = self.path / "report.html"

    def run(self, number: int) -> Path:
        """The run folder of a candidate."""
        return self.path / "candidates" / f"{number:02}"

    # --- opening ---------------------------------------------------------------------------

    def check_new(self) -> None:
        """Refuse a place where something lies already.

        Raises:
            InputError: says how to go on with the search there, or to choose another place.
        """
        with clear_disk_errors(self.path):
            if self.settings.exists():
                raise InputError(
                    f"{self.path} holds a search already. Go on with it: {self.resuming()}; or "
                    "give another --out."
                )
            if self.path.is_dir() and any(self.path.iterdir()):
                raise InputError(
                    f"{self.path} exists and is not empty. Give a new folder as --out; nothing in "
                    "this one was touched."
                )
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is a file. Give a new folder as --out.")

    def create(self, sections: Mapping[str, Any]) -> None:
        """Make the folder with its settings, in one stroke.

        Raises:
            InputError: something lies there, or the place cannot be written to.
        """
        yaml = require("yaml", extra="train", purpose="writing tune.yaml")
        self.check_new()
        text = yaml.safe_dump(dict(sections), sort_keys=False, allow_unicode=True, width=100)
        with clear_disk_errors(self.path):
            try:
                with new_folder(self.path, last=self.settings.name) as temporary:
                    (temporary / self.losses.name).mkdir()
                    (temporary / self.settings.name).write_text(text, encoding="utf-8")
            except FileExistsError:
                self.check_new()  # another process was faster
                raise

    def resuming(self) -> str:
        """What goes on with the search there: a command line, or a call from Python."""
        try:
            sections = self.read()
        except InputError:  # which is told when it is resumed
            sections = {}
        return resuming(self.path, sections, "lorakit tune", "resume_tune")

    def read(self) -> dict[str, Any]:
        """What ``tune.yaml`` holds.

        Raises:
            InputError: there is no search, or its settings are damaged.
        """
        yaml = require("yaml", extra="train", purpose="reading tune.yaml")
        if not self.settings.is_file():
            there = "has no tune.yaml" if self.path.is_dir() else "does not exist"
            raise InputError(
                f"{self.path} {there}, so there is no search to go on with. Give the --out folder "
                "of one, or begin one with --base, --data and --out."
            )
        try:
            content = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{self.settings} cannot be read: {error}") from error
        missing = [n for n in _SECTIONS if not isinstance(content, dict) or n not in content]
        if missing:
            raise InputError(
                f"{self.settings} is damaged: {', '.join(missing)} missing. Put back the file "
                "that was written."
            )
        return dict(content)

    def check_same(self, sections: Mapping[str, Any]) -> None:
        """Compare what a search would begin with now with what the one here began with.

        Raises:
            InputError: names the settings that differ.
            DataError, BaseError: data or base changed.
        """
        stored = self.read()
        check_content(stored["content"], sections["content"])
        then, now = _flat(stored), _flat(plain(sections))
        changed = [
            f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise InputError(
                collected(f"{self.path} holds a search that began with other settings", changed)
                + "\nGive the same settings again, or another --out."
            )

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from the same search; as :func:`running_alone`."""
        return running_alone(self.path, self.settings)

    # --- what candidates did ---------------------------------------------------------------

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Append a row to a candidate's file.

        Raises:
            TrainingError: the disk is full.
        """
        path = self._file(number)
        with clear_disk_errors(path):
            # the first byte ends a line that a kill cut in half
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with open(path, "ab") as file:
                file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows of a candidate's file; a line that a kill cut in half is left out."""
        found = []
        path = self._file(number)
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    found.append(row)
        return found

    def _file(self, number: int) -> Path:
        return self.losses / f"{number:02}.jsonl"

    # --- the end ---------------------------------------------------------------------------

    def take(self, number: int) -> None:
        """Put a candidate's adapter into ``adapter/``."""
        with atomic_folder(self.adapter) as temporary:
            shutil.copytree(self.run(number) / "adapter", temporary, dirs_exist_ok=True)

    def forget_checkpoints(self, number: int) -> None:
        """Delete the checkpoints of a candidate that has left for good."""
        shutil.rmtree(self.run(number) / "checkpoints", ignore_errors=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``tune.json``, which marks the search as ended."""
        write_atomic(self.result, (json.dumps(_finite(result), indent=2) + "\n").encode())


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Section.name → value."""
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in (values or {}).items()
    }


def to_row(step: int, losses: Losses) -> dict[str, Any]:
    """An evaluation as a row of a candidate's file."""
    return {
        "step": step,
        "loss": losses.mean if losses.finite else None,
        "sums": [x if math.isfinite(x) else None for x in losses.sums.tolist()],
        "counts": losses.counts.tolist(),
    }


def from_row(row: Mapping[str, Any]) -> Losses:
    """The inverse of :func:`to_row`."""
    sums = [math.nan if x is None else x for x in row["sums"]]
    return Losses(np.array(sums), np.array(row["counts"], np.int64))


def _finite(value: Any) -> Any:
    """JSON data, with ``null`` for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
