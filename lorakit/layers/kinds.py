"""What can be adapted: the kinds of modules, their factors' shapes, and their deltas.

Legend: r rank, ``A``/``B`` as in ``core.sites``. A module is known by its features alone
(``in_features``, ``out_features``), so a layer quantised by any library is a black box that works.
A subclass of torch's own classes may do something else in its ``forward`` (look up positions that
it counts itself, standardise its weight), which a change of the product does not follow; so one
call of it is compared with the product.

A mixture of experts has two kinds of its own. *Experts* are one module whose parameters hold a
matrix for each expert, ``[E, d_out, d_in]`` or ``[E, d_in, d_out]``, as transformers 5 makes them
for nearly all models: each such parameter is a site. A *router* holds the weight of a linear, and
gives back what it made of that linear's output.
"""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.sites import EXPERT_PARAMETERS, Kind

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: how the classes of routers are called
_ROUTER = re.compile(r"(Router|Gate)$")

#: largest difference of two computations of one output, relative to its largest number
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_HALF = 3e-2

#: torch's classes whose subclasses may compute something else
_ORDINARY = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: rows of a linear's trial; many numbers of groups divide it
_ROWS = 48
#: subclass of a linear → whether its first instance was one; a trial of each would take long
_linears: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shape:
    """What a site's factors must look like."""

    kind: Kind
    d_in: int
    """Input features, channels, or vocabulary."""
    d_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0
    """Experts in the parameter; 0 for what is no such parameter."""
    transposed: bool = False
    """Whether experts are stored as [E, d_in, d_out]."""

    def a(self, rank: int) -> tuple[int, ...]:
        """Shape of A."""
        return (*self._experts, rank, self.d_in, *self.kernel)

    def b(self, rank: int) -> tuple[int, ...]:
        """Shape of B."""
        return (*self._experts, self.d_out, rank // self.groups, *(1 for _ in self.kernel))

    @property
    def _experts(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()

    @property
    def fan_in(self) -> int:
        """Inputs that one row of A sees."""
        width = self.d_in
        for k in self.kernel:
            width *= k
        return width

    @property
    def max_rank(self) -> int:
        """The rank above which more rank changes nothing."""
        return min(self.fan_in, self.d_out)


def shape_of(module: Any) -> Shape | None:
    """How ``module`` can be adapted; ``None`` if it cannot, or by its parameters alone."""
    if is_router(module):
        return Shape("router", int(module.weight.shape[1]), int(module.weight.shape[0]))
    if not is_product(module):
        return None
    if isinstance(module, nn.Embedding):
        return Shape("embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Shape(
            "conv", module.in_channels, module.out_channels, module.kernel_size, module.groups
        )
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's transposed linear
        return Shape("linear", int(module.weight.shape[0]), int(module.nf))
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int):
        return Shape("linear", d_in, d_out)
    return None


def is_product(module: Any) -> bool:
    """Whether a module computes what its class in torch does, so that a low-rank change fits.

    Others than subclasses of those with a ``forward`` of their own are believed.
    """
    kind = next((one for one in _ORDINARY if isinstance(module, one)), None)
    if kind is None or type(module).forward is kind.forward:
        return True
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        return True  # quantised
    if kind is not nn.Linear:
        return _agrees_once(module, kind, weight)
    if type(module) not in _linears:
        _linears[type(module)] = _agrees_once(module, kind, weight)
    return _linears[type(module)]


@torch.no_grad()
def _agrees_once(module: Any, kind: type[nn.Module], weight: Tensor) -> bool:
    """Whether the output for one input is the product's; a linear's in its shape alone.

    A linear may round its weight in its own way, and need a device that it is not on yet.
    """
    to: dict[str, Any] = {"device": weight.device}
    if kind is nn.Linear:
        x = weight.new_ones(_ROWS, module.in_features)
        expected = weight.new_empty(_ROWS, module.out_features, device="meta")
    elif kind is nn.Embedding:
        last = module.num_embeddings - 1
        x = torch.tensor([[last, 0, last // 2]], **to)
        expected = F.embedding(x, weight) * getattr(module, "embed_scale", 1.0)
    else:
        spread = zip(module.kernel_size, module.dilation, strict=True)
        size = [module.in_channels, *(2 * ((k - 1) * d + 1) for k, d in spread)]
        x = torch.linspace(-1, 1, math.prod(size), **to).to(weight.dtype).view(1, *size)
        expected = module._conv_forward(x, weight, module.bias)
    try:
        found = type(module).forward(module, x)
    except Exception:  # whatever a module of another make raises
        return kind is nn.Linear
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return expected.is_meta or agrees(found, expected)


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of one output differ by no more than rounding."""
    found, expected = found.nan_to_num(), expected.nan_to_num()
    scale = expected.abs().max().clamp_min(1e-30)
    limit = _ROUNDING.get(expected.dtype, _ROUNDING_HALF)
    return bool((found - expected).abs().max() <= limit * scale)


def is_router(module: Any) -> bool:
    """Whether a module is a linear that also chooses experts, known by its class's name."""
    if not isinstance(module, nn.Module) or not _ROUTER.search(type(module).__name__):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def expert_shapes(module: Any) -> dict[str, Shape]:
    """Parameter → how it can be adapted, of a module of fused experts; else empty.

    Such a module says by itself how it is laid out (transformers' ``use_experts_implementation``).
    """
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool) or not isinstance(module, nn.Module):
        return {}
    found = {}
    for name in EXPERT_PARAMETERS:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
            experts, first, second = map(int, parameter.shape)
            d_in, d_out = (first, second) if transposed else (second, first)
            found[name] = Shape("experts", d_in, d_out, experts=experts, transposed=transposed)
    return found


def shapes_in(path: str, module: Any) -> dict[str, Shape]:
    """Site path → how it can be adapted, of everything that one module runs by itself."""
    shape = shape_of(module)
    if shape is not None:
        return {path: shape}
    return {f"{path}.{name}": one for name, one in expert_shapes(module).items()}


def delta(
    module: nn.Module, kind: Kind, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None
) -> Tensor:
    """B(A x), without the scaling.

    Args:
        x: linear [..., d_in]; embedding ids [...]; conv [N, c_in, …].

    Returns:
        The change in the shape of the module's output, in the dtype of the factors.
    """
    if kind == "linear":
        return F.linear(F.linear(x, A), B, bias)
    if kind == "embedding":
        change = F.linear(F.embedding(x, A.T), B, bias)
        scale = getattr(module, "embed_scale", None)  # Gemma, T5Gemma, BART scale inside
        return change if scale is None else change * scale
    return _conv_delta(module, x, A, B, bias)


def _conv_delta(module: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    conv = _CONV[len(module.kernel_size)]
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    hidden = conv(x, A, None, module.stride, padding, module.dilation)
    return conv(hidden, B, bias, groups=module.groups)
