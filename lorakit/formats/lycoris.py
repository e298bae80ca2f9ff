"""LyCORIS' files, read and turned into LoRA: LoCon, LoHa, LoKr and full differences.

The names of modules are kohya's, also behind ``lycoris_``; the tensors of a module tell its kind:

====== ===================================================== ======================================
LoCon  ``lora_up``, ``lora_down``, ``lora_mid``              exact, of the same rank
LoHa   ``hada_w1_a/b``, ``hada_w2_a/b``, ``hada_t1/2``       exact of rank r², or at a given rank
LoKr   ``lokr_w1`` or ``_a/_b``, so ``w2``, ``lokr_t2``      exact of both ranks' product, or so
full   ``diff``, ``diff_b``                                  at a given rank
====== ===================================================== ======================================

An approximation is the best of its rank, and says its error for each site. A LoKr of two full
matrices, and a full difference, have no low rank: a rank must be given. Scaling is alpha/r with the
r of the file (rsLoRA's stored alpha has its √r in it), and 1 for a LoKr of two full matrices.
``dora_scale`` is DoRA's magnitude.

A convolution's kernel is flattened in some of these files; its size then follows from the module's
name, and in a 1×1 projection of the attention from the model: SD1 has convolutions there.

Source: LyCORIS' ``modules/{locon,loha,lokr,full}.py`` and ``functional/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import FormatError
from lorakit.formats import kronecker
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.kohya import (
    ALPHA,
    DORA,
    DOWN,
    UP,
    Sorted,
    by_module,
    finished,
    is_lycoris_part,
    magnitude_from,
    plain_site,
    scaling_from,
    sort_modules,
)
from lorakit.formats.kronecker import Factors
from lorakit.formats.picture_names import FAMILIES, PREFIXES, family_of, read_name

MID = "lora_mid.weight"
#: of the factors of a whole file: 4 GB in float32
MAX_VALUES = 10**9
_BESIDE = {ALPHA, DORA, "scalar", "diff_b"}
_FIRST = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = {f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}

#: a module's last name → the side of its kernel, where the name alone tells
_KERNELS = {"conv1": 3, "conv2": 3, "conv_in": 3, "conv_out": 3, "conv": 3, "conv_shortcut": 1}


class _Wrong(Exception):
    """What is wrong with a module's tensors."""


class _Reader:
    """Turns modules into sites, and remembers the errors of what it approximated."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.errors: list[tuple[int, int, float]] = []
        """Rank before, rank after, relative error; of the module read last, if any."""
        self.values = 0
        """Values of all factors that were multiplied out."""

    def site(self, parts: Mapping[str, Tensor]) -> LowRank | str:
        """The site of a module of any kind, or what is wrong with it."""
        self.errors.clear()
        try:
            site = self._weight(parts)
            scalar = parts.get("scalar")
            if scalar is not None:
                site = replace(site, scaling=site.scaling * _one(scalar, "scalar"))
            return _with_bias(site, parts.get("diff_b"))
        except _Wrong as error:
            return str(error)
        except (RuntimeError, IndexError) as error:  # shapes that do not fit each other
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in parts.items())
            return f"its tensors do not fit together ({str(error).splitlines()[0]}): {shapes}"

    def _weight(self, parts: Mapping[str, Tensor]) -> LowRank:
        kinds = {
            "lora": {DOWN, UP, MID},
            "hada": {*_FIRST, "hada_t1", "hada_t2"},
            "lokr": _LOKR,
            "diff": {"diff"},
        }
        there = [kind for kind, names in kinds.items() if names & set(parts)]
        known = set.union(_BESIDE, *(kinds[kind] for kind in there))
        if extra := sorted(set(parts) - known):
            raise _Wrong(f"has {', '.join(extra)}, which is no low-rank change that is read here")
        if len(there) != 1:
            what = f"parts of {' and '.join(there)}" if there else ", ".join(sorted(parts))
            raise _Wrong(f"has {what}; expected those of one kind")
        return {"lora": _locon, "hada": self._loha, "lokr": self._lokr, "diff": self._full}[
            there[0]
        ](parts)

    def _loha(self, parts: Mapping[str, Tensor]) -> LowRank:
        _need(parts, _FIRST)
        rank = parts["hada_w1_b"].shape[0]
        halves = [
            _half(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
            for i in (1, 2)
        ]
        kernel = _kernel(parts.get("hada_t1"))
        product = halves[0][0].shape[1] * halves[1][0].shape[1]
        self._take(product, halves[0][0].shape[0], halves[0][1].shape[1])
        factors = kronecker.hadamard(*halves)
        if self.rank is not None and self.rank < factors[0].shape[1]:
            before = factors[0].shape[1]
            factors, error = kronecker.truncated(factors, self.rank)
            self.errors.append((before, factors[0].shape[1], error))
        return _site(factors, kernel, parts, _scale(parts, rank))

    def _lokr(self, parts: Mapping[str, Tensor]) -> LowRank:
        first, rank_1 = _lokr_half(parts, "w1")
        second, rank_2 = _lokr_half(parts, "w2")
        full = rank_1 is None and rank_2 is None
        exact = first[0].shape[1] * second[0].shape[1]
        if full and self.rank is None:
            raise _Wrong(
                f"is a LoKr of two full matrices, whose rank is {exact}; give a rank to "
                "approximate it at"
            )
        if self.rank is not None and self.rank < exact:
            self._take(
                self.rank,
                first[0].shape[0] * second[0].shape[0],
                first[1].shape[1] * second[1].shape[1],
            )
            factors, error = kronecker.truncated_kronecker(first, second, self.rank)
            self.errors.append((exact, factors[0].shape[1], error))
        else:
            self._take(
                exact,
                first[0].shape[0] * second[0].shape[0],
                first[1].shape[1] * second[1].shape[1],
            )
            factors = kronecker.kronecker(first, second)
        kernel = _kernel(parts.get("lokr_t2"), parts.get("lokr_w2"), parts.get("lokr_w2_b"))
        r = next((r for r in (rank_1, rank_2) if r is not None), 1)
        return _site(factors, kernel, parts, 1.0 if full else _scale(parts, r))

    def _take(self, rank: int, outputs: int, inputs: int) -> None:
        """Make room for two factors, which can be far larger than what they are products of.

        Raises:
            _Wrong: there is none.
        """
        size = rank * (outputs + inputs)
        self.values += size
        if self.values > MAX_VALUES:
            raise _Wrong(
                f"becomes a LoRA of rank {rank} with {size} values; a whole file may take "
                f"{MAX_VALUES}. Give a lower rank to approximate it at"
            )

    def _full(self, parts: Mapping[str, Tensor]) -> LowRank:
        diff = parts["diff"]
        matrix = diff.double().flatten(1)
        if self.rank is None:
            raise _Wrong(
                f"is a full difference of shape {tuple(diff.shape)}; give a rank to approximate "
                "it at"
            )
        factors, error = kronecker.truncated(kronecker.of_full(matrix), self.rank)
        self.errors.append((min(matrix.shape), factors[0].shape[1], error))
        return _site(factors, tuple(diff.shape[2:]), parts, 1.0)


def _locon(parts: Mapping[str, Tensor]) -> LowRank:
    parts = {name: t for name, t in parts.items() if name not in ("scalar", "diff_b")}
    if MID not in parts:
        site = plain_site(parts)
    else:
        _need(parts, (DOWN, UP))
        mid, down = parts[MID].double(), parts[DOWN].double().flatten(1)
        A = torch.einsum("mn...,nj->mj...", mid, down)
        rest = {name: t for name, t in parts.items() if name != MID}
        site = plain_site({**rest, DOWN: A.to(_dtype(parts[DOWN]))})
    if isinstance(site, str):
        raise _Wrong(site)
    return site


def _half(a: Tensor, b: Tensor, core: Tensor | None) -> Factors:
    """Factors of ``a b``, or of the core between ``a [r, m]`` and ``b [r, n]``, kernel last."""
    a, b = a.double(), b.double()
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T.contiguous(), torch.einsum("ij...,jn->in...", core.double(), b).flatten(1)


def _lokr_half(parts: Mapping[str, Tensor], name: str) -> tuple[Factors, int | None]:
    """Factors of one matrix of the product, and its rank if it was stored as factors."""
    if f"lokr_{name}" in parts:
        return kronecker.of_full(parts[f"lokr_{name}"].double().flatten(1)), None
    _need(parts, (f"lokr_{name}_a", f"lokr_{name}_b"))
    core = parts.get("lokr_t2") if name == "w2" else None
    a, b = parts[f"lokr_{name}_a"], parts[f"lokr_{name}_b"]
    return _half(a, b, core), b.shape[0]


def _kernel(*tensors: Tensor | None) -> tuple[int, ...]:
    """The kernel's size, if a tensor still has it; empty where it is flattened or none."""
    return next((tuple(t.shape[2:]) for t in tensors if t is not None and t.ndim > 2), ())


def _site(
    factors: Factors, kernel: tuple[int, ...], parts: Mapping[str, Tensor], scaling: float
) -> LowRank:
    """A site in float32, which holds products of two half-precision numbers exactly."""
    dtype = _dtype(next(t for name, t in parts.items() if name not in _BESIDE))
    B, A = (factor.to(dtype).contiguous() for factor in factors)
    magnitude = magnitude_from(parts, B.shape[0])
    if isinstance(magnitude, str):
        raise _Wrong(magnitude)
    if kernel:
        ones = [1] * len(kernel)
        A, B = A.reshape(A.shape[0], -1, *kernel), B.reshape(*B.shape, *ones)
    return LowRank(A, B, scaling, "conv" if kernel else "linear", magnitude=magnitude)


def _dtype(stored: Tensor) -> torch.dtype:
    return torch.float64 if stored.dtype == torch.float64 else torch.float32


def _scale(parts: Mapping[str, Tensor], rank: int) -> float:
    scaling = scaling_from(parts, rank)
    if isinstance(scaling, str):
        raise _Wrong(scaling)
    return scaling


def _one(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1:
        raise _Wrong(f"its {name} has shape {tuple(tensor.shape)}; expected one number")
    return float(tensor.item())


def _need(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise _Wrong(f"lacks {', '.join(missing)}; it has {', '.join(sorted(parts))}")


def _with_bias(site: LowRank, bias: Tensor | None) -> LowRank:
    """A site's bias is scaled like B·A, a stored difference is not."""
    if bias is None:
        return site
    if site.scaling == 0:
        raise _Wrong("has a diff_b beside a scaling of 0")
    return replace(site, bias=(bias.double() / site.scaling).to(_dtype(bias)))


# --- a file --------------------------------------------------------------------------------------


def _read(source: Source, hints: Hints) -> Reading:
    if hints.family is not None and hints.family not in FAMILIES:
        raise FormatError(f"family {hints.family!r} is unknown; use {', '.join(FAMILIES)}")
    reader = _Reader(hints.rank)
    errors: dict[str, tuple[int, int, float]] = {}
    modules = by_module(source.tensors)
    result = Sorted()
    for name, parts in modules.items():
        one = sort_modules({name: parts}, reader.site)
        _take(one, result, name)
        if reader.errors and (found := read_name(name)):
            errors |= dict.fromkeys(found[1].paths, reader.errors[0])
    _as_convolutions(result, hints)
    if errors:
        worst = max(error for _, _, error in errors.values())
        result.notes.append(
            f"{len(errors)} sites are approximated; the largest relative error is {worst:.3g}"
        )
        result.notes += [
            f"{path}: rank {before} taken at {after}, relative error {error:.3g}"
            for path, (before, after, error) in errors.items()
        ]
    facts = {"errors": {path: error for path, (_, _, error) in errors.items()}} if errors else {}
    return finished(source, result, "lycoris", facts)


def _take(one: Sorted, result: Sorted, name: str) -> None:
    for path in set(one.sites) & set(result.sites):
        result.problems.append(f"{name}: {path} is there twice, under another name too")
    result.sites |= one.sites
    result.notes += one.notes
    result.lost |= one.lost
    result.problems += one.problems
    result.sgm |= one.sgm


def _as_convolutions(result: Sorted, hints: Hints) -> None:
    """Give flattened kernels of a UNet their shape."""
    flat = {
        path: site
        for path, site in result.sites.items()
        if path.startswith("unet.") and isinstance(site, LowRank) and site.kind == "linear"
    }
    shapes = {p: tuple(s.A.shape) for p, s in result.sites.items() if isinstance(s, LowRank)}
    family, assumed = (hints.family, None) if hints.family else family_of(shapes)
    for path, site in sorted(flat.items()):
        leaf = path.rpartition(".")[2]
        side = _KERNELS.get(leaf)
        if leaf in ("proj_in", "proj_out") and ".transformer_blocks." not in path:
            side = 1 if family == "sd1" else None
            if assumed and f"proj_in and proj_out: {assumed}" not in result.notes:
                result.notes.append(f"proj_in and proj_out: {assumed}")
        if side is None:
            continue
        if site.A.shape[1] % side**2:
            result.problems.append(
                f"{path}: has {site.A.shape[1]} inputs; a {side}×{side} kernel needs a multiple "
                f"of {side**2}"
            )
            continue
        result.sites[path] = _convolution(site, side)


def _convolution(site: LowRank, side: int) -> Site:
    A = site.A.reshape(site.rank, -1, side, side)
    return replace(site, A=A, B=site.B.reshape(*site.B.shape, 1, 1), kind="conv")


# --- the format ----------------------------------------------------------------------------------


class Lycoris:
    """See the module."""

    name = "lycoris"
    title = "LyCORIS (LoCon, LoHa, LoKr)"
    folder = False

    def recognises(self, source: Source) -> bool:
        """By parts such as ``hada_w1_a`` under kohya's names, or the prefix ``lycoris_``."""
        keys = [key for key in source.shapes if key.startswith(PREFIXES)]
        parts = {key.partition(".")[2] for key in keys}
        own = any(map(is_lycoris_part, parts))
        return own or (DOWN in parts and any(key.startswith("lycoris_") for key in keys))

    def read(self, source: Source, hints: Hints) -> Reading:
        """See :class:`~lorakit.formats.format.Format`."""
        return _read(source, hints)

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """Refused: what LyCORIS adds to kohya's format is only read."""
        raise FormatError("LyCORIS' files are only read here. Write kohya's format, which it reads")


FORMAT = Lycoris()
