"""An adapted module's forward: ``y0 = base(x)``, then ``y0 + delta(x, y0, routing)``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.errors import RoutingError
from lorakit.layers.bank import LowRankParameters, ReplaceParameters
from lorakit.layers.dora import Magnitude
from lorakit.layers.dropout import keyed_dropout, keys_of, site_number
from lorakit.layers.forwards import Forwards
from lorakit.layers.kinds import delta
from lorakit.layers.routing import Plan, Share

#: dimensions of a row of x that are features, not tokens
_FEATURE_DIMS = {"linear": 1, "embedding": 0}


def is_sole(shares: Sequence[Share]) -> bool:
    """Whether one adapter alone acts, on all rows at weight 1."""
    return len(shares) == 1 and shares[0].rows is None and bool(shares[0].weight == 1.0)


#: how models call their embeddings of distances (T5, MPNet, wav2vec 2, BERT's relative_key)
_RELATIVE = re.compile(r"(^|_)rel(ative)?_|distance")

_serials = itertools.count()
_traced: set[int] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_traced(serial: int) -> bool:
    """Runs once, while a site is traced: a graph cannot mark its sites as called."""
    _traced.add(serial)
    return True


class SiteForward:
    """Stands in a module's ``__dict__`` as ``forward``; the module itself is untouched.

    An object rather than a closure, so that copying the model copies it with its module.
    """

    def __init__(self, module: nn.Module, path: str, forwards: Forwards) -> None:
        self.module = module
        self.path = path
        self.number = site_number(path)
        self.forwards = forwards
        #: a forward that somebody (accelerate, …) had put there before us
        self.previous = module.__dict__.get("forward")
        self.low_rank: dict[str, LowRankParameters] = {}
        self.replaced: dict[str, ReplaceParameters] = {}
        self.called = False
        self._serial = next(_serials)
        #: experts see the tokens that a router sends them, so a row's number means nothing there
        self.routed = "experts" in path.split(".")
        #: tables of relative positions are asked for [T, T], where T may be the number of rows
        self.relative = isinstance(module, nn.Embedding) and bool(
            _RELATIVE.search(path.rpartition(".")[2])
        )
        self._inside = False

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward. Not a bound method kept: that would be pickled by name."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # called by functional_call below
            return self.base(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        return self._eager(*args, **kwargs)

    def put(self, name: str, path: str, parameters: LowRankParameters) -> None:
        """Add one adapter's factors of the site at ``path``."""
        self.low_rank[name] = parameters

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        plan = self.forwards.plan()
        used = plan.routing.names
        if plan.uniform == () or not (used & self.low_rank.keys() or used & self.replaced.keys()):
            return self.base(*args, **kwargs)  # whatever part of the tokens it sees
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.is_nested:
            return self._without_rows(plan, x, args, kwargs)
        if plan.uniform is None and (self.routed or self.relative):
            sees = "looks up distances between positions"
            if self.routed:
                sees = "is an expert and sees routed tokens"
            raise RoutingError(
                f"{self.path} {sees}, not rows; all rows of a batch must use the same adapters here"
            )
        shares = plan.shares(self._count(plan, x), x.device)
        replaced = [s for s in shares if s.name in self.replaced] if self.replaced else []
        if replaced:
            y = self._replace(plan, replaced, x, args, kwargs)
        else:
            y = self.base(*args, **kwargs)
        owned = False
        # what DoRA rescales: each adapter's own output, before anything was added
        origin = y if not replaced or is_sole(shares) else None
        for share in shares:
            site = self.low_rank.get(share.name)
            if site is not None:
                y, owned = self._add(plan, site, share, x, y, origin, owned)
        return y

    @property
    def was_called(self) -> bool:
        """Whether any forward reached this site."""
        return self.called or self._serial in _traced

    # --- eager -----------------------------------------------------------------------------

    def _without_rows(
        self, plan: Plan, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output where the first argument is no plain tensor, and nothing tells the rows.

        Raises:
            RoutingError: more is asked for than one adapter's trained module in its place.
        """
        shares = plan.uniform or ()
        used = plan.routing.names
        if used & self.low_rank.keys():
            nested = isinstance(x, Tensor)
            raise RoutingError(
                f"{self.path} was called with a {'nested tensor' if nested else type(x).__name__} "
                "first, where its adapter needs the tensor that it changes. "
                + (
                    "Make torch's encoder with enable_nested_tensor=False"
                    if nested
                    else "Leave it out with exclude"
                )
            )
        replaced = [share for share in shares if share.name in self.replaced]
        if not is_sole(replaced):
            raise RoutingError(self._mixed)
        return self._with_parameters(replaced[0], args, kwargs)

    @property
    def _mixed(self) -> str:
        return (
            f"{self.path} was trained whole and is not called as tensor → tensor, so its "
            "rows cannot be mixed. Use one adapter, at weight 1, for the whole batch"
        )

    def _count(self, plan: Plan, x: Tensor) -> int:
        """Rows, or tokens of a packed batch, that this site sees."""
        if plan.routing.axis != "token":
            return int(x.shape[0]) if x.dim() else 1
        is_ids = not x.is_floating_point()
        return int(x.numel()) if is_ids else int(x.numel() // x.shape[-1])

    def _add(
        self,
        plan: Plan,
        site: LowRankParameters,
        share: Share,
        x: Tensor,
        y: Tensor,
        origin: Tensor | None,
        owned: bool,
    ) -> tuple[Tensor, bool]:
        """y plus one adapter's share; ``owned`` says that y may be written to."""
        keys = plan.dropout_keys
        rows = share.rows
        if rows is None and isinstance(share.weight, float):
            return self._everywhere(site, share, x, y, origin, keys), False
        flat = plan.routing.axis == "token"
        depth = _FEATURE_DIMS.get(site.kind, 0)
        if flat and site.kind != "conv":
            x = x.reshape(-1, *x.shape[x.dim() - depth :])
        shape = y.shape
        y = y.reshape(-1, shape[-1]) if flat else y
        if origin is not None and flat:
            origin = origin.reshape(-1, shape[-1])
        keys = keys.reshape(-1) if flat and keys is not None else keys
        if rows is None:
            part, rows = x, torch.arange(x.shape[0], device=x.device)
        else:
            part = x.index_select(0, rows)
            keys = None if keys is None else keys.index_select(0, rows)
            if origin is not None and site.magnitude is not None:
                origin = origin.index_select(0, rows)
        change = self._change(site, share.name, part, origin, y.dtype, keys)
        if isinstance(share.weight, float):
            change = change * share.weight
        else:
            weight = share.weight.to(change.dtype)
            change = change * weight.view(-1, *(1 for _ in change.shape[1:]))
        if not owned:
            y = y.clone()
        y.index_add_(0, rows, change.to(y.dtype))
        return y.reshape(shape), True

    def _everywhere(
        self,
        site: LowRankParameters,
        share: Share,
        x: Tensor,
        y: Tensor,
        origin: Tensor | None,
        keys: Tensor | None,
    ) -> Tensor:
        assert isinstance(share.weight, float)
        if site.magnitude is not None:
            change = self._rescaled(site, site.magnitude, share.name, x, origin, y.dtype, keys)
            return y + (change if share.weight == 1.0 else change * share.weight)
        factor = site.scaling * share.weight
        if site.kind == "linear" and site.bias is None and y.dtype == x.dtype:
            # fused: B(A x) is accumulated into a copy of y, no delta of y's size is made
            undropped = x
            x = self._dropped(site, x, keys)
            hidden = F.linear(x, site.A.to(x.dtype))
            out = torch.addmm(
                y.reshape(-1, y.shape[-1]),
                hidden.reshape(-1, hidden.shape[-1]),
                site.B.to(x.dtype).t(),
                alpha=factor,
            )
            if site.start is not None:
                A0, B0 = (t.to(x.dtype) for t in site.start)
                hidden = F.linear(undropped, A0)
                hidden = hidden.reshape(-1, hidden.shape[-1])
                out = torch.addmm(out, hidden, B0.t(), alpha=-factor)
            return out.view(y.shape)
        return y + (self._delta(site, x, y.dtype, keys) * factor).to(y.dtype)

    def _change(
        self,
        site: LowRankParameters,
        name: str,
        x: Tensor,
        origin: Tensor | None,
        dtype: torch.dtype,
        keys: Tensor | None,
    ) -> Tensor:
        """One adapter's change of the output, at weight 1."""
        if site.magnitude is not None:
            return self._rescaled(site, site.magnitude, name, x, origin, dtype, keys)
        return self._delta(site, x, dtype, keys) * site.scaling

    def _rescaled(
        self,
        site: LowRankParameters,
        magnitude: Magnitude,
        name: str,
        x: Tensor,
        origin: Tensor | None,
        dtype: torch.dtype,
        keys: Tensor | None,
    ) -> Tensor:
        """DoRA's change, ``(g − 1) ⊙ (W x) + g ⊙ s·B A x``; see ``layers.dora``.

        Dropout acts on the input of both parts, as in the authors' code and in PEFT, so that W is
        applied a second time while there is dropout.

        Args:
            origin: W x + bias where the module has computed it; else it is computed here.
        """
        own = self.replaced[name].by_name if name in self.replaced else {}
        if x.is_floating_point():
            dropped = self._dropped(site, x, keys)
            origin = origin if dropped is x else None
            x = dropped
        if origin is None:
            origin = self._own_output(name, x)
        bias = own.get("bias", getattr(self.module, "bias", None))
        A, B = site.whole()
        factor = magnitude.factor(self.module, A, B, site.scaling, own.get("weight"))
        spatial = (1,) * (B.dim() - 2)
        linear = origin if bias is None else origin - bias.to(origin.dtype).view(-1, *spatial)
        # 1 is taken off before a half-precision dtype would round it away
        change = (factor - 1).to(dtype).view(-1, *spatial) * linear
        dtype = x.dtype if x.is_floating_point() else dtype
        B = (B * factor.view(-1, 1, *spatial)).to(dtype)
        part = delta(self.module, site.kind, x, A.to(dtype), B, None)
        return change + (part * site.scaling).to(change.dtype)

    def _own_output(self, name: str, x: Tensor) -> Tensor:
        """The module's output without low-rank changes, with what this adapter replaces."""
        if name in self.replaced:
            output = self._with_parameters(Share(name, None, 1.0), (x,), {})
        else:
            output = self.base(x)
        assert isinstance(output, Tensor)
        return output

    def _delta(
        self, site: LowRankParameters, x: Tensor, dtype: torch.dtype, keys: Tensor | None
    ) -> Tensor:
        """B(A x), unscaled; the factors are cast to the activations' dtype."""
        undropped = x
        if x.is_floating_point():
            dtype = x.dtype
            x = self._dropped(site, x, keys)
        bias = None if site.bias is None else site.bias.to(dtype)
        change = delta(self.module, site.kind, x, site.A.to(dtype), site.B.to(dtype), bias)
        if site.start is not None:  # it stands for a part of the base, which is not dropped
            A0, B0 = (t.to(dtype) for t in site.start)
            change = change - delta(self.module, site.kind, undropped, A0, B0, None)
        return change

    def _dropped(self, site: LowRankParameters, x: Tensor, keys: Tensor | None) -> Tensor:
        if site.dropout == 0.0 or not self.module.training:
            return x
        if keys is None:
            return F.dropout(x, site.dropout)
        if self.routed:
            raise RoutingError(
                f"{self.path} is an expert and sees routed tokens; which of them a key of the "
                "dropout belongs to is not known. Train it without dropout"
            )
        return keyed_dropout(x, keys_of(x, keys), self.number, site.dropout)

    def _replace(
        self,
        plan: Plan,
        shares: list[Share],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's output with trained parameters in place of its own, per row."""
        if is_sole(shares):
            return self._with_parameters(shares[0], args, kwargs)
        base = self.base(*args, **kwargs)
        if not isinstance(base, Tensor) or len(args) != 1 or kwargs:
            raise RoutingError(self._mixed)
        is_ids = not x.is_floating_point()
        flat = plan.routing.axis == "token"
        y = base.reshape(-1, base.shape[-1]) if flat else base
        if flat:
            x = x.reshape(-1) if is_ids else x.reshape(-1, x.shape[-1])
        own, y = y, y.clone()
        for share in shares:
            # only its own rows: another row's NaN must not reach this adapter's gradient
            rows = torch.arange(len(x), device=x.device) if share.rows is None else share.rows
            part = x.index_select(0, rows)
            change = self._with_parameters(share, (part,), {}) - own.index_select(0, rows)
            if isinstance(share.weight, float):
                change = change * share.weight
            else:
                change = change * share.weight.to(y.dtype).view(-1, *(1 for _ in y.shape[1:]))
            y.index_add_(0, rows, change)
        return y.reshape(base.shape)

    def _with_parameters(self, share: Share, args: Any, kwargs: Any) -> Any:
        own = dict(self.module.named_parameters())
        values = {}
        for name, value in self.replaced[share.name].by_name.items():
            like = own.get(name, args[0] if args else value)  # a new bias, where there was none
            values[name] = value.to(like.dtype) if like.is_floating_point() else value
        self._inside = True
        try:
            return functional_call(self.module, values, args, kwargs)
        finally:
            self._inside = False

    # --- compiled --------------------------------------------------------------------------

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """One graph for every routing: all adapters, each multiplied by its rows' weights."""
        _note_traced(self._serial)
        y = self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        origin = y
        weights = self.forwards.weights
        if self.replaced:
            raise RoutingError(
                f"{self.path} was trained whole, which compiled code cannot switch per routing. "
                "Compile without that adapter, or run this model uncompiled"
            )
        for k, name in enumerate(self.forwards.names):
            site = self.low_rank.get(name)
            if site is None:
                continue
            if site.dropout and self.module.training and self.forwards.keyed:
                raise RoutingError(
                    "compiled code cannot read the keys of lorakit's dropout; train without "
                    "dropout, or uncompiled"
                )
            if x.shape[0] == weights.shape[0] or weights.shape[0] == 1:
                weight = weights[:, k].to(y.device, y.dtype).view(-1, *(1 for _ in y.shape[1:]))
            elif y.shape[:-1].numel() == weights.shape[0]:
                weight = weights[:, k].to(y.device, y.dtype).view(*y.shape[:-1], 1)
            else:
                raise RoutingError(
                    f"{self.path} sees {x.shape[0]} rows where the batch has {weights.shape[0]}; "
                    "leave it out (exclude) or run uncompiled"
                )
            change = self._change(site, name, x, origin, y.dtype, None)
            y = torch.where(weight != 0, y + weight * change.to(y.dtype), y)
        return y


class OutsideOfGraphs(SiteForward):
    """A site whose forward no graph holds: ``torch.compile`` breaks its graph there.

    It sees all tokens of the batch, in order.
    """

    def __init__(self, module: nn.Module, path: str, forwards: Forwards) -> None:
        super().__init__(module, path, forwards)
        self.routed = False

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        return self._broken(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _broken(self, *args: Any, **kwargs: Any) -> Any:
        return self._eager(*args, **kwargs)
