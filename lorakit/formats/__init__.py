"""Adapter files and :class:`~lorakit.core.adapter.Adapter`, both ways.

The native file is the PEFT folder, so that every tool of the field reads what is written here::

    adapter = load_adapter("runs/mine/adapter")           # a folder, a file, or a hub id
    adapter.sites["model.layers.0.self_attn.q_proj"]      # LowRank(A [r, d_in], B [d_out, r], …)
    save_adapter(adapter, "copy")                         # the same bytes again
    push_adapter(adapter, "owner/name")

The room of PEFT's dialect is ``peft``; every other dialect has its own file beside it and meets
the rest in ``format``; ``folder`` is for the disk.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lorakit.core.adapter import Adapter
from lorakit.formats.folder import adapter_in
from lorakit.formats.hub import upload
from lorakit.formats.load import load_adapter
from lorakit.formats.peft.write import write_peft

__all__ = ["load_adapter", "push_adapter", "save_adapter"]


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> Path:
    """Write a PEFT folder: config, weights, card, tokenizer files.

    The same adapter gives the same bytes. A folder that holds an adapter already has the old one
    or the new one at every moment; other files in it stay.

    Raises:
        FormatError: something that PEFT's format cannot hold, all of it in one message; or the
            path is a file.
        InputError: the place cannot be written to.
        TrainingError: the disk is full.
    """
    path = Path(folder).expanduser()
    write_peft(adapter, path)
    return path


def push_adapter(
    adapter: Adapter | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an adapter to the hub.

    Args:
        adapter: an adapter, or the folder of one or of its run, which is read first, so that
            nothing broken is uploaded.
        repo_id: ``owner/name``; made if it is not there.
        private: of a repository that is made now.
        revision: a branch; made if it is not there.
        message: of the commit.

    Returns:
        The address of its page.

    Raises:
        FormatError: the adapter cannot be used, or the hub refuses or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    path = None if isinstance(adapter, Adapter) else adapter_in(Path(adapter).expanduser())
    loaded = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
    if path is None or not path.is_dir():
        with tempfile.TemporaryDirectory() as parent:
            folder = save_adapter(loaded, Path(parent) / "adapter")
            return upload(folder, repo_id, private=private, revision=revision, message=message)
    return upload(path, repo_id, private=private, revision=revision, message=message)
