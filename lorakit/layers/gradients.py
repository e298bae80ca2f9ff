"""One flat gradient for the parameters of an adapter, and where each one's part is computed.

A backward written by hand puts each product there at once; what autograd makes elsewhere is copied
in afterwards. The alternative, a new tensor for every parameter in every step, costs two passes
over all gradients and, on a CPU, the price of fresh pages.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: the attribute of a parameter that holds the memory of its gradient, until it is used
_FREE = "lorakit_gradient"


class FlatGradient:
    """The gradient of parameters, in one piece.

    Args:
        parameters: in the order of the piece; all of one device and dtype.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        size = sum(parameter.numel() for parameter in parameters)
        # zeros: it takes its memory now and not page by page
        self._flat = parameters[0].detach().new_zeros(size)
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        offset = 0
        for parameter in parameters:
            part = self._flat[offset : offset + parameter.numel()]
            self._views.append((parameter, part.view(parameter.shape)))
            offset += parameter.numel()
        self.clear()

    def clear(self) -> None:
        """Forget what was added up."""
        for parameter, view in self._views:
            parameter.grad = None
            setattr(parameter, _FREE, view)

    def collect(self) -> Tensor:
        """What backwards have added up since :meth:`clear`, [P]; the memory itself."""
        for parameter, view in self._views:
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
                parameter.grad = view.detach()
        return self._flat

    def release(self) -> None:
        """From here on the parameters have gradients as autograd makes them."""
        for parameter, _ in self._views:
            parameter.grad = None
            setattr(parameter, _FREE, None)
        self._views = []
        self._flat = self._flat.new_empty(0)


def gradient_product(
    parameter: nn.Parameter, left: Tensor, right: Tensor, factor: float = 1.0
) -> Tensor:
    """``factor · leftᵀ right``, what a backward gives for ``parameter``; in its memory if it has
    some that is not used yet.

    Args:
        left: [N, m], right: [N, n]; the parameter is [m, n].
    """
    memory: Tensor | None = getattr(parameter, _FREE, None)
    if memory is None or memory.dtype != left.dtype:
        product = left.t() @ right
        return product if factor == 1.0 else product.mul_(factor)
    # once: autograd adds further products of this forward to it, or to what it has made of it
    setattr(parameter, _FREE, None)
    # a view of its own, which autograd keeps as the gradient instead of copying it
    return torch.addmm(memory, left.t(), right, beta=0, alpha=factor, out=memory).detach()
