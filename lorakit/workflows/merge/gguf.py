"""A base and adapters merged into one GGUF file, for llama.cpp and what is built on it.

Plan → validate → write → verify. The adapter goes to the file's order of rows, not the weights to
transformers': factors are small. Each tensor is dequantised, added to in float32 and quantised in
blocks of rows; a tensor that nothing changes and that keeps its type is copied byte for byte.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.bases.gguf_base import GgufBase, from_gguf, identity_of
from lorakit.bases.gguf_vocabulary import special_fields
from lorakit.bases.gguf_write import (
    FILE_TYPES,
    TensorPlan,
    dequantize,
    quantize,
    whole,
    write_gguf,
)
from lorakit.bases.identity import check_base
from lorakit.bases.source import find_source
from lorakit.core.adapter import Adapter
from lorakit.core.files import atomic_file
from lorakit.core.merging import Recipe, stretch
from lorakit.errors import BaseError, InputError, TrainingError
from lorakit.workflows.merge.gguf_check import Checked, check_rows
from lorakit.workflows.merge.gguf_plan import PlannedTensor, Weighted, make_plan

#: numbers that are worked on at a time
_BLOCK_ELEMENTS = 1 << 22
Say = Callable[[str], None]


@dataclass(frozen=True)
class TypeCost:
    """What encoding tensors in one type cost."""

    num_tensors: int
    error: float
    """‖written − wanted‖ / ‖wanted‖, Frobenius norms over these tensors."""
    change: float
    """‖wanted − base‖ / ‖wanted‖: what the adapters changed. Beside a larger error, a merge into
    this type loses much of what was learned."""


@dataclass(frozen=True)
class MergedGguf:
    """What was written."""

    path: Path
    architecture: str
    num_bytes: int
    num_changed: int
    """Tensors that an adapter changed."""
    num_copied: int
    """Tensors that were copied byte for byte."""
    by_type: Mapping[str, TypeCost]
    """GGUF's type → the error of the tensors that were encoded in it anew."""
    checked: Checked
    """What reading the file again showed."""
    notes: tuple[str, ...] = ()


def merge_to_gguf(
    base: str | os.PathLike[str],
    adapters: Sequence[Weighted],
    out: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    revision: str | None = None,
    allow_other_base: bool = False,
    before_end: Callable[[Path, GgufBase], None] = lambda path, parts: None,
    say: Say = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergedGguf:
    """Write base + adapters as one GGUF file.

    Args:
        base: a ``.gguf`` file or its alias, whose fields are kept; or a transformers folder or hub
            id of the Llama family, which is converted.
        adapters: each with its weight.
        out: the file; it appears whole or not at all.
        quantize: a key of :data:`lorakit.bases.gguf_write.FILE_TYPES` for all matrices; ``None``
            keeps each tensor's type.
        before_end: called with the finished file before it gets its name, and with what the base
            was; what it raises leaves nothing.
        progress: called with the bytes written and those there will be.

    Raises:
        BaseError: the base cannot be written so, or is not the adapters'; the way out is said.
        FormatError: an adapter has what the file has no place for. All problems are listed.
        InputError: a setting is impossible, or the disk has no room.
        TrainingError: what was written is not what was computed; nothing is left.
    """
    kind = _checked_kind(quantize)
    path = _checked_out(Path(out))
    parts = open_base(base, revision, say)
    notes = list(parts.notes)
    for adapter, _ in adapters:
        if adapter.base is None or not adapter.base.shapes:
            notes += _check_unsampled(adapter, parts)
        else:
            found = identity_of(parts, adapter.base)
            notes += check_base(adapter, found, allow_other=allow_other_base)
    fields = dict(parts.fields)
    notes += _take_tokenizer_(fields, parts, adapters)
    plan = make_plan(parts, adapters, kind)
    if kind is not None and quantize is not None:
        fields["general.file_type"] = whole(FILE_TYPES[quantize])
        fields.setdefault("general.quantization_version", whole(2))
    tally = _Tally()
    tensors = [_tensor_plan(one, tally) for one in plan.tensors]
    num_bytes = sum(one.num_bytes for one in tensors)
    _check_room(path, num_bytes)
    with atomic_file(path) as temporary:
        write_gguf(temporary, fields, tensors, alignment=parts.alignment, progress=progress)
        checked = check_rows(temporary, parts, plan.changes, plan.names())
        before_end(temporary, parts)
        num_bytes = temporary.stat().st_size
    return MergedGguf(
        path=path,
        architecture=parts.architecture,
        num_bytes=num_bytes,
        num_changed=sum(one.recipe is not None for one in plan.tensors),
        num_copied=sum(one.is_copy for one in plan.tensors),
        by_type=tally.result(),
        checked=checked,
        notes=(*notes, *plan.notes, *tally.notes()),
    )


def open_base(base: str | os.PathLike[str], revision: str | None, say: Say) -> GgufBase:
    """The parts of a base, whatever it is; nothing is loaded whole.

    Raises:
        BaseError: there is none, or it cannot be written as GGUF.
    """
    source = find_source(base, revision)
    if source.kind == "gguf":
        return from_gguf(Path(source.location), source.name)
    from lorakit.bases.fetch import fetch
    from lorakit.bases.gguf_convert import from_folder
    from lorakit.bases.tokenizers import read_tokenizer

    location = source.location
    if source.kind == "hub":
        location = str(fetch(source, say))
    tokenizer, notes = read_tokenizer(location)
    parts = from_folder(Path(location), source.name, tokenizer)
    return GgufBase(**{**vars(parts), "notes": (*notes, *parts.notes)})


# --- write


class _Tally:
    """Sums of squares by type: of the error, of what was wanted, of the change."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def begin(self, kind: str) -> None:
        self._sums.setdefault(kind, [0.0, 0.0, 0.0, 0.0])[0] += 1

    def add(self, kind: str, before: Tensor, wanted: Tensor, written: Tensor) -> None:
        sums = self._sums[kind]
        sums[1] += float((written - wanted).square().sum(dtype=torch.float64))
        sums[2] += float(wanted.square().sum(dtype=torch.float64))
        sums[3] += float((wanted - before).square().sum(dtype=torch.float64))

    def result(self) -> dict[str, TypeCost]:
        return {
            kind: TypeCost(int(n), *(math.sqrt(x / size) if size else 0.0 for x in (err, diff)))
            for kind, (n, err, size, diff) in sorted(self._sums.items())
        }

    def notes(self) -> list[str]:
        return [
            f"writing in {kind} adds an error of {found.error:.2%}, more than the "
            f"{found.change:.2%} that the adapter changes: a finer type keeps more of it "
            "(--quantize q8_0)"
            for kind, found in self.result().items()
            if found.change and found.error > found.change
        ]


def _tensor_plan(one: PlannedTensor, tally: _Tally) -> TensorPlan:
    blocks = one.base.copy if one.is_copy else lambda: _encoded(one, tally)
    assert blocks is not None
    return TensorPlan(one.name, one.base.shape, one.kind, blocks)


def _encoded(one: PlannedTensor, tally: _Tally) -> Iterator[np.ndarray]:
    """The tensor's bytes: dequantised, changed and quantised by blocks of rows."""
    step = max(1, _BLOCK_ELEMENTS // one.base.shape[-1])
    tally.begin(one.kind)
    for begin in range(0, one.base.num_rows, step):
        end = min(begin + step, one.base.num_rows)
        before = torch.from_numpy(one.base.rows(begin, end))
        wanted = before if one.recipe is None else _changed(before, one.recipe, begin)
        packed = quantize(wanted.numpy(), one.kind)
        written = torch.from_numpy(dequantize(packed, one.kind)).reshape(wanted.shape)
        if not bool(torch.isfinite(written).all()):
            raise TrainingError(
                f"{one.name} would hold values that are not finite in {one.kind} (the largest is "
                f"{float(wanted.abs().max()):.3g}). Write it in bf16 or f32, or check the base."
            )
        tally.add(one.kind, before, wanted, written)
        yield packed


def _changed(before: Tensor, recipe: Recipe, begin: int) -> Tensor:
    """Rows ``begin`` and on of the merged weight, float32 [n, d]."""
    rows = slice(begin, begin + before.shape[0])
    if recipe.value is not None:
        return recipe.value.reshape(-1, before.shape[-1])[rows].contiguous()
    after = before.clone()
    for term in recipe.terms:
        after.addmm_(term.left[rows], term.right, alpha=term.factor)
    if recipe.magnitude is not None:
        after *= stretch(recipe.magnitude[rows], after.norm(dim=1))[:, None]
    return after


# --- checks before


def _checked_kind(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in FILE_TYPES:
        more = (
            " K-quants are made by llama.cpp's own program: write f16 here, then "
            f"llama-quantize merged-f16.gguf merged.gguf {name.upper()}."
            if "k" in name.lower() or name.lower().startswith("iq")
            else ""
        )
        raise InputError(f"quantize is {name!r}; expected one of {', '.join(FILE_TYPES)}.{more}")
    return name.upper()


def _checked_out(path: Path) -> Path:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it, such as model.gguf.")
    return path


def _check_room(path: Path, num_bytes: int) -> None:
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise InputError(
            f"{path} will take {num_bytes / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free. "
            "Free some space, or give a place on a larger disk."
        )


def _check_unsampled(adapter: Adapter, base: GgufBase) -> list[str]:
    """Of an adapter without samples of its base, what can be said."""
    if adapter.base is None:
        return ["the adapter does not say which base it was trained on, so this was not checked"]
    return [
        f"the adapter was trained on {adapter.base.name!r} and holds no samples of it, so only "
        f"shapes were compared with {base.name!r}"
    ]


def _take_tokenizer_(
    fields: dict[str, bytes], base: GgufBase, adapters: Sequence[Weighted]
) -> list[str]:
    """Put an adapter's chat template and special tokens in, where it brings a tokenizer.

    Raises:
        BaseError: its vocabulary is not the base's.
    """
    with_files = [adapter for adapter, _ in adapters if adapter.tokenizer_files]
    if not with_files:
        return []
    found = [special_fields(_tokenizer(adapter, base)) for adapter in with_files]
    if any(one != found[0] for one in found):
        raise BaseError(
            "The adapters bring different chat templates or special tokens; merge them one at a "
            "time."
        )
    changed = sorted(key for key, value in found[0].items() if fields.get(key) != value)
    fields.update(found[0])
    return [f"from the adapter's tokenizer: {', '.join(changed)}"] if changed else []


def _tokenizer(adapter: Adapter, base: GgufBase) -> Any:
    import tempfile

    from lorakit.bases.tokenizers import read_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in adapter.tokenizer_files.items():
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        tokenizer, _ = read_tokenizer(folder)
    theirs = {number: token for token, number in tokenizer.get_vocab().items()}
    differing = [
        n for n, token in theirs.items() if n >= len(base.tokens) or base.tokens[n] != token
    ]
    if differing:
        raise BaseError(
            f"The adapter brings another vocabulary than the base's: {len(differing)} tokens "
            f"differ, the first is number {min(differing)}, {theirs[min(differing)]!r}. Merge into "
            "a folder (lorakit merge --out DIR), and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    return tokenizer
