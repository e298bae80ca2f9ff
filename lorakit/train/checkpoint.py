"""Checkpoints: one safetensors file each, whole or absent.

The tensors are the file's tensors; everything else is JSON in its header, with a digest of both,
so that a flipped bit is damage too. A file is written
beside its place, flushed to the disk and renamed, so a crash at any moment leaves the checkpoints
that were there. Reading begins with the newest and falls back where a file is damaged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.core.files import atomic_file
from lorakit.errors import TrainingError

#: raised when the layout changes in a way that older code would misread
LAYOUT = 2
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps."""

    step: int
    """Optimizer steps made."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Names that mean something to whoever wrote them."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """JSON data."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort by step."""
    return folder / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write one atomically, then delete all but the last ``keep``.

    Raises:
        TrainingError: the disk is full; the earlier checkpoints are untouched.
        InputError: the folder cannot be written to.
    """
    path = checkpoint_path(folder, checkpoint.step)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()
    }
    content = {"layout": LAYOUT, "step": checkpoint.step, "state": checkpoint.state}
    content["sha256"] = _digest(content, tensors)
    with atomic_file(path) as temporary:
        _save(tensors, temporary, {"lorakit_checkpoint": json.dumps(content)})
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(
    folder: Path, *, until: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be read, and a sentence on each that could not.

    Args:
        until: the last step whose checkpoint is wanted.

    Returns:
        ``None`` in place of a checkpoint where there is none yet.

    Raises:
        TrainingError: there are checkpoints and none can be read.
    """
    notes: list[str] = []
    paths = list_checkpoints(folder)
    if until is not None:
        paths = [path for path in paths if path <= checkpoint_path(folder, until)]
    for path in reversed(paths):
        try:
            return read_checkpoint(path), notes
        except TrainingError as error:
            notes.append(str(error))
    if paths:
        raise TrainingError(
            "\n".join([f"No checkpoint in {folder} can be read.", *notes])
            + "\nDelete the folder of checkpoints to begin this run again from its first step."
        )
    return None, notes


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one.

    Raises:
        TrainingError: the file is damaged, is no checkpoint, or has another layout.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["lorakit_checkpoint"])
            layout = content["layout"]
            if layout != LAYOUT:
                raise TrainingError(
                    f"{path} has layout {layout}; this version reads {LAYOUT}. Go on with the "
                    "version of lorakit that wrote it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if content.pop("sha256") != _digest(content, tensors):
            raise ValueError("its content does not fit its digest")
        return Checkpoint(int(content["step"]), tensors, content["state"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged: {type(error).__name__}: {error}") from error


# --- the best weights ------------------------------------------------------------------------


def best_path(folder: Path, step: int) -> Path:
    """Where the weights lie that were the best after a step."""
    return folder / f"best-{step:08d}.safetensors"


def write_best(folder: Path, step: int, flat: Tensor) -> None:
    """Keep weights [P] for checkpoints that name them as the best so far.

    Raises:
        TrainingError: the disk is full.
        InputError: the folder cannot be written to.
    """
    tensors = {"best": flat.detach().cpu().contiguous()}
    digest = _digest({"step": step}, tensors)
    with atomic_file(best_path(folder, step)) as temporary:
        _save(tensors, temporary, {"lorakit_best": digest})


def read_best(folder: Path, step: int) -> Tensor:
    """The weights that :func:`write_best` kept, [P].

    Raises:
        TrainingError: the file is missing or damaged.
    """
    path = best_path(folder, step)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {"best": file.get_tensor("best")}
            if (file.metadata() or {})["lorakit_best"] != _digest({"step": step}, tensors):
                raise ValueError("its content does not fit its digest")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{path}, the best weights of this run so far, cannot be read: "
            f"{type(error).__name__}: {error}. Put the file back; or delete {folder}, and the run "
            "begins again from its first step."
        ) from error
    best: Tensor = tensors["best"]
    return best


def forget_bests(folder: Path, best: int | None) -> None:
    """Delete the best weights that no checkpoint names, but for those of step ``best``."""
    jobs = [_state_of(path).get("job") or {} for path in list_checkpoints(folder)]
    named = {best, *((job.get("best") or {}).get("step") for job in jobs)}
    kept = {best_path(folder, step) for step in named if step is not None}
    for path in folder.glob("best-*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: a run goes on from this one."""
    for path in list_checkpoints(folder):
        if path > checkpoint_path(folder, step):
            path.unlink(missing_ok=True)


def moments(folder: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Moments at which several runs saved together: name → (step, folders), oldest first."""
    found = {}
    for path in list_checkpoints(folder):
        together = _state_of(path).get("together")
        if together:
            step = int(path.name.removeprefix("step-").removesuffix(".safetensors"))
            found[together["moment"]] = (step, tuple(together["members"]))
    return found


def _state_of(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON data; nothing of one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["lorakit_checkpoint"])["state"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}
    return state if isinstance(state, dict) else {}


def _digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the JSON data, and of the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``save_file``, with the system's error where it hides one in its own."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1] or number[2])
        raise OSError(code, str(error)) from error
