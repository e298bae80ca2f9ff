"""A prefix alone as PEFT keeps one, and what marks a folder that PEFT has no form for.

PEFT's prefix tuning is a method of its own: ``peft_type`` ``PREFIX_TUNING``, and one tensor
``prompt_embeddings [n, L · 2 · H_kv · d]`` that holds key and value of each layer by turns, and
names no module. An adapter that is a prefix and nothing else is written so, with the modules' names
in our header; it loads there and gives the same logits.

LoRA and a prefix in one adapter exist in PEFT neither as a file nor in a model. Such a folder has
LoRA's keys, those of the prefix (``<path>.prefix_key``, ``<path>.prefix_value``), and the
``peft_type`` :data:`BOTH`, which PEFT refuses by name: read as LoRA it would silently lose a part.

Legend: ``n`` virtual tokens, ``L`` layers, ``H_kv`` key heads, ``d`` their size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import Prefix
from lorakit.core.spec import LoRASpec
from lorakit.formats.header import Header
from lorakit.formats.peft.config import TASK_TYPES

ALONE = "PREFIX_TUNING"
BOTH = "LORA_AND_PREFIX_OF_LORAKIT"
TENSOR = "prompt_embeddings"
#: the path of layer i's site where the file names no module; ``layers.places`` knows it
PAST = "past_key_values"

_NUMBERED = re.compile(r"(?P<head>.*?\.)(?P<number>\d+)(?P<tail>\..*)?")


def in_order(prefixes: Mapping[str, Prefix]) -> list[str] | None:
    """The paths by layer, where PEFT's one tensor can hold them: all layers from 0 on, alike."""
    numbered: dict[int, str] = {}
    shapes = set()
    for path, site in prefixes.items():
        match = _NUMBERED.fullmatch(path)
        if match is None:
            return None
        numbered[int(match["number"])] = path
        shapes.add((match["head"], match["tail"], site.key.dtype))
        shapes.add((match["head"], match["tail"], site.value.dtype))
    like = {tuple(t.shape) for site in prefixes.values() for t in (site.key, site.value)}
    whole = sorted(numbered) == list(range(len(prefixes)))
    return [numbered[i] for i in sorted(numbered)] if whole and len(shapes | like) == 2 else None


def is_peft_prefix(adapter: Adapter) -> bool:
    """Whether PEFT has a form for all of it, as a prefix."""
    prefixes = adapter.prefixes
    return len(prefixes) == len(adapter.sites) and in_order(prefixes) is not None


def files_of(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Config, tensors, and the modules' paths by layer; of an adapter that is a prefix alone."""
    prefixes = adapter.prefixes
    paths = in_order(prefixes)
    assert paths is not None
    layers = [tensor for path in paths for tensor in (prefixes[path].key, prefixes[path].value)]
    n, heads, size = layers[0].shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None if adapter.base is None else adapter.base.name,
        "encoder_hidden_size": heads * size,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": len(paths),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": n,
        "peft_type": ALONE,
        "prefix_projection": False,
        "revision": None if adapter.base is None else adapter.base.revision,
        # without one PEFT's model is of no task, and runs the base as if there were no prefix
        "task_type": adapter.task_type or "CAUSAL_LM",
        "token_dim": heads * size,
    }
    return config, {TENSOR: torch.stack(layers, dim=1).reshape(n, -1)}, paths


def sites_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Header | None
) -> tuple[dict[str, Prefix], list[str]]:
    """The sites of PEFT's tensor, and what is wrong with it or its config."""
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    problems = [
        f"{name} is {config.get(name)!r}; expected a whole number of at least 1"
        for name in names
        if type(config.get(name)) is not int or not 1 <= config[name] <= 2**24
    ]
    if config.get("num_transformer_submodules", 1) not in (1, None):
        problems.append("num_transformer_submodules is not 1; encoder-decoders have no prefix here")
    if config.get("task_type") not in (None, *TASK_TYPES):
        problems.append(f"task_type is {config['task_type']!r}; expected {', '.join(TASK_TYPES)}")
    strangers = sorted(set(tensors) - {TENSOR})
    problems += [f"{key}: unknown; a prefix is one tensor {TENSOR}" for key in strangers[:8]]
    if TENSOR not in tensors:
        problems.append(f"it has no tensor {TENSOR}")
    if problems:
        return {}, problems
    n, layers, heads, width = (int(config[name]) for name in names)
    tensor = tensors[TENSOR]
    if tuple(tensor.shape) != (n, layers * 2 * width) or width % heads:
        return {}, [
            f"{TENSOR} has shape {tuple(tensor.shape)}; the config gives {(n, layers * 2 * width)} "
            f"in {heads} heads"
        ]
    paths = [f"{PAST}.{i}" for i in range(layers)]
    if header is not None and header.prefix:
        paths = list(header.prefix)
    if len(set(paths)) != layers:
        return {}, [f"its header names {len(set(paths))} modules for {layers} layers"]
    cut = tensor.reshape(n, layers, 2, heads, width // heads)
    sites = {
        path: Prefix(cut[:, i, 0].contiguous(), cut[:, i, 1].contiguous())
        for i, path in enumerate(paths)
    }
    return sites, [f"{path}: {p}" for path, site in sites.items() for p in site.problems()]


def spec_of(config: Mapping[str, Any]) -> LoRASpec:
    """The settings of a prefix of PEFT's."""
    return LoRASpec(targets=(), prefix=int(config["num_virtual_tokens"]))


def pairs(found: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Prefix], list[str]]:
    """The sites of a folder of both, by path: its key and value."""
    sites: dict[str, Prefix] = {}
    problems = []
    for path, parts in found.items():
        if set(parts) != {"key", "value"}:
            missing = ", ".join(f"prefix_{name}" for name in {"key", "value"} - set(parts))
            problems.append(f"{path}: {missing} is missing")
            continue
        site = Prefix(parts["key"], parts["value"])
        problems += [f"{path}: {problem}" for problem in site.problems()]
        sites[path] = site
    return sites, problems
