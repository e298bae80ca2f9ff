"""The tensors of one adapter on one model: a flat buffer, and views of it per site."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn

from lorakit.core.sites import Kind
from lorakit.errors import LorakitError
from lorakit.layers.dora import Magnitude


class LowRankParameters:
    """A low-rank site as a module uses it; the tensors are parameters of a :class:`Bank`."""

    __slots__ = ("A", "B", "bias", "dropout", "kind", "magnitude", "scaling", "start")

    def __init__(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        bias: nn.Parameter | None,
        scaling: float,
        kind: Kind,
        dropout: float,
        magnitude: nn.Parameter | None = None,
        start: tuple[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        self.A, self.B, self.bias = A, B, bias
        #: frozen A and B whose change is subtracted: the adapter acts as scaling·(B A − B₀ A₀)
        self.start = start
        self.magnitude = None if magnitude is None else Magnitude(magnitude)
        self.scaling = scaling
        self.kind = kind
        self.dropout = dropout

    def whole(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole change, those of the start stacked behind them."""
        if self.start is None:
            return self.A, self.B
        A0, B0 = self.start
        return torch.cat([self.A, A0]), torch.cat([self.B, -B0], dim=1)


class ReplaceParameters:
    """Parameters that stand in for some of a module's own, by their names in it."""

    __slots__ = ("by_name",)

    def __init__(self, by_name: dict[str, nn.Parameter]) -> None:
        self.by_name = by_name


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
            # a parameter's name must not hold a dot
            wanted = trainable and name in tensors
            self.register_parameter(
                name.replace(".", "/"), nn.Parameter(tensor, requires_grad=wanted)
            )
        if trainable:
            self._flatten()

    def get(self, name: str) -> nn.Parameter:
        """The parameter that was given as ``name``."""
        parameter = self._parameters[name.replace(".", "/")]
        assert isinstance(parameter, nn.Parameter)
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
                p.grad = None
                offset += p.numel()
            self.flat_parameter.append(nn.Parameter(flat))

    def _is_flat(self) -> bool:
        """Whether the parameters still are views of the flat buffer."""
        address = self.flat_parameter[0].data_ptr()
        for parameter in self.own():
            if parameter.data_ptr() != address:
                return False
            address += parameter.numel() * parameter.element_size()
        return True

    def flat(self) -> nn.Parameter:
        """The one flat parameter, with ``grad`` the flat gradient that the views accumulate into.

        Raises:
            LorakitError: the adapter is frozen, or spread over several devices.
        """
        if not self.trainable or len(self.flat_parameter) != 1:
            raise LorakitError(
                "this adapter is frozen; attach it with trainable=True"
                if not self.trainable
                else "this adapter lies on several devices or has several dtypes; use parameters()"
            )
        if not self._is_flat():
            self._flatten()  # the model was moved or copied since
        flat = self.flat_parameter[0]
        if flat.grad is None:
            flat.grad = torch.zeros_like(flat)
        offset = 0
        for parameter in self.own():
            size = parameter.numel()
            parameter.grad = flat.grad[offset : offset + size].view(parameter.shape)
            offset += size
        return flat
