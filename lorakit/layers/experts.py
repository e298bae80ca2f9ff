"""The forward of fused experts with adapters: each token's own adapters at each of its experts.

A module of fused experts gets all tokens and, for each, the experts that the router has chosen.
Its parameters hold a matrix for each expert, and an adapter's factors do so too, so a token at an
expert gets ``B_e (A_e x)`` of that expert, added to what the expert's own matrix gives. No product
B·A exists, and no copy of a parameter.

The module's own forward has no place where that could be added, so it is computed here, in the way
that the model was told to use (transformers' ``experts_implementation``), operation by operation:
where B is zero the outcome is the module's own, bit for bit. What a module computes it says by its
flags, and before it is believed, both forwards are compared on a few drawn tokens.

Legend: ``N`` tokens, ``k`` experts of each token, ``S = N·k`` *slots* (a token at an expert),
``E`` experts, ``r`` rank, ``d`` features of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import RoutingError, TargetError, collected
from lorakit.layers.bank import LowRankParameters
from lorakit.layers.dropout import expert_keys, keyed_dropout, keys_of, site_number
from lorakit.layers.forwards import Forwards
from lorakit.layers.grouped import filled, grouped_product
from lorakit.layers.kinds import agrees, expert_shapes
from lorakit.layers.routing import Plan, Share
from lorakit.layers.site import OutsideOfGraphs, is_sole

#: transformers' ways of running experts that are computed here
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def check_experts(modules: Mapping[str, nn.Module]) -> None:
    """Raise if one of these modules of fused experts does not run as this file computes it.

    Args:
        modules: by path; what holds no fused experts is not looked at.

    Raises:
        TargetError: all are listed, each with the reason.
    """
    problems = []
    for path, module in modules.items():
        if expert_shapes(module):
            reason = _why_not(module)
            if reason is not None:
                problems.append(f"{path}: {reason}")
    if problems:
        raise TargetError(
            collected("These experts cannot be adapted; leave them out", problems, limit=4)
        )


def _why_not(module: Any) -> str | None:
    own = module.__dict__.get("forward")
    if isinstance(own, ExpertsForward) and own.agrees:
        return None  # found out when its first adapter came
    if own is not None and not isinstance(own, ExpertsForward):
        return (
            "another library has overridden its forward (offloading to the processor?); load the "
            "model whole"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are not in memory; load the model whole"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes (expert parallelism)"
    return _disagreement(module)


def _disagreement(module: Any) -> str | None:
    """Why the module's output is not what this file computes; ``None`` if it is."""
    how = implementation(module)
    if how not in IMPLEMENTATIONS:
        return (
            f"it runs by {how!r}, which leaves no place for adapters; use "
            f"model.set_experts_implementation(…) with one of {', '.join(IMPLEMENTATIONS)}"
        )
    x, index, weights = _probe(module)
    devices = [x.device.index] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            expected = type(module).forward(module, x, index, weights)
            found = _Run(module, x, index, weights).forward()
        except Exception as error:  # whatever a module of another make raises
            return f"it does not run as fused experts do ({type(error).__name__}: {error})"
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return "its output is no tensor of the tokens' shape"
    if agrees(found, expected):
        return None
    return "it computes something else than gate · up, then down, by expert"


def _probe(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A few drawn tokens, each at two experts if there are two."""
    shapes = expert_shapes(module)
    first = next(iter(shapes.values()))
    parameter = next(p for name, p in module.named_parameters() if name in shapes)
    generator = torch.Generator().manual_seed(0)
    k = min(2, first.experts)
    x = torch.randn(6, first.d_in, generator=generator)
    index = torch.stack([torch.randperm(first.experts, generator=generator)[:k] for _ in x])
    weights = torch.rand(6, k, generator=generator) + 0.1
    to = {"device": parameter.device}
    return x.to(parameter.dtype).to(**to), index.to(**to), weights.to(parameter.dtype).to(**to)


def implementation(module: Any) -> str:
    """How transformers runs these experts."""
    config = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) or "eager"


class ExpertsForward(OutsideOfGraphs):
    """Stands as the forward of a module of fused experts; see the file.

    How many tokens an expert gets is known at run time alone, so it runs outside of graphs.
    """

    def __init__(self, module: nn.Module, path: str, forwards: Forwards) -> None:
        super().__init__(module, path, forwards)
        self._parts: dict[str, dict[str, LowRankParameters]] = {}
        self._agreed = {implementation(module)}  # compared when it was attached

    @property
    def agrees(self) -> bool:
        """Whether what is computed here was compared with how the experts run now."""
        return implementation(self.module) in self._agreed

    def put(self, name: str, path: str, parameters: LowRankParameters) -> None:
        """Add one adapter's factors of the parameter at ``path``."""
        if name not in self.low_rank:
            self._parts[name] = {}
        self._parts[name][path.rpartition(".")[2]] = parameters
        self.low_rank[name] = parameters

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        plan = self.forwards.plan()
        used = plan.routing.names
        adapted, whole = used & self.low_rank.keys(), used & self.replaced.keys()
        if plan.uniform == () or not (adapted or whole):
            return self.base(*args, **kwargs)
        if whole:
            return self._trained_whole(plan, bool(adapted), args, kwargs)
        self._check()
        x, index, weights = self._arguments(args, kwargs)
        shares = plan.shares(x.shape[:-1].numel(), x.device, flattened=True)
        parts = [
            _Part(share, self._parts[share.name]) for share in shares if share.name in self.low_rank
        ]
        run = _Run(self.module, x, index, weights, parts, plan.dropout_keys, self.path)
        return run.forward()

    def _trained_whole(
        self, plan: Plan, adapted: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if plan.uniform is None or not is_sole(plan.uniform) or adapted:
            raise RoutingError(
                f"{self.path} was trained whole, and its tokens are not told apart then. Use that "
                "adapter alone, at weight 1, for the whole batch"
            )
        return self._with_parameters(plan.uniform[0], args, kwargs)

    def _check(self) -> None:
        """The way of running them may have been changed since the adapter was attached."""
        if not self.agrees:
            reason = _disagreement(self.module)
            if reason is not None:
                raise RoutingError(f"{self.path}: {reason}")
            self._agreed.add(implementation(self.module))

    def _arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, chosen experts and their weights, whatever the module calls them."""
        if kwargs:
            signature = inspect.signature(type(self.module).forward)
            args = signature.bind(self.module, *args, **kwargs).args[1:]
        x, index, weights = args
        return x, index, weights


@dataclass(frozen=True, eq=False)
class _Part:
    """One adapter in a forward: its share of the tokens, and its factors by parameter."""

    share: Share
    factors: Mapping[str, LowRankParameters]


class _Slots:
    """The slots, in the order in which transformers' implementation ``how`` has them.

    =========== ==============================================================================
    eager       by expert, within one all tokens' first choices first
    batched_mm  by token
    grouped_mm  by expert, within one by token
    =========== ==============================================================================

    Args:
        index: [N, k], the experts of each token.
        weights: [N, k], what each expert's output is multiplied by.
    """

    def __init__(self, index: Tensor, weights: Tensor, experts: int, how: str) -> None:
        self.num_tokens, self.top_k = index.shape
        self.experts = experts
        self.is_sorted = how != "batched_mm"
        by_place = how == "eager"
        expert = (index.t() if by_place else index).reshape(-1)
        self.order = torch.arange(len(expert), device=index.device)
        """[S], which of the slots by token (or, eager, by choice) each is."""
        if self.is_sorted:
            expert, self.order = torch.sort(expert, stable=by_place)
        self.expert = expert
        """[S]"""
        self.token = self.order % self.num_tokens if by_place else self.order // self.top_k
        """[S]"""
        self.weight = (weights.t() if by_place else weights).reshape(-1)[self.order]
        """[S]"""

    @cached_property
    def ends(self) -> Tensor:
        """int32 [E], behind each expert's last slot, where they are sorted."""
        return self.ends_of(self.expert)

    @cached_property
    def filled(self) -> list[tuple[int, int, int]]:
        """(expert, begin, end) of the experts that have a slot, where they are sorted."""
        return filled(self.ends)

    def ends_of(self, expert: Tensor) -> Tensor:
        """int32 [E], behind each expert's last of some slots, given their experts in order."""
        counted = torch.arange(self.experts, device=expert.device)
        return torch.searchsorted(expert, counted, right=True, out_int32=True)

    def chosen(self, own: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The slots of some tokens, sorted by expert, and the ends of those.

        Args:
            own: bool [N], the tokens; ``None``: all.

        Returns:
            int64 [s], or ``None`` where they are all slots as they are, and int32 [E].
        """
        if own is None and self.is_sorted:
            return None, self.ends
        rows = self.order if own is None else own[self.token].nonzero().flatten()
        if not self.is_sorted:
            rows = rows[torch.sort(self.expert[rows], stable=True).indices]
        return rows, self.ends_of(self.expert[rows])


@dataclass(frozen=True, eq=False)
class _Acting:
    """The slots at which one adapter acts."""

    rows: Tensor | None
    """int64 [s], of the slots; ``None``: all."""
    ends: Tensor
    """int32 [E], of these slots."""
    weight: float | Tensor
    """Of the adapter: one, or [s]."""


class _Run:
    """One forward of a module of fused experts.

    Args:
        module: says how it is laid out.
        x: [N, d] or [B, T, d].
        parts: the adapters, with the tokens that they act on.
        keys: int64, one a token or a row, from which dropout is drawn.
        path: of the module, for dropout.
    """

    def __init__(
        self,
        module: Any,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        parts: Sequence[_Part] = (),
        keys: Tensor | None = None,
        path: str = "",
    ) -> None:
        self.module = module
        self.how = implementation(module)
        self.transposed: bool = module.is_transposed
        self.shape = x.shape
        self.x = x.reshape(-1, x.shape[-1])
        self.experts = int(module.down_proj.shape[0])
        index = index.reshape(len(self.x), -1)
        self.slots = _Slots(index, weights.reshape(index.shape), self.experts, self.how)
        self.parts = [(self._acting(part.share), part.factors) for part in parts]
        self.keys = None if keys is None else keys_of(self.x, keys.to(self.x.device))
        self.path = path

    def forward(self) -> Tensor:
        """What the module gives, with the adapters."""
        module, slots = self.module, self.slots
        hidden = self._project(self._first, self.x[slots.token])
        if self.how == "eager":  # vector instructions round the end of a tensor in another way
            hidden = torch.cat([self._active(hidden[b:e]) for _, b, e in slots.filled])
        else:
            hidden = self._active(hidden)
        out = self._project("down_proj", hidden)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        return self._gathered(out * slots.weight.unsqueeze(-1)).view(self.shape)

    @property
    def _first(self) -> str:
        return "gate_up_proj" if getattr(self.module, "has_gate", True) else "up_proj"

    def _active(self, hidden: Tensor) -> Tensor:
        gate: Any = getattr(self.module, "has_gate", True)
        active: Tensor = self.module._apply_gate(hidden) if gate else self.module.act_fn(hidden)
        return active

    def _gathered(self, out: Tensor) -> Tensor:
        """The sum of each token's experts, [N, d]; ``out`` [S, d] is weighted."""
        slots = self.slots
        if self.how == "eager":
            total = torch.zeros_like(self.x)
            for _, begin, end in slots.filled:
                total.index_add_(0, slots.token[begin:end], out[begin:end].to(total.dtype))
            return total
        if slots.is_sorted:
            back = torch.empty_like(slots.order)
            back[slots.order] = torch.arange(len(back), device=back.device)
            out = out[back]
        return out.view(slots.num_tokens, slots.top_k, -1).sum(1).to(self.x.dtype)

    # --- one parameter -----------------------------------------------------------------------

    def _project(self, name: str, x: Tensor) -> Tensor:
        """[S, …] → [S, …]: each slot times its expert's matrix, with the adapters' changes."""
        y = self._base(name, x)
        for acting, factors in self.parts:
            site = factors.get(name)
            if site is not None:
                y = self._changed(name, x, y, acting, site)
        return y

    def _base(self, name: str, x: Tensor) -> Tensor:
        weight = getattr(self.module, name)
        bias = getattr(self.module, f"{name}_bias") if self._has_bias else None
        if self.how == "eager":
            return self._loop(x, weight, bias)
        y = self._batched(x, weight) if self.how == "batched_mm" else self._grouped(x, weight)
        return y if bias is None else y + bias[self.slots.expert]

    @property
    def _has_bias(self) -> bool:
        return bool(getattr(self.module, "has_bias", False))

    def _loop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pieces = []
        for expert, begin, end in self.slots.filled:
            own = weight[expert]
            piece = x[begin:end] @ own if self.transposed else F.linear(x[begin:end], own)
            pieces.append(piece if bias is None else piece + bias[expert])
        return torch.cat(pieces)

    def _batched(self, x: Tensor, weight: Tensor) -> Tensor:
        own = weight[self.slots.expert]
        if self.transposed:
            return torch.bmm(x.unsqueeze(1), own).squeeze(1)
        return torch.bmm(own, x.unsqueeze(-1)).squeeze(-1)

    def _grouped(self, x: Tensor, weight: Tensor) -> Tensor:
        own = weight if self.transposed else weight.transpose(1, 2)
        out: Tensor = F.grouped_mm(x.to(weight.dtype), own, offs=self.slots.ends)
        return out

    def _changed(
        self, name: str, x: Tensor, y: Tensor, acting: _Acting, site: LowRankParameters
    ) -> Tensor:
        """y with one adapter's change of one parameter."""
        rows = acting.rows
        part = x if rows is None else x.index_select(0, rows)
        part = self._dropped(name, part, rows, site)
        A, B = site.A.to(part.dtype), site.B.to(part.dtype)
        hidden = grouped_product(part, A.transpose(1, 2), acting.ends)
        change = grouped_product(hidden, B.transpose(1, 2), acting.ends)
        if isinstance(acting.weight, float):
            change = change * (site.scaling * acting.weight)
        else:
            change = change * (site.scaling * acting.weight).to(change.dtype).unsqueeze(-1)
        change = change.to(y.dtype)
        return y + change if rows is None else y.index_add(0, rows, change)

    def _dropped(
        self, name: str, x: Tensor, rows: Tensor | None, site: LowRankParameters
    ) -> Tensor:
        if site.dropout == 0.0 or not self.module.training:
            return x
        if self.keys is None:
            return F.dropout(x, site.dropout)
        slots = self.slots
        keys = expert_keys(self.keys[slots.token], slots.expert)
        keys = keys if rows is None else keys.index_select(0, rows)
        return keyed_dropout(x, keys, site_number(f"{self.path}.{name}"), site.dropout)

    def _acting(self, share: Share) -> _Acting:
        """Where the tokens of a share are among the slots."""
        slots = self.slots
        own = None
        if share.rows is not None:
            own = torch.zeros(slots.num_tokens, dtype=torch.bool, device=self.x.device)
            own[share.rows] = True
        rows, ends = slots.chosen(own)
        if isinstance(share.weight, float):
            return _Acting(rows, ends, share.weight)
        of_token = share.weight
        if share.rows is not None:
            of_token = share.weight.new_zeros(slots.num_tokens)
            of_token[share.rows] = share.weight
        tokens = slots.token if rows is None else slots.token[rows]
        return _Acting(rows, ends, of_token[tokens])
