"""The forward of a router with adapters: its linear's output changes, and with it its choice.

A router multiplies by its weight inside and gives back probabilities and chosen experts, so the
change of that product has to be added in the middle of its own forward. While that runs, the one
call of ``torch.nn.functional.linear`` with the router's weight gets B(A x) of each token's adapters
added; nothing else of it is touched, and no other router is known by its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorakit.errors import RoutingError
from lorakit.layers.dropout import keys_of
from lorakit.layers.routing import Plan, Share
from lorakit.layers.site import OutsideOfGraphs, is_sole

#: what a router may do to its weight before it multiplies by it
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double)


class RouterForward(OutsideOfGraphs):
    """Stands as the forward of a router; see the file.

    A graph would be traced without what is added inside of the router.
    """

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        plan = self.forwards.plan()
        used = plan.routing.names
        adapted, whole = used & self.low_rank.keys(), used & self.replaced.keys()
        if plan.uniform == () or not (adapted or whole):
            return self.base(*args, **kwargs)
        if not whole:
            return self._with_change(plan, self.module.weight, args, kwargs)  # type: ignore[arg-type]
        if plan.uniform is None or not is_sole(plan.uniform):
            raise RoutingError(
                f"{self.path} was trained whole in part, and its tokens are not told apart then. "
                "Use that adapter alone, at weight 1, for the whole batch"
            )
        if not adapted:
            return self._with_parameters(plan.uniform[0], args, kwargs)
        own = self.replaced[plan.uniform[0].name].by_name
        weight = own.get("weight", self.module.weight)
        assert isinstance(weight, Tensor)
        with _Linear(weight, lambda x, y: self._changed(plan, x, y)) as linear:
            out = self._with_parameters(plan.uniform[0], args, kwargs)
        return self._checked(linear, out)

    def _with_change(
        self, plan: Plan, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with _Linear(weight, lambda x, y: self._changed(plan, x, y)) as linear:
            out = self.base(*args, **kwargs)
        return self._checked(linear, out)

    def _checked(self, linear: _Linear, out: Any) -> Any:
        if linear.calls != 1:
            raise RoutingError(
                f"{self.path} ({type(self.module).__name__}) multiplies by its weight "
                f"{linear.calls} times, or in another way than by torch.nn.functional.linear, so "
                "its adapter has no place to act. Leave it out with exclude"
            )
        return out

    def _changed(self, plan: Plan, x: Tensor, y: Tensor) -> Tensor:
        """What the linear gave, [N, E], with each token's adapters; ``x`` is [N, d]."""
        shape = y.shape
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        shares: Sequence[Share] = plan.shares(len(x), x.device, flattened=True)
        keys = None if plan.dropout_keys is None else keys_of(x, plan.dropout_keys.to(x.device))
        for share in shares:
            site = self.low_rank.get(share.name)
            if site is None:
                continue
            rows = share.rows
            part = x if rows is None else x.index_select(0, rows)
            mine = keys if keys is None or rows is None else keys.index_select(0, rows)
            part = self._dropped(site, part, mine)
            change = F.linear(F.linear(part, site.A.to(part.dtype)), site.B.to(part.dtype))
            factor = site.scaling * share.weight
            if isinstance(factor, Tensor):
                factor = factor.to(change.dtype).unsqueeze(-1)
            change = (change * factor).to(y.dtype)
            y = y + change if rows is None else y.index_add(0, rows, change)
        return y.reshape(shape)


class _Linear(TorchFunctionMode):
    """While it is open, a linear with this weight, or with a cast of it, gets ``change``."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._weights = [weight]
        self._change = change
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _CASTS and self._is_weight(args[0]):
            self._weights.append(out)
        elif func is F.linear:
            x, weight = _linear_arguments(*args, **(kwargs or {}))
            if self._is_weight(weight):
                self.calls += 1
                return self._change(x, out)
        return out

    def _is_weight(self, tensor: Any) -> bool:
        return any(tensor is own for own in self._weights)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Any = None) -> tuple[Tensor, Tensor]:
    return input, weight
