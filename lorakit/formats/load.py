"""From what a user names an adapter by, to the adapter."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.errors import FormatError
from lorakit.formats.folder import CONFIG, PICKLED, WEIGHTS, adapter_in
from lorakit.formats.format import Hints
from lorakit.formats.hub import download, is_hub_id
from lorakit.formats.peft.read import read_peft

logger = logging.getLogger(__name__)


def load_adapter(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    keep_base_weights: bool = False,
) -> Adapter:
    """The adapter in a folder, in a file, or on the hub; its format is detected.

    Args:
        ref: a PEFT folder, a run's folder with the adapter in it, a file or folder of another
            format (``lorakit.formats.registry``), or, where no such path exists, a hub id, with
            its revision as ``owner/name@revision``.
        revision: branch, tag or commit on the hub.
        dtype: cast every tensor; by default they stay as stored.
        keep_base_weights: PEFT stores the base's own embedding beside an adapted one, which is
            left out with a logged warning. Keep it as a ``Replace`` where the vocabulary was
            resized before training, since the new rows exist nowhere else.

    Raises:
        FormatError: nothing is there, it cannot be used, or not all of it would be carried over
            (``lorakit convert`` can leave that out). All problems are in one message.
        MissingDependencyError: the hub is needed and huggingface_hub is not installed.
    """
    path = Path(os.path.expanduser(ref))
    if not os.path.exists(path) and isinstance(ref, str) and is_hub_id(ref):
        path = download(ref, revision=revision)
    elif revision is not None:
        raise FormatError(
            f"revision {revision!r} is given, but {path} is a path; revisions exist on the hub"
        )
    adapter = _read(adapter_in(path), keep_base_weights=keep_base_weights)
    return adapter if dtype is None else cast(adapter, dtype)


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with every tensor in another dtype.

    Raises:
        FormatError: a value that is finite now would not be then.
    """
    sites: dict[str, Site] = {}
    for path, site in adapter.sites.items():
        if isinstance(site, LowRank | Prefix):
            changed: dict[str, Any] = {n: t.to(dtype) for n, t in site.tensors().items()}
            sites[path] = replace(site, **changed)
        else:
            sites[path] = Replace({n: t.to(dtype) for n, t in site.tensors_by_name.items()})
    return adapter.with_(sites=sites)


def _read(path: Path, *, keep_base_weights: bool) -> Adapter:
    """A PEFT folder as such; anything else by the format that recognises it."""
    # where a name is too long, a Path raises
    weights = any(os.path.isfile(path / name) for name in (WEIGHTS, PICKLED))
    if weights and os.path.isfile(path / CONFIG):
        return _read_settled(path, None, keep_base_weights=keep_base_weights)
    # PEFT's folder, which most adapters are, loads without the modules of the others
    from lorakit.formats.opening import open_source
    from lorakit.formats.registry import identify, read_with, refuse_losses

    source = open_source(path)
    form = identify(source)
    if form.name == "peft" and source.config:
        folder = source.weights.parent
        return _read_settled(folder, source.weights, keep_base_weights=keep_base_weights)
    reading = read_with(form, source, Hints())
    for note in reading.notes:
        logger.warning("%s (%s): %s", path, form.name, note)
    refuse_losses(path, reading)
    return reading.adapter


def _read_settled(folder: Path, weights: Path | None, *, keep_base_weights: bool) -> Adapter:
    """Read a folder that another process may be replacing: again, if it was."""
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


def _identity(folder: Path) -> tuple[int, int, int]:
    """Which folder it is; a removed one's number is soon given to a new one, at another time."""
    status = folder.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns
