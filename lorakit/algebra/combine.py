"""``combine``: several adapters become one; ``scale``, ``negate``, ``add`` are short forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from lorakit.algebra.arithmetic import linear_sites
from lorakit.algebra.checks import Weighted, check_sum
from lorakit.algebra.dense_merge import METHODS, Scope, merged_sites
from lorakit.algebra.settings import best_known, fingerprint, spec_of, without_results
from lorakit.algebra.svd import Loss, total
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import SpecError, collected

Method = Literal["linear", "svd", "ties", "dare", "dare_ties", "magnitude"]

#: TIES: the share that its paper keeps; DARE and magnitude pruning name none that fits all
DENSITY = {"ties": 0.2, "dare": 0.5, "dare_ties": 0.5, "magnitude": 0.5}


def combine(
    adapters: Sequence[Weighted],
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    scope: Scope | None = None,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    allow_other_base: bool = False,
) -> Adapter:
    """One adapter out of several with weights.

    ``"linear"`` is the true weighted sum of the changes, Σ weight·scaling·B·A, by stacking ranks;
    ``"svd"`` is that sum cut to a rank. ``"magnitude"``, ``"dare"``, ``"ties"`` and ``"dare_ties"``
    thin each change first (the largest numbers, or random ones), then add, or merge as TIES does;
    see ``prune``, ``dare`` and ``ties``. What was lost is in
    ``provenance["combined"]["sites"]``.

    Args:
        adapters: pairs of an adapter and its weight; weight 0 leaves one out.
        rank: of each site; ``None`` is the sum of the ranks for ``"linear"``, and the largest of
            them for the others. The exact sum is cut to it where one is given.
        density: share of the numbers of a change that are kept, in (0, 1]; ``None`` is 0.2 for
            TIES, as in its paper, else 0.5.
        seed: of DARE; ``None`` is 0.
        scope: count that share over the adapter's whole change (``"adapter"``, as in the paper of
            TIES; ``None``), or for each weight (``"site"``).
        dtype: of the result; ``None`` keeps the adapters' own. For ``"linear"`` a factor whose
            product with its weight does not fit there is stored in float64, so that the sum is
            exact to 2⁻⁵³.
        names: what the adapters are called in errors and in the provenance.
        allow_other_base: add adapters of different bases; shapes must fit.

    Raises:
        SpecError: a setting that is impossible or cannot act with this method.
        BaseError: the adapters belong to different bases.
        InputError: sites that have no sum without the base. All are named.
    """
    names = _names(adapters, names)
    _check_settings(
        adapters, names, method, rank=rank, density=density, seed=seed, scope=scope, dtype=dtype
    )
    acting = [pair for pair in adapters if pair[1] != 0.0]
    called = [name for name, (_, weight) in zip(names, adapters, strict=True) if weight != 0.0]
    check_sum(acting, called, linear=method in ("linear", "svd"), allow_other_base=allow_other_base)
    settings: dict[str, Any] = {"method": method, "rank": rank}
    if method in METHODS:
        chosen: dict[str, Any] = {"density": density or DENSITY[method], "seed": seed or 0}
        chosen["scope"] = scope or "adapter"
        found = merged_sites(acting, method, rank=rank, dtype=dtype, **chosen)
        unused = "seed" if METHODS[method][0] == "largest" else "scope"
        settings |= {key: value for key, value in chosen.items() if key != unused}
    else:
        cut = method == "svd" or rank is not None
        found = linear_sites(acting, rank=rank, cut=cut, dtype=dtype)
    sites: dict[str, Site] = {}
    losses: dict[str, Loss] = {}
    for path, site, loss in found:
        sites[path] = site
        if loss is not None:
            losses[path] = loss
    members = [adapter for adapter, _ in acting]
    return Adapter(
        sites=sites,
        spec=spec_of(sites, [adapter.spec for adapter in members]),
        base=best_known(members),
        provenance=_provenance(acting, called, settings, losses, sites),
        tokenizer_files=next((a.tokenizer_files for a in members if a.tokenizer_files), {}),
        task_type=next((a.task_type for a in members if a.task_type), None),
    )


def scale(adapter: Adapter, weight: float) -> Adapter:
    """The adapter with its change times ``weight``; the factors stay bitwise.

    Raises:
        InputError: it has a DoRA site or a module trained whole, which have no multiple.
    """
    return combine([(adapter, weight)])


def negate(adapter: Adapter) -> Adapter:
    """The adapter that undoes this one; raises as :func:`scale`."""
    return scale(adapter, -1.0)


def add(first: Adapter, second: Adapter, *, allow_other_base: bool = False) -> Adapter:
    """The sum of two; raises as :func:`combine`."""
    return combine([(first, 1.0), (second, 1.0)], allow_other_base=allow_other_base)


# --- settings ----------------------------------------------------------------------------------


def _names(adapters: Sequence[Weighted], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [f"adapter {i + 1}" for i in range(len(adapters))]
    if len(names) != len(adapters):
        raise SpecError(f"{len(names)} names are given for {len(adapters)} adapters")
    return list(names)


def _check_settings(
    adapters: Sequence[Weighted], names: Sequence[str], method: str, **settings: Any
) -> None:
    problems = []
    if method not in get_args(Method):
        problems.append(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    for name, (_, weight) in zip(names, adapters, strict=True):
        if not isinstance(weight, (int, float)) or not abs(weight) <= 1e6:
            problems.append(f"the weight of {name} is {weight!r}; it must be finite, at most 1e6")
    if not any(weight for _, weight in adapters):
        problems.append(
            "every weight is 0; the sum would change nothing" if adapters else "no adapter is given"
        )
    rank, density, dtype = settings["rank"], settings["density"], settings["dtype"]
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"rank is {rank!r}; it must be a whole number of at least 1")
    if density is not None and not 0.0 < density <= 1.0:
        problems.append(f"density is {density!r}; it must lie in (0, 1]")
    if dtype is not None and not dtype.is_floating_point:
        problems.append(f"dtype is {dtype}; it must be a float")
    if settings["scope"] not in (None, *get_args(Scope)):
        problems.append(f"scope is {settings['scope']!r}; it must be 'adapter' or 'site'")
    problems += _idle(method, settings)
    if problems:
        raise SpecError(collected("These adapters cannot be combined so", problems))


def _idle(method: str, settings: Mapping[str, Any]) -> list[str]:
    """Settings that this method does not read."""
    thinning = METHODS.get(method, (None, None))[0]
    readers = {"density": ("largest", "random"), "seed": ("random",), "scope": ("largest",)}
    return [
        f"{name} is {settings[name]!r}, which method {method!r} does not use; leave it out"
        for name, allowed in readers.items()
        if settings[name] is not None and thinning not in allowed
    ]


# --- history -----------------------------------------------------------------------------------


def _provenance(
    given: Sequence[Weighted],
    names: Sequence[str],
    settings: Mapping[str, Any],
    losses: Mapping[str, Loss],
    sites: Mapping[str, Site],
) -> dict[str, Any]:
    """What was combined and how, and what all of the members share."""
    histories = [without_results(adapter.provenance) for adapter, _ in given]
    shared = {
        key: value
        for key, value in histories[0].items()
        if all(key in other and other[key] == value for other in histories)
    }
    shared.pop("combined", None)
    shared.pop("compressed", None)
    members = [
        {
            "name": name,
            "weight": weight,
            "fingerprint": fingerprint(adapter),
            "base": None if adapter.base is None else adapter.base.name,
            "provenance": {k: v for k, v in adapter.provenance.items() if k not in shared},
        }
        for name, (adapter, weight) in zip(names, given, strict=True)
    ]
    combined = {
        **settings,
        "adapters": members,
        "relative_error": total(losses.values()).relative,
        "sites": {
            path: {"rank": _rank(sites[path]), "relative_error": loss.relative}
            for path, loss in losses.items()
        },
    }
    return {**shared, **_transposed(given), "combined": combined}


def _rank(site: Site) -> int | None:
    return site.rank if isinstance(site, LowRank) else None


def _transposed(given: Sequence[Weighted]) -> dict[str, Any]:
    """The one fact of PEFT's config about the base that its reader needs: it must not get lost."""
    told = [adapter.provenance.get("peft") for adapter, _ in given]
    found = [facts for facts in told if isinstance(facts, Mapping) and facts.get("fan_in_fan_out")]
    if not found or all(facts == told[0] for facts in told):
        return {}
    return {"peft": {"fan_in_fan_out": True}}
