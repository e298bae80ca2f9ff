"""The weighted sum of whole adapters, site by site.

A site that only some adapters have is the sum over those: elsewhere their change is zero. A module
that was trained whole has a value instead of a change, and Σ wᵢ(vᵢ − W) + W needs no base where the
weights of those who have it sum to 1: it is Σ wᵢvᵢ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorakit.algebra.checks import Weighted
from lorakit.algebra.stack import Part, cast, exactly, promoted, stack
from lorakit.algebra.svd import Loss, cut_to, distance, norm
from lorakit.core.sites import LowRank, Replace, Site


def paths_of(given: Sequence[Weighted]) -> list[str]:
    """Every adapted path, in the order of the adapters."""
    return list(dict.fromkeys(path for adapter, _ in given for path in adapter.sites))


def parts_at(given: Sequence[Weighted], path: str) -> list[Part]:
    """The low-rank sites at a path, with their adapters' weights."""
    found = [(adapter.sites.get(path), weight) for adapter, weight in given]
    return [(site, weight) for site, weight in found if isinstance(site, LowRank)]


def linear_sites(
    given: Sequence[Weighted], *, rank: int | None, cut: bool, dtype: torch.dtype | None
) -> Iterator[tuple[str, Site, Loss | None]]:
    """Path, site, and what a rank or a dtype cost; ``checks.check_sum`` has passed.

    Args:
        rank: with ``cut``, of each site; ``None`` is the largest that an adapter has there.
        cut: whether the exact sum is cut to a rank at all.
        dtype: of all tensors; ``None`` keeps what is exact and widens what is not, or, after a
            cut, is the narrowest that holds those of all adapters.
    """
    for path in paths_of(given):
        parts = parts_at(given, path)
        if not parts:
            yield path, averaged(given, path, dtype), None
            continue
        exact = stack(parts)
        site = exact
        if cut:
            site = cut_to(exact, rank or max(part.rank for part, _ in parts))
        narrow = dtype
        if narrow is None and site is not exact:
            narrow = promoted([t.dtype for part, _ in parts for t in (part.A, part.B)])
        if narrow is not None:
            site = cast(site, narrow)
        lost = None if site is exact else Loss(distance(exact, site), norm(exact))
        yield path, site, lost


def averaged(given: Sequence[Weighted], path: str, dtype: torch.dtype | None) -> Replace:
    """Σ weight·value of a module trained whole, with weights that sum to 1."""
    own = [(a.sites[path], weight) for a, weight in given if path in a.sites]
    values = [site.tensors() for site, _ in own]
    if len(own) == 1:
        found = values[0]
    else:
        found = {
            name: exactly(
                torch.stack(
                    [
                        tensors[name].detach().double() * weight
                        for tensors, (_, weight) in zip(values, own, strict=True)
                    ]
                ).sum(0),
                promoted([tensors[name].dtype for tensors in values]),
            )
            for name in values[0]
        }
    return Replace({n: t if dtype is None else t.to(dtype) for n, t in found.items()})
