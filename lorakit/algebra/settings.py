"""The settings and the facts of an adapter that was made from others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Site
from lorakit.core.spec import LoRASpec


def spec_of(sites: Mapping[str, Site], specs: Sequence[LoRASpec]) -> LoRASpec:
    """Settings for sites that come from adapters with these settings.

    What all agree on stays. Where they differ in what they target, the paths themselves are the
    targets; dropout goes, and the scaling rule is alpha/r. Rank and alpha are the commonest of the
    sites; a file's patterns for the others are made when it is written.
    """
    first = specs[0]
    low_rank = {path: site for path, site in sites.items() if isinstance(site, LowRank)}
    spec = replace(
        first,
        scaling=_agreed([s.scaling for s in specs], "alpha/r"),
        dropout=_agreed([s.dropout for s in specs], 0.0),
        bias=_agreed([s.bias for s in specs], "none"),
        train_modules=tuple(dict.fromkeys(name for s in specs for name in s.train_modules)),
        rank_pattern={},
        alpha_pattern={},
    )
    if len({(s.targets, s.exclude, s.layers) for s in specs}) > 1:
        spec = targeting(spec, low_rank)
    if not low_rank:
        return spec
    rank = _commonest(site.rank for site in low_rank.values())
    scaling = _commonest(site.scaling for site in low_rank.values() if site.rank == rank)
    return replace(spec, rank=rank, alpha=spec.alpha_of(rank, scaling))


def targeting(spec: LoRASpec, paths: Iterable[str]) -> LoRASpec:
    """The spec with these very paths as its targets, if there are any."""
    targets = tuple(sorted(paths))
    return replace(spec, targets=targets, exclude=(), layers=None) if targets else spec


def best_known(adapters: Sequence[Adapter]) -> BaseIdentity | None:
    """The first base with samples of its weights, else the first that is named at all."""
    named = [adapter.base for adapter in adapters if adapter.base is not None]
    return next((base for base in named if base.shapes), named[0] if named else None)


def fingerprint(adapter: Adapter) -> str:
    """A digest of an adapter's numbers: the first 16 hexadecimal digits of a SHA-256."""
    digest = hashlib.sha256()
    for path, site in sorted(adapter.sites.items()):
        digest.update(f"{path}:{getattr(site, 'scaling', '')!r}".encode())
        for name, tensor in sorted(site.tensors().items()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def without_results(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The history less what was measured of the former values, which the new ones are not."""
    return {key: value for key, value in provenance.items() if key != "metrics"}


def _agreed(values: Sequence[Any], otherwise: Any) -> Any:
    return values[0] if all(value == values[0] for value in values) else otherwise


def _commonest(values: Iterable[Any]) -> Any:
    counts: Counter[Hashable] = Counter(values)
    return max(counts, key=lambda value: counts[value])
