"""The tensors of one adapter on one model: a flat buffer, and views of it per site."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.sites import Kind
from lorakit.errors import LorakitError
from lorakit.layers.dora import Magnitude


class LowRankParameters:
    """A low-rank site as a module uses it; the tensors are parameters of a :class:`Bank`.

    They are looked up at each use, so that a parameter put in another's place acts, as
    ``load_state_dict(…, assign=True)`` and ``torch.func.functional_call`` do it.

    Args:
        bank: of the adapter.
        path: of the site in it.
    """

    __slots__ = ("_A", "_B", "_bias", "_held", "_magnitude", "_start", "dropout", "kind", "scaling")

    def __init__(self, bank: Bank, path: str, scaling: float, kind: Kind, dropout: float) -> None:
        self._held: dict[str, Any] = bank._parameters
        self._A, self._B, self._bias = (
            _key(f"{path}.{name}") for name in ("lora_A", "lora_B", "lora_bias")
        )
        self._start = _key(f"{path}.start_A"), _key(f"{path}.start_B")
        magnitude = _key(f"{path}.lora_magnitude")
        self._magnitude = (
            (magnitude, Magnitude(bank.get(magnitude))) if magnitude in self._held else None
        )
        self.scaling = scaling
        self.kind = kind
        self.dropout = dropout

    @property
    def A(self) -> nn.Parameter:
        parameter: nn.Parameter = self._held[self._A]
        return parameter

    @property
    def B(self) -> nn.Parameter:
        parameter: nn.Parameter = self._held[self._B]
        return parameter

    @property
    def bias(self) -> nn.Parameter | None:
        return self._held.get(self._bias)

    @property
    def start(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Frozen A and B whose change is subtracted: the adapter acts as scaling·(B A − B₀ A₀)."""
        A0, B0 = self._start
        return (self._held[A0], self._held[B0]) if A0 in self._held else None

    @property
    def magnitude(self) -> Magnitude | None:
        if self._magnitude is None:
            return None
        key, magnitude = self._magnitude
        magnitude.value = self._held[key]
        return magnitude

    def whole(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole change, those of the start stacked behind them."""
        if self.start is None:
            return self.A, self.B
        A0, B0 = self.start
        return torch.cat([self.A, A0]), torch.cat([self.B, -B0], dim=1)


class ReplaceParameters:
    """Parameters that stand in for some of a module's own; looked up as a low-rank site's are.

    Args:
        bank: of the adapter.
    """

    __slots__ = ("_bank", "_names")

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._names: dict[str, str] = {}

    def put(self, key: str, name: str) -> None:
        """Let what the bank calls ``name`` stand in for the module's parameter ``key``."""
        self._names[key] = name

    @property
    def by_name(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that the module has for its own."""
        return {key: self._bank.get(name) for key, name in self._names.items()}


class Bank(nn.Module):
    """The parameters of one adapter, registered under the model so that optimizers find them.

    A trainable adapter's tensors are views of one flat buffer per device: one tensor to
    optimise, to reduce, to write.

    Args:
        tensors: name (``"<path>.lora_A"``…) → initial value. Copied where trainable.
        trainable: whether they receive gradients.
        fixed: further tensors, which never do.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        trainable: bool,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.trainable = trainable
        #: names in the order of the flat buffer
        self._order = list(tensors)
        #: the flat parameter that optimizers may use in place of its views
        self.flat_parameter: list[nn.Parameter] = []  # in a list: not registered a second time
        for name, tensor in {**tensors, **(fixed or {})}.items():
            wanted = trainable and name in tensors
            self.register_parameter(_key(name), nn.Parameter(tensor, requires_grad=wanted))
        if trainable:
            self._flatten()

    def get(self, name: str) -> nn.Parameter:
        """The parameter that was given as ``name``."""
        parameter = self._parameters[_key(name)]
        assert parameter is not None
        return parameter

    def own(self) -> list[nn.Parameter]:
        """The adapter's tensors without the fixed ones, in the order of the flat buffer."""
        return [self.get(name) for name in self._order]

    def arrange(self, group_of: Callable[[str], Hashable]) -> dict[Hashable, tuple[int, int]]:
        """Put the tensors of each group behind one another in the flat buffer.

        In a group the A's come first, and else the order stays as it was: so the A's of linears
        that read one input lie together, and one product can use all of them.

        Returns:
            Group → its begin and end in :meth:`flat`.

        Raises:
            LorakitError: as :meth:`flat`.
        """
        groups: dict[Hashable, list[str]] = {}
        for name in self._order:
            groups.setdefault(group_of(name), []).append(name)
        for names in groups.values():
            names.sort(key=lambda name: not name.endswith(".lora_A"))
        order = [name for names in groups.values() for name in names]
        if order != self._order:
            self._let_go()
            self._order = order
            self._flatten()
        self.flat()
        ranges, offset = {}, 0
        for group, names in groups.items():
            size = sum(self.get(name).numel() for name in names)
            ranges[group] = (offset, offset + size)
            offset += size
        return ranges

    @torch.no_grad()
    def _flatten(self) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in self.own():
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self.flat_parameter = []
        for (device, dtype), parameters in groups.items():
            size = sum(p.numel() for p in parameters)
            flat = torch.empty(size, dtype=dtype, device=device)
            offset = 0
            for p in parameters:
                view = flat[offset : offset + p.numel()].view(p.shape)
                view.copy_(p)
                p.data = view
                offset += p.numel()
            self.flat_parameter.append(nn.Parameter(flat))

    def _is_flat(self) -> bool:
        """Whether the parameters still are views of the flat buffer."""
        return _lie_in(self.own(), self.flat_parameter[0])

    def flat(self) -> nn.Parameter:
        """The one flat parameter, with ``grad`` the flat gradient that the views accumulate into.

        Gradients that the views have from elsewhere are moved into it.

        Raises:
            LorakitError: the adapter is frozen, or spread over several devices.
        """
        if not self.trainable or len(self.flat_parameter) != 1:
            raise LorakitError(
                "this adapter is frozen; attach it with trainable=True"
                if not self.trainable
                else "this adapter lies on several devices or has several dtypes; use parameters()"
            )
        self._let_go()
        if not self._is_flat():
            self._flatten()  # the model was moved or copied since
        flat = self.flat_parameter[0]
        if flat.grad is None:
            flat.grad = torch.zeros_like(flat)
        elsewhere = any(p.grad is not None for p in self.own()) and not self._is_linked()
        offset = 0
        for parameter in self.own():
            size = parameter.numel()
            view = flat.grad[offset : offset + size].view(parameter.shape)
            if elsewhere:  # by a backward that did not know of the flat one
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            parameter.grad = view
            offset += size
        return flat

    def _is_linked(self) -> bool:
        """Whether the parameters' gradients are views of the flat one."""
        flat = self.flat_parameter[0].grad
        gradients = [p.grad for p in self.own() if p.grad is not None]
        return flat is not None and len(gradients) == len(self._order) and _lie_in(gradients, flat)

    def _let_go(self) -> None:
        """Forget gradients that are views of a former flat one: it was set to something else."""
        gradients = [p.grad for p in self.own() if p.grad is not None]
        if len(gradients) < 2 or len(gradients) < len(self._order) or self._is_linked():
            return
        if _lie_in(gradients, gradients[0]):
            for parameter in self.own():
                parameter.grad = None


def _lie_in(tensors: Sequence[Tensor], buffer: Tensor) -> bool:
    """Whether tensors lie one behind the other, from the beginning of ``buffer``."""
    address, storage = buffer.data_ptr(), buffer.untyped_storage().data_ptr()
    for one in tensors:
        if one.data_ptr() != address or one.untyped_storage().data_ptr() != storage:
            return False
        address += one.numel() * one.element_size()
    return True


def _key(name: str) -> str:
    """What a tensor is called among a module's parameters, whose names must not hold a dot."""
    return name.replace(".", "/")
