"""One flat gradient for the parameters of an adapter, which backwards written by hand add to.

A gradient that goes through autograd is a tensor of its own for every parameter and step: two
passes over all of them, a node of the graph for each and, on a CPU, the price of fresh pages. Of
many adapters in one forward that is a good part of the step. So a backward written by hand puts
its products where they belong, and autograd does not know of them; what it makes elsewhere is added
when the gradient is collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

#: the attribute of a parameter that holds its :class:`_Place`
_NAME = "lorakit_gradient"


class _Place:
    """A parameter's part of a flat gradient."""

    __slots__ = ("filled", "view")

    def __init__(self, view: Tensor) -> None:
        self.view = view
        self.filled = False


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
        self._places: list[tuple[nn.Parameter, _Place]] = []
        offset = 0
        for parameter in parameters:
            part = self._flat[offset : offset + parameter.numel()]
            place = _Place(part.view(parameter.shape))
            setattr(parameter, _NAME, place)
            self._places.append((parameter, place))
            offset += parameter.numel()
        self.clear()

    def clear(self) -> None:
        """Forget what was added up."""
        for parameter, place in self._places:
            parameter.grad = None
            place.filled = False

    def collect(self) -> Tensor:
        """What backwards have added up since :meth:`clear`, [P]; the memory itself."""
        for parameter, place in self._places:
            if parameter.grad is not None:
                _add(place, parameter.grad)
                parameter.grad = None
            elif not place.filled:
                place.view.zero_()
                place.filled = True
        return self._flat

    def release(self) -> None:
        """From here on the parameters have gradients as autograd makes them."""
        for parameter, _ in self._places:
            parameter.grad = None
            delattr(parameter, _NAME)
        self._places = []
        self._flat = self._flat.new_empty(0)


def has_place(parameter: nn.Parameter) -> bool:
    """Whether a backward adds the gradient of ``parameter`` itself, by the functions below."""
    return hasattr(parameter, _NAME)


def gradient_product(
    parameter: nn.Parameter, left: Tensor, right: Tensor, factor: float = 1.0
) -> Tensor | None:
    """``factor · leftᵀ right`` for ``parameter``: added where it has a place, else given back.

    Args:
        left: [N, m], right: [N, n]; the parameter is [m, n].
    """
    place: _Place | None = getattr(parameter, _NAME, None)
    if place is not None and place.view.dtype == left.dtype:
        kept = 1 if place.filled else 0
        torch.addmm(place.view, left.t(), right, beta=kept, alpha=factor, out=place.view)
        place.filled = True
        return None
    product = left.t() @ right
    return gradient_sum(parameter, product if factor == 1.0 else product.mul_(factor))


def gradient_products(
    parameters: Sequence[nn.Parameter], left: Tensor, right: Tensor
) -> list[Tensor | None]:
    """The same for parameters [m_i, n] that share ``right``.

    It is one product if their places lie together, have the dtype of ``left``, and all or none of
    them were added to; else one for each.

    Args:
        left: [N, Σ m_i], in the order of the parameters.
    """
    places: list[_Place | None] = [getattr(parameter, _NAME, None) for parameter in parameters]
    known = [place for place in places if place is not None]
    together = None
    if len(known) == len(places) and len({place.filled for place in known}) == 1:
        together = one_below_the_other([place.view for place in known])
    if together is None or together.dtype != left.dtype:
        columns = torch.split(left, [len(parameter) for parameter in parameters], dim=1)
        return [
            gradient_product(one, part, right)
            for one, part in zip(parameters, columns, strict=True)
        ]
    kept = 1 if known[0].filled else 0
    torch.addmm(together, left.t(), right, beta=kept, out=together)
    for place in known:
        place.filled = True
    return [None] * len(places)


def one_below_the_other(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices [m_i, n] as one [Σ m_i, n] in the same memory; ``None`` if they do not lie so."""
    first = matrices[0].detach()
    if len(matrices) == 1:
        return first
    begin, width = first.data_ptr(), first.shape[1]
    address = begin
    for one in matrices:
        if one.data_ptr() != address or one.dtype != first.dtype or one.shape[1] != width:
            return None
        if not one.is_contiguous():
            return None
        address += one.numel() * one.element_size()
    if one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
        return None  # neighbours by chance
    # a single row is contiguous whatever its stride, so the stride is not asked for
    rows = (address - begin) // (width * first.element_size())
    return first.as_strided((rows, width), (width, 1))


def gradient_sum(parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
    """The same for a gradient that exists, in the shape of ``parameter``."""
    place: _Place | None = getattr(parameter, _NAME, None)
    if place is None:
        return gradient.to(parameter.dtype)
    _add(place, gradient)
    return None


@torch.no_grad()
def _add(place: _Place, gradient: Tensor) -> None:
    if place.filled:
        place.view.add_(gradient)
    else:
        place.view.copy_(gradient)
        place.filled = True
