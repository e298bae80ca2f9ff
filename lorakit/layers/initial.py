"""A new adapter for a model: values whose delta is zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError, TargetError, collected
from lorakit.layers.dora import check_dense, weight_lengths
from lorakit.layers.places import home_of
from lorakit.layers.targets import compact_targets, resolve_targets, whole_modules


def initial_adapter(model: nn.Module, spec: LoRASpec, seed: int) -> Adapter:
    """A new adapter whose delta is zero.

    A is drawn as PyTorch draws a linear's weight (Kaiming uniform with a = √5, bound
    1/√fan_in), from N(0, 1/r²), or with orthonormal rows; B is zero (Hu et al., 2021, §4.1).
    An embedding's A is zero and its B normal, as in the authors' loralib. DoRA's magnitude is the
    length of each output's weights, so that the factor on them is 1.

    Raises:
        SpecError, TargetError: settings that don't fit the model.
    """
    generator = torch.Generator().manual_seed(seed)
    sites: dict[str, Site] = {}
    targeted = resolve_targets(model, spec)
    silent = [t.path for t in targeted if t.alpha == 0]
    if silent:
        raise SpecError(
            collected("alpha is 0 here, so nothing could be learnt; give another", silent, limit=3)
        )
    if spec.variant == "dora":
        check_dense({target.path: target.module for target in targeted})
    for target in targeted:
        _, dtype = home_of(target.module)
        A = torch.empty(target.shape.a(target.rank), dtype=dtype)
        B = torch.zeros(target.shape.b(target.rank), dtype=dtype)
        if target.shape.kind == "embedding":
            A.zero_()
            B.normal_(generator=generator)
        elif spec.init == "gaussian":
            A.normal_(std=1 / target.rank, generator=generator)
        elif spec.init == "orthogonal":
            nn.init.orthogonal_(A, generator=generator)
        else:
            bound = 1 / math.sqrt(A[0].numel())
            A.uniform_(-bound, bound, generator=generator)
        scaling = spec.scaling_of(target.rank, target.alpha)
        lengths = None
        if spec.variant == "dora":
            lengths = weight_lengths(target.module, dtype).cpu()
        sites[target.path] = LowRank(A, B, scaling, target.shape.kind, magnitude=lengths)
    whole = whole_modules(model, spec.train_modules)
    for path, module in whole.items():
        _refuse_running_statistics(path, module)
        sites[path] = Replace({n: p.detach().clone() for n, p in module.named_parameters()})
    if spec.bias != "none":
        sites.update(_biases(model, spec, list(sites), whole))
    targets = compact_targets(model, [p for p, s in sites.items() if isinstance(s, LowRank)])
    # the one fact about the base's layers that a PEFT folder states
    transposed = any(type(t.module).__name__ == "Conv1D" for t in targeted)
    provenance = {"peft": {"fan_in_fan_out": True}} if transposed else {}
    return Adapter(
        sites, replace(spec, targets=targets) if targets else spec, provenance=provenance
    )


def _biases(
    model: nn.Module, spec: LoRASpec, adapted: Sequence[str], whole: Mapping[str, nn.Module]
) -> dict[str, Site]:
    wanted = set(adapted)
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        bias = module._parameters.get("bias")
        inside = any(path == w or path.startswith(w + ".") for w in whole)
        if bias is None or inside or not path or (spec.bias == "lora" and path not in wanted):
            continue
        found[f"{path}.bias"] = Replace({"": bias.detach().clone()})
    if not found:
        raise TargetError(
            f"bias is {spec.bias!r}, but there is no bias to train "
            + ("on the adapted modules" if spec.bias == "lora" else "in this model")
            + '; use bias="none"'
        )
    return found


def _refuse_running_statistics(path: str, module: nn.Module) -> None:
    for name, child in module.named_modules():
        if getattr(child, "running_mean", None) is not None:
            inner = f"{path}.{name}" if name else path
            raise TargetError(
                f"{inner} keeps running statistics, which training would change in the base; "
                "name the modules beside it in train_modules"
            )
