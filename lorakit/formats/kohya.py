"""kohya's files, as sd-scripts writes them: one safetensors file of Stable Diffusion or Flux.

=================================== ====================================================
``<name>.lora_down.weight``         A ``[r, d_in]``, of a convolution ``[r, c_in, k, k]``
``<name>.lora_up.weight``           B ``[d_out, r]``, of a convolution ``[c_out, r, 1, 1]``
``<name>.alpha``                    one number; scaling = alpha/r, and 1 where it is missing or 0
``<name>.dora_scale``               DoRA's magnitude ``[d_out, 1…]``, in files of other trainers
=================================== ====================================================

``<name>`` is a path with underscores behind ``lora_unet_``, ``lora_te_``, ``lora_te1_`` …; see
``picture_names``. The header holds how it was trained (``ss_…``) and a hash of the tensors
(``sshs_model_hash``). Source: sd-scripts' ``networks/lora.py`` and ``library/train_util.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import write_safetensors
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, collected
from lorakit.formats import fused
from lorakit.formats.carried import adapter_of, header_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.peft.match import exact_alpha
from lorakit.formats.picture_metadata import shown
from lorakit.formats.picture_names import (
    FAMILIES,
    PREFIXES,
    SGM,
    SWAPPED,
    Named,
    family_of,
    read_name,
    write_name,
)

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
FILE = "lora.safetensors"
_TRAINING = ("ss_", "sshs_", "modelspec.")

#: names with dots, under which ComfyUI and Black Forest Labs store the same modules
_DOTTED = re.compile(
    r"(?:diffusion_model\.(.+)|((?:double|single|input|output)_blocks\.\d.+|middle_block\.\d.+))"
    r"\.(lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
_DOTTED_PARTS = {
    "lora_A.weight": DOWN, "lora_B.weight": UP, DOWN: DOWN, UP: UP, ALPHA: ALPHA, DORA: DORA,
}  # fmt: skip

#: modules outside the classes in which sd-scripts builds its own; it skips their keys in a file
_UNSEEN = re.compile(
    r"unet\.(conv_in|conv_out|(time|add)_embedding\.linear_[12])"
    r"|text_encoder_2\.text_projection"
    r"|transformer\.(proj_out|norm_out\.linear)"
)

#: a module's tensors by the rest of their names → its site, or what is wrong with it
SiteOf = Callable[[Mapping[str, Tensor]], LowRank | str]


# --- reading -------------------------------------------------------------------------------------


@dataclass
class Sorted:
    """The tensors of a file, by module."""

    sites: dict[str, Site] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    sgm: bool = False
    """Whether names of Stability's code were used."""


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name up to the first dot → the rest of each name → tensor; dotted names made kohya's."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        name, _, part = flat_key(key).partition(".")
        modules.setdefault(name, {})[part] = tensors[key]
    return modules


def flat_key(key: str) -> str:
    """kohya's key of a dotted one (ComfyUI's, Black Forest Labs'); any other key itself."""
    if (dotted := _DOTTED.fullmatch(key)) is None:
        return key
    name = (dotted[1] or dotted[2]).replace(".", "_")
    return f"lora_unet_{name}.{_DOTTED_PARTS[dotted[3]]}"


def sort_modules(modules: Mapping[str, Mapping[str, Tensor]], site_of: SiteOf) -> Sorted:
    """The sites of all modules that have a known name; of the others, every key is listed."""
    result = Sorted()
    for name, parts in modules.items():
        found = read_name(name)
        if found is None:
            why = (
                "no module of Stable Diffusion, SDXL or Flux is known by this name"
                if name.startswith(PREFIXES)
                else f"is no name of this format; they begin with {', '.join(PREFIXES)}"
            )
            result.lost |= {_key(name, part): why for part in parts}
            continue
        table, named = found
        result.sgm |= table is SGM
        site = site_of(parts)
        if isinstance(site, str):
            result.problems.append(f"{name}: {site}")
            continue
        wrong = site.problems()
        result.problems += [f"{name}: {problem}" for problem in wrong]
        if not wrong:
            _place(name, site, named, result)
    known = {name: parts for name, parts in modules.items() if read_name(name) is not None}
    silent = [name for name, parts in known.items() if ALPHA not in parts]
    if 0 < len(silent) < len(known):
        result.notes.append(
            f"{len(silent)} of {len(known)} modules say no alpha, such as {silent[0]}; their "
            "scaling is 1, as sd-scripts has it"
        )
    return result


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _place(name: str, site: LowRank, named: Named, result: Sorted) -> None:
    """Put a module's site under its path, or its parts under theirs."""
    parts: Sequence[LowRank | None] = [site]
    if len(named.paths) > 1:
        sizes = _read_sizes(named, site)
        try:
            parts = fused.split(site, sizes)
        except ValueError as error:
            result.problems.append(f"{name}: {error}")
            return
        left = [p for p, part in zip(named.paths, parts, strict=True) if part is None]
        if left:
            result.notes.append(f"{name} does not change {', '.join(left)}; left out")
    for path, part in zip(named.paths, parts, strict=True):
        if part is None:
            continue
        if path in result.sites:
            result.problems.append(f"{name}: {path} is there twice, under another name too")
        result.sites[path] = _swapped(part) if path.endswith("." + SWAPPED) else part


def _read_sizes(named: Named, site: LowRank) -> list[int]:
    """Outputs of each part: three of one size, or three of the input's and the rest."""
    outputs, n = site.B.shape[0], len(named.paths)
    if n == 4:
        hidden = site.A.shape[1]
        return [hidden, hidden, hidden, outputs - 3 * hidden]
    return [outputs // n] * n


def _swapped(site: LowRank) -> LowRank:
    """The two halves of the outputs exchanged."""

    def turned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat(tensor.chunk(2)[::-1])

    B = turned(site.B)
    assert B is not None
    return replace(site, B=B, bias=turned(site.bias), magnitude=turned(site.magnitude))


def plain_site(parts: Mapping[str, Tensor]) -> LowRank | str:
    """The site of ``lora_down``, ``lora_up``, ``alpha`` and ``dora_scale``, or what is wrong."""
    missing = [part for part in (DOWN, UP) if part not in parts]
    if missing:
        return f"lacks {' and '.join(missing)}; it has {', '.join(sorted(parts))}"
    extra = sorted(set(parts) - {DOWN, UP, ALPHA, DORA})
    if extra:
        return f"has {', '.join(extra)}, which this format does not know"
    A, B = parts[DOWN], parts[UP]
    if A.ndim < 2 or B.ndim < 2 or 0 in A.shape:
        return f"its lora_down has shape {tuple(A.shape)}, its lora_up {tuple(B.shape)}"
    scaling = scaling_from(parts, A.shape[0])
    if isinstance(scaling, str):
        return scaling
    magnitude = magnitude_from(parts, B.shape[0])
    if isinstance(magnitude, str):
        return magnitude
    return LowRank(A, B, scaling, "linear" if A.ndim == 2 else "conv", magnitude=magnitude)


def scaling_from(parts: Mapping[str, Tensor], rank: int) -> float | str:
    """alpha/r; 1 without an alpha or with one of 0, as sd-scripts has it. Or what is wrong."""
    if ALPHA not in parts:
        return 1.0
    if parts[ALPHA].numel() != 1:
        return f"its alpha has shape {tuple(parts[ALPHA].shape)}; expected one number"
    return (float(parts[ALPHA].item()) or rank) / rank


def magnitude_from(parts: Mapping[str, Tensor], outputs: int) -> Tensor | str | None:
    """DoRA's magnitude by output; or what is wrong."""
    if DORA not in parts:
        return None
    scale = parts[DORA]
    if scale.numel() != outputs or scale.shape[0] != outputs:
        return (
            f"its dora_scale has shape {tuple(scale.shape)}; expected ({outputs}, 1), a length "
            "of each output's weights. By input it has no counterpart; merge it where it was made"
        )
    return scale.reshape(outputs)


def finished(
    source: Source, result: Sorted, tool: str, facts: Mapping[str, Any] | None = None
) -> Reading:
    """The reading of sorted modules.

    Raises:
        FormatError: anything is malformed, or nothing has a known name.
    """
    problems = result.problems
    named = {flat_key(key): key for key in source.shapes}
    lost = {named.get(key, key): why for key, why in sorted(result.lost.items())}
    if not problems and not result.sites:
        problems = [f"{key}: {why}" for key, why in lost.items()] or ["it holds no tensor"]
    if problems:
        raise FormatError(
            collected(f"{source.weights} cannot be used as an adapter", problems)
            + "\nNothing of it was loaded."
        )
    if any(flat_key(key) != key for key in source.shapes):
        result.notes.append("names with dots are taken as kohya's with underscores")
    metadata = {k: v for k, v in source.metadata.items() if k.startswith(_TRAINING)}
    provenance = {tool: {"metadata": metadata, "names": _names_used(result), **(facts or {})}}
    adapter = adapter_of(result.sites, source.metadata, provenance)
    return Reading(adapter, tuple(result.notes), lost)


def _names_used(result: Sorted) -> str:
    shapes = {p: tuple(s.A.shape) for p, s in result.sites.items() if isinstance(s, LowRank)}
    family, _ = family_of(shapes)
    plain = family == "sdxl" and not result.sgm and any(p.startswith("unet.") for p in shapes)
    return "sdxl-diffusers" if plain else family


# --- writing -------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """The tensors to be, and what they leave out."""

    family: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    stored: dict[str, float] = field(default_factory=dict)
    """Path → the scaling that the file gives."""
    notes: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


def _plan(adapter: Adapter, hints: Hints) -> _Plan:
    family, assumed = _family(adapter, hints)
    plan = _Plan(family, notes=[assumed] if assumed else [])
    done: set[str] = set()
    for path, site in sorted(adapter.sites.items()):
        if path in done:
            continue
        if reason := _unwritable(site):
            plan.lost[path] = reason
            continue
        found = write_name(path, plan.family)
        if found is None:
            plan.lost[path] = f"has no name in kohya's files of {plan.family}"
            continue
        name, named = found
        if len(named.paths) == 1:
            assert isinstance(site, LowRank)
            _add(name, [path], site, plan)
            continue
        done |= set(named.paths)
        parts = [_usable(adapter.sites.get(p)) for p in named.paths]
        try:
            joined = fused.join(parts, _write_sizes(named, parts, adapter, plan))
        except ValueError as error:
            plan.lost |= {p: str(error) for p in named.paths if p in adapter.sites}
            continue
        there = {p: x for p, x in zip(named.paths, parts, strict=True) if x is not None}
        if len({part.scaling for part in there.values()}) > 1:
            plan.notes.append(
                f"{', '.join(there)} have several scalings and one name; their ratio goes into B"
            )
        _add(name, list(there), joined, plan)
    _add_alphas(plan)
    unseen = sorted(path for path in plan.stored if _UNSEEN.fullmatch(path))
    if unseen:
        plan.notes.append(
            f"sd-scripts skips {len(unseen)} of the sites without a word, because it looks at no "
            f"module outside the blocks: {', '.join(unseen)}. ComfyUI has names for them; for "
            "sd-scripts, merge the adapter into its base (`lorakit merge`)"
        )
    return plan


def _add_alphas(plan: _Plan) -> None:
    """None at all where every scaling is 1: then diffusers is exact for mixed ranks too.

    Of Flux, diffusers is exact with them, and sd-scripts stops at a module without one.
    """
    ranks = {name: plan.tensors[f"{name}.{DOWN}"].shape[0] for name in plan.alphas}
    folded = all(plan.alphas[name] == rank for name, rank in ranks.items())
    if folded and plan.family != "flux":
        return
    plan.tensors |= {f"{name}.{ALPHA}": _number(alpha) for name, alpha in plan.alphas.items()}
    if plan.family != "flux" and (
        len(set(plan.alphas.values())) > 1 or len(set(ranks.values())) > 1
    ):
        plan.notes.append(
            "ranks or alphas differ between modules: sd-scripts and ComfyUI read them, diffusers "
            "takes another scale in attention. For diffusers, write its own format, or fold the "
            "scale into B"
        )


def _family(adapter: Adapter, hints: Hints) -> tuple[str, str | None]:
    if hints.family is not None:
        if hints.family not in FAMILIES:
            raise FormatError(
                f"family {hints.family!r} is unknown; kohya's names exist for {', '.join(FAMILIES)}"
            )
        return hints.family, None
    told = adapter.provenance.get("kohya")
    if isinstance(told, Mapping) and told.get("names") in FAMILIES:
        return str(told["names"]), None
    if adapter.base is not None and adapter.base.architecture == "SD3Transformer2DModel":
        raise FormatError(
            "the adapter is for Stable Diffusion 3, whose modules have no names in kohya's "
            "format. Write diffusers' (--to diffusers)."
        )
    return family_of({path: tuple(site.A.shape) for path, site in adapter.low_rank.items()})


def _usable(site: Site | None) -> LowRank | None:
    return site if isinstance(site, LowRank) and not _unwritable(site) else None


def _unwritable(site: Site) -> str | None:
    """Why a site has no place in the format."""
    if isinstance(site, Prefix):
        return "is a prefix of keys and values; kohya's files hold low-rank changes only"
    if isinstance(site, Replace):
        return "was trained whole; kohya's files hold low-rank changes only"
    if site.kind == "embedding":
        return "is an embedding, which kohya's files have no name for"
    if site.kind in ("experts", "router"):
        return "belongs to a mixture of experts, which kohya's files have no name for"
    if site.B.shape[1] != site.rank:
        return "is a grouped convolution, whose B sd-scripts cannot hold"
    if site.bias is not None:
        return "has a bias of B, which kohya's files have no place for"
    return None


def _write_sizes(
    named: Named, parts: Sequence[LowRank | None], adapter: Adapter, plan: _Plan
) -> list[int]:
    """Outputs of each part, also of those that are not adapted."""
    known = [part for part in parts if part is not None]
    if len(parts) == 3:
        return [known[0].B.shape[0]] * 3
    hidden = next((p.B.shape[0] for p in parts[:3] if p is not None), known[0].A.shape[1])
    if parts[3] is not None:
        return [hidden] * 3 + [parts[3].B.shape[0]]
    for path, site in sorted(adapter.low_rank.items()):
        if path.endswith(".proj_mlp"):
            return [hidden] * 3 + [site.B.shape[0]]
        if path.startswith("transformer.single_") and path.endswith(".proj_out"):
            return [hidden] * 3 + [site.A.shape[1] - hidden]
    plan.notes.append(f"{named.paths[3]} is not adapted; its size is taken as 4 · {hidden}")
    return [hidden] * 3 + [4 * hidden]


def _add(name: str, paths: Sequence[str], site: LowRank, plan: _Plan) -> None:
    if any(path.endswith("." + SWAPPED) for path in paths):
        site = _swapped(site)
    B, scaling = site.B, site.scaling
    if scaling == 0:  # sd-scripts takes an alpha of 0 for "no scaling"
        B, scaling = torch.zeros_like(B), 1.0
        plan.notes.append(f"{name}: its scaling is 0; written as a B of zeros")
    alpha = exact_alpha(LoRASpec(), site.rank, scaling)
    plan.tensors[f"{name}.{DOWN}"] = site.A
    plan.tensors[f"{name}.{UP}"] = B
    plan.alphas[name] = alpha
    if site.magnitude is not None:
        ones = [1] * (site.A.ndim - 1)
        plan.tensors[f"{name}.{DORA}"] = site.magnitude.reshape(-1, *ones)
    plan.stored |= dict.fromkeys(paths, alpha / site.rank)


def _number(value: float) -> Tensor:
    """A 0-dim tensor, in float32 as sd-scripts has it where that is exact."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)


def _metadata(adapter: Adapter, plan: _Plan) -> dict[str, str]:
    told = adapter.provenance.get("kohya")
    kept = told.get("metadata", {}) if isinstance(told, Mapping) else {}
    metadata = {
        str(k): str(v)
        for k, v in kept.items()
        if str(k).startswith(_TRAINING) and not str(k).startswith("sshs_")
    }
    metadata = shown(adapter, plan.family) | metadata
    module = "networks.lora_flux" if plan.family == "flux" else "networks.lora"
    metadata.setdefault("ss_network_module", module)
    ranks = {t.shape[0] for k, t in plan.tensors.items() if k.endswith(DOWN) and t.ndim == 2}
    alphas = set(plan.alphas.values())
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        # as sd-scripts' resizer says where they differ
        said = f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
        if said == "Dynamic" or not _equal(metadata.get(key), said):
            metadata[key] = said
    metadata["sshs_model_hash"] = _hash(plan.tensors)
    return metadata | header_of(adapter, plan.stored)


def _equal(text: str | None, other: str) -> bool:
    try:
        return text is not None and float(text) == float(other)
    except ValueError:
        return False


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that follows the header, in its order; sd-scripts' ``addnet_hash``."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the format ----------------------------------------------------------------------------------


class Kohya:
    """See the module."""

    name = "kohya"
    title = "kohya (sd-scripts)"
    folder = False

    def recognises(self, source: Source) -> bool:
        """By names such as ``lora_unet_….lora_down.weight``, and no parts of LyCORIS."""
        names = [key for key in map(flat_key, source.shapes) if key.startswith(PREFIXES)]
        parts = {key.partition(".")[2] for key in names}
        own = any(map(is_lycoris_part, parts)) or any(n.startswith("lycoris_") for n in names)
        return DOWN in parts and not own

    def read(self, source: Source, hints: Hints) -> Reading:
        """See :class:`~lorakit.formats.format.Format`."""
        return finished(source, sort_modules(by_module(source.tensors), plain_site), self.name)

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """See :class:`~lorakit.formats.format.Format`."""
        plan = _plan(adapter, hints)
        if not plan.tensors:
            raise FormatError(
                collected(
                    "Nothing of this adapter fits kohya's format",
                    (f"{path}: {why}" for path, why in plan.lost.items()),
                )
                + "\nIts files are for Stable Diffusion, SDXL and Flux; write another format."
            )
        if any(site.magnitude is not None for site in adapter.low_rank.values()):
            plan.notes.append(
                "DoRA's magnitudes are written as dora_scale, which ComfyUI and LyCORIS read; "
                "sd-scripts and diffusers leave them out, and with them the change is another. "
                "Merge it for those"
            )
        if adapter.tokenizer_files:
            plan.lost["tokenizer_files"] = "kohya's format has no place for a tokenizer"
        content = partial(
            write_safetensors, tensors=plan.tensors, metadata=_metadata(adapter, plan)
        )
        return Written({FILE: content}, tuple(plan.notes), plan.lost)


def is_lycoris_part(part: str) -> bool:
    """Whether a tensor of a module is one of LyCORIS' own."""
    return part.startswith(("hada_", "lokr_", "lora_mid.")) or part in ("diff", "diff_b", "b_diff")


FORMAT = Kohya()
