"""How alike two adapters are, site by site and in total, from their factors.

The subspace similarity is that of Hu et al., 2021 (arXiv 2106.09685, section 7.2 and appendix G)::

    φ(A, B, i, j) = ‖(Uᵢ of A)ᵀ (Uⱼ of B)‖²_F / min(i, j)    in [0, 1]

with the first i and j singular vectors of the two: 1 where the smaller subspace lies in the larger,
max(i, j)/d on average between random subspaces of d dimensions. The paper takes the vectors of the
factor A; those of ΔW = scaling·B·A itself do not depend on how ΔW is split into factors, and span
the same space at full rank. Here they are ΔW's: right (what the site reads) and left (what it
writes). ``of="factors"`` gives the paper's own, and B's beside it.

Legend: d_in, d_out of one site; r₁, r₂ ranks of its change in the two adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.identity import compare_identities
from lorakit.core.linalg import factors
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.errors import BaseError, FormatError, InputError, collected

Of = Literal["delta", "factors"]


@dataclass(frozen=True, eq=False)
class Directions:
    """The singular values and vectors of one site's change, as far as it has any."""

    right: Tensor
    """[d_in, r], float64, orthonormal: what the site reads."""
    values: Tensor
    """Singular values of scaling·B·A, float64 [r], largest first."""
    left: Tensor
    """[d_out, r], orthonormal: what the site writes."""


@dataclass(frozen=True, eq=False)
class SitePair:
    """One site in both adapters."""

    path: str
    norms: tuple[float, float]
    """‖ΔW‖, Frobenius."""
    distance: float
    """‖ΔW₁ - ΔW₂‖."""
    cosine: float | None
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); ``None`` where one is zero."""
    spectra: tuple[Tensor, Tensor]
    """Singular values, float64, largest first."""
    right: Tensor
    """φ of the right singular vectors at [i - 1, j - 1], float64 [r₁, r₂]; empty where one is 0."""
    left: Tensor
    """φ of the left singular vectors, [r₁, r₂]."""
    widths: tuple[int, int]
    """d_in and d_out: what chance is counted by."""

    def at(self, i: int, j: int) -> tuple[float | None, float | None]:
        """φ right and left of the first i and j directions, cut to what the two have."""
        i, j = min(i, self.right.shape[0]), min(j, self.right.shape[1])
        if not i or not j:
            return None, None
        return float(self.right[i - 1, j - 1]), float(self.left[i - 1, j - 1])

    @property
    def whole(self) -> tuple[float | None, float | None]:
        """φ right and left of all directions that both have."""
        rank = min(self.right.shape) if self.right.numel() else 0
        return self.at(rank, rank)

    @property
    def chance(self) -> tuple[float, float]:
        """What ``whole`` is on average between random subspaces: max(i, j)/d."""
        rank = min(self.right.shape) if self.right.numel() else 0
        return rank / self.widths[0], rank / self.widths[1]


@dataclass(frozen=True, eq=False)
class WholePair:
    """A module or parameter that both adapters trained whole."""

    path: str
    distance: float
    """‖values₁ - values₂‖ / ‖values₁‖; its change is not known without the base."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two adapters beside each other."""

    sites: tuple[SitePair, ...]
    whole: tuple[WholePair, ...]
    only: tuple[Mapping[str, float | None], Mapping[str, float | None]]
    """Path → ‖ΔW‖ of what one of them has alone; ``None`` where it was trained whole."""
    notes: tuple[str, ...] = field(default=())
    """What was not compared, or makes the numbers mean less."""

    @property
    def norms(self) -> tuple[float, float]:
        """‖ΔW‖ over all low-rank sites of each, with those that the other has not."""
        first, second = (
            math.hypot(*(s.norms[k] for s in self.sites), *(n or 0.0 for n in alone.values()))
            for k, alone in enumerate(self.only)
        )
        return first, second

    @property
    def distance(self) -> float:
        """‖ΔW₁ - ΔW₂‖ over all low-rank sites; a site that one has not counts as zero there."""
        alone = [n or 0.0 for one in self.only for n in one.values()]
        return math.hypot(*(s.distance for s in self.sites), *alone)

    @property
    def cosine(self) -> float | None:
        """Of all low-rank changes as one vector; what one has not is zero there."""
        return _ratio(self._inner, self.norms)

    @property
    def common_cosine(self) -> float | None:
        """The same over the common sites alone."""
        first, second = (math.hypot(*(s.norms[k] for s in self.sites)) for k in (0, 1))
        return _ratio(self._inner, (first, second))

    @property
    def _inner(self) -> float:
        return math.fsum((s.cosine or 0.0) * s.norms[0] * s.norms[1] for s in self.sites)


def compare(
    first: Adapter, second: Adapter, *, of: Of = "delta", allow_other_base: bool = False
) -> Comparison:
    """Compare two adapters; nothing of the size of a weight is made.

    Args:
        of: take singular vectors of the change (``"delta"``) or of the factors, as the paper
            does: the right ones of A and the left ones of B.
        allow_other_base: compare what belongs to different bases.

    Raises:
        FormatError: sites of one path that have different shapes, all listed; or no common site.
        BaseError: they were trained on different bases.
        InputError: ``of`` is neither of the two.
    """
    if of not in ("delta", "factors"):
        raise InputError(f"of is {of!r}; expected 'delta' or 'factors'")
    notes = _base_notes(first, second, allow_other_base)
    first, second = _experts_apart(first), _experts_apart(second)
    common = [path for path in first.sites if path in second.sites]
    problems = [text for path in common for text in _misfit(path, first, second)]
    if problems:
        raise FormatError(collected("These adapters are not for the same model", problems))
    if not common:
        raise FormatError(
            "The adapters have no module in common: the first has "
            f"{_some(first.sites)}, the second {_some(second.sites)}. Give two that adapt the "
            "same modules of one base."
        )
    pairs = []
    whole = []
    for path in common:
        one, other = first.sites[path], second.sites[path]
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            pairs.append(_pair(path, one, other, of))
        elif isinstance(one, Replace) and isinstance(other, Replace):
            whole.append(WholePair(path, _whole_distance(one, other)))
    only = tuple(
        {p: _norm_of(s) for p, s in a.sites.items() if p not in b.sites}
        for a, b in ((first, second), (second, first))
    )
    notes += _notes(first, second)
    return Comparison(tuple(pairs), tuple(whole), (only[0], only[1]), tuple(notes))


def _experts_apart(adapter: Adapter) -> Adapter:
    """Each expert of fused ones as a site of its own, called ``path[number]``."""
    if all(site.kind != "experts" for site in adapter.low_rank.values()):
        return adapter
    sites: dict[str, Site] = {}
    for path, site in adapter.sites.items():
        if isinstance(site, LowRank) and site.kind == "experts":
            sites |= {f"{path}[{e}]": own for e, own in enumerate(site.by_expert())}
        else:
            sites[path] = site
    return adapter.with_(sites=sites)


# --- one site ----------------------------------------------------------------------------------


def directions(site: LowRank, *, of: Of = "delta") -> Directions:
    """Singular values of the change, and singular vectors of it or of its factors.

    Directions whose singular value is rounding are left out.
    """
    A, B = factors(site)
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T.contiguous())
    u, values, vh = torch.linalg.svd(r_b @ r_a.T * site.scaling, full_matrices=False)
    values, rank = _above_rounding(values, max(A.shape[1], B.shape[0]))
    if of == "delta" or not rank:
        return Directions(q_a @ vh.T[:, :rank], values, q_b @ u[:, :rank])
    return Directions(_own(A.T), values, _own(B))


def _own(factor: Tensor) -> Tensor:
    """Left singular vectors of a factor [d, r]."""
    U, values, _ = torch.linalg.svd(factor, full_matrices=False)
    own: Tensor = U[:, : _above_rounding(values, len(factor))[1]]
    return own


def _above_rounding(values: Tensor, width: int) -> tuple[Tensor, int]:
    smallest = width * torch.finfo(values.dtype).eps * float(values[0])
    rank = int((values > smallest).sum())
    return values[:rank], rank


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """φ for every i and j at once.

    Args:
        first, second: orthonormal columns [d, r₁] and [d, r₂], in order.

    Returns:
        [r₁, r₂], at [i - 1, j - 1] φ of the first i and the first j columns.
    """
    overlap = (first.T @ second).square().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, dtype=overlap.dtype).unsqueeze(1)
    j = torch.arange(1, overlap.shape[1] + 1, dtype=overlap.dtype).unsqueeze(0)
    found: Tensor = overlap / torch.minimum(i, j)
    return found


def inner(first: LowRank, second: LowRank) -> float:
    """⟨ΔW₁, ΔW₂⟩ = s₁ s₂ Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), in float64."""
    (A1, B1), (A2, B2) = factors(first), factors(second)
    return float(((B1.T @ B2) * (A1 @ A2.T)).sum()) * first.scaling * second.scaling


def _pair(path: str, one: LowRank, other: LowRank, of: Of) -> SitePair:
    first, second = directions(one, of=of), directions(other, of=of)
    norms = float(first.values.norm()), float(second.values.norm())
    return SitePair(
        path,
        norms,
        _distance(one, other),
        _ratio(inner(one, other), norms),
        (first.values, second.values),
        similarity(first.right, second.right),
        similarity(first.left, second.left),
        (first.right.shape[0], first.left.shape[0]),
    )


def _distance(one: LowRank, other: LowRank) -> float:
    """‖ΔW₁ - ΔW₂‖, of the stacked factors: a difference of norms would lose half the digits."""
    (A1, B1), (A2, B2) = factors(one), factors(other)
    B = torch.cat([B1 * one.scaling, -B2 * other.scaling], dim=1)
    A = torch.cat([A1, A2])
    r_b = torch.linalg.qr(B, mode="r").R
    r_a = torch.linalg.qr(A.T.contiguous(), mode="r").R
    return float((r_b @ r_a.T).norm())


def _ratio(product: float, norms: tuple[float, float]) -> float | None:
    size = norms[0] * norms[1]
    return max(-1.0, min(1.0, product / size)) if size else None


def _norm_of(site: object) -> float | None:
    return float(directions(site).values.norm()) if isinstance(site, LowRank) else None


def _whole_distance(one: Replace, other: Replace) -> float:
    first, second = one.tensors(), other.tensors()
    apart = math.hypot(*(float((t.double() - second[n].double()).norm()) for n, t in first.items()))
    size = math.hypot(*(float(t.double().norm()) for t in first.values()))
    return apart / size if size else (0.0 if not apart else math.inf)


# --- averages over sites -----------------------------------------------------------------------


def average(grids: Iterator[Tensor] | list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of φ grids of different sizes, and how many had each cell.

    Returns:
        Both [largest r₁, largest r₂]; the mean is NaN where none had the cell.
    """
    known = [grid for grid in grids if grid.numel()]
    if not known:
        return torch.zeros(0, 0), torch.zeros(0, 0)
    shape = max(g.shape[0] for g in known), max(g.shape[1] for g in known)
    total = torch.zeros(shape, dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.float64)
    for grid in known:
        total[: grid.shape[0], : grid.shape[1]] += grid
        count[: grid.shape[0], : grid.shape[1]] += 1
    return total / count, count


# --- what fits, what is said -------------------------------------------------------------------


def _misfit(path: str, first: Adapter, second: Adapter) -> Iterator[str]:
    one, other = first.sites[path], second.sites[path]
    if type(one) is not type(other):
        return
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        shapes = [(s.kind, tuple(s.B.shape[:1]), tuple(s.A.shape[1:])) for s in (one, other)]
        if shapes[0] != shapes[1]:
            yield (
                f"{path}: {shapes[0][0]} {shapes[0][2]} → {shapes[0][1]} in the first, "
                f"{shapes[1][0]} {shapes[1][2]} → {shapes[1][1]} in the second"
            )
        return
    shapes_by_name = [{n: tuple(t.shape) for n, t in s.tensors().items()} for s in (one, other)]
    if shapes_by_name[0] != shapes_by_name[1]:
        yield f"{path}: {shapes_by_name[0]} in the first, {shapes_by_name[1]} in the second"


def _base_notes(first: Adapter, second: Adapter, allow_other: bool) -> list[str]:
    if first.base is None or second.base is None:
        return ["not both say which base they were trained on, so this was not compared"]
    names = first.base.name, second.base.name
    if not first.base.shapes or not second.base.shapes:
        if names[0] == names[1]:
            return []
        return [f"trained on {names[0]!r} and {names[1]!r}, of which the files hold no samples"]
    try:
        compare_identities(first.base, second.base)
    except BaseError as error:
        lines = [line.removeprefix("  - ") for line in str(error).splitlines()[1:-1]]
        title = f"The adapters were trained on different bases, {names[0]!r} and {names[1]!r}"
        if not allow_other:
            advice = "Pass allow_other_base=True (--allow-other-base) to compare them all the same."
            raise BaseError(collected(title, lines) + "\n" + advice) from error
        return [f"{title}, as allowed: " + "; ".join(lines)]
    if names[0] == names[1]:
        return []
    return [f"trained on {names[0]!r} and {names[1]!r}, whose sampled weights agree"]


def _notes(first: Adapter, second: Adapter) -> list[str]:
    notes = []
    for k, adapter in enumerate((first, second), 1):
        dora = sum(s.magnitude is not None for s in adapter.low_rank.values())
        if dora:
            notes.append(
                f"adapter {k} has {dora} DoRA sites; their low-rank part is compared, not what "
                "the magnitude does to the base's weight"
            )
        biases = sum(s.bias is not None for s in adapter.low_rank.values())
        if biases:
            notes.append(f"adapter {k} has {biases} biases of B, which are not compared")
        if adapter.prefixes:
            notes.append(
                f"adapter {k} has a prefix of {adapter.num_virtual_tokens} virtual tokens, which "
                "is not compared"
            )
    mixed = [
        p
        for p, s in first.sites.items()
        if type(s) is not type(second.sites.get(p, s)) and p not in first.prefixes
    ]
    if mixed:
        notes.append(
            f"{len(mixed)} modules are low-rank in one and trained whole in the other, and not "
            f"compared: {_some(mixed)}"
        )
    return notes


def _some(paths: Iterator[str] | Mapping[str, object] | list[str]) -> str:
    known = list(paths)
    return ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
