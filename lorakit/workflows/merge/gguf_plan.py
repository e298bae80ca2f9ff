"""What a merged GGUF will hold: which adapter site changes which tensor, and each tensor's type.

Everything is checked here, before anything is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.bases.gguf_base import BaseTensor, GgufBase
from lorakit.bases.gguf_write import WRITABLE, fits
from lorakit.core.adapter import Adapter
from lorakit.core.gguf_names import gguf_name, norm_offset, to_gguf_rows
from lorakit.core.merging import Recipe, Term
from lorakit.core.sites import NOT_MERGED, LowRank, Prefix, Site
from lorakit.errors import BaseError, FormatError, collected

#: coarse types; the embedding and the head are kept in 8 bits beside them, as llama-quantize keeps
#: them finer than the rest: every token passes through both
_COARSE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_OUTER = ("token_embd.weight", "output.weight")

Weighted = tuple[Adapter, float]


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter does to one tensor, as the adapter has it: in transformers' order."""

    weight: float
    low_rank: LowRank | None = None
    added: Tensor | None = None
    """Or: what is added to a bias, [d_out]."""
    value: Tensor | None = None
    """Or: what stands in its place."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it fits."""
        if self.low_rank is None:
            tensor = self.added if self.added is not None else self.value
            assert tensor is not None
            return tuple(tensor.shape)
        out, into = self.low_rank.B.shape[0], self.low_rank.A.shape[1]
        return (into, out) if self.low_rank.kind == "embedding" else (out, into)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: from where, changed how, as what."""

    base: BaseTensor
    name: str
    kind: str
    recipe: Recipe | None

    @property
    def is_copy(self) -> bool:
        return self.recipe is None and self.kind == self.base.kind and self.base.copy is not None


@dataclass(frozen=True)
class Plan:
    """What will be written."""

    tensors: tuple[PlannedTensor, ...]
    changes: Mapping[str, Sequence[Change]]
    """Name of a tensor → what changes it."""
    notes: tuple[str, ...] = ()

    def names(self) -> dict[str, str]:
        """Name of a tensor → name of the tensor of the base that it was made of."""
        return {one.name: one.base.name for one in self.tensors}


def make_plan(base: GgufBase, adapters: Sequence[Weighted], kind: str | None) -> Plan:
    """Where each site goes, checked before anything is written.

    Args:
        kind: GGUF's type for matrices, or ``None`` to keep each tensor's.

    Raises:
        FormatError: a site has no place in the file, or does not fit. All are listed.
        BaseError: a type that cannot be written; the way out is said.
    """
    changes, problems = _changes_by_tensor(adapters)
    stored = dict(base.tensors)
    notes = []
    if base.is_tied and any(name in changes for name in _OUTER) and "token_embd.weight" in stored:
        stored["output.weight"] = stored["token_embd.weight"]
        notes.append(
            "the head was the embedding once more; the adapter changes one of them, so the file "
            "holds both"
        )
    recipes = {}
    for name, found in changes.items():
        if name not in stored:
            problems.append(f"{name}: the base has no such tensor to change")
            continue
        misfits = _misfits(name, stored[name], found)
        problems += misfits
        if not misfits:
            recipes[name] = _recipe(base, name, found)
    if problems:
        raise FormatError(
            collected(f"The adapter has no place in a GGUF of {base.name!r}", problems)
            + "\nGive the base that it was trained on, or merge into a folder "
            "(lorakit merge --out DIR) and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    tensors, more = _with_kinds(base, stored, recipes, kind)
    return Plan(tuple(tensors), changes, (*notes, *more))


def _changes_by_tensor(
    adapters: Sequence[Weighted],
) -> tuple[dict[str, list[Change]], list[str]]:
    """Name of a tensor → what changes it; and what has no name."""
    found: dict[str, list[Change]] = {}
    problems = []
    for adapter, weight in adapters:
        problems += [f"{path}: {NOT_MERGED}" for path in list(adapter.prefixes)[:1]]
        for path, site in adapter.sites.items():
            if isinstance(site, Prefix):
                continue
            for parameter, change in _changes(path, site, weight):
                module, _, leaf = parameter.rpartition(".")
                name = gguf_name(module)
                if name is None or leaf not in ("weight", "bias"):
                    problems.append(f"{parameter}: llama.cpp has no name for it")
                else:
                    found.setdefault(f"{name}.{leaf}", []).append(change)
    return found, problems


def _changes(path: str, site: Site, weight: float) -> Iterator[tuple[str, Change]]:
    """Path of a parameter → what changes it."""
    if isinstance(site, LowRank):
        yield f"{path}.weight", Change(weight, low_rank=site)
        if site.bias is not None:
            added = (site.scaling * site.bias.detach().double()).float()
            yield f"{path}.bias", Change(weight, added=added)
        return
    for key, value in site.tensors().items():
        yield (f"{path}.{key}" if key else path), Change(weight, value=value.detach())


def _misfits(name: str, tensor: BaseTensor, changes: Sequence[Change]) -> list[str]:
    problems = []
    alone = len(changes) == 1 and changes[0].weight == 1.0
    for change in changes:
        site = change.low_rank
        if site is not None and site.kind == "conv":
            problems.append(f"{name}: a convolution, which language models here do not have")
        elif change.shape != tensor.shape:
            problems.append(
                f"{name}: the adapter's shape is {change.shape}, the base's {tensor.shape}"
            )
        if site is not None and site.magnitude is not None:
            if site.kind != "linear":
                problems.append(f"{name}: DoRA of an embedding needs all its rows at once")
            if not alone:
                problems.append(f"{name}: DoRA is merged alone and with weight 1")
        elif change.value is not None and not alone:
            problems.append(f"{name}: it was trained whole, and is merged alone and with weight 1")
    return problems


def _recipe(base: GgufBase, name: str, changes: Sequence[Change]) -> Recipe:
    """The changes in llama.cpp's order of rows; a vector counts as one row."""
    heads = base.heads(name)
    terms: list[Term] = []
    value = magnitude = None
    for change in changes:
        site = change.low_rank
        if site is not None:
            A, B = site.A.detach().float(), site.B.detach().float()
            left, right = (A.T, B.T) if site.kind == "embedding" else (B, A)
            terms.append(Term(to_gguf_rows(left, heads), right, change.weight * site.scaling))
            if site.magnitude is not None:
                magnitude = to_gguf_rows(site.magnitude.detach().float(), heads)
        elif change.added is not None:
            row = to_gguf_rows(change.added, heads)[None]
            terms.append(Term(torch.ones(1, 1), row, change.weight))
        else:
            assert change.value is not None
            value = to_gguf_rows(change.value.float(), heads) + norm_offset(base.architecture, name)
    return Recipe(tuple(terms), value, magnitude)


def _with_kinds(
    base: GgufBase,
    stored: Mapping[str, BaseTensor],
    recipes: Mapping[str, Recipe],
    kind: str | None,
) -> tuple[list[PlannedTensor], list[str]]:
    found, unwritable, narrow, outer = [], [], [], []
    for name, tensor in stored.items():
        wanted = tensor.kind
        if kind is not None and _is_quantizable(name, tensor):
            wanted = kind
            if kind in _COARSE and name in _OUTER:
                wanted = "Q8_0"
                outer.append(name)
            if not fits(tensor.shape, wanted):
                wanted = "F16"
                narrow.append(name)
        if wanted not in WRITABLE and (name in recipes or wanted != tensor.kind):
            unwritable.append(f"{name}: {wanted}")
        found.append(PlannedTensor(tensor, name, wanted, recipes.get(name)))
    if unwritable:
        raise BaseError(
            collected(
                f"The adapter changes tensors of {base.name!r} of types that cannot be written "
                "here",
                unwritable,
                limit=6,
            )
            + "\nGive --quantize f16 (or q8_0, …), and llama.cpp's program for the rest: "
            "llama-quantize merged-f16.gguf merged.gguf Q4_K_M. Best is a base that was not "
            "quantised before."
        )
    notes = []
    if narrow:
        notes.append(f"rows do not fit blocks of 32, so these are F16: {', '.join(narrow[:4])}")
    if outer:
        notes.append(f"{' and '.join(outer)} in Q8_0: finer than the rest, as every token uses it")
    return found, notes


def _is_quantizable(name: str, tensor: BaseTensor) -> bool:
    """Matrices that are multiplied with; routers of experts stay exact, as in llama-quantize."""
    return (
        len(tensor.shape) > 1
        and name.endswith(".weight")
        and not name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    )
