"""Phi-3's joined projections, which torchtune, litgpt and ONNX Runtime's builder keep apart.

transformers has q, k and v as ``self_attn.qkv_proj`` and gate and up as ``mlp.gate_up_proj``, in
this order of rows. Sources: torchtune's ``models/phi3/_convert_weights.py``, litgpt's
``convert_hf_checkpoint.py`` and onnxruntime-genai's ``models/builders/base.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lorakit.core.sites import LowRank, Site
from lorakit.formats import fused

#: also Phi-3.5's and Phi-4's
MODEL_TYPE = "phi3"
_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_BLOCK = re.compile(r"(model\.layers\.\d+\.)(.+)")


def joined(
    sites: Mapping[str, Site], config: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Site], list[str]]:
    """The sites with those of parts joined as transformers has them, and what was done.

    Args:
        sites: by path.
        config: the base's; of another model type, nothing is changed.
        problems: gets a line for each joined site that cannot be.
    """
    if config.get("model_type") != MODEL_TYPE:
        return dict(sites), []
    found: dict[str, Site] = dict(sites)
    whole = 0
    for path in sites:
        block = _BLOCK.fullmatch(path)
        if block is None:
            continue
        for name, parts in _PARTS.items():
            if block[2] not in parts or path not in found:
                continue
            own = [found.pop(block[1] + part, None) for part in parts]
            kept = [site if isinstance(site, LowRank) else None for site in own]
            sizes = _sizes(name, config)
            try:
                if sizes is None:
                    raise ValueError("the base's config lacks its heads or intermediate_size")
                found[block[1] + name] = fused.join(kept, sizes)
                whole += 1
            except ValueError as error:
                problems.append(f"{block[1]}{name}: {error}")
    notes = [f"{whole} sites are joined of parts, as the base has them"] if whole else []
    return found, notes


def apart(path: str, site: LowRank, config: Mapping[str, Any]) -> dict[str, LowRank] | str:
    """The parts of a joined site, all of them with its A; itself, if it is none; or what lacks.

    Unlike :func:`fused.split`, every part keeps the rank, which a graph is built for.
    """
    block = _BLOCK.fullmatch(path)
    if block is None or block[2] not in _PARTS:
        return {path: site}
    names = _PARTS[block[2]]
    sizes = _sizes(block[2], config)
    if sizes is None and len(names) == 2:
        sizes = [site.B.shape[0] // 2] * 2
    if sizes is None:
        return (
            "joins query, key and value: give the base, of which only the config is read (--base)"
        )
    if sum(sizes) != site.B.shape[0]:
        return (
            f"has {site.B.shape[0]} outputs; the base's config makes {' + '.join(map(str, sizes))}"
        )
    rows = torch.split(site.B, sizes)
    return {
        block[1] + name: replace(site, B=B.contiguous())
        for name, B in zip(names, rows, strict=True)
    }


def _sizes(name: str, config: Mapping[str, Any]) -> list[int] | None:
    """Outputs of each part; ``None`` where the config does not say."""
    if name == "mlp.gate_up_proj":
        width = config.get("intermediate_size")
        return [width] * 2 if type(width) is int and width > 0 else None
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    groups = config.get("num_key_value_heads") or heads
    if not (type(heads) is int and type(groups) is int and type(hidden) is int and heads > 0):
        return None
    head_dim = config.get("head_dim") or hidden // heads
    return [heads * head_dim, groups * head_dim, groups * head_dim]
