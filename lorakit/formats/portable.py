"""Plain LoRA that every program reads alike: each scale folded into B, alpha = rank everywhere.

Programs differ in how they take a scale: some ignore it, some know one for all modules, some read
rsLoRA's as alpha/r. A file in which every factor is exactly 1 leaves nothing to differ about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Prefix
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, collected

MERGE = "merge it into its base instead: `lorakit merge`"


def fold(adapter: Adapter, *, rank: int | None = None) -> tuple[Adapter, list[str]]:
    """The adapter with every scaling equal to 1, and what was done.

    Folding is exact in B's own dtype where the factor is a power of two or the products happen to
    fit. Elsewhere B becomes float32: the product of a bfloat16 or float16 value and a factor is
    then off by half a unit in the last place of float32 at most, so no value is rounded to the
    16 bits that it was stored in. A follows, since some programs demand one dtype of both.

    Args:
        rank: pad A and B with zeros to this rank at each site, which changes nothing of B·A.

    Raises:
        FormatError: a site is no plain LoRA, or its rank is larger than ``rank``. All are listed.
    """
    problems = not_plain(adapter)
    if rank is not None:
        problems += [
            f"{path}: rank {site.rank} is larger than {rank}"
            for path, site in adapter.low_rank.items()
            if site.rank > rank
        ]
    if problems:
        raise FormatError(
            collected("This adapter is more than plain LoRA", problems) + f"\nOr {MERGE}."
        )
    sites, notes = fold_sites(adapter.low_rank, rank=rank)
    return adapter.with_(sites=sites, spec=plain_spec(adapter.spec, sites)), notes


def one_rank(adapter: Adapter) -> int | None:
    """The rank to which all sites can be padded: their largest; ``None`` where there is none."""
    return max((site.rank for site in adapter.low_rank.values()), default=None)


def fold_sites(
    sites: Mapping[str, LowRank], *, rank: int | None = None
) -> tuple[dict[str, LowRank], list[str]]:
    """Each site with a scaling of 1, padded to ``rank`` if one is given, and what was done."""
    folded, widened, padded = {}, 0, 0
    for path, site in sites.items():
        one = fold_site(site)
        widened += one.B.dtype != site.B.dtype
        if rank is not None and site.rank < rank:
            one = pad_site(one, rank)
            padded += 1
        folded[path] = _in_one_dtype(one)
    scaled = sum(site.scaling != 1.0 for site in sites.values())
    notes = [f"the scale of {scaled} sites is folded into B, so that every factor is 1"]
    if widened:
        notes.append(
            f"A and B of {widened} sites became float32, because their factor times B does not "
            "fit the 16 bits that it was stored in"
        )
    if padded:
        notes.append(f"{padded} sites are padded with zeros to rank {rank}")
    return folded, notes if scaled else notes[1:]


def plain_sites(
    adapter: Adapter, kinds: Collection[str] = ("linear",)
) -> tuple[dict[str, LowRank], dict[str, str]]:
    """The low-rank sites without a bias or a magnitude, and what is left out: path → why."""
    kept: dict[str, LowRank] = {}
    lost: dict[str, str] = {}
    for path, site in adapter.sites.items():
        if isinstance(site, Prefix):
            lost[path] = "a prefix, keys and values in front of the text; this format has none"
        elif not isinstance(site, LowRank):
            lost[path] = "trained whole; this format holds low-rank changes alone"
        elif site.magnitude is not None:
            lost[path] = "DoRA, which rescales the whole weight; this format has no place for it"
        elif site.kind not in kinds:
            lost[path] = f"adapts {_KINDS[site.kind]}, which this format has no place for"
        else:
            if site.bias is not None:
                lost[f"{path}.bias"] = "a bias of B; this format has no place for it"
            kept[path] = replace(site, bias=None)
    return kept, lost


_KINDS = {
    "linear": "a linear layer",
    "conv": "a convolution",
    "embedding": "an embedding",
    "experts": "fused experts",
    "router": "a router",
}


def not_plain(adapter: Adapter, *, dora: bool = False) -> list[str]:
    """What B·A alone cannot say.

    Args:
        dora: a magnitude is no problem.
    """
    problems = []
    for path, site in adapter.sites.items():
        if isinstance(site, Prefix):
            problems.append(f"{path}: is a prefix, keys and values in front of the text")
        elif not isinstance(site, LowRank):
            problems.append(f"{path}: was trained whole, and is no low-rank change")
        elif site.magnitude is not None and not dora:
            problems.append(f"{path}: is DoRA, which rescales the whole weight")
        elif site.bias is not None:
            problems.append(f"{path}: has a bias of B")
    return problems


def fold_site(site: LowRank, scaling: float = 1.0) -> LowRank:
    """The same change at another scaling; in B's dtype where that is exact, else in float32."""
    if site.scaling == scaling:
        return site
    exact = site.B.double() * (site.scaling / scaling)
    B = exact.to(site.B.dtype)
    if not torch.equal(B.double(), exact) and B.dtype.itemsize < 4:
        B = exact.float()
        return replace(site, A=site.A.to(_at_least_float32(site.A.dtype)), B=B, scaling=scaling)
    return replace(site, B=B, scaling=scaling)


def pad_site(site: LowRank, rank: int) -> LowRank:
    """The same change at a larger rank: rows of zeros in A, columns of zeros in B.

    A grouped convolution's rank is shared out among its groups, so each group is padded.
    """
    if rank == site.rank:
        return site
    groups = site.rank // site.B.shape[1] if site.kind == "conv" else 1
    if rank % groups:
        raise FormatError(f"rank {rank} does not divide among {groups} groups")
    A = torch.cat([_zeros_below(part, rank // groups) for part in site.A.chunk(groups)])
    B = site.B.new_zeros(site.B.shape[0], rank // groups, *site.B.shape[2:])
    B[:, : site.B.shape[1]] = site.B
    return replace(site, A=A, B=B)


def _zeros_below(part: Tensor, rows: int) -> Tensor:
    padded = part.new_zeros(rows, *part.shape[1:])
    padded[: part.shape[0]] = part
    return padded


def _in_one_dtype(site: LowRank) -> LowRank:
    """A and B in the wider dtype of the two, which some programs demand."""
    dtype = torch.promote_types(site.A.dtype, site.B.dtype)
    if site.A.dtype == site.B.dtype:
        return site
    return replace(site, A=site.A.to(dtype), B=site.B.to(dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def plain_spec(spec: LoRASpec, sites: Mapping[str, LowRank]) -> LoRASpec:
    """Alpha equal to the rank, under the rule that every reader knows."""
    ranks = [site.rank for site in sites.values()]
    common = max(set(ranks), key=lambda r: (ranks.count(r), -r))
    return replace(
        spec,
        rank=common,
        alpha=float(common),
        rank_pattern={},
        alpha_pattern={},
        scaling="alpha/r",
    )
