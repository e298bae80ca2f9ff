"""A base's files and adapters become a merged model's files, one tensor at a time.

Plan → validate → write → verify. The plan is that of :mod:`lorakit.layers.merge_plan`, made on the
model without its weights; the sums are those of :mod:`lorakit.core.merging`, so the files hold the
same bits as a model that was merged in memory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.bases.fetch import fetch
from lorakit.bases.identity import check_base
from lorakit.bases.load import Located, locate
from lorakit.bases.source import Source, find_source
from lorakit.core.checkpoint import Checkpoint, Shard, open_checkpoint
from lorakit.core.merging import Recipe, check_rows, compute_dtype_for, merge_
from lorakit.core.products import exact_products
from lorakit.core.safetensors_io import read_entry, read_rows, write_streamed
from lorakit.errors import BaseError, FormatError, InputError, TrainingError, collected
from lorakit.layers.merge_plan import Change, MergeLike, Weighted, plan_merge, weighted
from lorakit.workflows.merge.folder import (
    building,
    checked_out,
    copy_other_files,
    read_json,
    write_record,
)
from lorakit.workflows.skeleton import identity_of, skeleton_of, stored_names

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

#: rows of each changed tensor that are computed again in float64
NUM_ROWS = 8


@dataclass(frozen=True)
class MergedFiles:
    """What was written."""

    path: Path
    num_tensors: int
    num_changed: int
    num_bytes: int
    shards: tuple[str, ...]
    rows_checked: int
    """Rows that were computed again in float64; 0 if that was not asked for."""
    worst_row: float
    """The largest difference there, as a share of what rounding allows; above 1 is refused."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Tensors:
    """What one tensor of the new checkpoint is made of."""

    source: str
    """Name of the tensor in the base's files."""
    recipe: Recipe | None = None


@dataclass(eq=False)
class FilePlan:
    """Everything that is known before a byte is written."""

    checkpoint: Checkpoint
    made: dict[str, Tensors]
    """Name in the new files → what it is made of."""
    untied: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapters change."""
        return [name for name, one in self.made.items() if one.recipe is not None]


def merge_files(
    base: str | os.PathLike[str],
    what: MergeLike,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    untie: bool = False,
    verify: bool = True,
    before_end: Callable[[Path], None] = lambda folder: None,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> MergedFiles:
    """Write base + adapters as a model of the same layout, never holding more than a tensor.

    Args:
        base: a folder with safetensors files, a hub id, a ``.gguf`` file (dequantised) or an alias.
        what: as :func:`lorakit.merge` takes it.
        out: a folder that does not exist or is empty; it appears whole or not at all.
        dtype: of every float tensor; ``None`` keeps each tensor's own.
        compute_dtype: what is added in.
        untie: write tensors of their own for weights that are shared and adapted in one place.
        verify: compute rows of every changed tensor again in float64 and compare.
        before_end: called with the finished folder before it gets its name; what it raises
            leaves nothing.
        progress: called with the bytes written and those there will be.

    Raises:
        BaseError: no such base, or not the adapters'.
        FormatError: a site that the files have no place for; the way out is said.
        InputError: ``out`` is not empty, the disk has no room, a sum overflows its dtype.
        TrainingError: what was written is not what was computed; nothing is left.
    """
    adapters = weighted(what)
    folder = checked_out(Path(out))
    source, located, checkpoint = open_base(base, revision, say)
    plan = plan_files(checkpoint, adapters, untie=untie)
    plan.notes += _check_bases(
        checkpoint, source, located, adapters, allow_other_base=allow_other_base
    )
    if located.notes:
        plan.notes += located.notes
    _check_room(folder, plan, dtype)
    with building(folder) as temporary:
        shards = _write_shards(plan, temporary, dtype, compute_dtype, progress)
        copy_other_files(checkpoint.path, temporary, adapters, plan.untied, dtype)
        write_record(temporary, source.name, checkpoint.path, adapters, plan.notes)
        checked, worst = (0, 0.0)
        if verify:
            checked, worst = _check_written(plan, temporary, compute_dtype)
        before_end(temporary)
        size = sum(f.stat().st_size for f in temporary.rglob("*") if f.is_file())
    return MergedFiles(
        folder,
        len(plan.made),
        len(plan.changed),
        size,
        tuple(shards),
        checked,
        worst,
        tuple(plan.notes),
    )


# --- the base ----------------------------------------------------------------------------------


def open_base(
    base: str | os.PathLike[str], revision: str | None, say: Say
) -> tuple[Source, Located, Checkpoint]:
    """A reference as a checkpoint on this machine."""
    source = find_source(base, revision)
    located = locate(source, say)
    folder = fetch(source, say) if source.kind == "hub" else Path(located.location)
    return source, located, open_checkpoint(folder)


def _check_bases(
    checkpoint: Checkpoint,
    source: Source,
    located: Located,
    adapters: Sequence[Weighted],
    *,
    allow_other_base: bool,
) -> list[str]:
    if all(adapter.base is None for adapter, _ in adapters):
        return ["the adapters do not say which base they were trained on; this was not checked"]
    model, _ = skeleton_of(checkpoint)
    stored = stored_names(model, checkpoint.entries)
    identity = identity_of(model, checkpoint, stored, source.name, storage=located.storage)
    notes = []
    for adapter, _ in adapters:
        notes += check_base(adapter, identity, allow_other=allow_other_base)
    return notes


# --- plan --------------------------------------------------------------------------------------


def plan_files(
    checkpoint: Checkpoint, adapters: Sequence[Weighted], *, untie: bool = False
) -> FilePlan:
    """Match every site with a tensor of the files.

    Raises:
        BaseError: the files are quantised.
        FormatError: sites without a tensor of their own. All are listed.
    """
    _check_dense(checkpoint)
    model, guessed = skeleton_of(checkpoint)
    changes = plan_merge(model, adapters, untie=untie)
    plan = FilePlan(checkpoint, {name: Tensors(name) for name in checkpoint.entries})
    if guessed is not None:
        plan.notes.append(guessed)
    stored = stored_names(model, checkpoint.entries)
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    entries, problems = checkpoint.entries, []
    for change in changes:
        everywhere = paths[id(change.parameter)]
        names = [n for path in everywhere for n in stored.get(path, ())]
        if not names:
            close = difflib.get_close_matches(change.name, entries, n=1, cutoff=0.6)
            hint = f"; close: {close[0]}" if close else ""
            problems.append(f"{change.name}: no tensor of the files is this parameter alone{hint}")
        elif len({entries[n].shape for n in names} | {tuple(change.parameter.shape)}) > 1:
            shapes = ", ".join(f"{n} {entries[n].shape}" for n in names)
            problems.append(
                f"{change.name}: the model has shape {tuple(change.parameter.shape)}, the files "
                f"{shapes}"
            )
        elif change.untie:
            _untie_(plan, change, everywhere, stored, names[0])
        else:
            plan.made |= {name: Tensors(name, change.recipe) for name in names}
    if problems:
        raise FormatError(
            collected("The base's files have no place for these changes", problems)
            + "\nMerge in memory instead, which lets transformers map the names: --in-memory."
        )
    return plan


def _untie_(
    plan: FilePlan,
    change: Change,
    paths: Sequence[str],
    stored: Mapping[str, Sequence[str]],
    source: str,
) -> None:
    """Store every holder of a shared parameter by itself, and change the adapted one."""
    plan.untied = True
    for path in paths:
        recipe = change.recipe if path == change.name else None
        for name in stored.get(path) or [path]:
            before = plan.made.get(name)
            if recipe is not None or before is None:
                plan.made[name] = Tensors(before.source if before else source, recipe)
    plan.notes.append(f"{change.name} was tied to another weight and is stored by itself now")


def _check_dense(checkpoint: Checkpoint) -> None:
    folder = checkpoint.path
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    method = config.get("quantization_config")
    if method:
        name = method.get("quant_method", "quantised") if isinstance(method, dict) else method
        raise BaseError(
            f"{folder} is quantised ({name}), and its files cannot be added to. Give the model "
            "that it was made of, or pass --in-memory, which writes a dense model."
        )


# --- writing -----------------------------------------------------------------------------------


def _new_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


def _check_room(path: Path, plan: FilePlan, dtype: torch.dtype | None) -> None:
    entries = plan.checkpoint.entries
    needed = 0
    for one in plan.made.values():
        entry = entries[one.source]
        size = _new_dtype(entry.dtype, dtype).itemsize
        needed += (entry.end - entry.begin) // entry.dtype.itemsize * size
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{path} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there. "
            "Free some space, or give --out another disk."
        )


def _write_shards(
    plan: FilePlan,
    folder: Path,
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
    progress: Progress,
) -> list[str]:
    home = {name: shard for shard in plan.checkpoint.shards for name in shard.entries}
    shards: dict[str, list[str]] = {shard.path.name: [] for shard in plan.checkpoint.shards}
    for name, one in plan.made.items():
        shards[home[one.source].path.name].append(name)
    total = sum(home[o.source].entries[o.source].end - home[o.source].entries[o.source].begin
                for o in plan.made.values())  # fmt: skip
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        one = plan.made[name]
        shard = home[one.source]
        entry = shard.entries[one.source]
        tensor = _made(shard, name, one, dtype, compute_dtype)
        done += entry.end - entry.begin
        progress(done, total)
        return tensor

    size = 0
    for shard in plan.checkpoint.shards:
        entries = {name: home[plan.made[name].source].entries[plan.made[name].source]
                   for name in shards[shard.path.name]}  # fmt: skip
        layout = {name: (_new_dtype(e.dtype, dtype), e.shape) for name, e in entries.items()}
        write_streamed(folder / shard.path.name, layout, make, shard.metadata)
        size += sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in layout.values())
    if plan.checkpoint.index is not None:
        _write_index(plan.checkpoint.index, folder, shards, size)
    return list(shards)


def _write_index(index: Path, folder: Path, shards: Mapping[str, list[str]], size: int) -> None:
    data = read_json(index)
    data.setdefault("metadata", {})["total_size"] = size
    where = {name: file for file, names in shards.items() for name in names}
    data["weight_map"] = dict(sorted(where.items()))
    (folder / index.name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _made(
    shard: Shard, name: str, one: Tensors, dtype: torch.dtype | None, compute_dtype: torch.dtype
) -> Tensor:
    tensor = read_entry(shard.path, shard.entries[one.source])
    target = _new_dtype(tensor.dtype, dtype)
    fine: Any = True
    with exact_products(["cpu"]):
        if one.recipe is not None:
            if target != tensor.dtype:  # added before it is cast, and cast once
                tensor = tensor.to(compute_dtype_for(tensor.dtype, compute_dtype))
            fine = merge_(tensor, one.recipe, compute_dtype)
        if target != tensor.dtype:
            tensor = tensor.to(target)
            fine = bool(fine) and bool(torch.isfinite(tensor).all())
    if not bool(fine):
        kind = str(target).removeprefix("torch.")
        raise InputError(
            f"{name} would hold values that are NaN or Inf in {kind}; nothing was written. The "
            "weight or scaling is too large for this dtype, or the base holds such values. Pass "
            "--dtype float32 or bfloat16, or lower the weight."
        )
    return tensor


# --- verifying ---------------------------------------------------------------------------------


def _check_written(plan: FilePlan, folder: Path, compute_dtype: torch.dtype) -> tuple[int, float]:
    """Rows checked, and the worst of them.

    Raises:
        TrainingError: a row is not W + ΔW, or a tensor is missing.
    """
    written = open_checkpoint(folder)
    old = {name: shard for shard in plan.checkpoint.shards for name in shard.entries}
    new = {name: shard for shard in written.shards for name in shard.entries}
    problems = [f"{name}: missing" for name in plan.made if name not in new]
    count, worst = 0, 0.0
    for name in plan.changed:
        one, recipe = plan.made[name], plan.made[name].recipe
        if recipe is None or name not in new:
            continue
        before, after = old[one.source].entries[one.source], new[name].entries[name]
        height = before.shape[0] if before.shape else 1
        rows = _sampled(name, height) if recipe.by_rows else list(range(height))
        ratio = check_rows(
            read_rows(old[one.source].path, before, rows),
            read_rows(new[name].path, after, rows),
            rows,
            recipe,
            compute_dtype,
        )
        count, worst = count + len(rows), max(worst, ratio)
        if not ratio <= 1:
            problems.append(f"{name}: {ratio:.3g} times the difference that rounding allows")
    if problems:
        raise TrainingError(
            collected("What was written is not base + adapters", problems)
            + "\nNothing was left. Check the disk and the memory of this machine, then try again."
        )
    return count, worst


def _sampled(name: str, height: int) -> list[int]:
    """Rows that depend on the tensor's name; the first and the last are among them."""
    rows = {0, height - 1}
    for k in range(4 * NUM_ROWS):
        if len(rows) >= min(NUM_ROWS, height):
            break
        draw = hashlib.sha256(f"{name}:{k}".encode()).digest()
        rows.add(int.from_bytes(draw[:8], "big") % height)
    return sorted(rows)
