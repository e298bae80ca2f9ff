"""``Adapter``: the value in which formats, training and serving meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorakit.core.frozen import FrozenDict
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, collected


@dataclass(frozen=True, eq=False)
class Adapter:
    """Module path → site, with the settings and the history that made it.

    Nothing writes into an adapter; operations return a new one.

    Raises:
        FormatError: a site is malformed or holds a value that is not finite. All are listed.
    """

    sites: Mapping[str, Site]
    spec: LoRASpec = field(default_factory=LoRASpec)
    base: BaseIdentity | None = None
    """The base it was trained on; ``None`` if the file did not say."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Data hash, recipe, metrics, versions: plain JSON data."""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """File name → content, where training changed the tokenizer or the chat template."""
    task_type: str | None = None
    """PEFT's task type, such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``."""

    def __post_init__(self) -> None:
        for name in ("sites", "provenance", "tokenizer_files"):
            object.__setattr__(self, name, FrozenDict(dict(getattr(self, name))))
        problems = [
            f"{path}: {problem}" for path, site in self.sites.items() for problem in site.problems()
        ]
        lengths = sorted({site.length for site in self.prefixes.values()})
        if len(lengths) > 1:
            problems.append(
                f"its layers have prefixes of {', '.join(map(str, lengths))} virtual tokens; all "
                "that have one need the same number, for it shifts the positions of the text"
            )
        if not self.sites:
            problems = ["it holds no site"]
        if problems:
            raise FormatError(collected("This is not a usable adapter", problems))

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """The low-rank sites alone."""
        return {p: s for p, s in self.sites.items() if isinstance(s, LowRank)}

    @property
    def replaced(self) -> dict[str, Replace]:
        """The modules and parameters that were trained whole."""
        return {p: s for p, s in self.sites.items() if isinstance(s, Replace)}

    @property
    def prefixes(self) -> dict[str, Prefix]:
        """The trained keys and values in front of the text, by attention module."""
        return {p: s for p, s in self.sites.items() if isinstance(s, Prefix)}

    @property
    def num_virtual_tokens(self) -> int:
        """Of the prefix, which is as long in every layer that has one; 0 without one."""
        return max((site.length for site in self.prefixes.values()), default=0)

    @property
    def num_parameters(self) -> int:
        return sum(site.num_parameters for site in self.sites.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            t.numel() * t.element_size() for s in self.sites.values() for t in s.tensors().values()
        )

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {t.dtype for s in self.sites.values() for t in s.tensors().values()}

    def with_(self, **changes: Any) -> Adapter:
        """A copy with some fields changed."""
        return replace(self, **changes)


def hollow(adapter: Adapter) -> Adapter:
    """An adapter of the same shapes, all zero, that takes no memory."""

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    sites: dict[str, Site] = {}
    for path, site in adapter.sites.items():
        if isinstance(site, Replace):
            sites[path] = Replace({k: zeros(t) for k, t in site.tensors_by_name.items()})
        else:
            tensors: dict[str, Any] = {k: zeros(t) for k, t in site.tensors().items()}
            sites[path] = replace(site, **tensors)
    return adapter.with_(sites=sites)
