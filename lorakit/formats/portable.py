"""Plain LoRA that every program reads alike: each scale folded into B, alpha = rank everywhere.

Programs differ in how they take a scale: some ignore it, some know one for all modules, some read
rsLoRA's as alpha/r. A file in which every factor is exactly 1 leaves nothing to differ about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
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
    sites: dict[str, Site] = {}
    widened, padded = [], []
    for path, site in adapter.low_rank.items():
        folded = fold_site(site)
        if folded.B.dtype != site.B.dtype:
            widened.append(path)
        if rank is not None and site.rank < rank:
            folded = pad_site(folded, rank)
            padded.append(path)
        sites[path] = folded
    notes = [f"the scale of {len(sites)} sites is folded into B; every factor is 1"]
    if widened:
        notes.append(
            f"A and B of {len(widened)} sites became float32, because their factor times B does "
            "not fit the stored 16 bits exactly"
        )
    if padded:
        notes.append(f"{len(padded)} sites are padded with zeros to rank {rank}")
    return adapter.with_(sites=sites, spec=_spec(adapter.spec, sites)), notes


def not_plain(adapter: Adapter) -> list[str]:
    """What B·A alone cannot say."""
    problems = []
    for path, site in adapter.sites.items():
        if not isinstance(site, LowRank):
            problems.append(f"{path}: was trained whole, and is no low-rank change")
        elif site.magnitude is not None:
            problems.append(f"{path}: is DoRA, which rescales the whole weight")
        elif site.bias is not None:
            problems.append(f"{path}: has a bias of B")
    return problems


def fold_site(site: LowRank) -> LowRank:
    """``scaling·B`` in the place of B; exact in B's dtype, or in float32 where that rounds."""
    if site.scaling == 1.0:
        return site
    exact = site.B.double() * site.scaling
    B = exact.to(site.B.dtype)
    if not torch.equal(B.double(), exact) and site.B.dtype not in (torch.float32, torch.float64):
        B = exact.float()
    if B.dtype != site.B.dtype:
        return replace(site, A=_widened(site.A, B.dtype), B=B, scaling=1.0)
    return replace(site, B=B, scaling=1.0)


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


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype.itemsize >= dtype.itemsize else tensor.to(dtype)


def _spec(spec: LoRASpec, sites: Mapping[str, Site]) -> LoRASpec:
    """Alpha equal to the rank at every site, under the rule that every reader knows."""
    ranks = [site.rank for site in sites.values() if isinstance(site, LowRank)]
    common = max(set(ranks), key=lambda r: (ranks.count(r), -r))
    return replace(
        spec,
        rank=common,
        alpha=float(common),
        rank_pattern={},
        alpha_pattern={},
        scaling="alpha/r",
    )
