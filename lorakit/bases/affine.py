"""Linears whose weights are torchao's int8 or int4 tensors: scaled integers, weights alone.

============ ================================================== ============================
storage      a weight is                                        its scales
============ ================================================== ============================
int8         q · scale, q in [-128, 127]                        one for each output
int4         q · scale + zero, q in [-8, 7], two to a byte,     a pair for each 64 inputs
             the first in the low half
============ ================================================== ============================

The tensors are torchao's classes, ``Int8Tensor`` and ``Int4Tensor`` (plain packing); their numbers
are read here, with the same sums on every device. torchao's own product with an int8 tensor keeps
a wide copy of the weight from the forward to the backward; the one with an int4 tensor needs mslk
on a GPU, and neither has a gradient there. So :class:`AffineLinear` makes the weight dense for the
moment of each product, in the forward and again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases.nibbles import look_up, pairs
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import BaseError, collected
from lorakit.optional import require

#: the names of these storages
NAMES = ("int8-torchao", "int4-torchao")
#: inputs that share a scale in 4 bits, as in NF4; where the width is no multiple, fewer
_GROUPS = (64, 32)
#: the same floor as torchao's and mslk's, against division by zero
_EPS4, _EPS8 = 1e-6, torch.finfo(torch.float32).eps


class Affine:
    """What the tensors of both widths have in common."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in)."""
        return tuple(self._weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that ``store_`` writes to."""
        found = {"packed": self._weight.qdata, "scales": self._weight.scale}
        if self._weight.zero_point is not None:
            found["zeros"] = self._weight.zero_point
        return found


class Affine8(Affine):
    """torchao's ``Int8Tensor``: scales of rows, of groups of inputs, or one for all."""

    storage = "int8"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[d_out, d_in]."""
        weight = self._weight
        return self._scaled(
            weight.qdata.to(dtype),
            weight.scale.to(dtype),
            None if weight.zero_point is None else weight.zero_point.to(dtype),
        )

    def _scaled(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        (d_out, d_in), (rows, columns) = self.shape, self._weight.block_size
        blocks = values.view(d_out // rows, rows, d_in // columns, columns)
        by_block = (d_out // rows, 1, d_in // columns, 1)
        if zero is not None:
            blocks -= zero.view(by_block)
        blocks *= scale.view(by_block)
        return values

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The values at some places, float32 [places]."""
        weight = self._weight
        block = rows // weight.block_size[0], columns // weight.block_size[1]
        values = weight.qdata[rows, columns].float()
        if weight.zero_point is not None:
            values -= weight.zero_point.view(self._blocks)[block].float()
        scaled: Tensor = values.mul_(weight.scale.view(self._blocks)[block].float())
        return scaled

    @property
    def _blocks(self) -> tuple[int, int]:
        (d_out, d_in), (rows, columns) = self.shape, self._weight.block_size
        return d_out // rows, d_in // columns

    def store_(self, dense: Tensor) -> None:
        """Quantise again by blocks of the same size, symmetrically, as torchao does."""
        weight = self._weight
        (d_out, d_in), (rows, columns) = self.shape, weight.block_size
        blocks = dense.float().reshape(d_out // rows, rows, d_in // columns, columns)
        q, scale = _symmetric(blocks)
        weight.qdata.copy_(q.view(d_out, d_in))
        weight.scale.copy_(scale.view(weight.scale.shape))
        if weight.zero_point is not None:
            weight.zero_point.zero_()


class Affine4(Affine):
    """torchao's ``Int4Tensor``, plain packing."""

    storage = "int4"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[d_out, d_in]."""
        weight = self._weight
        code = torch.tensor([*range(8), *range(-8, 0)], dtype=dtype, device=weight.qdata.device)
        values = look_up(weight.qdata.detach(), pairs(code, low_first=True), dtype)
        d_out, d_in = self.shape
        groups = values.view(d_out, -1, weight.block_size[1])
        # apart, for addcmul takes three times as long
        groups.mul_(weight.scale.to(dtype).t()[..., None])
        groups.add_(weight.zero_point.to(dtype).t()[..., None])
        return values.view(d_out, d_in)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The values at some places, float32 [places]."""
        weight = self._weight
        byte = weight.qdata[rows, columns // 2].to(torch.int32) & 255
        nibble = torch.where(columns % 2 == 0, byte & 15, byte >> 4)
        q = torch.where(nibble < 8, nibble, nibble - 16)
        group = columns // weight.block_size[1]
        values: Tensor = q.float() * weight.scale[group, rows].float()
        return values.add_(weight.zero_point[group, rows].float())

    def store_(self, dense: Tensor) -> None:
        """Quantise again by groups of the same size."""
        weight = self._weight
        packed, scale, zero = _quantised4(
            dense.to(weight.qdata.device), weight.block_size[1], weight.scale.dtype
        )
        weight.qdata.copy_(packed)
        weight.scale.copy_(scale)
        weight.zero_point.copy_(zero)


def affine_weight(weight: Any) -> Affine8 | Affine4 | None:
    """How a tensor of torchao's is read; ``None`` if it is none of these.

    Raises:
        BaseError: it is one, but what it means depends on more than its numbers.
    """
    kinds: dict[str, type[Affine8] | type[Affine4]] = {"Int8Tensor": Affine8, "Int4Tensor": Affine4}
    kind = kinds.get(type(weight).__name__)
    if kind is None or not type(weight).__module__.startswith("torchao."):
        return None
    if weight.act_pre_scale is not None:
        raise BaseError(
            f"its weight ({type(weight).__name__}) comes with scales for its inputs (AWQ, "
            "SmoothQuant), which are not known here. Load the base without quantisation"
        )
    if weight.ndim != 2:
        raise BaseError(f"its weight ({type(weight).__name__}) has {weight.ndim} dimensions, not 2")
    return kind(weight)


class AffineLinear(nn.Linear):
    """A linear whose weight is an ``Int8Tensor`` or ``Int4Tensor``; input and output are not."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Product.apply(input, affine_weight(self.weight))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x @ W.T`` in x's dtype. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Affine8 | Affine4) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return (dy @ ctx.packed.dense(dy.dtype) if ctx.needs_input_grad[0] else None), None


@torch.no_grad()
def store_affine_(model: nn.Module, storage: str, dtype: torch.dtype, device: torch.device) -> int:
    """Quantise the linears in a model's numbered blocks on ``device``, one at a time; heads stay.

    Args:
        storage: one of :data:`NAMES`.
        dtype: of all other parameters, of the scales in 4 bits, and of the computation.

    Returns:
        How many linears there were.

    Raises:
        BaseError: linears whose inputs cannot be cut into groups. All are listed.
        MissingDependencyError: torchao is not installed.
    """
    require_torchao(storage)
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and any(part.isdigit() for part in path.split("."))
    ]
    four = storage == "int4-torchao"
    odd = [f"{p}: {m.in_features} inputs" for p, m in linears if four and not _group(m.in_features)]
    if odd:
        raise BaseError(
            collected(f"These linears have no whole groups of {_GROUPS[-1]} inputs", odd, limit=6)
            + "\nUse quantize='int8-torchao' or no quantisation."
        )
    for _, module in linears:
        dense = module.weight.detach().to(device).float()
        packed = _int4_tensor(dense, dtype) if four else _int8_tensor(dense, dtype)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.__class__ = AffineLinear
    done = {id(module.weight) for _, module in linears}
    for parameter in model.parameters():
        if id(parameter) not in done and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return len(linears)


def require_torchao(storage: str) -> None:
    """
    Raises:
        MissingDependencyError: torchao is not installed.
        BaseError: it is too old.
    """
    with quiet_transformers():
        found = require("torchao.quantization", extra="quant", purpose=f"quantize={storage!r}")
    needed = "Int4Tensor" if storage == "int4-torchao" else "Int8Tensor"
    if not hasattr(found, needed):
        version = getattr(require("torchao"), "__version__", "?")
        raise BaseError(
            f"torchao {version} has no {needed}, which quantize={storage!r} needs. "
            "Run: pip install --upgrade torchao"
        )


def _int8_tensor(dense: Tensor, dtype: torch.dtype) -> Tensor:
    q, scale = _symmetric(dense[:, None, None, :])
    d_out, d_in = dense.shape
    made: Tensor = require("torchao.quantization").Int8Tensor(
        q.view(d_out, d_in), scale.view(d_out, 1), [1, d_in], dtype
    )
    return made


def _int4_tensor(dense: Tensor, dtype: torch.dtype) -> Tensor:
    group = _group(dense.shape[1])
    packed, scale, zero = _quantised4(dense, group, dtype)
    made: Tensor = require("torchao.quantization").Int4Tensor(
        packed, scale, zero, [1, group], dense.shape
    )
    return made


def _group(width: int) -> int:
    return next((size for size in _GROUPS if width % size == 0), 0)


def _symmetric(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales of blocks, as ``choose_qparams_affine`` of torchao 0.18 chooses them.

    Args:
        blocks: float32 [n, rows, m, columns], a block being [rows, columns].

    Returns:
        int8 of the same shape, and float32 [n, 1, m, 1].
    """
    scale = (blocks.abs().amax(dim=(1, 3), keepdim=True) / 127.5).clamp_(min=_EPS8)
    return (blocks * (1.0 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale


def _quantised4(dense: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sixteen levels between each group's least and largest value (mslk's row quantisation).

    Args:
        dense: [d_out, d_in].
        dtype: of the scales. The integers are chosen for the scales as they are kept.

    Returns:
        int8 [d_out, d_in / 2], scale and zero [d_in / group, d_out].
    """
    groups = dense.float().reshape(dense.shape[0], -1, group)
    least, largest = groups.amin(2), groups.amax(2)
    scale = ((largest - least) / 15).clamp_(min=_EPS4).to(dtype)
    zero = (least + 8 * scale.float()).to(dtype)
    q = (groups - zero.float()[..., None]).div_(scale.float()[..., None])
    q = q.round_().clamp_(-8, 7).to(torch.int8).view(dense.shape)
    packed = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
    return packed, scale.t().contiguous(), zero.t().contiguous()
