"""The run folder: what lies where, and how it is opened, once or again.

::

    run.yaml        every resolved setting; written once, and enough to resume alone
    start/          the adapter that ``--from`` named, as it was
    initial/        where a new adapter began, if its initialisation read the base or data
    metrics.jsonl   rows of kind step, eval, note
    checkpoints/    the last two
    adapter/        the best so far, a PEFT folder
    model/          instead of it, where all weights are trained: a folder of transformers
    samples.jsonl, report.html, result.json     written at the end
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.core.adapter import Adapter
from lorakit.core.files import clear_disk_errors, new_folder, running_alone, write_atomic
from lorakit.errors import InputError, collected
from lorakit.formats import save_adapter
from lorakit.optional import require


def resuming(path: Path, sections: Mapping[str, Any], command: str, call: str) -> str:
    """What goes on with what lies in a folder: a command line, or a call from Python where it was
    given data and did not record where this came from.

    Args:
        sections: its settings, as :meth:`RunFolder.create` takes them.
        command: what stands before ``--resume``.
        call: the function that takes the data.
    """
    content = sections.get("content") or {}
    lacking = [
        f"{name}=…"
        for name in ("data", "validation")
        if content.get(name) is not None and sections.get(name) is None
    ]
    if lacking:
        return f"{call}({str(path)!r}, {', '.join(lacking)})"
    return f"{command} --resume {path}".lstrip()


class RunFolder:
    """Paths of a run, and the file of metrics, which only grows between two checkpoints."""

    def __init__(self, path: Path) -> None:
        path = Path(os.path.realpath(path.expanduser()))
        self.path = path
        self.settings = path / "run.yaml"
        self.start = path / "start"
        self.initial = path / "initial"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.samples = path / "samples.jsonl"
        self.result = path / "result.json"

    # --- opening ---------------------------------------------------------------------------

    def check_new(self) -> None:
        """Refuse a place where something lies already.

        Raises:
            InputError: says how to go on with the run there, or to choose another place.
        """
        with clear_disk_errors(self.path):  # a name can be too long even to look for
            self._check_new()

    def _check_new(self) -> None:
        if self.settings.exists():
            raise InputError(
                f"{self.path} holds a run already. Go on with it: {self.resuming()}; or give "
                "another --out."
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(
                f"{self.path} exists and is not empty. Give a new folder as --out; nothing in "
                "this one was touched."
            )
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file. Give a new folder as --out.")
        above = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            what = "is no folder" if not above.is_dir() else "cannot be written to"
            raise InputError(
                f"{self.path} cannot be made: {above} {what}. Give another place as --out."
            )

    def create(
        self,
        settings: Mapping[str, Any],
        start: Adapter | None,
        notes: Sequence[str],
        *,
        initial: Adapter | None = None,
    ) -> None:
        """Make the folder in one stroke: it is a run or it is not there.

        Args:
            settings: sections of run.yaml.
            start: the adapter that the run goes on with, if any.
            notes: the first rows of the metrics.
            initial: where a new adapter begins, if it is kept.

        Raises:
            InputError: something lies there, or the place cannot be written to.
            TrainingError: the disk is full.
        """
        self.check_new()
        with clear_disk_errors(self.path):
            try:
                self._fill(settings, start, notes, initial)
            except FileExistsError:
                self.check_new()  # another process was faster
                raise

    def _fill(
        self,
        settings: Mapping[str, Any],
        start: Adapter | None,
        notes: Sequence[str],
        initial: Adapter | None,
    ) -> None:
        with new_folder(self.path, last=self.settings.name) as temporary:
            if start is not None:
                save_adapter(start, temporary / self.start.name)
            if initial is not None:
                save_adapter(initial, temporary / self.initial.name)
            rows = [_as_line({"kind": "note", "text": text}) for text in notes]
            (temporary / self.metrics.name).write_bytes(b"".join(rows))
            (temporary / self.settings.name).write_bytes(_as_yaml(settings))

    def read_settings(self) -> dict[str, Any]:
        """What ``run.yaml`` holds.

        Raises:
            InputError: there is no run, or its settings cannot be read or are damaged.
        """
        yaml = require("yaml", extra="train", purpose="reading run.yaml")
        if not self.settings.is_file():
            there = "has no run.yaml" if self.path.is_dir() else "does not exist"
            raise InputError(
                f"{self.path} {there}, so there is no run to resume. Give the --out folder of a "
                "run, or start one with --base, --data and --out."
            )
        try:
            content = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{self.settings} cannot be read: {error}") from error
        return _checked(self.settings, content, _SECTIONS)

    def resuming(self, command: str = "") -> str:
        """What goes on with the run there; see :func:`resuming`.

        Args:
            command: what stands before ``--resume``.
        """
        try:
            sections = self.read_settings()
        except InputError:  # which is told when it is resumed
            sections = {}
        return resuming(self.path, sections, command, "Trainer.resume")

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from the same run; as :func:`running_alone`."""
        return running_alone(self.path, self.settings)

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(".*.tmp") if folder.is_dir() else ():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    # --- content ---------------------------------------------------------------------------

    def open_metrics(self, length: int | None) -> MetricsFile:
        """The file of metrics, cut to ``length`` bytes: what was written after is made again.

        ``None`` keeps the notes at its beginning, with which the run was created.
        """
        return MetricsFile(self.metrics, self._notes_length() if length is None else length)

    def _notes_length(self) -> int:
        length = 0
        if not self.metrics.exists():  # somebody deleted it; it begins anew
            return length
        with open(self.metrics, "rb") as file:
            for line in file:
                if not line.startswith(_NOTE):
                    break
                length += len(line)
        return length

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Write ``samples.jsonl``."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        write_atomic(self.samples, "".join(lines).encode())

    def read_samples(self) -> list[dict[str, Any]]:
        """What ``samples.jsonl`` holds; nothing if it is not there."""
        if not self.samples.is_file():
            return []
        # not splitlines, which also parts a line at signs that JSON leaves as they are
        lines = self.samples.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``, which marks the run as ended."""
        write_atomic(self.result, (json.dumps(result, indent=2) + "\n").encode())

    def read_result(self) -> dict[str, Any] | None:
        """What ``result.json`` holds; ``None`` while the run has not ended.

        Raises:
            InputError: it is damaged.
        """
        if not self.result.is_file():
            return None
        try:
            content = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            content = error
        content = _checked(self.result, content, _RESULT)
        return {name: content[name] for name in _RESULT}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, written through at once."""

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        with clear_disk_errors(path):
            self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by close()
            self._file.truncate(min(length, path.stat().st_size))  # never padded with zeros
            self._file.seek(0, os.SEEK_END)

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; numbers that are not finite become ``null``.

        Raises:
            TrainingError: the disk is full.
        """
        with clear_disk_errors(self._path):
            self._file.write(_as_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        with clear_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with clear_disk_errors(self._path):
            self._file.close()


#: what a resume needs of run.yaml, and of which types
_SECTIONS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "data": (dict, type(None)),
    "validation": (dict, type(None)),
    "lora": (dict, type(None)),
    "train": (dict,),
    "content": (dict,),
}

_NUMBER = (int, float, type(None))

#: the same of result.json
_RESULT: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "ending": (str,),
    "last_loss": _NUMBER,
    "base_loss": _NUMBER,
    "best_loss": _NUMBER,
    "best_step": (int, type(None)),
    "seconds": (int, float),
}

#: how types are called in messages
_WORDS = {dict: "a mapping", type(None): "null", int: "a whole number", float: "a number"}


def _checked(path: Path, content: Any, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """``content`` of a file, if it is a mapping with values of these types.

    Raises:
        InputError: names the file and every field that is missing or of another type.
    """
    if not isinstance(content, dict):
        problems = [f"it is no mapping: {content!r:.80}"]
    else:
        problems = [
            f"{name} is missing"
            if name not in content
            else f"{name} is {content[name]!r:.80}; it must be "
            + " or ".join(_WORDS.get(kind, "text") for kind in allowed)
            for name, allowed in kinds.items()
            if name not in content or not isinstance(content[name], allowed)
        ]
    if not problems:
        return dict(content)
    way = "Put back the file that was written"
    if path.name == "result.json":
        way = "Delete it and resume the run, which writes it again"
    raise InputError(collected(f"{path} is damaged", problems) + f"\n{way}.")


#: how a row of this kind begins
_NOTE = b'{"kind": "note"'


def _as_line(row: Mapping[str, Any]) -> bytes:
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(plain, ensure_ascii=False) + "\n").encode()


def _as_yaml(settings: Mapping[str, Any]) -> bytes:
    yaml = require("yaml", extra="train", purpose="writing run.yaml")
    text: str = yaml.safe_dump(
        dict(settings), sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )
    return text.encode()
