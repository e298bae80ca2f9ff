"""Merging methods that look at single numbers of a change, for whole adapters.

The papers define them on the change of the weights, so that is where they are applied here: B·A is
multiplied out, one site at a time, sparsified, merged, and cut back to a stated rank by a singular
value decomposition. (On A and B apart, as PEFT's ``ties`` or ``dare_linear`` do it, the product
of merged factors has terms between the adapters that belong to none of them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lorakit.algebra.arithmetic import averaged, parts_at, paths_of
from lorakit.algebra.checks import Weighted
from lorakit.algebra.dare import drop_and_rescale
from lorakit.algebra.prune import keep_largest, threshold
from lorakit.algebra.stack import Part, promoted
from lorakit.algebra.svd import Loss, dense, from_dense
from lorakit.algebra.ties import elect_and_merge
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site

#: method → (how each change is thinned, how the changes are joined)
METHODS: dict[str, tuple[Literal["largest", "random"], Literal["ties", "sum"]]] = {
    "ties": ("largest", "ties"),
    "dare": ("random", "sum"),
    "dare_ties": ("random", "ties"),
    "magnitude": ("largest", "sum"),
}

#: over what the share of kept numbers is counted
Scope = Literal["adapter", "site"]


def merged_sites(
    given: Sequence[Weighted],
    method: str,
    *,
    rank: int | None,
    density: float,
    seed: int,
    scope: Scope,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Site, Loss | None]]:
    """Path, site, and what the rank cost; ``checks.check_sum`` has passed.

    Args:
        rank: of each site; ``None`` is the largest that an adapter has there.
        dtype: of the factors; ``None`` is the narrowest that holds those of all adapters.
    """
    thinning, joining = METHODS[method]
    largest = thinning == "largest"
    limits = [_limit(a, density) if largest and scope == "adapter" else None for a, _ in given]

    def thinned(place: int, change: Tensor, *key: str) -> Tensor:
        if not largest:
            return drop_and_rescale(change, density, seed, place, *key)
        limit = limits[place]
        return keep_largest(
            change, threshold(lambda: [change], density) if limit is None else limit
        )

    def joined(changes: Sequence[Tensor]) -> Tensor:
        return elect_and_merge(changes) if joining == "ties" else sum(changes[1:], changes[0])

    def merged(path: str, name: str, of: Callable[[LowRank], Tensor | None]) -> Tensor | None:
        changes = []
        for place, (adapter, weight) in enumerate(given):
            site = adapter.sites.get(path)
            change = of(site) if isinstance(site, LowRank) else None
            if change is not None:
                changes.append(thinned(place, change, path, name) * weight)
        return joined(changes) if changes else None

    for path in paths_of(given):
        parts = parts_at(given, path)
        if not parts:
            yield path, averaged(given, path, dtype), None
            continue
        change, bias = merged(path, "weight", dense), merged(path, "bias", _bias)
        assert change is not None
        site = _site(change, bias, parts, rank, dtype)
        left = torch.linalg.vector_norm(change - dense(site))
        yield path, site, Loss(float(left), float(torch.linalg.vector_norm(change)))


def _site(
    change: Tensor,
    bias: Tensor | None,
    parts: Sequence[Part],
    rank: int | None,
    dtype: torch.dtype | None,
) -> LowRank:
    sites = [site for site, _ in parts]
    dtype = dtype or promoted([t.dtype for site in sites for t in (site.A, site.B)])
    found = from_dense(change, sites[0], rank or max(site.rank for site in sites), dtype)
    return replace(found, bias=None if bias is None else bias.to(dtype))


def _bias(site: LowRank) -> Tensor | None:
    """What the site adds to the module's bias, float64 [m]."""
    return None if site.bias is None else site.bias.detach().double() * site.scaling


def _limit(adapter: Adapter, density: float) -> float:
    """From which size on the numbers of this adapter's change are kept."""

    def parts() -> Iterator[Tensor]:
        for site in adapter.low_rank.values():
            yield dense(site)
            bias = _bias(site)
            if bias is not None:
                yield bias

    return threshold(parts, density) if adapter.low_rank else 0.0
