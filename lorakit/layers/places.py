"""Where an adapter's sites lie in a model, and whether they fit.

A model's structure does not change while adapters are attached, so it is walked once; adding the
hundredth adapter costs what the first did.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.errors import FormatError, collected
from lorakit.layers.kinds import Shape, shape_of, shapes_in
from lorakit.layers.past import attention_modules

#: a router's linear is adapted as a linear is; files do not always tell them apart
_ALIKE = {"linear", "router"}


def home_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a trainable site's tensors lie: the module's device; float32, or float64 with it."""
    hook = getattr(module, "_hf_hook", None)  # accelerate: weights may be offloaded
    device = getattr(hook, "execution_device", None)
    parameter = next(module.parameters(), None)
    if device is None:
        device = parameter.device if parameter is not None else torch.device("cpu")
    elif isinstance(device, int):
        device = torch.device("cuda", device)
    double = parameter is not None and parameter.dtype == torch.float64
    return torch.device(device), torch.float64 if double else torch.float32


#: how a site of a prefix is called whose file has the numbers of layers and not their names
PAST = "past_key_values"


class Places:
    """The modules and parameters of a bare model, by path."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._modules = {path: module for path, module in modules.items() if path}
        first: dict[int, str] = {}
        for path, module in modules.items():
            first.setdefault(id(module), path)
        #: path → the first path of the same module; not by module, for a copied model has others
        self._first_path = {path: first[id(module)] for path, module in modules.items()}
        self._parameters = {
            f"{path}.{key}" if path else key: parameter
            for path, module in modules.items()
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        self._attentions: list[str] | None = None
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._homes: dict[str, tuple[torch.device, torch.dtype]] = {}

    def first_path(self, path: str) -> str:
        """The first path of the module at ``path``, which may have several."""
        return self._first_path[path]

    def holders(self) -> dict[int, set[str]]:
        """Id of a parameter → the paths of all that a change of it changes, its own among them.

        Several where modules share it, or where another parameter lies in the same memory.
        """
        found: dict[int, set[str]] = {}
        for path, parameter in self._parameters.items():
            holder, _, key = path.rpartition(".")
            first = self.first_path(holder)
            found.setdefault(id(parameter), set()).add(f"{first}.{key}" if first else key)
        own = {key: frozenset(paths) for key, paths in found.items()}
        for one, other in _overlapping({id(p): p for p in self._parameters.values()}):
            found[one] |= own[other]
            found[other] |= own[one]
        return found

    def home(self, path: str) -> tuple[torch.device, torch.dtype]:
        """:func:`home_of` the module at ``path``, remembered."""
        if path not in self._homes:
            self._homes[path] = home_of(self._modules[path])
        return self._homes[path]

    def owners(self, adapter: Adapter) -> dict[str, tuple[str, nn.Module]]:
        """Site path → (path of the module that runs it, that module); everything is checked.

        Raises:
            FormatError: paths or shapes that are not this model's. All are listed.
        """
        owners: dict[str, tuple[str, nn.Module]] = {}
        problems = []
        for path, site in adapter.sites.items():
            if _names_parameter(site):
                owner_path = path.rpartition(".")[0] if self._is_parameter(path) else ""
            elif isinstance(site, Prefix):
                owner_path = self._attention(path)
            else:
                owner_path = path
            owner = self._modules.get(owner_path)
            if owner is None:
                close = difflib.get_close_matches(path, self._modules, n=1, cutoff=0.6)
                hint = f"; close: {close[0]}" if close else ""
                problems.append(f"{path}: not in this model{hint}")
                continue
            owners[path] = (self._first_path[owner_path], owner)
            problems += [f"{path}: {text}" for text in self._misfit(owner, path, site)]
        if problems:
            raise FormatError(
                collected("The adapter does not fit this model", problems)
                + "\nGive the base that it was trained on."
            )
        return owners

    def _is_parameter(self, path: str) -> bool:
        """Whether a parameter lies at a path, or a bias could: of a linear that has none."""
        module, _, name = path.rpartition(".")
        return path in self._parameters or (name == "bias" and self._without_bias(module))

    def _without_bias(self, path: str) -> bool:
        owner: Any = self._modules.get(path)
        if owner is None or "bias" not in owner._parameters or owner.bias is not None:
            return False
        shape = shape_of(owner)
        return shape is not None and shape.kind == "linear"

    def _attention(self, path: str) -> str:
        """The attention module of a prefix; a file of PEFT's numbers them and names none."""
        head, _, number = path.rpartition(".")
        if head != PAST or not number.isdigit():
            return path
        if self._attentions is None:
            self._attentions = attention_modules(self._modules)
        return self._attentions[int(number)] if int(number) < len(self._attentions) else path

    def shape(self, path: str, owner: nn.Module) -> Shape | None:
        """How the site at ``path``, which ``owner`` runs, can be adapted; remembered."""
        if path not in self._shapes:
            inside = path.rpartition(".")[0] if path in self._parameters else path
            self._shapes[path] = shapes_in(inside, owner)
        return self._shapes[path].get(path)

    def _misfit(self, owner: nn.Module, path: str, site: Site) -> list[str]:
        if isinstance(site, Prefix):
            return _prefix_misfit(owner, site)
        if isinstance(site, Replace):
            own = dict(owner.named_parameters())
            found = []
            for key, tensor in site.tensors_by_name.items():
                mine = own.get(key) if key else self._parameters.get(path)
                if not key and mine is None:  # a new bias
                    shape = shape_of(owner)
                    if shape is not None and tuple(tensor.shape) != (shape.d_out,):
                        found.append(f"it has shape {tuple(tensor.shape)}; expected {shape.d_out}")
                elif mine is None:
                    found.append(f"it has no parameter {key!r}")
                elif mine.shape != tensor.shape:
                    found.append(
                        f"{key or 'value'} has shape {tuple(tensor.shape)}; "
                        f"the model's is {tuple(mine.shape)}"
                    )
            return found
        shape = self.shape(path, owner)
        if shape is None:
            what = "fused experts" if site.kind == "experts" else "linear, convolution or embedding"
            return [f"{type(owner).__name__} is no {what}"]
        if shape.kind != site.kind and not {shape.kind, site.kind} <= _ALIKE:
            return [f"it is a {site.kind} site; the model has a {shape.kind} there"]
        expected = shape.a(site.rank), shape.b(site.rank)
        if expected != (tuple(site.A.shape), tuple(site.B.shape)):
            return [
                f"A has shape {tuple(site.A.shape)} and B {tuple(site.B.shape)}; "
                f"at rank {site.rank} this model needs {expected[0]} and {expected[1]}"
            ]
        return []


def _overlapping(tensors: Mapping[int, Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs that share memory; slices of one tensor, as of a fused projection, do not."""
    by_storage: dict[int, list[tuple[int, int, bool, int]]] = {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or is_lazy(tensor) or not tensor.numel():
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps)
        size, start = tensor.element_size(), int(tensor.storage_offset()) * tensor.element_size()
        # the storage's own address and not its data's, which is 0 for all on meta
        by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(
            (start, start + int(span) * size, span == tensor.numel(), key)
        )
    for places in by_storage.values():
        places.sort()
        for number, (start, end, dense, key) in enumerate(places):
            for later, _, _, other in places[number + 1 :]:
                if later >= end:
                    break
                if dense or later == start:  # else it may lie in a gap, as a slice of columns does
                    yield key, other


def _prefix_misfit(owner: Any, site: Prefix) -> list[str]:
    """What of a prefix's shape differs from what the attention module says of itself."""
    config = getattr(owner, "config", None)
    heads = getattr(config, "num_key_value_heads", None)
    size = getattr(owner, "head_dim", None)
    found = []
    if config is None:
        found.append(f"it is a prefix, and {type(owner).__name__} is no attention with a config")
    if isinstance(heads, int) and site.key.shape[1] != heads:
        found.append(f"its prefix has {site.key.shape[1]} heads; the model has {heads} there")
    if isinstance(size, int) and site.key.shape[2] != size:
        found.append(f"its prefix has heads of size {site.key.shape[2]}; the model's are {size}")
    return found


def _names_parameter(site: Site) -> bool:
    """Whether a site's path is a parameter's rather than a module's."""
    if isinstance(site, LowRank):
        return site.kind == "experts"
    return isinstance(site, Replace) and "" in site.tensors_by_name
