"""Recognising a base: a few of its numbers, taken at places that depend on its shapes alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.bases.affine import Affine4, Affine8, affine_weight
from lorakit.core.identity import BaseIdentity, compare_identities
from lorakit.errors import BaseError

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter

NUM_SAMPLES = 32
"""Numbers taken from each sampled tensor."""
NUM_LINEARS = 8
"""Linears that are sampled, spread over the depth; with less than seven, a model whose blocks hold
seven kinds of linear could be changed in a kind that is never looked at."""


def identify(
    model: nn.Module, name: str, *, storage: str | None = None, revision: str | None = None
) -> BaseIdentity:
    """Take the identity of a model: class, shapes, and samples of a few weights.

    Sampled are the embedding, the last norm and :data:`NUM_LINEARS` linears of the blocks. Heads
    are left out, because they are new or tied. Weights that are not in memory (meta, offloaded)
    or whose format is not known are left out of the samples; their shapes are kept.

    Args:
        model: a model, bare or with adapters attached; nothing in it is changed. One that is made
            of several says by ``identified_by`` which of them identifies it.
        name: how the user calls it.
        storage: how its weights were stored before they were loaded, where their dtype does not
            tell: a GGUF type such as ``"Q4_1"``. Norms and biases are exact in such files.
        revision: commit on the hub.
    """
    model = getattr(model, "identified_by", model)
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, tuple[float, ...]] = {}
    kinds: dict[str, str] = {}
    named = {path: module for path, module in model.named_modules() if _shape(module)}
    embedding = _embedding(model, named)
    for path, module in _chosen(named, embedding):
        path = _weight_of(path)
        shape = _shape(module)
        shapes[path] = shape
        values, kind = _read(module, sample_positions(shape))
        kinds[path] = storage if storage is not None and len(shape) > 1 else kind
        if values is not None:
            samples[path] = tuple(float(f"{v:.9g}") for v in values.tolist())
    main = storage or _main_storage(model, kinds)
    return BaseIdentity(
        name=name,
        architecture=_class_name(model),
        shapes=shapes,
        samples=samples,
        storage=main,
        stored={path: kind for path, kind in kinds.items() if kind != main},
        revision=revision,
        embedding=None if embedding is None else _weight_of(embedding),
    )


def check_base(
    adapter: Adapter, base_identity: BaseIdentity, *, allow_other: bool = False
) -> list[str]:
    """Check that ``adapter`` was trained on this base.

    Args:
        allow_other: go on with another base, and say so.

    Returns:
        What the user should be told: what could not be checked, or differs and is allowed.

    Raises:
        BaseError: it was trained on another base, and ``allow_other`` is false.
    """
    trained_on = adapter.base
    if trained_on is None:
        return ["the adapter does not say which base it was trained on, so this was not checked"]
    if not trained_on.shapes:  # other tools write the base's name and nothing else
        if trained_on.architecture not in ("", base_identity.architecture):
            return _refuse_or_say(
                f"The adapter was trained on {trained_on.name!r}, a {trained_on.architecture}; "
                f"this base, {base_identity.name!r}, is a {base_identity.architecture}. "
                "Give the base it was trained on, or pass allow_other_base=True "
                "(--allow-other-base).",
                allow_other,
            )
        if _last_part(trained_on.name) == _last_part(base_identity.name):
            return []
        return [
            f"the adapter was trained on {trained_on.name!r} and is used on "
            f"{base_identity.name!r}; it holds no samples of its base, so only shapes are checked"
        ]
    try:
        return compare_identities(trained_on, base_identity)
    except BaseError as error:
        return _refuse_or_say(str(error), allow_other, error)


def _refuse_or_say(problem: str, allow_other: bool, error: BaseError | None = None) -> list[str]:
    if not allow_other:
        raise error or BaseError(problem)
    told = problem.partition("\nGive the base")[0].partition(" Give the base")[0]
    return [f"used on another base, as allowed. {told}"]


def _class_name(model: nn.Module) -> str:
    # wrappers that make a subclass on the fly (FSDP2) keep the name behind a prefix
    return type(model).__name__.removeprefix("FSDP")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


# --- which weights


def _chosen(named: dict[str, nn.Module], embedding: str | None) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each weight to sample, in a fixed order."""
    norm = next((p for p in reversed(named) if _is_norm(named[p]) and not _in_block(p)), None)
    linears = _spread([p for p in named if len(_shape(named[p])) > 1 and _in_block(p)])
    if not linears:  # no numbered blocks: all but the last, which may be a new head
        linears = _spread([p for p in named if len(_shape(named[p])) > 1][:-1])
    for path in dict.fromkeys([embedding, *linears, norm]):
        if path is not None:
            yield path, named[path]


def _weight_of(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _embedding(model: Any, named: dict[str, nn.Module]) -> str | None:
    found: Any = None
    if hasattr(model, "get_input_embeddings"):
        try:
            found = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            found = None
    if found is None:
        found = next((m for m in named.values() if isinstance(m, nn.Embedding)), None)
    return next((path for path, module in named.items() if module is found), None)


def _is_norm(module: nn.Module) -> bool:
    return len(_shape(module)) == 1 and "norm" in type(module).__name__.lower()


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _spread(paths: list[str]) -> list[str]:
    """At most NUM_LINEARS of ``paths``: evenly over the depth, of different kinds."""
    if len(paths) <= NUM_LINEARS:
        return paths
    chosen: list[str] = []
    seen: set[str] = set()
    for step in range(NUM_LINEARS):
        place = step * (len(paths) - 1) / (NUM_LINEARS - 1)
        near = sorted(range(len(paths)), key=lambda i: (abs(i - place), i))
        new = [i for i in near if _kind(paths[i]) not in seen and paths[i] not in chosen]
        index = next(iter(new or [i for i in near if paths[i] not in chosen]))
        chosen.append(paths[index])
        seen.add(_kind(paths[index]))
    return sorted(chosen, key=paths.index)


def _kind(path: str) -> str:
    """What a linear is in its block: its path without numbers."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def sample_positions(shape: tuple[int, ...]) -> list[int]:
    """Flat positions in a tensor of ``shape``; they depend on the shape and on nothing else."""
    size = math.prod(shape)
    draws = (
        hashlib.sha256(f"{shape}:{index}".encode()).digest()[:8] for index in range(NUM_SAMPLES)
    )
    return [int.from_bytes(draw, "big") % size for draw in draws]


# --- how a weight is stored


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the module's weight as if it were not quantised; ``()`` if it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):  # packed formats keep no `weight`, but their size
        size = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        return tuple(size) if all(isinstance(n, int) for n in size) else ()  # type: ignore[arg-type]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    if weight.ndim == 2 and weight.shape[-1] == 1 and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)  # packed to 4 bits, state not made yet
    return tuple(weight.shape)


def _read(module: nn.Module, positions: list[int]) -> tuple[Tensor | None, str]:
    """The values at flat ``positions`` in float32, and how they are stored.

    Returns:
        ``[len(positions)]`` on the CPU, or ``None`` where they cannot be read here; the storage.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None, "4-bit"
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return _read_4bit(weight, state, positions), str(state.quant_type)
    if weight.dtype == torch.int8:
        return _read_int8(module, weight, positions), "int8"
    if not weight.is_floating_point():
        return None, "4-bit"
    try:
        packed = affine_weight(weight)
    except BaseError:  # its numbers alone do not say what it is
        return None, "4-bit" if type(weight).__name__ == "Int4Tensor" else "int8"
    if packed is not None:
        return (None if weight.is_meta else _read_affine(packed, weight, positions)), packed.storage
    storage = str(weight.dtype).removeprefix("torch.")
    if weight.is_meta or not _is_plain(weight):
        return None, storage
    with torch.no_grad():
        index = torch.tensor(positions, device=weight.device)
        # of an unraveled index, so that a weight that is not contiguous is not copied whole
        return weight[torch.unravel_index(index, weight.shape)].float().cpu(), storage


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _read_4bit(weight: Tensor, state: Any, positions: list[int]) -> Tensor | None:
    """Values of a weight that bitsandbytes packed: two to a byte, the first in the high half.

    Each is ``code[nibble] · absmax[block]``, and with double quantisation ``absmax`` is
    ``code2[…] · absmax2[…] + offset`` (Dettmers et al., 2023, arXiv 2305.14314, section 3). Only
    the numbers at ``positions`` are unpacked.
    """
    if weight.is_meta or getattr(state, "packing_format_for_cpu", False):
        return None  # after its first forward, a CPU kernel may have reordered the bytes
    with torch.no_grad():
        place = torch.tensor(positions, device=weight.device)
        packed = weight.detach().reshape(-1).view(torch.uint8)[place // 2].long()
        nibble = torch.where(place % 2 == 0, packed >> 4, packed & 15)
        block = place // state.blocksize
        scale = state.absmax[block]
        if state.nested:
            scale = state.state2.code[scale.long()]
            scale = scale * state.state2.absmax[block // state.state2.blocksize] + state.offset
        values = state.code[nibble].float() * scale.float()
    return torch.as_tensor(values, device="cpu")


def _read_int8(module: nn.Module, weight: Tensor, positions: list[int]) -> Tensor | None:
    """Values of an LLM.int8 weight ``[out, in]``: ``q · SCB[row] / 127``."""
    state = getattr(module, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None:  # moved there by the first forward
        scales = getattr(state, "SCB", None)
    if scales is None or weight.is_meta:
        return None
    with torch.no_grad():
        rows, columns = torch.unravel_index(torch.tensor(positions), weight.shape)
        rows, columns = rows.to(weight.device), columns.to(weight.device)
        values = weight[rows, columns].float() * scales[rows].float() / 127
    return torch.as_tensor(values, device="cpu")


def _read_affine(packed: Affine8 | Affine4, weight: Tensor, positions: list[int]) -> Tensor:
    """Values of a weight that torchao holds."""
    with torch.no_grad():
        rows, columns = torch.unravel_index(torch.tensor(positions), weight.shape)
        return packed.at(rows.to(weight.device), columns.to(weight.device)).cpu()


def _main_storage(model: nn.Module, kinds: dict[str, str]) -> str:
    """How most of the sampled weights are stored."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not kinds:
        parameter = next(model.parameters(), None)
        return str(parameter.dtype).removeprefix("torch.") if parameter is not None else "float32"
    main = max(kinds.values(), key=list(kinds.values()).count)
    method = getattr(config, "quant_method", None)
    if main == "4-bit" and method is not None:
        return str(getattr(method, "value", method))
    return main
