"""How one weight of a base is stored, and how it becomes dense and is stored again.

================ =========================================== =============================
stored           dense                                       what undoing keeps
================ =========================================== =============================
a float tensor   itself                                      the tensor
nf4, fp4         code[nibble] · absmax[block]                packed bytes, absmax, offset
int8             q · SCB[row] / 127                          bytes and SCB
torchao's        q · scale, or q · scale + zero              integers, scales, zeros
================ =========================================== =============================

bitsandbytes' weights are unpacked here rather than by it: its CPU kernel of 0.50 takes the
scale of another block where a row is not a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.bases.affine import affine_weight
from lorakit.bases.nibbles import look_up, pairs
from lorakit.errors import BaseError
from lorakit.optional import require


class Packed(Protocol):
    """A quantised weight [d_out, d_in]."""

    @property
    def storage(self) -> str:
        """``"nf4"``, ``"fp4"``, ``"int8"`` or ``"int4"``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in)."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the packed numbers mean."""

    def store_(self, dense: Tensor) -> None:
        """Quantise again, into the tensors that are there."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that :meth:`store_` writes to."""


def packed_weight(module: nn.Module) -> Packed | None:
    """The quantised weight of a module; ``None`` if its weight is an ordinary tensor.

    Raises:
        BaseError: a storage that cannot be written to.
    """
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return Packed4bit.of(weight)
    if isinstance(weight, Tensor) and weight.dtype == torch.int8:
        return PackedInt8.of(module)
    if isinstance(weight, Tensor) and weight.is_floating_point() and _is_plain(weight):
        return None
    found = affine_weight(weight)
    if found is not None:
        return found
    how = type(weight).__name__ if weight is not None else "a packed format without `weight`"
    raise BaseError(
        f"its weight is stored as {how}, which cannot be written to. Load the base without "
        "quantisation (or dequantise it), and merge into that"
    )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


@dataclass(frozen=True, eq=False)
class Packed4bit:
    """bitsandbytes' 4 bits (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

    weight: Any
    state: Any

    @classmethod
    def of(cls, weight: Any) -> Packed4bit:
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise BaseError(
                "its 4-bit bytes were reordered by a CPU kernel in its first forward; load it "
                "with lorakit.load_base, which forbids that, and merge then"
            )
        return cls(weight, state)

    @property
    def storage(self) -> str:
        return str(self.state.quant_type)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state.shape)

    def tensors(self) -> dict[str, Tensor]:
        found = {"packed": self.weight, "absmax": self.state.absmax}
        if self.state.nested:
            found |= {"offset": self.state.offset, "absmax2": self.state.state2.absmax}
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[d_out, d_in]: two numbers to a byte, the first in the high half."""
        state = self.state
        scale = state.absmax
        if state.nested:
            scale = state.state2.code[scale.long()].view(-1)
            per = state.state2.blocksize
            scale = scale * state.state2.absmax.repeat_interleave(per)[: len(scale)] + state.offset
        scale = scale.to(dtype)
        packed = self.weight.detach().reshape(-1).view(torch.uint8)
        size = torch.Size(self.shape).numel()
        values = look_up(packed, pairs(state.code.to(dtype)), dtype)
        values = values[:size]
        whole = size // state.blocksize * state.blocksize
        values[:whole].view(-1, state.blocksize).mul_(scale[: whole // state.blocksize, None])
        if whole < size:
            values[whole:].mul_(scale[-1])
        return values.view(self.shape)

    def store_(self, dense: Tensor) -> None:
        """Quantised by bitsandbytes with the settings that are there, in the dtype it had."""
        state = self.state
        packed, new = require("bitsandbytes.functional").quantize_4bit(
            dense.float(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self.weight.dtype,
        )
        self.weight.data.copy_(packed.view(self.weight.shape))
        state.absmax.copy_(new.absmax)
        if state.nested:
            state.offset.copy_(new.offset)
            state.state2.absmax.copy_(new.state2.absmax)


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """LLM.int8's rows (Dettmers et al., 2022, arXiv 2208.07339, section 2.1)."""

    weight: Tensor
    scales: Tensor
    """SCB [d_out], the largest size in each row."""

    @property
    def storage(self) -> str:
        return "int8"

    @classmethod
    def of(cls, module: Any) -> PackedInt8:
        scales = getattr(module.weight, "SCB", None)
        if scales is None:  # moved there by the first forward
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is None:
            raise BaseError(
                "its weight is int8 without scales, so its values are not known. Load the base "
                "again, without quantisation or with quantize='int8'"
            )
        return cls(module.weight, scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.weight, "scales": self.scales}

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.data.to(dtype).mul_((self.scales.to(dtype) / 127)[:, None])

    def store_(self, dense: Tensor) -> None:
        largest = dense.abs().amax(dim=1)
        step = torch.where(largest > 0, largest, torch.ones_like(largest)) / 127
        self.weight.data.copy_((dense / step[:, None]).round_().clamp_(-127, 127).to(torch.int8))
        self.scales.copy_(largest)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """Path, module and weight of every quantised linear."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            found = packed_weight(module) if not _dense(module) else None
            if found is not None:
                yield path, module, found


def _dense(module: Any) -> bool:
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None or affine_weight(weight) is not None:
        return False
    return bool(weight.is_floating_point())
