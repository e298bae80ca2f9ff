"""``merge``: adapters become part of a model's weights, and ``undo()`` puts the originals back.

Plan → validate → apply → undo. Everything that can be known beforehand is checked before anything
is touched: paths, shapes, kinds, ties, storages, the base. Only whether a sum overflows the dtype
of its weight is not always known without computing it. Then:

=============== ==================================================================================
originals are   what is done about overflow
=============== ==================================================================================
kept            it is looked for while merging, and the weights merged so far are put back
not kept        where the factors' sizes do not exclude it, everything is computed once without
                being written; then it is merged
=============== ==================================================================================
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorakit.bases.identity import check_base, identify
from lorakit.core.files import clear_disk_errors
from lorakit.core.identity import BaseIdentity
from lorakit.core.merging import (
    Scratch,
    compute_dtype_for,
    doubtful,
    finish_,
    merge_,
)
from lorakit.core.products import exact_products
from lorakit.core.safetensors_io import read_entry, read_safetensors_header, write_safetensors
from lorakit.errors import InputError, LorakitError, collected
from lorakit.layers.handle import handle_of
from lorakit.layers.merge_plan import (
    Change,
    MergeLike,
    Weighted,
    check_in_memory,
    plan_merge,
    weighted,
)

logger = logging.getLogger(__name__)

Keep = Literal["memory", "disk"]

#: model → its identity before the first of the merges that are in it
_identities: weakref.WeakKeyDictionary[nn.Module, BaseIdentity] = weakref.WeakKeyDictionary()
#: tensor → the merges in it, the last one last, each with the tensor's version after it. A merge is
#: a token here, so that nothing keeps a model or its originals alive
_merges: Any = WeakIdKeyDictionary()


def merge(
    model: nn.Module,
    what: MergeLike,
    *,
    undo: Keep | None = "memory",
    compute_dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    untie: bool = False,
) -> Undo:
    """Add adapters to a model's weights, in place.

    Modules, parameters, their storage, strides and hooks stay; only numbers change. Each weight
    is read once, all adapters are added in ``compute_dtype``, and the sum is cast once. A
    quantised weight is made dense, added to, and quantised again; what that costs is in
    ``undo.errors``.

    Args:
        model: any ``nn.Module`` without attached adapters.
        what: an adapter, ``(adapter, 0.7)``, or a list of either.
        undo: where the original values are kept: ``"memory"``, ``"disk"`` (a temporary file,
            removed with the result or at exit), or ``None``.
        compute_dtype: float32 or float64; a weight of a wider dtype is added to in its own.
        allow_other_base: merge an adapter that was trained on other weights; shapes must fit.
        untie: give a weight that another module shares (an embedding tied to the head) a tensor
            of its own, where only one of them is adapted.

    Returns:
        Call it to put the original values back, bit for bit.

    Raises:
        FormatError: a site that is not in the model, or cannot be merged exactly.
        BaseError: an adapter that was trained on other weights.
        InputError: weights or settings that cannot act, a sum that overflows its dtype. The
            model is then as it was.
        LorakitError: the model has adapters attached.
    """
    _check_settings(undo, compute_dtype)
    _check_not_attached(model)
    adapters = weighted(what)
    changes = plan_merge(model, adapters, untie=untie)
    check_in_memory(changes)
    identity, notes = _check_bases(model, adapters, allow_other_base)
    if undo is None:
        _check_results(changes, compute_dtype)
    result = Undo(model, changes, undo, notes)
    result._apply(compute_dtype)
    _identities.setdefault(model, identity)
    return result


class Undo:
    """A merge that happened. Call it to put the original values back, bit for bit.

    Merges of the same weights are undone in the reverse order.
    """

    def __init__(
        self, model: nn.Module, changes: Sequence[Change], where: Keep | None, notes: Sequence[str]
    ) -> None:
        self.where = where
        """``"memory"``, ``"disk"`` or ``None``."""
        self.notes = tuple(notes)
        """What should be known of the adapters' base, and of what was done."""
        self.errors: dict[str, float] = {}
        """Quantised weight → ‖stored - sum‖ / ‖sum‖ (Frobenius): what quantising again added."""
        self.bytes = 0
        """Bytes that the originals take where they are kept."""
        self._model = weakref.ref(model)
        self._changes = list(changes)
        self._steps: list[_Step] = []
        self._store = _Store.open(where)
        self._done = False
        self._under_way = False
        self._token = object()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the merge changed."""
        return tuple(change.name for change in self._changes)

    @property
    def undone(self) -> bool:
        """Whether the originals are back."""
        return self._done

    def __call__(self) -> None:
        """Put the originals back.

        Raises:
            LorakitError: they were not kept, are back already, or something else has changed the
                weights since: a later merge, which must be undone first, or training.
        """
        if self.where is None:
            raise LorakitError(
                "this merge was made with undo=None, so the original values were not kept; load "
                "the base again"
            )
        if self._done:
            raise LorakitError("this merge was undone already; there is nothing to put back")
        model = self._model()
        if model is not None:
            _check_not_attached(model)
        if not self._under_way:  # else it was interrupted, and what it wrote counts as its own
            self._check_untouched()
        self._under_way = True
        self._restore()
        for step in self._steps:
            for tensor in step.watched:
                records = _merges[tensor]
                records.pop()
                if records:
                    records[-1] = (records[-1][0], _version(tensor))
        if model is not None and not any(_merges.get(_held(p)) for p in model.parameters()):
            _identities.pop(model, None)
        self._close()

    def _check_untouched(self) -> None:
        problems = []
        for step in self._steps:
            for tensor in step.watched:
                records = _merges.get(tensor) or []
                if not records or records[-1][0] is not self._token:
                    problems.append(f"{step.name}: merged again since")
                elif records[-1][1] != _version(tensor):
                    problems.append(f"{step.name}: written to since by something else")
            if not step.in_place():
                problems.append(f"{step.name}: its module holds another tensor now")
        if problems:
            raise LorakitError(
                collected("The weights are not as this merge left them", problems, limit=6)
                + "\nUndo later merges first. Other changes would be lost: load the base again."
            )

    def _apply(self, compute_dtype: torch.dtype) -> None:
        """Keep the originals and merge; whatever goes wrong, the model is as it was."""
        try:
            with clear_disk_errors(self._store.path or Path(tempfile.gettempdir())):
                self._steps = [_Step.of(change) for change in self._changes]
                self.bytes = self._store.keep_all(self._steps)
            fine, scratch = [], Scratch()
            with exact_products({step.change.parameter.device.type for step in self._steps}):
                for step in self._steps:
                    self._store.keep(step)
                    step.started = True
                    step.separate()
                    # without originals, it was proven or tried before anything was touched
                    check = self.where is not None
                    ok, error = _rewrite_(step.change, compute_dtype, scratch, check=check)
                    fine.append((step.change, ok))
                    if error is not None:
                        self.errors[step.name] = error
            _check_finite(fine)
        except BaseException:
            if self.where is not None:
                self._restore()
            self._close()
            raise
        if self.where == "memory":
            self.bytes = self._store.bytes
        for step in self._steps:
            for tensor in step.watched:
                if tensor not in _merges:
                    _merges[tensor] = []
                _merges[tensor].append((self._token, _version(tensor)))

    def _restore(self) -> None:
        with torch.no_grad():
            for step in reversed(self._steps):
                if step.started:
                    step.restore_(self._store.kept(step))

    def _close(self) -> None:
        self._done = True
        self._store.close()


@dataclass(eq=False)
class _Step:
    """One change under way: the tensors that it writes to."""

    change: Change
    tensors: list[Tensor]
    shared: nn.Parameter | None = None
    """The tied parameter that the module held before."""
    own: nn.Parameter | None = None
    """What the module holds instead of it since."""
    started: bool = False

    @classmethod
    def of(cls, change: Change) -> _Step:
        if change.packed is not None:
            return cls(change, list(change.packed.tensors().values()))
        parameter = change.parameter
        if change.untie:
            assert isinstance(parameter, nn.Parameter)
            return cls(change, [], shared=parameter)
        return cls(change, [parameter])

    @property
    def name(self) -> str:
        return self.change.name

    @property
    def watched(self) -> list[Tensor]:
        """The tensors whose later changes an undo would lose."""
        return self.tensors if self.own is None else [self.own]

    def separate(self) -> None:
        """Give a tied weight a tensor of its own; nothing else needs to be kept for it."""
        if self.shared is not None:
            self.own = nn.Parameter(
                self.shared.detach().clone(), requires_grad=self.shared.requires_grad
            )
            setattr(self.change.module, self.change.key, self.own)

    def in_place(self) -> bool:
        """Whether the module still holds what was merged into."""
        if self.change.packed is not None:
            return True
        return self.change.parameter is self.watched[0]

    def restore_(self, kept: list[Tensor]) -> None:
        if self.shared is not None:
            setattr(self.change.module, self.change.key, self.shared)
        for tensor, original in zip(self.tensors, kept, strict=True):
            tensor.copy_(original)


class _Store:
    """Where originals are kept."""

    def __init__(self, where: Keep | None, folder: str | None) -> None:
        self.where = where
        self.bytes = 0
        self.path = None if folder is None else Path(folder, "originals.safetensors")
        self._memory: dict[int, list[Tensor]] = {}
        self._entries: dict[str, Any] = {}
        self._remove = None
        if folder is not None:
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def open(cls, where: Keep | None) -> _Store:
        return cls(where, tempfile.mkdtemp(prefix="lorakit-undo-") if where == "disk" else None)

    def keep_all(self, steps: Sequence[_Step]) -> int:
        """Before anything is touched, the model itself holds what is written to the disk."""
        if self.where != "disk":
            return 0
        assert self.path is not None
        tensors = {
            f"{i}.{k}": _plain(tensor)
            for i, step in enumerate(steps)
            for k, tensor in enumerate(step.tensors)
        }
        write_safetensors(self.path, tensors, {})
        self._entries = dict(read_safetensors_header(self.path)[0])
        self._numbers = {id(step): i for i, step in enumerate(steps)}
        return self.path.stat().st_size

    def keep(self, step: _Step) -> None:
        if self.where == "memory":
            copies = [_plain(tensor).clone() for tensor in step.tensors]
            self._memory[id(step)] = copies
            self.bytes += sum(t.numel() * t.element_size() for t in copies)

    def kept(self, step: _Step) -> list[Tensor]:
        if self.where == "memory":
            return self._memory[id(step)]
        assert self.path is not None
        number = self._numbers[id(step)]
        return [
            read_entry(self.path, self._entries[f"{number}.{k}"]) for k in range(len(step.tensors))
        ]

    def close(self) -> None:
        self._memory.clear()
        if self._remove is not None:
            self._remove()


def _rewrite_(
    change: Change,
    asked: torch.dtype,
    scratch: Scratch,
    *,
    write: bool = True,
    check: bool = True,
) -> tuple[Tensor, float | None]:
    """Merge one weight; whether it is finite, and what quantising it again added."""
    if change.packed is None:
        weight = change.parameter.detach()
        fine = merge_(weight, change.recipe, asked, write=write, check=check, scratch=scratch)
        return fine, None
    dtype = compute_dtype_for(torch.float32, asked)
    total = change.packed.dense(dtype)
    finish_(total, change.recipe.to(change.parameter.device, dtype), 0)
    fine = torch.isfinite(total).all()
    if not write or not bool(fine):
        return fine, None
    change.packed.store_(total)
    again = change.packed.dense(dtype)
    return fine, float((again - total).norm() / total.norm().clamp_min(1e-30))


def _check_results(changes: Sequence[Change], asked: torch.dtype) -> None:
    """Compute, without writing, what the factors alone do not prove to be finite."""
    plain = [c for c in changes if c.packed is None]
    doubts = doubtful([c.recipe for c in plain], [c.parameter.dtype for c in plain])
    open_ = [c for c, doubt in zip(plain, doubts, strict=True) if doubt]
    open_ += [c for c in changes if c.packed is not None]
    scratch = Scratch()
    with exact_products({c.parameter.device.type for c in open_}):
        _check_finite([(c, _rewrite_(c, asked, scratch, write=False)[0]) for c in open_])


def _check_finite(results: Sequence[tuple[Change, Tensor]]) -> None:
    """
    Raises:
        InputError: sums that are NaN or do not fit their weight's dtype. All are listed.
    """
    if not results:
        return
    device = results[0][1].device
    fine = torch.stack([ok.to(device) for _, ok in results]).tolist()
    bad = [change for (change, _), ok in zip(results, fine, strict=True) if not ok]
    if bad:
        lines = [f"{c.name} ({str(c.parameter.dtype).removeprefix('torch.')})" for c in bad]
        raise InputError(
            collected("Merged, these weights would hold values that are NaN or Inf", lines, limit=8)
            + "\nNothing was changed. The weight or scaling is too large for this dtype, or the "
            "base holds such values; load the base as float32 or bfloat16, or lower the weight."
        )


def _check_settings(undo: Any, compute_dtype: Any) -> None:
    problems = []
    if undo is not None and undo not in get_args(Keep):
        problems.append(f"undo is {undo!r}; it must be 'memory', 'disk' or None")
    if compute_dtype not in (torch.float32, torch.float64):
        problems.append(f"compute_dtype is {compute_dtype}; it must be torch.float32 or float64")
    if problems:
        raise InputError(collected("Cannot merge like this", problems))


def _check_not_attached(model: nn.Module) -> None:
    parts = [p or "the model" for p, m in model.named_modules() if handle_of(m) is not None]
    if parts:
        raise LorakitError(
            f"adapters are attached to {parts[0]}, and would act on top of the merged weights. "
            "Take them off first: handle.detach(); handle.snapshot(name) before it keeps their "
            "values."
        )


def _check_bases(
    model: nn.Module, adapters: Sequence[Weighted], allow_other: bool
) -> tuple[BaseIdentity, list[str]]:
    """The model's identity before any merge, and what to say about the adapters' bases."""
    identity = _identities.get(model)
    if identity is None:
        label = getattr(getattr(model, "config", None), "name_or_path", "")
        identity = identify(model, label or type(model).__name__)
    notes = []
    for adapter, _ in adapters:
        if adapter.base is not None and not allow_other:
            notes += check_base(adapter, identity)
    for note in notes:
        logger.info("%s", note)
    return identity, notes


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without the class of a library's parameter."""
    return tensor.data if isinstance(tensor, nn.Parameter) else tensor


def _held(parameter: Tensor) -> Tensor:
    """What is written to in a merge: torchao's tensors hold others."""
    found: Tensor = getattr(parameter, "qdata", parameter)
    return found


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; ``None`` where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version
