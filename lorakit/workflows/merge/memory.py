"""Merging a model that is loaded, for files that cannot be merged tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorakit.bases import Base, load_base
from lorakit.bases.preview import base_config
from lorakit.core.checkpoint import open_checkpoint
from lorakit.layers.dense import to_dense_
from lorakit.layers.merge import merge
from lorakit.layers.merge_plan import MergeLike, weighted
from lorakit.workflows.merge.files import MergedFiles, Progress, Say
from lorakit.workflows.merge.folder import (
    building,
    checked_out,
    copy_other_files,
    write_record,
)


def merge_in_memory(
    base: str | os.PathLike[str],
    what: MergeLike,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    untie: bool = False,
    trust_remote_code: bool = False,
    load: Callable[..., Base] = load_base,
    before_end: Callable[[Path], None] = lambda folder: None,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> MergedFiles:
    """As :func:`lorakit.workflows.merge.files.merge_files`, through the loaded model.

    A base that bitsandbytes quantised becomes dense. transformers saves the result, in its own
    layout. No rows are checked: what was written is what transformers made of the model.

    Args:
        load: what loads the base as the class that the adapters were trained on, such as a kind's
            ``load_base``; by default as a causal language model.
    """
    folder = checked_out(Path(out))
    adapters = weighted(what)
    if dtype is None:
        config: Any = base_config(base, revision=revision, trust_remote_code=trust_remote_code)
        stored = getattr(config, "dtype", None)
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    loaded = load(
        ref=base,
        device="cpu",
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    model: Any = loaded.model
    notes = list(loaded.notes)
    dense = to_dense_(model, dtype)
    if dense:
        notes.append(f"{len(dense)} quantised linears became dense")
    undo = merge(
        model,
        adapters,
        undo=None,
        compute_dtype=compute_dtype,
        allow_other_base=allow_other_base,
        untie=untie,
    )
    notes += undo.notes
    brought = [name for name in loaded.new_weights if name in undo.names]
    if brought:
        notes.append(f"the adapters bring these new weights, trained: {', '.join(brought[:6])}")
    tied = any(change.untie for change in undo._changes)
    if tied:
        model.config.tie_word_embeddings = False
    with building(folder) as temporary:
        model.save_pretrained(temporary)
        for reader in filter(None, (loaded.tokenizer, loaded.processor)):
            reader.save_pretrained(temporary)
        copy_other_files(temporary, temporary, adapters, tied, None)
        write_record(temporary, loaded.identity.name, Path(loaded.ref), adapters, notes)
        before_end(temporary)
        written = open_checkpoint(temporary)
        size = sum(f.stat().st_size for f in temporary.rglob("*") if f.is_file())
        shards = tuple(shard.path.name for shard in written.shards)
    progress(1, 1)
    return MergedFiles(
        folder, len(written.entries), len(undo.names), size, shards, 0, 0.0, tuple(notes)
    )
