"""Keys of PEFT's ``adapter_model.safetensors`` and the sites of an adapter, both ways.

===================================  =======================================================
key, behind ``base_model.model.``    site
===================================  =======================================================
``<path>.lora_A.weight``             ``LowRank`` at ``<path>``; [r, d_in] linear, [r, c, k…] conv
``<path>.lora_B.weight``             [d_out, r] or [c_out, r/groups, 1…]
``<path>.lora_B.bias``               its bias, [d_out] (``lora_bias``)
``<path>.lora_embedding_A``, ``_B``  ``LowRank`` of an embedding, [r, V] and [d, r]
``<path>.lora_magnitude_vector``      DoRA's magnitude, [d_out]; of a convolution [1, c_out, 1…]
``<path>.bias``                      ``Replace`` at ``<path>.bias`` (``bias="all"``)
``<path>.base_layer.bias``           the same, of a module that has a low-rank site too
``<path>.lora_A.weight``             ``LowRank`` at ``<path>.<name>``, where
                                     ``target_parameters`` names that parameter: experts,
                                     [E·r, d_in], expert by expert
``<path>.lora_B.weight``             [d_out, r·E], rank by rank: column k·E + e is expert e's
``<path>.base_layer.lora_A.weight``  the same of the parameter that the module holds before that one
``<path>.<name>``                    ``Replace`` at ``<path>``, if ``modules_to_save`` names it
``<path>.prefix_key``, ``_value``    ``Prefix`` (:mod:`lorakit.formats.peft.prefix`)
``<path>.base_layer.weight``         the base's own embedding, dropped (see :class:`Reading`)
``<embedding>.weight``               ``Replace``: the vocabulary grew, PEFT saves it whole
===================================  =======================================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorakit.core.sites import EXPERT_PARAMETERS, Kind, LowRank, Prefix, Replace, Site
from lorakit.formats.dialects import describe_keys
from lorakit.formats.peft.config import AUTOMATIC_HEADS
from lorakit.formats.peft.match import Selection, parameters_in

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."

#: embeddings and heads that PEFT saves whole when their number of rows differs from the base's
VOCABULARY_MODULES = ("embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_in")

_FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.(weight|bias)|lora_embedding_(A|B))")
_PREFIX = re.compile(r"(.+)\.prefix_(key|value)")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector")
_WRAP = ".base_layer"
_WRAPPED = re.compile(r"((?!\.base_layer).)+(\.base_layer)+\.lora_[AB]\.weight")
_NAMED = re.compile(r".+\.lora_(?:A|B|embedding_A|embedding_B)\.([^.]+)(?:\.(?:weight|bias))?")


@dataclass(frozen=True)
class Reading:
    """What the config and the header say about the keys."""

    saved: tuple[str, ...] = ()
    """``modules_to_save``: ends of module paths, in PEFT's sense not even cut at a dot."""
    biases: bool = False
    """Whether keys that end in ``.bias`` are expected outside of saved modules."""
    replaced: tuple[str, ...] | None = None
    """Paths of all ``Replace`` sites, where lorakit wrote the file and knows."""
    prefixes: bool = False
    """Whether keys of a prefix are expected."""
    keep_base_weights: bool = False
    """Whether the weight that PEFT stores beside an adapted embedding becomes a ``Replace``.

    It equals the base's unless the vocabulary was resized before training, which the file does
    not tell; it is the largest part of such a file."""
    parameters: tuple[str, ...] = ()
    """``target_parameters``: ends of parameters' paths."""
    modules: Selection = Selection(())
    """What the config selects among modules."""

    @cached_property
    def replaced_paths(self) -> frozenset[str]:
        return frozenset(self.replaced or ())


@dataclass
class Found:
    """The sites' tensors, and what was wrong or worth a note."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    """Of the sites that ``target_parameters`` names."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Their path → that of the parameter, which PEFT's patterns see."""
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    prefixes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, Tensor], reading: Reading) -> Found:
    """Assign every tensor to a site, or to a problem."""
    found = Found()
    strangers = [key for key in tensors if not key.startswith(PREFIX)]
    if len(strangers) == len(tensors):
        found.problems.append(
            f"none of its {len(tensors)} keys is PEFT's; these are {describe_keys(strangers)}"
        )
        return found
    twice = 2 * PREFIX
    if reading.replaced is None and all(key.startswith(twice) for key in tensors):
        # a PeftModel inside of another; PEFT itself loads nothing of it, with a warning
        found.notes.append(f"every key begins with {twice!r}; one {PREFIX!r} is left out")
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    found.problems += [f"{key}: does not begin with {PREFIX!r}" for key in sorted(strangers)]
    for key in sorted(set(tensors) - set(strangers)):
        _sort_key(key.removeprefix(PREFIX), tensors[key], reading, found)
    if reading.parameters:
        _name_parameters(found, reading)
    for path, parts in found.whole.items():
        _fold_copies(path, parts, found)
    found.whole = {path: parts for path, parts in found.whole.items() if parts}
    return found


def _sort_key(key: str, tensor: Tensor, reading: Reading, found: Found) -> None:
    match = _FACTOR.fullmatch(key)
    if match is not None and _is_factor(key, reading):
        path, factor, what, embedding = match.groups()
        name = f"E{embedding}" if embedding else (factor if what == "weight" else f"{factor}.bias")
        found.factors.setdefault(path, {})[name] = tensor
        return
    match = _MAGNITUDE.fullmatch(key)
    if match is not None and ".base_layer." not in key:
        found.factors.setdefault(match[1], {})["magnitude"] = tensor
        return
    match = _PREFIX.fullmatch(key) if reading.prefixes else None
    if match is not None:
        found.prefixes.setdefault(match[1], {})[match[2]] = tensor
        return
    owner, inside, tail = key.rpartition(".base_layer.")
    key = f"{owner}.{tail}" if inside else key
    if reading.replaced is not None:
        place = _listed(key, reading.replaced_paths)
    elif inside:
        place = (key, "") if tail == "bias" else None
    else:
        place = _inferred(key, reading)
    if place is not None:
        found.whole.setdefault(place[0], {})[place[1]] = tensor
    elif inside and tail == "weight" and reading.keep_base_weights:
        found.whole[key] = {"": tensor}
    elif inside and tail == "weight":
        found.notes.append(
            f"{owner}: the file holds this module's own weight {list(tensor.shape)} too; it was "
            "left out, since it is the base's. If the vocabulary was resized before training, "
            "load with keep_base_weights=True"
        )
    else:
        found.problems.append(_unknown(key, owner if inside else ""))


def _is_factor(key: str, reading: Reading) -> bool:
    """PEFT wraps a module once for each of its parameters, the next around the last."""
    if ".base_layer." not in key:
        return True
    return bool(reading.parameters) and _WRAPPED.fullmatch(key) is not None


def _name_parameters(found: Found, reading: Reading) -> None:
    """Give the factors of bare parameters their paths; the file has their module's alone."""
    levels: dict[str, list[str]] = {}
    for raw in sorted(found.factors, key=len, reverse=True):  # the innermost first
        module = raw
        while module.endswith(_WRAP):
            module = module.removesuffix(_WRAP)
        levels.setdefault(module, []).append(raw)
    for module, raws in levels.items():
        if raws == [module] and reading.modules.selects(module):
            continue
        choices = parameters_in(module, reading.parameters)
        if raws == [module] and not choices[0]:
            continue
        names = next((n for c in choices if len(n := in_order(c)) == len(raws)), None)
        complete = raws == [module + _WRAP * k for k in reversed(range(len(raws)))]
        if names is None or not complete:
            found.problems.append(
                f"{module}: it has the factors of {len(raws)} of its parameters, and "
                f"target_parameters names {', '.join(sorted(choices[0])) or 'none'} there; which "
                "are whose cannot be told"
            )
        for raw, name in zip(raws, names or raws, strict=True):
            parts = found.factors.pop(raw)
            if names is not None and complete:
                path = module if name == "weight" else f"{module}.{name}"
                found.factors[path] = parts
                found.parameters[path] = f"{module}.{name}"
                found.kinds[path] = "experts" if name != "weight" else _kind_of(module)


def _kind_of(module: str) -> Kind:
    """Of a module whose weight is adapted; one that is called otherwise is fitted to its model."""
    return "router" if module.rpartition(".")[2] in ("gate", "router") else "linear"


def in_order(names: Collection[str]) -> list[str]:
    """Parameters of one module, in the order in which it holds them; empty if that is not known."""
    if len(names) == 1:
        return list(names)
    known = [name for name in EXPERT_PARAMETERS if name in names]
    return known if len(known) == len(names) else []


def _listed(key: str, paths: Collection[str]) -> tuple[str, str] | None:
    """(path, name) of a key under one of the paths, the longest first."""
    path, name = key, ""
    while path:
        if path in paths:
            return path, name
        path, _, last = path.rpartition(".")
        name = f"{last}.{name}" if name else last
    return None


def _inferred(key: str, reading: Reading) -> tuple[str, str] | None:
    path = saved_path(key, reading.saved)
    if path is not None:
        return path, key[len(path) + 1 :]
    if key.endswith(".bias") and reading.biases:
        return key, ""
    path, _, name = key.rpartition(".")
    if path.rpartition(".")[2] in VOCABULARY_MODULES and name in ("weight", "bias"):
        return path, name
    return None


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ends of module paths that PEFT wraps for this config, its own additions included."""
    names = config.get("modules_to_save") or ()
    names = [names] if isinstance(names, str) else names
    automatic = AUTOMATIC_HEADS.get(str(config.get("task_type")), ())
    strings = [n for n in names if isinstance(n, str) and n] if isinstance(names, list) else []
    return tuple(dict.fromkeys([*strings, *automatic]))


def saved_path(key: str, names: Collection[str]) -> str | None:
    """The module that PEFT's ``modules_to_save`` wraps, of which ``key`` is or lies inside."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if path.endswith(tuple(names)):
            return path
    return None


def _fold_copies(path: str, parts: dict[str, Tensor], found: Found) -> None:
    """Remove the second and third copy that PEFT writes of a saved module's bias.

    With ``bias="all"`` every key that ends in ``.bias`` is saved, also inside its wrapper:
    ``modules_to_save.bias`` is the trained one again, ``original_module.bias`` the base's, which
    nothing uses.
    """
    for name in list(parts):
        wrapper, _, own = name.partition(".")
        if wrapper == "original_module" and own:
            del parts[name]
        elif wrapper == "modules_to_save" and own:
            own = own.removeprefix("default.")
            tensor = parts.pop(name)
            if not torch.equal(parts.setdefault(own, tensor), tensor):
                found.problems.append(f"{path}: {own} is in the file twice, with other values")


def _unknown(key: str, adapted: str) -> str:
    named = _NAMED.fullmatch(key)
    if named is not None and named[1] not in ("weight", "bias"):
        return (
            f"{key}: the adapter's name {named[1]!r} was left in the key; save it with "
            "PEFT's save_pretrained, which removes it"
        )
    if ".token_adapter." in key or key.endswith("trainable_tokens_delta"):
        return f"{key}: belongs to single trained tokens, which plain LoRA has not"
    if adapted:
        return (
            f"{key}: lies inside the adapted module {adapted}; that is how PEFT adapts "
            "nn.MultiheadAttention, which is not read here, or parameters, which the config would "
            "name in target_parameters"
        )
    if key.endswith(".bias"):
        return f"{key}: a bias, but the config says bias = none"
    return f"{key}: unknown, and no entry of modules_to_save names its module"


def low_rank_site(
    parts: Mapping[str, Tensor], scaling: float, kind: Kind | None = None, rank: int = 0
) -> tuple[LowRank | None, list[str]]:
    """The site of one path's tensors, and what is wrong with them.

    Args:
        kind: of a site that ``target_parameters`` names.
        rank: of experts, of which the shapes have only a multiple.
    """
    embedding = "EA" in parts or "EB" in parts
    names = ("EA", "EB") if embedding else ("A", "B")
    missing = [_key_part(name) for name in names if name not in parts]
    surplus = [_key_part(name) for name in parts if name not in (*names, "B.bias", "magnitude")]
    if embedding and "B.bias" in parts:
        surplus.append(_key_part("B.bias"))
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} does not belong to this site" for name in surplus]
    if problems:
        return None, problems
    A, B = parts[names[0]], parts[names[1]]
    if kind == "experts":
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
            return None, [
                f"lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}; with rank {rank} "
                f"in the config, experts need [{rank}·E, d_in] and [d_out, {rank}·E]"
            ]
        A, B = _by_expert(A, B, rank)
    elif kind is None:
        kind = "embedding" if embedding else ("conv" if A.dim() > 2 else "linear")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        expected = _magnitude_shape(kind, B)
        if magnitude.shape != expected:
            return None, [
                f"lora_magnitude_vector has shape {tuple(magnitude.shape)}; expected {expected}"
            ]
        magnitude = magnitude.reshape(-1)
    site = LowRank(A, B, scaling, kind, parts.get("B.bias"), magnitude)
    problems = site.problems()
    return (None if problems else site), problems


def _by_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """PEFT's [E·r, d_in] and [d_out, r·E] as [E, r, d_in] and [E, d_out, r].

    As in its ``ParamWrapper.get_delta_weight``: A is laid out by expert, B by rank.
    """
    by_rank = B.reshape(B.shape[0], rank, -1)
    return A.reshape(-1, rank, A.shape[1]), by_rank.permute(2, 0, 1).contiguous()


def _for_peft(site: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as PEFT lays them out; the inverse of :func:`_by_expert` for experts."""
    if site.kind != "experts":
        return site.A, site.B
    return site.A.flatten(0, 1), site.B.permute(1, 2, 0).flatten(1)


def _magnitude_shape(kind: Kind, B: Tensor) -> tuple[int, ...]:
    """PEFT keeps a convolution's in the shape in which it multiplies the output."""
    return (1, *B.shape[:1], *B.shape[2:]) if kind == "conv" else tuple(B.shape[:1])


def warn_of_grouped_dora(what: str, sites: Mapping[str, Site]) -> None:
    """Say where PEFT's DoRA is another formula than ours.

    For a convolution with groups PEFT (0.21) reshapes a product of B and A whose rows belong to
    other outputs, and takes the lengths of that. Ours are those of the weight that is applied.
    """
    grouped = [
        path
        for path, site in sites.items()
        if isinstance(site, LowRank)
        and site.magnitude is not None
        and site.B.shape[1] != site.A.shape[0]
    ]
    if grouped:
        logger.warning(
            "%s: %s is DoRA on a convolution with groups, where PEFT computes other lengths, so "
            "its output there differs from lorakit's",
            what,
            ", ".join(grouped),
        )


def _key_part(name: str) -> str:
    if name == "magnitude":
        return "lora_magnitude_vector"
    if name.startswith("E"):
        return f"lora_embedding_{name[1:]}"
    return f"lora_{name}" if "." in name else f"lora_{name}.weight"


def keys_from_sites(sites: Mapping[str, Site], *, lora_bias: bool) -> dict[str, Tensor]:
    """Every site's tensors under PEFT's keys.

    Args:
        lora_bias: whether each low-rank site gets a bias; PEFT has one switch for all of them,
            so where only some have one, the others get zeros, which add nothing.
    """
    keys: dict[str, Tensor] = {}
    for path, site in sites.items():
        if isinstance(site, Replace):
            for name, tensor in site.tensors_by_name.items():
                keys[PREFIX + _parameter_key(path, name, sites)] = tensor
            continue
        if isinstance(site, Prefix):
            keys |= {f"{PREFIX}{path}.prefix_{name}": t for name, t in site.tensors().items()}
            continue
        if site.magnitude is not None:
            shape = _magnitude_shape(site.kind, site.B)
            keys[f"{PREFIX}{path}.lora_magnitude_vector"] = site.magnitude.reshape(shape)
        if site.kind == "embedding":
            keys[f"{PREFIX}{path}.lora_embedding_A"] = site.A
            keys[f"{PREFIX}{path}.lora_embedding_B"] = site.B
        else:
            wrapped = _wrapped(path, sites) if site.kind == "experts" else path
            keys[f"{PREFIX}{wrapped}.lora_A.weight"], keys[f"{PREFIX}{wrapped}.lora_B.weight"] = (
                _for_peft(site)
            )
            bias = site.B.new_zeros(site.B.shape[0]) if site.bias is None else site.bias
            if lora_bias:
                keys[f"{PREFIX}{path}.lora_B.bias"] = bias
    return keys


def _wrapped(path: str, sites: Mapping[str, Site]) -> str:
    """The module that holds a parameter, as often wrapped as later ones are adapted too."""
    module, _, own = path.rpartition(".")
    beside = [
        name for name in EXPERT_PARAMETERS if isinstance(sites.get(f"{module}.{name}"), LowRank)
    ]
    later = beside[beside.index(own) + 1 :] if own in beside else []
    return module + _WRAP * len(later)


def _parameter_key(path: str, name: str, sites: Mapping[str, Site]) -> str:
    if name:
        return f"{path}.{name}"
    module, _, own = path.rpartition(".")
    adapted = isinstance(sites.get(module), LowRank)
    return f"{module}.base_layer.{own}" if adapted else path
