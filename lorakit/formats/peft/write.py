"""Writing the PEFT folder: plan all files, check that they read back, then touch the disk."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import write_safetensors
from lorakit.core.sites import EXPERT_PARAMETERS, Replace
from lorakit.errors import FormatError, collected
from lorakit.formats.card import model_card
from lorakit.formats.folder import CARD, CONFIG, WEIGHTS, Content, write_folder
from lorakit.formats.header import Header, spec_difference, write_header
from lorakit.formats.peft import config as peft_config
from lorakit.formats.peft import match as peft_match
from lorakit.formats.peft import prefix as peft_prefix
from lorakit.formats.peft.keys import (
    VOCABULARY_MODULES,
    Reading,
    keys_from_sites,
    saved_names,
    saved_path,
    sort_keys,
    warn_of_grouped_dora,
)
from lorakit.formats.tokenizer_files import is_tokenizer_file

logger = logging.getLogger(__name__)

#: kinds that PEFT adapts as parameters, not as modules
_PARAMETERS = ("experts", "router")

#: last names that PEFT gives to experts on models with fused ones
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

#: classes of models with fused experts, for adapters that do not tell
_MIXTURES = re.compile(r"Moe|Mixtral|MiniMax|Deepseek|Dots|Longcat|SolarOpen|Mellum|Olmoe|FlexOlmo")

#: models whose linears are transformers' Conv1D, for which PEFT wants ``fan_in_fan_out``
_TRANSPOSED = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write the folder; the same adapter always gives the same bytes.

    Raises:
        FormatError: something that the folder cannot hold. All is listed, nothing is written.
        InputError: the place cannot be written to.
        TrainingError: the disk is full.
    """
    write_folder(folder, plan_files(adapter))


def plan_files(adapter: Adapter) -> dict[str, Content]:
    """File name → content; the weights are written by a function, so that they exist once."""
    problems = [*_unwritable(adapter), *_unwritable_files(adapter.tokenizer_files)]
    if problems:
        raise FormatError(collected("The adapter does not fit PEFT's format", problems))
    warn_of_grouped_dora("what is saved", adapter.sites)
    _warn_of_new_biases(adapter)
    if peft_prefix.is_peft_prefix(adapter):
        config, header, keys = _plan_prefix(adapter)
    else:
        config, header = _plan(adapter)
        keys = keys_from_sites(adapter.sites, lora_bias=bool(config.get("lora_bias")))
        _check_reads_back(adapter, config, keys, header)
    metadata = write_header(header)
    text = json.dumps(config, indent=2) + "\n"
    return {
        CONFIG: text.encode(),
        CARD: model_card(adapter, config["base_model_name_or_path"]).encode(),
        **dict(sorted(adapter.tokenizer_files.items())),
        WEIGHTS: partial(write_safetensors, tensors=keys, metadata=metadata),
    }


def _plan(adapter: Adapter) -> tuple[dict[str, Any], Header]:
    """The config, and what it leaves out."""
    low_rank = adapter.low_rank
    bare = _as_parameters(adapter)
    names = {path: f"{path}.weight" if path in bare else path for path in low_rank}
    spec = peft_match.fitting_spec(
        adapter.spec, {names[path]: site for path, site in low_rank.items()}
    )
    spec = replace(spec, bias=_bias_mode(adapter), variant=_variant(adapter))
    experts = {path for path, site in low_rank.items() if site.kind == "experts"}
    parameters = [names[path] for path in low_rank if path in bare | experts]
    modules = [path for path in low_rank if path not in bare | experts]
    selection = peft_match.select(spec, modules)
    lora_bias = any(site.bias is not None for site in low_rank.values())
    facts = _file_facts(adapter)
    config = peft_config.config_from_spec(
        spec,
        target_modules=selection.target_modules,
        exclude_modules=selection.exclude_modules,
        layers_to_transform=selection.layers_to_transform,
        target_parameters=peft_match.select_parameters(spec, parameters),
        modules_to_save=_modules_to_save(adapter),
        lora_bias=lora_bias,
        **facts,
    )
    given_back, _ = peft_config.read_config(config, trained=True)
    if adapter.prefixes:
        config["peft_type"] = peft_prefix.BOTH
        config["num_virtual_tokens"] = adapter.num_virtual_tokens
        config = dict(sorted(config.items()))
    scalings = peft_match.scalings(spec, names.values())
    no_bias = [p for p, s in low_rank.items() if s.bias is None] if lora_bias else []
    header = Header(
        base=adapter.base,
        provenance=adapter.provenance,
        spec=spec_difference(adapter.spec, given_back),
        replaced=tuple(adapter.replaced),
        task_type=adapter.task_type if adapter.task_type != facts["task_type"] else None,
        scaling={p: s.scaling for p, s in low_rank.items() if scalings[names[p]] != s.scaling},
        no_bias=tuple(no_bias),
    )
    return config, header


def _plan_prefix(adapter: Adapter) -> tuple[dict[str, Any], Header, dict[str, Tensor]]:
    """The same of a prefix alone, for which PEFT has a form of its own, and its tensors."""
    config, tensors, paths = peft_prefix.files_of(adapter)
    header = Header(
        base=adapter.base,
        provenance=adapter.provenance,
        spec=spec_difference(adapter.spec, peft_prefix.spec_of(config)),
        prefix=tuple(paths),
    )
    return config, header, tensors


def _warn_of_new_biases(adapter: Adapter) -> None:
    """PEFT puts a bias of a file into the base's own, and passes over it where there is none.

    Where the base is not known, the spec says whether there are new ones. Without any low-rank site
    PEFT refuses the folder by itself.
    """
    shapes = adapter.base.shapes if adapter.base is not None else {}
    if not adapter.low_rank or not (shapes or adapter.spec.bias == "new"):
        return
    new = [
        path
        for path, site in adapter.replaced.items()
        if path.endswith(".bias") and "" in site.tensors_by_name and path not in shapes
    ]
    if new:
        logger.warning(
            "%s%s: a new bias, for which PEFT has no place beside a weight that is not adapted; it "
            "would leave it out without a word. lorakit reads it",
            new[0],
            f" and {len(new) - 1} more" if len(new) > 1 else "",
        )


def _as_parameters(adapter: Adapter) -> set[str]:
    """Sites of modules that PEFT has to adapt by their ``weight``.

    Those are routers, which are no linears. And where a model has fused experts, PEFT (0.21) takes
    ``gate_proj``, ``up_proj`` and ``down_proj`` in target_modules for names of experts from before
    they were fused, and drops the dense linears that are called so, at times without a word.
    """
    low_rank = adapter.low_rank
    routers = {path for path, site in low_rank.items() if site.kind == "router"}
    if not _has_fused_experts(adapter):
        return routers
    hidden = {
        path
        for path, site in low_rank.items()
        if site.kind == "linear" and path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS
    }
    lone = [p for p, s in low_rank.items() if s.bias is not None or s.magnitude is not None]
    if hidden and lone:  # which PEFT knows for modules alone
        logger.warning(
            "PEFT 0.21 takes %s for the name of experts and would leave it out; load this adapter "
            "there with a DoRA or a bias of B only on models without fused experts",
            sorted(hidden)[0],
        )
        return routers
    return routers | hidden


def _has_fused_experts(adapter: Adapter) -> bool:
    told = adapter.provenance.get("peft")
    if isinstance(told, Mapping) and told.get("fused_experts"):
        return True
    architecture = "" if adapter.base is None else adapter.base.architecture
    kinds = {site.kind for site in adapter.low_rank.values()}
    return bool(kinds & set(_PARAMETERS)) or _MIXTURES.search(architecture) is not None


def _file_facts(adapter: Adapter) -> dict[str, Any]:
    """Fields of the config that belong to the file rather than to the settings."""
    told = adapter.provenance.get("peft")
    told = told if isinstance(told, Mapping) else {}
    facts: dict[str, Any] = {name: told.get(name) for name in peft_config.FILE_FACTS}
    if adapter.base is not None:
        facts["base_model_name_or_path"] = adapter.base.name
        facts["revision"] = adapter.base.revision
    facts["fan_in_fan_out"] = bool(facts["fan_in_fan_out"]) or _is_transposed(adapter)
    facts["task_type"] = adapter.task_type
    heads = peft_config.AUTOMATIC_HEADS.get(adapter.task_type or "")
    if heads and not (
        any(path.endswith(heads) for path in adapter.replaced) and _can_wrap(adapter, heads)
    ):
        # for this task PEFT demands a head in the file, and fails where the base's own is used
        facts["task_type"] = None
    return facts


def _is_transposed(adapter: Adapter) -> bool:
    """Whether the adapted modules store their weight as [d_in, d_out], for which PEFT asks."""
    if adapter.base is None or all(s.kind != "linear" for s in adapter.low_rank.values()):
        return False
    shapes = adapter.base.shapes
    return adapter.base.architecture.startswith(_TRANSPOSED) and not any(
        shapes.get(f"{path}.weight") == (site.B.shape[0], site.A.shape[1])
        for path, site in adapter.low_rank.items()
        if site.kind == "linear" and site.B.shape[0] != site.A.shape[1]
    )


def _bias_mode(adapter: Adapter) -> Any:
    """The spec's mode, or the narrowest that covers the biases that are there."""
    owners = [
        path.removesuffix(".bias")
        for path, site in adapter.replaced.items()
        if path.endswith(".bias") and "" in site.tensors_by_name
    ]
    if not owners:
        return "none"
    only_adapted = all(owner in adapter.low_rank for owner in owners)
    if adapter.spec.bias == "all" or not only_adapted:
        return "all"
    return "lora"


def _variant(adapter: Adapter) -> Any:
    """What the sites are; all are DoRA's, or none is."""
    magnitudes = [site.magnitude is not None for site in adapter.low_rank.values()]
    return "dora" if any(magnitudes) else "lora"


def _modules_to_save(adapter: Adapter) -> list[str]:
    """The paths of modules that were trained whole.

    The spec's words would not do: PEFT does not match them at a dot, so "norm" is "input_layernorm"
    too. What is left out is in the file all the same, and PEFT loads it into the base's own module:
    an embedding whose vocabulary grew, as PEFT itself does it, and a module whose path, as PEFT
    matches names, would also cover an adapted one.
    """
    return [
        path
        for path, site in adapter.replaced.items()
        if "" not in site.tensors_by_name
        and (
            path.endswith(adapter.spec.train_modules)
            or path.rpartition(".")[2] not in VOCABULARY_MODULES
        )
        and _can_wrap(adapter, [path])
    ]


def _can_wrap(adapter: Adapter, names: Sequence[str]) -> bool:
    """Whether PEFT, told to save modules of these names, leaves the adapted ones alone."""
    return all(saved_path(f"{path}.weight", names) is None for path in adapter.low_rank)


def _unwritable(adapter: Adapter) -> list[str]:
    """What PEFT's format has no place for."""
    problems = []
    low_rank = adapter.low_rank
    whole = [p for p, site in adapter.replaced.items() if "" not in site.tensors_by_name]
    with_bias = [path for path, site in low_rank.items() if site.bias is not None]
    with_magnitude = [path for path, site in low_rank.items() if site.magnitude is not None]
    for path, site in low_rank.items():
        if not math.isfinite(site.scaling):
            problems.append(f"{path}: its scaling is {site.scaling}")
        inside = [p for p in whole if path == p or path.startswith(p + ".")]
        if inside:
            problems.append(f"{path}: is adapted, and {inside[0]} was trained whole; keep one")
        if with_bias and site.kind == "embedding":
            problems.append(
                f"{path}: an embedding, beside {with_bias[0]}, which has a bias of B; PEFT's "
                "lora_bias covers all sites and refuses embeddings"
            )
        holder, _, own = path.rpartition(".")
        beside = [p for p in low_rank if p != path and p.rpartition(".")[0] == holder]
        if site.kind == "experts" and own not in EXPERT_PARAMETERS and beside:
            problems.append(
                f"{path}: stands beside {beside[0]}; PEFT does not name a module's parameters, and "
                f"only {', '.join(EXPERT_PARAMETERS)} are told apart by their order"
            )
        if with_bias and site.kind in _PARAMETERS:
            problems.append(
                f"{path}: adapts a parameter, beside {with_bias[0]}, which has a bias of B; PEFT's "
                "lora_bias covers all sites and refuses parameters"
            )
        if with_magnitude and site.magnitude is None:
            problems.append(
                f"{path}: is plain LoRA, and {with_magnitude[0]} is DoRA; PEFT has one switch for "
                "all sites, and would give this one a magnitude too"
            )
    if with_magnitude and with_bias:
        problems.append(
            f"{with_bias[0]}: has a bias of B, and {with_magnitude[0]} is DoRA; PEFT has no file "
            "with both"
        )
    if adapter.task_type is not None and adapter.task_type not in peft_config.TASK_TYPES:
        problems.append(
            f"task_type is {adapter.task_type!r}; expected one of "
            + ", ".join(peft_config.TASK_TYPES)
        )
    return problems


def _unwritable_files(files: Mapping[str, bytes]) -> list[str]:
    return [
        f"{name!r} is no name of a tokenizer's file, so nothing would read it back"
        for name in files
        if not is_tokenizer_file(name)
    ]


def _check_reads_back(
    adapter: Adapter, config: Mapping[str, Any], keys: Mapping[str, Tensor], header: Header
) -> None:
    """Names of modules are free, so a key may mean something else than it came from.

    Raises:
        FormatError: names the sites that would be read as others.
    """
    reading = Reading(
        saved_names(config),
        config["bias"] != "none",
        header.replaced,
        bool(adapter.prefixes),
        parameters=tuple(config.get("target_parameters") or ()),
        modules=peft_match.selection_in(config),
    )
    found = sort_keys(keys, reading)
    expected = {
        path: set(site.tensors_by_name) if isinstance(site, Replace) else None
        for path, site in adapter.sites.items()
    }
    got: dict[str, set[str] | None] = dict.fromkeys(found.factors)
    got |= {path: set(tensors) for path, tensors in found.whole.items()}
    got |= dict.fromkeys(found.prefixes)
    wrong = sorted(p for p in expected | got if expected.get(p, 0) != got.get(p, 0))
    if wrong or found.problems or found.notes:
        raise FormatError(
            collected(
                "These sites cannot be told apart under PEFT's names; rename or leave them out",
                [*wrong, *found.problems],
            )
        )
