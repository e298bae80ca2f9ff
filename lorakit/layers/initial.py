"""A new adapter for a model: the values it begins with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.algebra.stack import stack
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError, TargetError, collected
from lorakit.inits import Factors, olora, pissa
from lorakit.layers.dora import check_dense, dense_weight, output_rows, weight_lengths
from lorakit.layers.kinds import expert_shapes, shape_of
from lorakit.layers.past import past_of
from lorakit.layers.places import home_of
from lorakit.layers.targets import (
    Target,
    compact_targets,
    norm_modules,
    output_heads,
    resolve_targets,
    whole_modules,
)

#: initialisations whose A is drawn and whose B is zero
DRAWN = ("kaiming", "gaussian", "orthogonal")
#: those that need more than the base's weights, and what
NEEDS = {
    "eva": "a few batches of data",
    "lora-ga": "a few batches of data",
    "loftq": "the base's weights as they were before they were quantised",
}
#: those that the papers begin by taking their B·A out of the base's weight
MOVING = ("pissa", "olora", "lora-ga")


@dataclass(frozen=True, eq=False)
class Initial:
    """Where a new adapter begins."""

    adapter: Adapter
    """A and B of each site, at the rank at which they are trained."""

    @property
    def subtracted(self) -> bool:
        """Whether its first scaling·B A is taken off, so that the first forward is the base's."""
        return self.adapter.spec.init in MOVING

    @property
    def is_base(self) -> bool:
        """Whether the first forward is the base's."""
        return self.adapter.spec.init != "loftq" and not self.adapter.prefixes


def since_start(now: Adapter, start: Adapter) -> Adapter:
    """What ``now`` changes beyond ``start``, at twice the rank: ``scaling·(B A − B₀ A₀)``.

    It is plain LoRA for the untouched base, and says in its provenance how it began.
    """
    sites: dict[str, Site] = dict(now.sites)
    for path, first in start.low_rank.items():
        last = now.low_rank[path]
        both = stack([(replace(last, magnitude=None), 1.0), (replace(first, magnitude=None), -1.0)])
        sites[path] = replace(both, magnitude=last.magnitude)
    spec = now.spec
    factor = math.sqrt(2) if spec.scaling == "alpha/sqrt(r)" else 2
    doubled = replace(
        spec,
        rank=2 * spec.rank,
        alpha=factor * spec.alpha,
        rank_pattern={key: 2 * rank for key, rank in spec.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in spec.alpha_pattern.items()},
        init="kaiming",
    )
    history = {**now.provenance, "init": {"method": spec.init, "rank": spec.rank}}
    return now.with_(sites=sites, spec=doubled, provenance=history)


def new_targets(model: nn.Module, spec: LoRASpec) -> list[Target]:
    """What the spec adapts, checked for its initialisation and variant too.

    Raises:
        SpecError, TargetError: settings that don't fit the model.
    """
    targeted = resolve_targets(model, spec)
    silent = [t.path for t in targeted if t.alpha == 0]
    if silent:
        raise SpecError(
            collected("alpha is 0 here, so nothing could be learnt; give another", silent, limit=3)
        )
    if spec.variant == "dora":
        routed = [t.path for t in targeted if t.shape.kind in ("experts", "router")]
        if routed:
            raise TargetError(
                collected(
                    "DoRA is not defined here for routers and fused experts; leave them out, or "
                    'give variant="lora"',
                    routed,
                    limit=4,
                )
            )
        check_dense({target.path: target.module for target in targeted})
    if spec.init not in DRAWN:
        _check_weights(targeted, spec)
    return targeted


def _check_weights(targeted: Sequence[Target], spec: LoRASpec) -> None:
    """Raise if the initialisation cannot be computed for one of these."""
    problems = []
    for target in targeted:
        shape = target.shape
        if shape.groups > 1:
            problems.append(f"{target.path}: a convolution with groups")
        elif shape.kind in ("experts", "router"):
            what = "fused experts" if shape.experts else "a router"
            problems.append(f"{target.path}: {what}")
        elif spec.init in ("eva", "lora-ga", "loftq") and shape.kind != "linear":
            problems.append(f"{target.path}: no linear")
        elif spec.init == "lora-ga" and 2 * target.rank > shape.max_rank:
            problems.append(
                f"{target.path}: it needs 2·{target.rank} directions of {shape.max_rank}"
            )
        if target.alpha < 0:
            problems.append(f"{target.path}: alpha is {target.alpha:g}, and has to be above 0")
    if problems:
        raise TargetError(
            collected(
                f"init {spec.init!r} cannot begin here; exclude these or take another init",
                problems,
                limit=8,
            )
        )
    if spec.init in ("pissa", "olora"):
        modules = {target.path: target.module for target in targeted}
        check_dense(modules, f"init {spec.init!r} needs these weights")


def initial(
    model: nn.Module, spec: LoRASpec, seed: int, given: Mapping[str, Factors] | None = None
) -> Initial:
    """A new adapter whose first forward is the base's (or, with LoftQ, nearer to the dense base).

    ``kaiming``, ``gaussian``, ``orthogonal``: A is drawn as PyTorch draws a linear's weight
    (Kaiming uniform with a = √5, bound 1/√fan_in), from N(0, 1/r²), or with orthonormal rows; B is
    zero (Hu et al., 2021, §4.1). An embedding's A is zero and its B normal, as in the authors'
    loralib. The others: :mod:`lorakit.inits`. DoRA's magnitude is the length of each output's
    weights, so that the factor on them is 1.

    Args:
        given: path → factors, for initialisations that need more than the weights; a site that
            is not among them is left out.

    Raises:
        SpecError, TargetError: settings that don't fit the model, or ``given`` is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    targeted = new_targets(model, spec)
    if spec.init in NEEDS and given is None:
        raise SpecError(
            f"init {spec.init!r} needs {NEEDS[spec.init]}: make the values with "
            "lorakit.workflows.calibrate.calibrate(base, spec, data) and attach those; "
            "lorakit train does it by itself"
        )
    sites: dict[str, Site] = {}
    for target in targeted:
        if given is not None and target.path not in given:
            continue
        _, dtype = home_of(target.module)
        if given is not None:
            factors: Factors | None = given[target.path]
        else:
            factors = _from_weight(target, spec)
        A, B = (
            _drawn(target, spec, dtype, generator)
            if factors is None
            else _cast(target, factors, dtype)
        )
        scaling = spec.scaling_of(target.rank, target.alpha)
        lengths = None
        if spec.variant == "dora":
            lengths = _lengths(target, spec, A, B, scaling, dtype)
        sites[target.path] = LowRank(A, B, scaling, target.shape.kind, magnitude=lengths)
    whole = whole_modules(model, spec.train_modules)
    if spec.norms:
        whole.update(_norms(model, whole))
    for path, module in whole.items():
        _refuse_running_statistics(path, module)
        if any(whole[other] is module for other in sites if other in whole):
            continue  # one module under several paths has one site
        sites[path] = Replace({n: p.detach().clone() for n, p in module.named_parameters()})
    if spec.bias != "none":
        sites.update(_biases(model, spec, sites, whole))
    if spec.prefix:
        prefixes = _prefix(model, spec.prefix, seed)
        both = [path for path in prefixes if path in sites]
        if both:
            raise TargetError(
                collected("These modules are to be trained whole and to have a prefix", both)
                + "\nLeave them out of train_modules, or the prefix."
            )
        sites.update(prefixes)
    targets = compact_targets(model, [p for p, s in sites.items() if isinstance(s, LowRank)])
    # the one fact about the base's layers that a PEFT folder states
    transposed = any(type(t.module).__name__ == "Conv1D" for t in targeted)
    facts = {"fan_in_fan_out": True} if transposed else {}
    if any(expert_shapes(module) for module in model.modules()):
        facts["fused_experts"] = True  # PEFT takes some linears' names for theirs
    provenance: dict[str, Any] = {"peft": facts} if facts else {}
    if spec.init not in DRAWN:
        provenance["init"] = {"method": spec.init, "rank": spec.rank}
    return Initial(
        Adapter(sites, replace(spec, targets=targets) if targets else spec, provenance=provenance)
    )


def _drawn(
    target: Target, spec: LoRASpec, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    A = torch.empty(target.shape.a(target.rank), dtype=dtype)
    B = torch.zeros(target.shape.b(target.rank), dtype=dtype)
    if target.shape.kind == "embedding":
        A.zero_()
        B.normal_(generator=generator)
    elif spec.init == "gaussian":
        A.normal_(std=1 / target.rank, generator=generator)
    elif spec.init == "orthogonal":
        for one in A if target.shape.experts else [A]:
            nn.init.orthogonal_(one, generator=generator)
    else:
        bound = 1 / math.sqrt(target.shape.fan_in)
        A.uniform_(-bound, bound, generator=generator)
    return A, B


def weight_rows(module: nn.Module) -> Tensor:
    """A module's weight as [d_out, n] on its device; of packed weights what their numbers mean."""
    return output_rows(module, dense_weight(module)).detach()


def _from_weight(target: Target, spec: LoRASpec) -> Factors | None:
    """What the weight alone gives; ``None`` where nothing of it is used."""
    if spec.init == "pissa":
        scaling = spec.scaling_of(target.rank, target.alpha)
        return pissa(weight_rows(target.module), target.rank, scaling)
    if spec.init == "olora":
        return olora(weight_rows(target.module), target.rank)
    return None


def _cast(target: Target, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors in a site's shapes and dtype, on the CPU."""
    rank = len(factors.A)
    A = factors.A.detach().to("cpu", dtype).reshape(target.shape.a(rank))
    B = factors.B.detach().to("cpu", dtype).reshape(target.shape.b(rank))
    return A.contiguous(), B.contiguous()


def _lengths(
    target: Target, spec: LoRASpec, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """DoRA's first magnitude: the lengths of what the first forward computes with."""
    if spec.init != "loftq":
        return weight_lengths(target.module, dtype).cpu()
    first = weight_rows(target.module).cpu().double() + scaling * B.double() @ A.double()
    lengths: Tensor = torch.linalg.vector_norm(first, dim=1).to(dtype)
    return lengths


def _norms(model: nn.Module, whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The norms that no module contains which is trained whole already."""
    norms = norm_modules(model)
    if not norms:
        raise TargetError("norms is true, but no norm of this model has a weight; leave it out")
    return {
        path: module
        for path, module in norms.items()
        if not any(path == w or path.startswith(w + ".") for w in whole)
    }


def _biases(
    model: nn.Module, spec: LoRASpec, sites: Mapping[str, Site], whole: Mapping[str, nn.Module]
) -> dict[str, Site]:
    """Biases as values of their own; a new one where a weight is adapted is the bias of its B."""
    wanted = {path for path, site in sites.items() if isinstance(site, LowRank)}
    heads = output_heads(model)
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        inside = any(path == w or path.startswith(w + ".") for w in whole)
        if inside or not path or (spec.bias == "lora" and path not in wanted):
            continue
        bias = module._parameters.get("bias")
        shape = shape_of(module) if bias is None and "bias" in module._parameters else None
        if bias is not None:
            found[f"{path}.bias"] = Replace({"": bias.detach().clone()})
        elif spec.bias != "new" or shape is None or shape.kind != "linear":
            continue
        elif not any(path == head or path.startswith(head + ".") for head in heads):
            zeros = torch.zeros(shape.d_out, dtype=home_of(module)[1])
            site = sites.get(path)
            if isinstance(site, LowRank) and site.magnitude is None:
                found[path] = replace(site, bias=zeros)
            else:
                found[f"{path}.bias"] = Replace({"": zeros})
    if not found:
        raise TargetError(
            f"bias is {spec.bias!r}, but there is no bias to train "
            + ("on the adapted modules" if spec.bias == "lora" else "in this model")
            + '; use bias="none", or bias="new" to add biases that begin at zero'
        )
    return found


def _prefix(model: nn.Module, length: int, seed: int) -> dict[str, Site]:
    """Keys and values that the base computes for drawn tokens, its first one in front.

    Activations of words, even of unrelated ones, are a far better beginning than random numbers (Li
    & Liang, 2021, section 7.4), and a base's attention rests on its first token (Xiao et al.,
    arXiv 2309.17453).
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    rows = 1 if weight is None else int(weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (length,), generator=generator)
    first = getattr(getattr(model, "config", None), "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < rows:
        ids[0] = first
    found: dict[str, Site] = {}
    for path, (key, value) in past_of(model, ids).items():
        dtype = home_of(model.get_submodule(path))[1]
        found[path] = Prefix(key.to("cpu", dtype), value.to("cpu", dtype))
    return found


def _refuse_running_statistics(path: str, module: nn.Module) -> None:
    for name, child in module.named_modules():
        if getattr(child, "running_mean", None) is not None:
            inner = f"{path}.{name}" if name else path
            raise TargetError(
                f"{inner} keeps running statistics, which training would change in the base; "
                "name the modules beside it in train_modules"
            )
