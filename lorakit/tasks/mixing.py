"""Which runs may share a forward of a language model: those of which no row reaches another.

==================== ======================================================================
what would couple    what is done
==================== ======================================================================
the base's dropout   off, as are batch statistics: the base is in evaluation mode
experts' balancing   no such loss is added; only the tokens' own losses are trained on
experts' adapters    nothing is coupled where experts are fused: their adapters know each token's
                     run. Experts that are modules see tokens of all runs without a sign of whose
                     they are; a run that adapts such a one, or trains any whole, goes alone
int8 outliers        LLM.int8's kernel splits off columns by all rows; a run with a linear in
                     that kernel has forwards of its own. Fused layers unpack the weight
DoRA, whole modules  nothing is coupled; their layers are not fused, so that the runs that have
                     them in a layer share forwards with each other alone
lengths              frequencies that depend on a forward's longest row: examples go one by one
==================== ======================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Prefix, Site
from lorakit.infer import PackedModel


def why_not_mixed(packed: PackedModel, adapter: Adapter | None) -> str | None:
    """Why rows of a run may not share a forward with another's; ``None`` if they may.

    Args:
        adapter: what it trains; ``None`` is the base itself.
    """
    if adapter is None:
        return "it trains the base itself"
    expert = lone_expert(adapter)
    if expert is not None:
        return f"{expert} is an expert, which sees the tokens that a router sends it"
    if not has_int8(packed.model):
        return None
    if packed.fused is None or packed.fused.reasons:
        return "its base is int8, whose kernel treats all rows of a forward alike"
    plain = [path for path, site in adapter.sites.items() if not _runs_fused(site)]
    if plain:
        return f"its base is int8, and {plain[0]} needs that kernel, which mixes rows"
    return None


def lone_expert(adapter: Adapter) -> str | None:
    """A site that sees tokens without a sign of whose they are; fused experts know it."""
    for path, site in adapter.sites.items():
        fused = isinstance(site, LowRank) and site.kind == "experts"
        if "experts" in path.split(".") and not fused:
            return path
    return None


def needs_plain_layers(adapter: Adapter | None) -> bool:
    """Whether decoder layers that it adapts cannot run fused.

    A forward's layers run fused for all of its runs or for none, so those that cannot share
    forwards of their own, and slow nobody else down.
    """
    return adapter is not None and any(
        "layers" in path.split(".") and not _runs_fused(site)
        for path, site in adapter.sites.items()
    )


def _runs_fused(site: Site) -> bool:
    """Whether a fused layer takes it: plain products, and keys and values in front of a row's own,
    which no other row sees."""
    return isinstance(site, Prefix) or (isinstance(site, LowRank) and site.magnitude is None)


def has_int8(model: nn.Module) -> bool:
    """Whether a weight is stored in eight bits by bitsandbytes."""
    return any(
        isinstance(weight, Tensor) and weight.dtype == torch.int8
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
    )
