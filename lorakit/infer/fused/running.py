"""A model's decoder layers, fused for the time of a forward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.infer.fused.family import Anatomy, DoesNotFit, anatomy_of, dense_weight
from lorakit.infer.fused.layer import Call, FusedLayer, Recompute
from lorakit.infer.fused.linear import Group, Linear, Part
from lorakit.infer.segments import Segments, reading
from lorakit.layers.prefix import stretches
from lorakit.layers.routing import Plan
from lorakit.layers.site import SiteForward

#: of a layer: q, k and v; o; gate and up; down
Groups = tuple[Group, Group, Group, Group]


class FusedBody:
    """The decoder layers of a model's body.

    Args:
        body: a module with ``layers``, each of which gets the hidden states [1, N, d].
        recompute: what each layer makes again in its backward instead of keeping it. A layer that
            does not run fused is run again whole, unless it is ``"none"``.

    Raises:
        DoesNotFit: no layer is of the Llama kind; the message says why.
    """

    def __init__(self, body: Any, *, recompute: Recompute = "none") -> None:
        layers = getattr(body, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise DoesNotFit(f"{type(body).__name__} has no list of layers")
        self.layers = list(layers)
        self.recompute: Recompute = recompute
        self.counts: Counter[str] = Counter()
        """Layers that ran fused, and those that ran as they are, by the reason."""
        self._anatomies: list[Anatomy | str] = []
        for layer in self.layers:
            try:
                self._anatomies.append(anatomy_of(layer))
            except DoesNotFit as reason:
                self._anatomies.append(str(reason))
        reasons = [a for a in self._anatomies if isinstance(a, str)]
        if len(reasons) == len(self.layers):
            raise DoesNotFit(reasons[0])

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why layers were not fused, in forwards so far and by construction."""
        made = [a for a in self._anatomies if isinstance(a, str)]
        return tuple(dict.fromkeys([*made, *(r for r in self.counts if r != "fused")]))

    def summary(self) -> str:
        """How the layers ran, for a person; the same however often a run was resumed."""
        if not self.reasons:
            return "every decoder layer ran fused in every forward"
        ran = "some decoder layers ran" if self.counts["fused"] else "the decoder layers ran"
        return f"{ran} in the plain path: {'; '.join(self.reasons)}"

    @contextlib.contextmanager
    def running(self, rows: Tensor | None = None) -> Iterator[None]:
        """Layers run fused until the block ends.

        Args:
            rows: int64 [S], the tokens that the last layer gives on; ``None``: all.
        """
        last = len(self.layers) - 1
        prepared = _Prepared(self)
        before = [layer.__dict__.get("forward") for layer in self.layers]
        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.enter_context(_without_checkpointing(layer))
                if before[i] is None:
                    stack.callback(layer.__dict__.pop, "forward", None)
                    only = rows if i == last else None
                    layer.__dict__["forward"] = _Running(self, i, only, prepared)
            yield

    @property
    def selects(self) -> bool:
        """Whether :meth:`running` can leave the other rows out at the end."""
        return "forward" not in self.layers[-1].__dict__


class _Running:
    """Stands in for a layer's forward."""

    def __init__(
        self, owner: FusedBody, index: int, rows: Tensor | None, prepared: _Prepared
    ) -> None:
        self._owner, self._index, self._rows, self._prepared = owner, index, rows, prepared

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner
        layer, anatomy = owner.layers[self._index], owner._anatomies[self._index]
        call: Call | str = anatomy if isinstance(anatomy, str) else "it is called in another way"
        segments, rope = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if torch.is_autocast_enabled(hidden_states.device.type):
            call = "autocast chooses the dtype of each operation"
        elif torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
            call = "its own weights are trained"
        elif (
            isinstance(anatomy, Anatomy)
            and isinstance(segments, Segments)
            and isinstance(rope, tuple)
        ):
            call = self._call(anatomy, hidden_states, segments, rope)
        if isinstance(call, str):
            owner.counts[call] += 1
            out = self._as_it_is(layer, hidden_states, *args, **kwargs)
            if self._rows is None:
                return out
            if isinstance(out, tuple):
                return (out[0].index_select(1, self._rows), *out[1:])
            return out.index_select(1, self._rows)
        owner.counts["fused"] += 1
        y: Tensor = FusedLayer.apply(  # type: ignore[no-untyped-call]
            hidden_states[0], call, *call.parameters()
        )
        return y[None]

    def _as_it_is(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; run again in the backward if that is wanted."""
        own = partial(type(layer).forward, layer)
        if self._owner.recompute == "none" or not torch.is_grad_enabled():
            return own(hidden_states, *args, **kwargs)
        return checkpoint(
            own,
            hidden_states,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _again(layer)),
            **kwargs,
        )

    def _call(
        self, anatomy: Anatomy, hidden: Tensor, segments: Segments, rope: tuple[Tensor, Tensor]
    ) -> Call | str:
        """How this forward goes through the layer, or why it cannot."""
        count = hidden.shape[1]
        groups = self._prepared.groups(self._index, hidden)
        if isinstance(groups, str):
            return groups
        qkv, o, gate_up, down = groups
        if self._rows is not None:
            o, gate_up, down = (group.rows(self._rows, count) for group in (o, gate_up, down))
        cos, sin = rope
        return Call(
            anatomy,
            qkv,
            o,
            gate_up,
            down,
            cos=cos.reshape(count, -1),
            sin=sin.reshape(count, -1),
            segments=segments,
            rows=self._rows,
            recompute=self._owner.recompute,
            prefixes=stretches(anatomy.attention, segments.lengths),
        )


class _Prepared:
    """Who adapts which linear in one forward.

    It is found for all layers at once, when the first of them asks. Between two layers their large
    products drive this code out of the processor's caches, and it would take four times as long.
    """

    def __init__(self, owner: FusedBody) -> None:
        self._owner = owner
        self._found: dict[tuple[object, ...], list[Groups | str]] = {}

    def groups(self, index: int, hidden: Tensor) -> Groups | str:
        """The linears of a layer that gets ``hidden`` [1, N, d], or why it cannot be fused."""
        key = (hidden.shape[1], hidden.dtype, hidden.device)
        if key not in self._found:
            layers = zip(self._owner.layers, self._owner._anatomies, strict=True)
            self._found[key] = [_groups(layer, anatomy, hidden) for layer, anatomy in layers]
        return self._found[key][index]


def _groups(layer: nn.Module, anatomy: Anatomy | str, hidden: Tensor) -> Groups | str:
    if isinstance(anatomy, str):
        return anatomy
    reason = _trained_whole(layer, anatomy)
    if reason is not None:
        return reason
    linears: dict[int, Linear] = {}
    keys: Tensor | None = None
    for module in anatomy.linears:
        found, keys = _linear(module, hidden, keys)
        if isinstance(found, str):
            return found
        linears[id(module)] = found
    qkv, o, gate_up, down = (
        Group([linears[id(module)] for module in members], keys)
        for members in (anatomy.qkv, (anatomy.o,), anatomy.gate_up, (anatomy.down,))
    )
    return qkv, o, gate_up, down


def _trained_whole(layer: nn.Module, anatomy: Anatomy) -> str | None:
    """Why a layer cannot be fused: parts that are no linears, such as norms, are an adapter's."""
    linears = {id(module) for module in anatomy.linears}
    for module in layer.modules():
        site = module.__dict__.get("forward")
        if id(module) in linears or not isinstance(site, SiteForward):
            continue
        if site.forwards.plan().routing.names & (site.replaced.keys() | site.low_rank.keys()):
            return "an adapter trains a norm of the layer, or another part that is no linear"
    return None


@contextlib.contextmanager
def _without_checkpointing(layer: Any) -> Iterator[None]:
    """transformers' own is off: it would run the layer again when its segments are forgotten."""
    on = getattr(layer, "gradient_checkpointing", False)
    if on:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if on:
            layer.gradient_checkpointing = on


@contextlib.contextmanager
def _again(layer: nn.Module) -> Iterator[None]:
    """Around the second forward of a layer, which happens in the backward."""
    with reading(layer), _without_checkpointing(layer):
        yield


def _linear(module: Any, hidden: Tensor, keys: Tensor | None) -> tuple[Linear | str, Tensor | None]:
    """A linear with the adapters that this forward routes to it, or why it cannot be fused."""
    weight = partial(dense_weight, module, hidden.dtype)
    bias = None if module.bias is None else module.bias.detach().to(hidden.dtype)
    site = module.__dict__.get("forward")
    if site is None:
        return Linear(weight, bias, 0), keys
    if not isinstance(site, SiteForward) or site.previous is not None:
        return "another library has overridden the forward of its linears", keys
    site.called = True
    plan = site.forwards.plan()
    parts = []
    for name, start, stop, share in plan.stretches(hidden.shape[1]):
        low_rank = site.low_rank.get(name)
        reason = _why_not(site, name, plan)
        if reason is not None:
            return reason, keys
        if low_rank is None:
            continue
        dropout = low_rank.dropout if module.training else 0.0
        keys = plan.dropout_keys if dropout else keys
        factor = low_rank.scaling * share
        parts.append(
            Part(name, start, stop, low_rank.A, low_rank.B, low_rank.bias, factor, dropout)
        )
        if low_rank.start is not None:
            # as one more adapter, which is frozen; a part of the base, so nothing drops its input
            A0, B0 = low_rank.start
            parts.append(Part(f"{name} at its start", start, stop, A0, B0, None, -factor, 0.0))
    keys = None if keys is None else keys.reshape(-1).to(hidden.device)
    return Linear(weight, bias, site.number, tuple(parts)), keys


def _why_not(site: SiteForward, name: str, plan: Plan) -> str | None:
    """Why an adapter's share of a linear cannot be fused; ``None`` if it can."""
    if name in site.replaced:
        return "an adapter trains a module or a bias of the layer whole"
    low_rank = site.low_rank.get(name)
    if low_rank is None:
        return None
    if low_rank.magnitude is not None:
        return "DoRA's lengths need the plain path"
    if low_rank.dropout and site.module.training and plan.dropout_keys is None:
        return "dropout without keys is drawn in the plain path"
    if plan.routing.axis == "row" and len(plan.routing.mixes) > 1:
        return "a routing by rows has no meaning in a packed row"
    return None
