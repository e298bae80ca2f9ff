"""A checkpoint's model without its weights: which tensor is which parameter of what module.

transformers builds it from config.json, on the meta device. Where there is none, or none that
transformers knows, it is guessed from the tensors' names and shapes.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.algebra.extract import Place, Weight
from lorakit.bases.identity import identify
from lorakit.bases.quiet import quiet_transformers
from lorakit.core.checkpoint import Checkpoint
from lorakit.core.identity import BaseIdentity
from lorakit.core.safetensors_io import Entry
from lorakit.errors import MissingDependencyError
from lorakit.layers.kinds import shape_of
from lorakit.optional import require

logger = logging.getLogger(__name__)

#: module names that stand for a table of vectors, where only names are known
_EMBEDDING = re.compile(r"emb|^(wte|wpe|shared)$", re.IGNORECASE)
#: model types whose linears are transformers' Conv1D, and the names of those linears
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc|q_attn)$")
_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def skeleton_of(checkpoint: Checkpoint) -> tuple[nn.Module, str | None]:
    """The model on the meta device; and where its structure was guessed, why."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = _config(folder)
    built = _transformers_model(folder, config) if config else "there is no config.json beside it"
    if isinstance(built, nn.Module):
        return built.eval(), None
    kinds = "embeddings by name, transposed linears by model type, tied weights not at all"
    return _from_names(checkpoint, config), f"{built}; kinds come from shapes and names ({kinds})"


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _transformers_model(folder: Path, config: dict[str, Any]) -> nn.Module | str:
    """The model of ``architectures``, or the reason why there is none."""
    named = next(iter(config.get("architectures") or []), None)
    if named is None:
        return "its config.json names no architecture"
    try:
        transformers = require("transformers", extra="train", purpose="knowing the modules")
    except MissingDependencyError as error:
        return str(error)
    with quiet_transformers():  # the class is imported here, and what it can make use of
        architecture = getattr(transformers, str(named), None)
    if architecture is None:
        return f"transformers has no {named}"
    try:
        with quiet_transformers(), torch.device("meta"):
            built: nn.Module = architecture(transformers.AutoConfig.from_pretrained(str(folder)))
    except Exception as error:  # an architecture's own code may raise anything
        logger.debug("building %s without weights", named, exc_info=True)
        return f"{named} cannot be built without weights ({type(error).__name__}: {error})"
    return built


# --- from names alone --------------------------------------------------------------------------


def _from_names(checkpoint: Checkpoint, config: dict[str, Any]) -> nn.Module:
    """A tree of modules whose parameters are the checkpoint's tensors."""
    transposed = config.get("model_type") in _CONV1D_MODELS
    root = nn.Module()
    entries = {n: e for n, e in checkpoint.entries.items() if e.dtype.is_floating_point}
    owners = {name.rpartition(".")[0] for name in entries}
    parents = {owner.rpartition(".")[0] for owner in owners}
    for path in sorted(owners - parents - {""}):
        entry = entries.get(f"{path}.weight")
        leaf = None if entry is None else _leaf(path, entry, transposed=transposed)
        if leaf is not None:
            _put(root, path, leaf)
    for name, entry in entries.items():
        path, _, own = name.rpartition(".")
        parent = _module(root, path)
        if parent._parameters.get(own) is None:
            empty = torch.empty(entry.shape, device="meta", dtype=entry.dtype)
            parent.register_parameter(own, nn.Parameter(empty, requires_grad=False))
    return root


def _leaf(path: str, entry: Entry, *, transposed: bool) -> nn.Module | None:
    """The module whose weight has this shape; ``None`` where it is not adapted."""
    shape = entry.shape
    if 0 in shape:
        return None
    options: dict[str, Any] = {"device": "meta", "bias": False}
    own = path.rpartition(".")[2]
    if len(shape) == 2 and _EMBEDDING.search(own):
        return nn.Embedding(*shape, device="meta")
    if len(shape) == 2 and transposed and _CONV1D.search(own):
        return Conv1D(*shape)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], **options)
    if len(shape) in _CONVS and shape[1] > 1:  # one channel: most often one group a channel
        conv: Any = _CONVS[len(shape)]  # each kind annotates its kernel with its own length
        made: nn.Module = conv(shape[1], shape[0], shape[2:], **options)
        return made
    return None


class Conv1D(nn.Module):
    """Stands for transformers' transposed linear, which is known by this name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.empty(d_in, d_out, device="meta"), requires_grad=False)


def _put(root: nn.Module, path: str, leaf: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    _module(root, parent).add_module(own, leaf)


def _module(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root


# --- parameters --------------------------------------------------------------------------------


def stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Path of a parameter or buffer → the names in checkpoints that mean it.

    transformers has renamed modules since checkpoints were written, and the hub's oldest were saved
    from the inner model, without its prefix. A name that is part of a fused parameter, such as one
    expert of many, means none.
    """
    known = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    known |= {path for path, _ in model.named_buffers(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    rename = _renaming(model)
    found: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        for text in dict.fromkeys((rename(name), name)):
            variants = (text, f"{prefix}.{text}", text.removeprefix(f"{prefix}."))
            path = next((v for v in variants[: 3 if prefix else 1] if v in known), None)
            if path is not None:
                found.setdefault(path, []).append(name)
                break
    return found


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """transformers' own rule from a name in a file to one in the model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        mapping: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):  # older ones, or no model of transformers
        return lambda name: name

    def rename(name: str) -> str:
        for one in renamings:
            name = one.rename_source_key(name)[0]
        return name

    return rename


def weights_of(
    model: nn.Module, allowed: Callable[[str], bool], stored: Mapping[str, Sequence[str]]
) -> list[Weight]:
    """Each parameter of a model under all its paths; a shared module's under its first.

    Args:
        allowed: whether the module at a path may be adapted.
        stored: from :func:`stored_names`.
    """
    held: dict[int, dict[str, Place | None]] = {}
    names: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).extend(stored.get(path, ()))
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            place = _place(model, path, module) if own == "weight" and allowed(path) else None
            name = f"{path}.{own}" if path else own
            held.setdefault(id(parameter), {})[name] = place
    weights = []
    for key, owners in held.items():
        owners = _called(owners)
        everywhere = names[key]
        own_first = {
            path: tuple(dict.fromkeys((*stored.get(path, ()), *everywhere))) for path in owners
        }
        weights.append(Weight(own_first, {p: q for p, q in owners.items() if q is not None}))
    return weights


def _called(owners: dict[str, Place | None]) -> dict[str, Place | None]:
    """Without the module that only holds what others are tied to: T5 and BART never call it."""
    if any(path.endswith("embed_tokens.weight") for path in owners):
        used = {p: q for p, q in owners.items() if p.split(".")[-2] != "shared"}
        return used or owners
    return owners


def _place(root: nn.Module, path: str, module: nn.Module) -> Place | None:
    shape = shape_of(module)
    parent = root.get_submodule(path.rpartition(".")[0])
    if shape is None or isinstance(parent, nn.MultiheadAttention):
        return None  # that one reads its projection's weight and never calls it
    return Place(path, shape.kind, type(module).__name__ == "Conv1D", shape.groups)


# --- identity ----------------------------------------------------------------------------------


def identity_of(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored: Mapping[str, Sequence[str]],
    name: str,
    *,
    storage: str | None = None,
    revision: str | None = None,
) -> BaseIdentity:
    """The identity of a base that is not loaded: only the sampled numbers are read.

    Args:
        model: its skeleton; some of its parameters become views of the files for good.
        stored: from :func:`stored_names`.
    """
    where = {entry: shard.path for shard in checkpoint.shards for entry in shard.entries}
    entries = checkpoint.entries
    for path in identify(model, name).shapes:
        own = next((n for n in stored.get(path, ()) if n in entries), None)
        module: Any = model.get_submodule(path.rpartition(".")[0])
        if own is not None and entries[own].shape == tuple(module.weight.shape):
            view = _mapped(where[own], entries[own])
            module.weight = nn.Parameter(view, requires_grad=False)
    return identify(model, name, storage=storage, revision=revision)


def _mapped(path: Path, entry: Entry) -> Tensor:
    """A tensor whose bytes stay in the file until they are read."""
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    flat = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=entry.begin)
    return flat.reshape(entry.shape)
