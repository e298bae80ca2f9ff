"""An adapter from two checkpoints: the best of a rank for each weight that differs.

Nothing but the two tensors of one weight is in memory at a time. Which weights may be adapted, and
as what, is given; ``workflows.extract`` reads it from the model's structure.

Legend: ``m``, ``n`` a stored weight as a matrix, kernels flattened; r rank, G groups.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lorakit.algebra.best_rank import (
    DENSE,
    Difference,
    Spectrum,
    decompose,
    factors_of,
    residual,
)
from lorakit.core.checkpoint import Checkpoint
from lorakit.core.safetensors_io import Entry
from lorakit.core.sites import Kind, LowRank, Replace, Site
from lorakit.errors import FormatError, InputError, collected

logger = logging.getLogger(__name__)

Remainder = Literal["report", "keep", "refuse"]
#: called after each tensor: how many of how many are done, and its name
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Place:
    """A module whose weight may become a low-rank site."""

    path: str
    kind: Kind
    transposed: bool = False
    """Whether a linear stores [d_in, d_out], as GPT-2's Conv1D does."""
    groups: int = 1


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, under every name that it has; tied weights have several."""

    names: Mapping[str, tuple[str, ...]]
    """Path of the parameter in the model → names in a checkpoint that mean it, its own first."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Path of the parameter → the module that may be adapted; without, it is never adapted."""


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and what became of it."""

    before: str
    """Name in the base's checkpoint."""
    after: str
    parameters: tuple[str, ...]
    """Paths in the model that hold this tensor."""
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Choice:
    """How large the sites become: one of the two.

    Raises:
        InputError: none is given, both are, or a value is impossible.
    """

    rank: int | Literal["full"] | None = None
    """Rank of every site; a weight that has less gets its own full rank."""
    energy: float | None = None
    """Share of each weight's squared change to keep, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise InputError("give either a rank or an energy, the share of each change to keep")
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if self.rank is not None and self.rank != "full" and not whole:
            raise InputError(
                f"rank is {self.rank!r}; expected a whole number of at least 1, or 'full'"
            )
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise InputError(f"energy is {self.energy!r}; expected a share above 0 and at most 1")


@dataclass(frozen=True)
class SiteError:
    """How well one site stands for the change of its weight."""

    rank: int
    norm: float
    """‖ΔW‖, Frobenius."""
    error: float
    """‖ΔW - B A‖ / ‖ΔW‖ of the factors as they are stored."""
    best: float
    """The smallest such error that any matrix of this rank has."""


@dataclass(frozen=True)
class Left:
    """A tensor that changed and has no low-rank site."""

    shape: tuple[int, ...]
    norm: float | None
    """‖change‖, Frobenius; ``None`` of numbers that are not floats."""
    kept: bool
    """Whether a ``Replace`` site holds it."""
    tied_to: str | None = None
    """The parameter that holds the same tensor and is listed too."""


@dataclass(frozen=True)
class Extracted:
    """The sites, and what they do not hold."""

    sites: Mapping[str, Site]
    errors: Mapping[str, SiteError]
    """Of each low-rank site, by its path."""
    remainder: Mapping[str, Left]
    """By parameter path."""
    unchanged: int
    """Tensors that are equal in both."""
    change: float
    """‖tuned - base‖ over all float tensors, a tied one once."""
    lacking: float
    """‖what the adapter lacks of it‖."""
    lacking_best: float
    """The same, had each site the smallest error of its rank."""

    @property
    def error(self) -> float:
        """Share of the whole change that the adapter lacks, as norms."""
        return self.lacking / self.change if self.change else 0.0

    @property
    def best(self) -> float:
        """The smallest such share at these ranks."""
        return self.lacking_best / self.change if self.change else 0.0


# --- plan --------------------------------------------------------------------------------------


def pair_tensors(base: Checkpoint, tuned: Checkpoint, weights: Sequence[Weight]) -> list[Pair]:
    """Which tensor of the tuned checkpoint belongs to which of the base.

    A tied weight may be stored under any of its names, and under two in one of the checkpoints.
    What no weight names is paired by its own name.

    Raises:
        FormatError: a tensor is in one of the two alone, shapes differ, or a weight is stored
            as something else than floats. All are listed.
    """
    before, after = base.entries, tuned.entries
    problems: list[str] = []
    grouped: dict[tuple[str, str], list[tuple[str, Place | None]]] = {}
    claimed: set[str] = set()
    for weight in weights:
        claimed.update(name for names in weight.names.values() for name in names)
        for path, own in weight.names.items():
            first, second = (
                next((name for name in own if name in entries), None) for entries in (before, after)
            )
            if first is not None and second is not None:
                place = weight.places.get(path)
                grouped.setdefault((first, second), []).append((path, place))
            elif first is not None or second is not None:
                problems.append(_one_sided(path, before, after, first, second))
    for name in sorted((before.keys() | after.keys()) - claimed):
        if name in before and name in after:
            grouped[(name, name)] = [(name, None)]
        else:
            found = name if name in before else None
            problems.append(_one_sided(name, before, after, found, name))
    for (first, second), members in grouped.items():
        adapted = any(place is not None for _, place in members)
        problems += _misfit(members[0][0], before[first], after[second], adapted=adapted)
    if problems:
        raise FormatError(
            collected(f"{tuned.path} was not made of {base.path}", sorted(set(problems)))
            + "\nGive the base that it was fine-tuned from. Where the vocabulary was resized, "
            "resize the base's too (resize_token_embeddings, save_pretrained), then extract."
        )
    return [
        Pair(first, second, tuple(p for p, _ in m), tuple(q for _, q in m if q is not None))
        for (first, second), m in grouped.items()
    ]


def _one_sided(
    path: str,
    before: Mapping[str, Entry],
    after: Mapping[str, Entry],
    first: str | None,
    second: str | None,
) -> str:
    if first is not None:
        return f"{path} {before[first].shape}: in the base, missing in the tuned checkpoint"
    assert second is not None
    return f"{path} {after[second].shape}: in the tuned checkpoint, not in the base"


def _misfit(path: str, before: Entry, after: Entry, *, adapted: bool) -> Iterator[str]:
    if before.shape != after.shape:
        rows = before.shape[1:] == after.shape[1:] and len(before.shape) > 1
        resized = "; its number of rows was changed, as when a vocabulary grows" if rows else ""
        yield f"{path}: {before.shape} in the base, {after.shape} tuned{resized}"
    for where, entry in (("base", before), ("tuned checkpoint", after)):
        if adapted and not entry.dtype.is_floating_point:
            yield (
                f"{path}: stored as {entry.dtype} in the {where}, so it is quantised; give the "
                "checkpoint in float32, bfloat16 or float16"
            )


# --- apply -------------------------------------------------------------------------------------


def extract_sites(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[Pair],
    choice: Choice,
    *,
    dtype: torch.dtype = torch.float32,
    remainder: Remainder = "report",
    device: str | torch.device = "cpu",
    dense: int = DENSE,
    progress: Progress | None = None,
) -> Extracted:
    """Decompose each pair's difference, and collect what has no low-rank site.

    The singular values are shared evenly: A and B both take their roots. The scaling is 1.

    Args:
        dtype: of the factors; differences and decompositions are float64.
        remainder: what becomes of changed tensors that are not adapted: ``"report"`` lists them,
            ``"keep"`` stores their new values whole, ``"refuse"`` raises.
        device: where the decompositions are computed.
        dense: up to this many numbers a difference is decomposed whole; see ``best_rank``.

    Raises:
        FormatError: values that are NaN or infinite, by name; or the two checkpoints are equal.
        InputError: with ``"refuse"``, the tensors that remain; with ``"keep"``, those that no
            site can hold.
    """
    if remainder not in ("report", "keep", "refuse"):
        raise InputError(f"remainder is {remainder!r}; expected 'report', 'keep' or 'refuse'")
    sites: dict[str, Site] = {}
    errors: dict[str, SiteError] = {}
    left: dict[str, Left] = {}
    sizes: list[tuple[float, float, float]] = []
    unchanged, broken = 0, []
    for number, pair in enumerate(pairs, 1):
        before, after = base.read(pair.before).to(device), tuned.read(pair.after).to(device)
        if _equal(before, after):
            unchanged += 1
        elif not math.isfinite(size := _size(before, after)):
            broken.append(pair.parameters[0])
        else:
            found, own_errors = _adapted(before, after, pair, size, choice, dtype, dense)
            sites |= found
            errors |= own_errors
            alone = _without_site(pair, found, before, size, kept=remainder == "keep")
            left |= alone
            if before.is_floating_point():
                sizes.append(_lacking(math.sqrt(size), list(own_errors.values()), alone))
        if progress is not None:
            progress(number, len(pairs), pair.parameters[0])
    if broken:
        raise FormatError(
            collected("These tensors hold NaN or infinite values in one of the two", broken)
        )
    if not errors and not left:
        raise FormatError(
            f"{tuned.path} and {base.path} hold the same {unchanged} tensors; there is nothing "
            "to extract. Give the fine-tuned checkpoint as the tuned one."
        )
    _check_left(left, remainder)
    if remainder == "keep":
        sites |= _whole(pairs, left, sites, tuned)
    if not sites:
        raise InputError(
            collected("No weight that may be adapted changed; only these did", _listed(left))
            + "\nKeep them whole (remainder='keep', --remainder keep), or give other targets."
        )
    change, lacking, best = (math.hypot(*column) for column in zip(*sizes, strict=True))
    return Extracted(sites, errors, left, unchanged, change, lacking, best)


def _without_site(
    pair: Pair, sites: Mapping[str, Site], before: Tensor, size: float, *, kept: bool
) -> dict[str, Left]:
    """The parameters of a changed tensor that no low-rank site adapts."""
    adapted = {f"{path}.weight" for path in sites}
    norm = math.sqrt(size) if before.is_floating_point() else None
    paths = [path for path in pair.parameters if path not in adapted]
    shape = tuple(before.shape)
    return {p: Left(shape, norm, kept, None if p == paths[0] else paths[0]) for p in paths}


def _lacking(
    norm: float, errors: Sequence[SiteError], left: Mapping[str, Left]
) -> tuple[float, float, float]:
    """‖change‖ of one tensor, what is lacking of it, and the least that must be."""
    if any(not one.kept for one in left.values()):
        return norm, norm, norm
    worst = max(errors, key=lambda one: one.error, default=None)
    return norm, norm * (worst.error if worst else 0.0), norm * (worst.best if worst else 0.0)


def _equal(before: Tensor, after: Tensor) -> bool:
    if before.dtype == after.dtype:
        return torch.equal(before, after)
    return before.shape == after.shape and bool((before.double() == after.double()).all())


def _size(before: Tensor, after: Tensor) -> float:
    """‖after - before‖²."""
    return _matrix(before, after).squared_norm()


def _matrix(before: Tensor, after: Tensor) -> Difference:
    rows = before.shape[0] if before.dim() > 1 else 1
    return Difference(before.reshape(rows, -1), after.reshape(rows, -1))


def _adapted(
    before: Tensor,
    after: Tensor,
    pair: Pair,
    size: float,
    choice: Choice,
    dtype: torch.dtype,
    dense: int,
) -> tuple[dict[str, Site], dict[str, SiteError]]:
    """The sites of all places of a weight; those of tied weights share one decomposition."""
    sites: dict[str, Site] = {}
    errors: dict[str, SiteError] = {}
    by_groups: dict[int, list[Place]] = {}
    for place in pair.places:
        by_groups.setdefault(place.groups, []).append(place)
    for groups, places in by_groups.items():
        if isinstance(choice.rank, int) and choice.rank < groups:
            logger.info(
                "%s: has %d groups and needs a rank of at least that; it is left out",
                places[0].path,
                groups,
            )
            continue
        parts = [
            _matrix(b, a) for b, a in zip(before.chunk(groups), after.chunk(groups), strict=True)
        ]
        spectra = [decompose(part, dense=dense) for part in parts]
        rank = _rank(spectra, choice, groups)
        factors = [
            _stored_factors(part, spectrum, rank, dtype)
            for part, spectrum in zip(parts, spectra, strict=True)
        ]
        lacking = sum(residual(p, *f) for p, f in zip(parts, factors, strict=True))
        tail = sum(spectrum.tail(rank) ** 2 for spectrum in spectra)
        error = SiteError(
            rank * groups, math.sqrt(size), math.sqrt(lacking / size), math.sqrt(tail / size)
        )
        for place in places:
            sites[place.path] = _site(place, factors, tuple(before.shape))
            errors[place.path] = error
    return sites, errors


def _rank(spectra: Sequence[Spectrum], choice: Choice, groups: int) -> int:
    """Rank of each group: what is asked, as far as the differences have it."""
    highest = max(spectrum.rank for spectrum in spectra)
    if choice.energy is not None:
        summed = torch.stack([spectrum.squares for spectrum in spectra]).sum(0)
        return Spectrum(summed, spectra[0].vectors, highest).rank_for(choice.energy)
    wanted = highest if choice.rank in (None, "full") else int(choice.rank) // groups
    return min(highest, wanted)


def _stored_factors(
    part: Difference, spectrum: Spectrum, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(left [m, r], right [n, r])`` in ``dtype``; zeros where a group has a smaller rank."""
    left, right = factors_of(part, spectrum, min(rank, spectrum.rank))
    missing = rank - left.shape[1]
    left, right = (torch.nn.functional.pad(t, (0, missing)) for t in (left, right))
    return left.to("cpu", dtype), right.to("cpu", dtype)


def _site(place: Place, factors: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Site:
    """The factors in the layout of their kind; one pair for each group."""
    left, right = factors[0]
    if place.kind == "embedding" or place.transposed:  # the stored weight is (B A)ᵀ
        return LowRank(left.T.contiguous(), right.contiguous(), 1.0, place.kind)
    if place.kind in ("linear", "router"):
        return LowRank(right.T.contiguous(), left.contiguous(), 1.0, place.kind)
    ones = [1] * (len(shape) - 2)
    rank, groups = left.shape[1], place.groups
    A = left.new_zeros(rank * groups, shape[1] * groups, *shape[2:])
    # by group A sees its own channels alone, as the weight does
    for group, (_, own) in enumerate(factors):
        channels = slice(group * shape[1], (group + 1) * shape[1])
        A[group * rank : (group + 1) * rank, channels] = own.T.reshape(rank, *shape[1:])
    B = torch.cat([own for own, _ in factors]).reshape(-1, rank, *ones)
    return LowRank(A, B, 1.0, "conv")


# --- the remainder -----------------------------------------------------------------------------


def _listed(left: Mapping[str, Left]) -> list[str]:
    def size(one: Left) -> str:
        return "not floats" if one.norm is None else f"changed by {one.norm:.4g}"

    return [f"{path} {one.shape}: {size(one)}" for path, one in left.items()]


def _check_left(left: Mapping[str, Left], remainder: Remainder) -> None:
    if remainder == "refuse" and left:
        raise InputError(
            collected("These tensors changed and have no low-rank site", _listed(left))
            + "\nKeep them whole (remainder='keep', --remainder keep), or go on without them "
            "(remainder='report')."
        )
    numbers = {path: one for path, one in left.items() if one.norm is None}
    if remainder == "keep" and numbers:
        raise InputError(
            collected("An adapter holds floats alone, so these cannot be kept", _listed(numbers))
            + "\nGo on without them (remainder='report', --remainder report)."
        )


def _whole(
    pairs: Sequence[Pair], left: Mapping[str, Left], sites: Mapping[str, Site], tuned: Checkpoint
) -> dict[str, Site]:
    """New values of what remains: modules whole, and biases of adapted modules alone."""
    names = {path: pair.after for pair in pairs for path in pair.parameters}
    modules: dict[str, list[str]] = {}
    for path in names:
        module, _, own = path.rpartition(".")
        if own in ("weight", "bias") and module:
            modules.setdefault(module, []).append(path)
    found: dict[str, Site] = {}
    for path in left:
        module, _, own = path.rpartition(".")
        if module in modules and own in ("weight", "bias") and module not in sites:
            if module not in found:
                found[module] = Replace(
                    {p.rpartition(".")[2]: tuned.read(names[p]) for p in modules[module]}
                )
        else:
            found[path] = Replace({"": tuned.read(names[path])})
    return found
