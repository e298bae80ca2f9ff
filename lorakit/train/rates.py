"""Which learning rate each tensor of an adapter has, in shares of the run's.

Three settings give factors, and where several name a tensor they are multiplied:

- ``lora_plus_ratio`` (LoRA+, Hayou et al., arXiv 2402.12354): every B learns this many times faster
  than its A. An embedding's B, which is drawn and not zero at the start, has no part in it.
- ``prefix_lr_ratio``: keys and values of a prefix learn this many times faster than the rest.
- ``lr_pattern``: a regular expression that ends a path → the factor there.

Tensors of one factor are one stretch of the flat buffer, so that a fused optimizer goes over each
at once.
"""

from __future__ import annotations

from collections.abc import Callable

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.errors import SpecError, collected
from lorakit.layers.targets import matches_pattern
from lorakit.train.settings import TrainSettings


def rate_factors(adapter: Adapter, settings: TrainSettings) -> Callable[[str], float]:
    """The factor of a tensor by its name on the model, such as ``"<path>.lora_A"``.

    Raises:
        SpecError: a pattern that names nothing of the adapter, or a ratio without any B.
    """
    fast = {
        f"{path}.lora_B"
        for path, site in adapter.sites.items()
        if isinstance(site, LowRank) and site.kind != "embedding"
    }
    problems = [
        f"lr_pattern {pattern!r} matches none of the adapter's sites"
        for pattern in settings.lr_pattern
        if not any(matches_pattern(pattern, path) for path in adapter.sites)
    ]
    if settings.lora_plus_ratio != 1 and not fast:
        problems.append("lora_plus_ratio needs a B of a linear or a convolution; there is none")
    ratio = settings.prefix_lr_ratio
    if ratio is not None and not adapter.prefixes:
        problems.append(f"prefix_lr_ratio is {ratio:g}, but there is no prefix")
    if problems:
        raise SpecError(collected("These learning rates cannot act", problems))
    front = {f"{path}.prefix_{name}" for path in adapter.prefixes for name in ("key", "value")}
    # the longest path that the name begins with: "score.weight" is of the module "score"
    site_of = sorted(adapter.sites, key=len, reverse=True)

    def factor(name: str) -> float:
        path = next(p for p in site_of if name == p or name.startswith(f"{p}."))
        found = next(
            (f for pattern, f in settings.lr_pattern.items() if matches_pattern(pattern, path)), 1.0
        )
        found *= ratio if ratio is not None and name in front else 1.0
        return found * (settings.lora_plus_ratio if name in fast else 1.0)

    return factor
