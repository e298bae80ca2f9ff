"""``compress``: the same change with less rank, and by how much it differs.

Each site keeps its largest singular values, which is the best that its rank can do in Frobenius
norm (Eckart & Young, 1936). How much rank a site gets is given, follows from the share of its
energy (the squares of the singular values) that is to be kept, or from a number of parameters for
the whole adapter; see ``budget``. Everything is computed from the factors, in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.algebra.budget import allocate
from lorakit.algebra.checks import DORA_WAY_OUT
from lorakit.algebra.settings import fingerprint, spec_of, targeting, without_results
from lorakit.algebra.svd import (
    Loss,
    Spectrum,
    directions_at,
    distance,
    norm,
    num_directions,
    num_groups,
    spectrum,
    total,
    truncated,
)
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import InputError, SpecError, collected

logger = logging.getLogger(__name__)

#: a rest of this share of the energy is the rounding of the decomposition itself
_ROUNDING = 1e-28
#: facts of the history that are true of the larger adapter alone
_OLD = ("metrics", "compressed")


def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
) -> Adapter:
    """A smaller adapter; exactly one of the three says how small.

    Sites keep their dtype, kind and scaling. One that has no more rank than it is given stays as
    it is, to the last bit. ``provenance["compressed"]`` holds rank and relative error of each site
    (‖ΔW − ΔW'‖/‖ΔW‖, of the factors as they are stored) and of the whole.

    Args:
        rank: largest rank of each site. With G groups a rank is a multiple of G, at least G.
        energy: share of each site's ‖ΔW‖² that is kept at least, in (0, 1].
        parameters: most parameters of the whole adapter. They go where they keep the most of the
            sum of all ‖ΔW‖²; a site that gets none is left out; the provenance says
            rank 0 for it.

    Raises:
        SpecError: none or several of them, an impossible value, or too few parameters.
        InputError: DoRA sites, whose change is not ΔW alone. All are named.
    """
    _check(adapter, rank, energy, parameters)
    spectra = {path: spectrum(site) for path, site in adapter.low_rank.items()}
    if parameters is not None:
        smaller = _to_parameters(adapter, spectra, parameters)
        dropped = [path for path in spectra if path not in smaller.sites]
        if dropped:
            listed = ", ".join(dropped[:3]) + (" …" if len(dropped) > 3 else "")
            logger.warning("%d of %d sites get no rank: %s", len(dropped), len(spectra), listed)
        return smaller
    if rank is not None:
        chosen = {path: directions_at(site, rank) for path, site in adapter.low_rank.items()}
        return _built(adapter, spectra, chosen, {"rank": rank})
    assert energy is not None
    chosen = {path: _for_energy(one, energy) for path, one in spectra.items()}
    return _built(adapter, spectra, chosen, {"energy": energy})


def compress_to_each(adapter: Adapter, parameters: Iterable[int]) -> Iterator[Adapter]:
    """``compress(adapter, parameters=…)`` of several sizes, decomposed once.

    Raises:
        SpecError, InputError: as :func:`compress`.
    """
    sizes = list(parameters)
    for size in sizes:
        _check(adapter, None, None, size)
    spectra = {path: spectrum(site) for path, site in adapter.low_rank.items()}
    for size in sizes:
        yield _to_parameters(adapter, spectra, size)


def size_at_rank(adapter: Adapter, rank: int) -> int:
    """Parameters of ``compress(adapter, rank=rank)``."""
    saved = 0
    for site in adapter.low_rank.values():
        saved += _cost(site) * max(0, num_directions(site) - directions_at(site, rank))
    return adapter.num_parameters - saved


def _to_parameters(adapter: Adapter, spectra: Mapping[str, Spectrum], parameters: int) -> Adapter:
    chosen, best = _for_parameters(adapter, spectra, parameters)
    how = {"parameters": parameters, "allocation": "optimal" if best else "greedy"}
    return _built(adapter, spectra, chosen, how)


@dataclass(frozen=True)
class _Cut:
    site: LowRank | None
    loss: Loss


def _cut(site: LowRank, whole: Spectrum, directions: int) -> _Cut:
    size = norm(site)
    if directions == 0:
        return _Cut(None, Loss(size, size))
    if directions >= num_directions(site):
        return _Cut(site, Loss(0.0, size))
    smaller = truncated(site, whole, min(directions, len(whole.S[0])))
    return _Cut(smaller, Loss(distance(site, smaller), size))


def _built(
    adapter: Adapter,
    spectra: Mapping[str, Spectrum],
    chosen: Mapping[str, int],
    how: Mapping[str, Any],
) -> Adapter:
    cuts = {
        path: _cut(site, spectra[path], chosen[path]) for path, site in adapter.low_rank.items()
    }
    sites: dict[str, Site] = {}
    for path, site in adapter.sites.items():
        kept = cuts[path].site if path in cuts else site
        if kept is not None:
            sites[path] = kept
    dropped = len(cuts) - sum(path in sites for path in cuts)
    spec = spec_of(sites, [adapter.spec])
    if dropped:  # a word such as "q_proj" would select them too
        spec = targeting(spec, [p for p, site in sites.items() if isinstance(site, LowRank)])
    smaller = adapter.with_(sites=sites, spec=spec)
    history = without_results(adapter.provenance)
    earlier = {key: adapter.provenance[key] for key in _OLD if key in adapter.provenance}
    size = {"parameters": adapter.num_parameters, "fingerprint": fingerprint(adapter)}
    facts = {
        **how,
        "from": {**size, **earlier},
        "parameters_left": smaller.num_parameters,
        "relative_error": total(cut.loss for cut in cuts.values()).relative,
        "sites": {
            path: {
                "rank": 0 if cut.site is None else cut.site.rank,
                "relative_error": cut.loss.relative,
            }
            for path, cut in cuts.items()
        },
    }
    return smaller.with_(provenance={**history, "compressed": facts})


# --- how much rank -----------------------------------------------------------------------------


def _for_energy(whole: Spectrum, energy: float) -> int:
    """The least directions, the same number in each group, that keep this share."""
    gains = whole.gains
    allowed = max(1.0 - energy, _ROUNDING) * math.fsum(gains)
    left = 0.0
    for directions in range(len(gains), 1, -1):
        left += gains[directions - 1]  # summed from the small end, so that it is exact
        if left > allowed:
            return directions
    return 1


def _for_parameters(
    adapter: Adapter, spectra: Mapping[str, Spectrum], parameters: int
) -> tuple[dict[str, int], bool]:
    """Directions of each site, and whether no other choice is better.

    Raises:
        SpecError: what cannot be cut is larger than that, or nothing would be left.
    """
    low_rank = adapter.low_rank
    if adapter.num_parameters <= parameters:
        return {path: site.rank for path, site in low_rank.items()}, True
    costs = {path: _cost(site) for path, site in low_rank.items()}
    gains = {
        path: [gain * low_rank[path].scaling ** 2 for gain in one.gains]
        for path, one in spectra.items()
    }
    least = {path: int(site.bias is not None) for path, site in low_rank.items()}
    smallest = smallest_size(adapter)
    if parameters < smallest:
        reason = "its smallest direction" if not any(least.values()) else "what cannot be cut"
        raise SpecError(
            f"parameters is {parameters:,}; with {reason} the adapter has {smallest:,} already, "
            f"and {adapter.num_parameters:,} as it is. Give more"
        )
    rest = {path: own[least[path] :] for path, own in gains.items()}
    budget = parameters - _fixed(adapter)
    found, best = allocate(rest, costs, budget)
    chosen = {path: number + least[path] for path, number in found.items()}
    if not any(chosen.values()) and len(adapter.sites) == len(
        adapter.low_rank
    ):  # every change is zero
        chosen[min(costs, key=costs.__getitem__)] = 1
    return chosen, best


def smallest_size(adapter: Adapter) -> int:
    """The fewest parameters to which this adapter can be compressed."""
    fixed = _fixed(adapter)
    whole = len(adapter.sites) > len(adapter.low_rank) or any(
        s.bias is not None for s in adapter.low_rank.values()
    )
    return fixed if whole else fixed + min(_cost(site) for site in adapter.low_rank.values())


def _fixed(adapter: Adapter) -> int:
    """Parameters that no rank decides about.

    A site with a bias of B is not left out, so one direction of it is among them.
    """
    fixed = adapter.num_parameters
    fixed -= sum(site.num_parameters for site in adapter.low_rank.values())
    for site in adapter.low_rank.values():
        fixed += 0 if site.bias is None else site.bias.numel() + _cost(site)
    return fixed


def _cost(site: LowRank) -> int:
    """Parameters of one direction in each group."""
    return (site.A.numel() + site.B.numel()) // num_directions(site)


def _check(
    adapter: Adapter, rank: int | None, energy: float | None, parameters: int | None
) -> None:
    given = {"rank": rank, "energy": energy, "parameters": parameters}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise SpecError(
            f"{' and '.join(chosen) or 'nothing'} is given; compress needs exactly one of "
            "rank, energy and parameters"
        )
    for name in ("rank", "parameters"):
        value = chosen.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise SpecError(f"energy is {energy!r}; it must lie in (0, 1]")
    problems = [
        f"{path}: its change is magnitude·(W + ΔW)/‖W + ΔW‖, whose error cannot be known without W"
        for path, site in adapter.low_rank.items()
        if site.magnitude is not None
    ]
    problems += [
        f"{path}: its {site.B.shape[0]} outputs cannot be cut into {num_groups(site)} groups"
        for path, site in adapter.low_rank.items()
        if site.B.shape[0] % num_groups(site)
    ]
    if problems:
        advice = f"\n{DORA_WAY_OUT}" if "magnitude" in problems[0] else ""
        raise InputError(collected("These sites cannot be compressed", problems) + advice)
