"""MLX's adapters, as mlx-lm trains and loads them: ``adapters.safetensors`` and a config.

==================== =====================================================================
``<path>.lora_a``    Aᵀ ``[d_in, r]``; of an embedding ``[V, r]``
``<path>.lora_b``    Bᵀ ``[r, d_out]``; of an embedding ``[r, d]``
``<path>.m``         DoRA's magnitude ``[d_out]``
==================== =====================================================================

``adapter_config.json`` holds ``fine_tune_type``, ``num_layers`` (blocks from the last on; -1 for
all) and ``lora_parameters`` with one rank and one ``scale``, a direct factor on B·A, for every
site. mlx-lm builds its layers from that, then loads the tensors by name; a name that it does not
know is skipped without a word. Source: mlx-lm's ``tuner/utils.py``, ``lora.py`` and ``dora.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import write_safetensors
from lorakit.core.sites import LowRank, Prefix, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, clipped, collected
from lorakit.formats.carried import adapter_of, header_of
from lorakit.formats.folder import CONFIG
from lorakit.formats.format import Content, Hints, Reading, Source, Written
from lorakit.formats.pairs import EMBEDDINGS, by_module, left_behind, missing_parts, refuse
from lorakit.formats.peft.config import is_number
from lorakit.formats.portable import fold_site, pad_site

FILE = "adapters.safetensors"
#: mlx-lm's default, for configs that leave it out
DEFAULT_SCALE = 20.0

_KEY = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|h|blocks|block)\.(\d+)\.(.+)")


class _Mlx:
    name = "mlx"
    title = "MLX adapter"
    folder = True

    def recognises(self, source: Source) -> bool:
        """mlx-lm's config, or its keys."""
        if "fine_tune_type" in source.config or "lora_parameters" in source.config:
            return True
        names = source.shapes if source.storage == "safetensors" else ()
        return bool(names) and all(_KEY.fullmatch(name) for name in names)

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter; its scale is in the config."""
        problems: list[str] = []
        scale = _scale(source.config, hints, problems)
        kind = source.config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            problems.append(f"fine_tune_type is {kind!r}; only lora and dora are adapters")
        parts = by_module(source.tensors, _KEY, problems)
        problems += missing_parts(parts, ("lora_a", "lora_b"))
        for path, own in parts.items():
            if ("m" in own) != (kind == "dora"):
                has = "has" if "m" in own else "lacks"
                problems.append(f"{path}: {has} m, but fine_tune_type is {kind!r}")
        refuse(f"{source.path} cannot be used as an adapter", problems)
        sites: dict[str, Site] = {
            path: _site(path, own, scale, hints) for path, own in parts.items()
        }
        refuse(
            f"{source.path} cannot be used as an adapter",
            [f"{path}: {problem}" for path, site in sites.items() for problem in site.problems()],
        )
        facts = {"mlx": {"base": source.config["model"]}} if source.config.get("model") else {}
        return Reading(adapter_of(sites, source.metadata, facts))

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The folder; what differs among the sites is folded and padded until one rank fits."""
        kept, lost = _fitting(adapter, hints)
        if not kept:
            raise FormatError(
                collected(
                    "Nothing of this adapter fits MLX", (f"{p}: {w}" for p, w in lost.items())
                )
            )
        uniform, scale, notes = _uniform(kept)
        left, losses = left_behind(adapter, header=True)
        rank = next(iter(uniform.values())).rank
        spec = _spec(adapter.spec, rank, scale)
        tensors: dict[str, Tensor] = {}
        for path, site in uniform.items():
            tensors[f"{path}.lora_a"] = site.A.T.contiguous()
            tensors[f"{path}.lora_b"] = site.B.T.contiguous()
            if site.magnitude is not None:
                tensors[f"{path}.m"] = site.magnitude
        dora = any(site.magnitude is not None for site in uniform.values())
        config = {
            "fine_tune_type": "dora" if dora else "lora",
            "lora_parameters": {
                "dropout": float(adapter.spec.dropout),
                "keys": sorted({_in_block(path) for path in uniform}),
                "rank": rank,
                "scale": scale,
            },
            "model": adapter.base.name if adapter.base else None,
            "num_layers": hints.base.get("num_hidden_layers", -1),
        }
        metadata = header_of(adapter.with_(sites=uniform, spec=spec), dict.fromkeys(uniform, scale))
        files: dict[str, Content] = {
            CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
            FILE: partial(write_safetensors, tensors=tensors, metadata=metadata),
        }
        return Written(files, (*notes, *left), {**lost, **losses})


# --- reading -------------------------------------------------------------------------------------


def _scale(config: Mapping[str, Any], hints: Hints, problems: list[str]) -> float | None:
    """The factor of every site; ``None`` where a hint's alpha decides by rank."""
    if not config:
        if hints.alpha is None:
            problems.append(
                f"there is no {CONFIG} beside it, without which its scale is unknown; put it "
                "there, or give --alpha (the scale times the rank)"
            )
        return None
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        problems.append(f"lora_parameters is {parameters!r}; expected an object with the scale")
        return None
    scale = parameters.get("scale", DEFAULT_SCALE)
    if not is_number(scale):
        problems.append(f"scale is {clipped(repr(scale), 80)}; expected a finite number")
        return None
    return float(scale)


def _site(
    path: str,
    own: Mapping[str, Tensor],
    scale: float | None,
    hints: Hints,
) -> LowRank:
    A, B = own["lora_a"].T.contiguous(), own["lora_b"].T.contiguous()
    kind = "embedding" if path.rpartition(".")[2] in EMBEDDINGS else "linear"
    scaling = (hints.alpha or 0.0) / A.shape[0] if scale is None else scale
    return LowRank(A, B, scaling, kind, magnitude=own.get("m"))  # type: ignore[arg-type]


# --- writing -------------------------------------------------------------------------------------


def _fitting(adapter: Adapter, hints: Hints) -> tuple[dict[str, LowRank], dict[str, str]]:
    """The sites that mlx-lm builds a layer for, and the others: path → why not."""
    kept: dict[str, LowRank] = {}
    lost: dict[str, str] = {}
    all_dora = all(site.magnitude is not None for site in adapter.low_rank.values())
    for path, site in adapter.sites.items():
        if isinstance(site, Prefix):
            lost[path] = "a prefix of keys and values; MLX's adapters hold low-rank changes alone"
            continue
        if not isinstance(site, LowRank):
            lost[path] = "trained whole; MLX's adapters hold low-rank changes alone"
            continue
        embedding = path.rpartition(".")[2] in EMBEDDINGS
        if site.kind == "conv":
            lost[path] = "adapts a convolution, for which mlx-lm has no layer"
        elif site.kind in ("experts", "router"):
            lost[path] = "belongs to a mixture of experts, which mlx-lm adapts in another layout"
        elif site.magnitude is not None and not all_dora:
            lost[path] = "DoRA beside plain LoRA; mlx-lm makes all sites one or the other"
        elif (site.kind == "embedding") != embedding:
            lost[path] = f"an {site.kind} site of this name would be read as another kind"
        elif path == "lm_head" and hints.base.get("tie_word_embeddings", False):
            lost[path] = "the head of this base is its embedding, for which MLX has no layer"
        elif site.kind == "embedding" and hints.base.get("tie_word_embeddings", True):
            lost[path] = (
                "an adapted embedding; MLX would apply it to the tied head too, which training "
                "did not (give --base if this base's head is not tied)"
            )
        else:
            if site.bias is not None:
                lost[f"{path}.bias"] = "a bias of B; MLX's adapters have none"
            kept[path] = replace(site, bias=None)
    return kept, lost


def _uniform(sites: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], float, list[str]]:
    """The sites at one scale and one rank, the scale, and what was done."""
    notes = []
    scales = {site.scaling for site in sites.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    changed = [path for path, site in sites.items() if site.scaling != scale]
    if changed:
        notes.append(f"the scale of {len(changed)} sites is folded into B: MLX has one for all")
    folded = {path: fold_site(site, scale) for path, site in sites.items()}
    rank = max(site.rank for site in sites.values())
    padded = sum(site.rank < rank for site in sites.values())
    if padded:
        notes.append(f"{padded} sites are padded with zeros to rank {rank}: MLX has one for all")
    return {path: pad_site(site, rank) for path, site in folded.items()}, scale, notes


def _spec(spec: LoRASpec, rank: int, scale: float) -> LoRASpec:
    alpha = spec.alpha_of(rank, scale)
    return replace(spec, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def _in_block(path: str) -> str:
    """The name under which mlx-lm looks for a module in each block, or the whole path."""
    block = _BLOCK.fullmatch(path)
    return path if block is None else block[2]


FORMAT = _Mlx()
