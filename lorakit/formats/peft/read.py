"""Reading the PEFT folder: everything is checked, and every problem is in one error."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import read_safetensors
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, collected
from lorakit.formats.folder import CONFIG, PICKLED, WEIGHTS
from lorakit.formats.header import Header, apply_difference, read_header
from lorakit.formats.peft import prefix as peft_prefix
from lorakit.formats.peft.config import AUTOMATIC_HEADS, FILE_FACTS, malformed, read_config
from lorakit.formats.peft.keys import (
    Found,
    Reading,
    low_rank_site,
    saved_names,
    sort_keys,
    warn_of_grouped_dora,
)
from lorakit.formats.peft.match import Patterned, scalings, selection_in
from lorakit.formats.pickled import read_pickled
from lorakit.formats.tokenizer_files import tokenizer_files_in

logger = logging.getLogger(__name__)

#: a config above this is no config
MAX_CONFIG_BYTES = 10_000_000


def read_peft(
    folder: Path, weights: Path | None = None, *, keep_base_weights: bool = False
) -> Adapter:
    """The adapter of a folder.

    Args:
        weights: the file of weights, if it is not called as PEFT calls it.
        keep_base_weights: keep the base's own embedding that PEFT stores beside an adapted one.

    Raises:
        FormatError: anything unknown, missing, malformed, not finite, or of another method. All
            problems are in one message.
    """
    config = read_json(folder / CONFIG)
    weights = _weights_in(folder) if weights is None else weights
    if weights.suffix == ".safetensors":
        tensors, metadata = read_safetensors(weights)
    else:
        tensors, metadata = read_pickled(weights), {}
    try:
        header = read_header(metadata)
    except FormatError as error:
        raise FormatError(f"{weights} cannot be read: {error}.") from error
    return _adapter(
        _Files(folder, weights.name, config, tensors, header), keep_base_weights=keep_base_weights
    )


@dataclass(frozen=True)
class _Files:
    """A folder's content, not yet understood."""

    folder: Path
    weights: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    header: Header | None


def _adapter(files: _Files, *, keep_base_weights: bool) -> Adapter:
    config, header = files.config, files.header
    if config.get("peft_type") == peft_prefix.ALONE:
        return _prefix_alone(files)
    both = config.get("peft_type") == peft_prefix.BOTH
    if both:
        config = {**config, "peft_type": "LORA"}
        config.pop("num_virtual_tokens", None)
    # of a malformed config nothing is matched with the keys; what is wrong is said below
    sound = {} if malformed(config) else config
    reading = Reading(
        saved=saved_names(config),
        biases=config.get("bias", "none") != "none",
        replaced=None if header is None else header.replaced,
        prefixes=both,
        keep_base_weights=keep_base_weights,
        parameters=tuple(sound.get("target_parameters") or ()),
        modules=selection_in(sound),
    )
    found = sort_keys(files.tensors, reading)
    if not config.get("target_modules") and not reading.parameters:
        others = config.get("modules_to_save") or reading.biases
        nothing: Any = [] if others else "all-linear"
        config = {**config, "target_modules": sorted(found.factors) or nothing}
    spec, wrong = read_config(config, trained=True)
    problems = [f"{CONFIG}: {problem}" for problem in wrong]
    problems += [f"{files.weights}: {problem}" for problem in found.problems]
    sites = _sites(found, config, spec, header, problems)
    if not sites and not problems:
        problems.append(f"{files.weights}: it holds no tensor of an adapter")
    if spec is not None and header is not None:
        try:
            spec = apply_difference(spec, header.spec)
        except FormatError as error:
            problems.append(f"{files.weights}: {error}")
    if problems or spec is None:
        raise FormatError(
            collected(f"{files.folder} cannot be used as an adapter", problems)
            + "\nNothing of it was loaded. Save it again from where it was trained, or ask for a "
            "plain LoRA adapter in PEFT's format."
        )
    for note in found.notes:
        logger.warning("%s: %s", files.folder, note)
    if header is None:  # PEFT's own
        warn_of_grouped_dora(str(files.folder), sites)
    return Adapter(
        sites=dict(sorted(sites.items())),
        spec=spec if header is not None else _without_unused_heads(spec, config, sites),
        base=None if header is None else header.base,
        provenance=_facts(config) if header is None else header.provenance,
        tokenizer_files=tokenizer_files_in(files.folder),
        task_type=(header.task_type if header and header.task_type else config.get("task_type")),
    )


def _prefix_alone(files: _Files) -> Adapter:
    """An adapter that is a prefix and nothing else, as PEFT has them."""
    header = files.header
    sites, problems = peft_prefix.sites_of(files.config, files.tensors, header)
    spec = None if problems else peft_prefix.spec_of(files.config)
    if spec is not None and header is not None:
        try:
            spec = apply_difference(spec, header.spec)
        except FormatError as error:
            problems.append(f"{files.weights}: {error}")
    if problems or spec is None:
        raise FormatError(collected(f"{files.folder} cannot be used as a prefix", problems))
    return Adapter(
        sites=dict(sorted(sites.items())),
        spec=spec,
        base=None if header is None else header.base,
        provenance=_facts(files.config) if header is None else header.provenance,
        tokenizer_files=tokenizer_files_in(files.folder),
        task_type=files.config.get("task_type"),
    )


def _sites(
    found: Found,
    config: Mapping[str, Any],
    spec: LoRASpec | None,
    header: Header | None,
    problems: list[str],
) -> dict[str, Site]:
    """The sites; what is wrong with any of them is added to ``problems``."""
    sites: dict[str, Site] = {}
    settings = spec or LoRASpec()  # the rest is checked although the settings are unusable
    names = {path: found.parameters.get(path, path) for path in found.factors}
    factor_on = scalings(settings, names.values())
    ranks = Patterned(settings.rank, settings.rank_pattern)
    with_bias, with_magnitude = bool(config.get("lora_bias")), bool(config.get("use_dora"))
    for path, parts in found.factors.items():
        scaling, rank = _scaling(path, factor_on[names[path]], header), ranks.at(names[path])
        site, wrong = low_rank_site(parts, scaling, found.kinds.get(path), rank)
        problems += [f"{path}: {problem}" for problem in wrong]
        if site is None:
            continue
        sites[path] = _without_added_bias(path, site, header)
        if spec is not None and site.rank != rank:
            problems.append(f"{path}: its tensors have rank {site.rank}, {CONFIG} gives {rank}")
        if (site.bias is not None) != with_bias and site.kind != "embedding":
            has = "lacks" if site.bias is None else "has"
            problems.append(f"{path}: {has} lora_B.bias, but lora_bias is {with_bias}")
        if (site.magnitude is not None) != with_magnitude:
            has = "lacks" if site.magnitude is None else "has"
            problems.append(
                f"{path}: {has} lora_magnitude_vector (DoRA), but use_dora is {with_magnitude}"
            )
    prefixes, wrong = peft_prefix.pairs(found.prefixes)
    sites |= prefixes
    problems += wrong
    for path, tensors in found.whole.items():
        sites[path] = Replace(tensors)
        problems += [f"{path}: {problem}" for problem in sites[path].problems()]
    return sites


def _scaling(path: str, scaling: float, header: Header | None) -> float:
    """The config's, or the header's where that differs in its last bits only."""
    exact = None if header is None else header.scaling.get(path)
    return exact if exact is not None and math.isclose(exact, scaling, rel_tol=1e-12) else scaling


def _without_added_bias(path: str, site: LowRank, header: Header | None) -> LowRank:
    if header is not None and path in header.no_bias and site.bias is not None:
        return site if site.bias.any() else replace(site, bias=None)
    return site


def _without_unused_heads(
    spec: LoRASpec, config: Mapping[str, Any], sites: Mapping[str, Site]
) -> LoRASpec:
    """Without the entries of ``modules_to_save`` that PEFT adds and this model has not."""
    automatic = AUTOMATIC_HEADS.get(str(config.get("task_type")), ())
    kept = []
    for name in spec.train_modules:
        used = any(path.endswith(name) for path, site in sites.items() if isinstance(site, Replace))
        if used or name not in automatic:
            kept.append(name)
        if not used and name not in automatic:
            logger.warning("modules_to_save names %r, but the file holds nothing of it", name)
    return replace(spec, train_modules=tuple(kept))


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of another tool says about its origin."""
    names = (*FILE_FACTS, "peft_version")
    facts = {name: config[name] for name in names if config.get(name)}
    return {"peft": facts} if facts else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: it is none.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise FormatError(f"{path} is no file; copy or download it again.")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FormatError(f"{path} has {path.stat().st_size} bytes; that is no config.")
        content = json.loads(path.read_text(encoding="utf-8"))
        # JSON can name one half of a UTF-16 pair, which nothing can be written with
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is no JSON ({error or type(error).__name__}); copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(
        f"{folder} has {CONFIG} but no {WEIGHTS}. The adapter was copied in part; copy or "
        "download it again."
    )
