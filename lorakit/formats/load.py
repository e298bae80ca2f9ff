"""From what a user names an adapter by, to the adapter."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.errors import FormatError
from lorakit.formats.folder import CONFIG, PICKLED, WEIGHTS
from lorakit.formats.hub import download, is_hub_id
from lorakit.formats.peft.read import read_peft

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def load_adapter(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    keep_base_weights: bool = False,
) -> Adapter:
    """The adapter in a folder, in a file, or on the hub.

    Args:
        ref: a PEFT folder, a file of weights whose ``adapter_config.json`` lies beside it, or,
            where no such path exists, a hub id, with its revision as ``owner/name@revision``.
        revision: branch, tag or commit on the hub.
        dtype: cast every tensor; by default they stay as stored.
        keep_base_weights: PEFT stores the base's own embedding beside an adapted one, which is
            left out with a logged warning. Keep it as a ``Replace`` where the vocabulary was
            resized before training, since the new rows exist nowhere else.

    Raises:
        FormatError: nothing is there, or it cannot be used. All problems are in one message.
        MissingDependencyError: the hub is needed and huggingface_hub is not installed.
    """
    path = Path(os.path.expanduser(ref))
    if not os.path.exists(path) and isinstance(ref, str) and is_hub_id(ref):
        path = download(ref, revision=revision)
    elif revision is not None:
        raise FormatError(
            f"revision {revision!r} is given, but {path} is a path; revisions exist on the hub"
        )
    adapter = _read_settled(path, keep_base_weights=keep_base_weights)
    return adapter if dtype is None else cast(adapter, dtype)


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with every tensor in another dtype.

    Raises:
        FormatError: a value that is finite now would not be then.
    """
    sites: dict[str, Site] = {}
    for path, site in adapter.sites.items():
        if isinstance(site, LowRank):
            bias = None if site.bias is None else site.bias.to(dtype)
            sites[path] = replace(site, A=site.A.to(dtype), B=site.B.to(dtype), bias=bias)
        else:
            sites[path] = Replace({n: t.to(dtype) for n, t in site.tensors_by_name.items()})
    return adapter.with_(sites=sites)


def _read_settled(path: Path, *, keep_base_weights: bool) -> Adapter:
    """Read a folder that another process may be replacing: again, if it was."""
    folder, weights = _locate(path)
    for _ in range(5):
        before = _identity(folder)
        try:
            adapter = read_peft(folder, weights, keep_base_weights=keep_base_weights)
        except (FormatError, FileNotFoundError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return adapter
    raise FormatError(f"{folder} changes faster than it can be read. Load a copy of it.")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The folder, and the file of weights if one was named.

    Raises:
        FormatError: no adapter is there; it says what is, and what to give instead.
    """
    if not os.path.exists(path):  # where a name is too long, a Path raises
        raise FormatError(_missing(path))
    if path.is_dir():
        if not (path / CONFIG).exists():
            raise FormatError(_no_adapter(path))
        return path, None
    if path.name == CONFIG:
        return path.parent, None
    if path.suffix == ".gguf":
        raise FormatError(
            f"{path} is a GGUF file, which is not read as an adapter. Give the PEFT folder that "
            "it was converted from; a GGUF base goes to --base."
        )
    if path.suffix not in _SUFFIXES:
        raise FormatError(f"{path} is no adapter. Give a PEFT folder, or its {WEIGHTS}.")
    if not (path.parent / CONFIG).exists():
        raise FormatError(
            f"{path} has no {CONFIG} beside it, without which its scale and ranks are unknown. "
            "Put the config of the same adapter there."
        )
    return path.parent, path


def _missing(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {path.parent / close[0]}?" if close else "Check the path."
    return f"{path} does not exist, and is no hub id (owner/name). {hint}"


def _no_adapter(folder: Path) -> str:
    """Why a folder without a config is no adapter, and what is."""
    inside = sorted(p.parent for p in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")])
    if inside:
        paths = ", ".join(str(p) for p in inside[:5])
        return f"{folder} is no adapter itself, but holds some. Give one of: {paths}"
    if (folder / "config.json").exists() or (folder / "model_index.json").exists():
        return (
            f"{folder} is a whole model, not an adapter (it has config.json and no {CONFIG}). "
            "Give it as the base, and an adapter beside it."
        )
    names = sorted(p.name for p in folder.iterdir())
    if "adapters.safetensors" in names:
        return f"{folder} holds an MLX adapter, which is not read here. Convert it to PEFT first."
    if WEIGHTS in names or PICKLED in names:
        return (
            f"{folder} has weights but no {CONFIG}, without which their scale is unknown. Copy "
            "the config of the same adapter there."
        )
    there = ", ".join(names[:6]) or "nothing"
    return f"{folder} has no {CONFIG}; it holds {there}. Give the folder of an adapter."
