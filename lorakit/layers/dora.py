"""DoRA (Liu et al., arXiv 2402.09353): the length of each output's weights is trained apart.

The adapted weight is ``m ⊙ (W + s·B A) / ‖W + s·B A‖`` by output, so an adapted module gives
``y0 + (g − 1) ⊙ (y0 − bias) + g ⊙ s·B A x`` with ``g = m / ‖W + s·B A‖``. The length is a constant
for the gradient (section 4.3 of the paper). It comes from the factors; no product of them is made:

    ‖W + s·B A‖² = ‖W‖² + 2s · Σ (W Aᵀ) ⊙ B + s² · Σ (B A Aᵀ) ⊙ B      (sums over r, by output)

A new adapter's m is ‖W‖ from the very sum that its first g divides by, so that g is exactly 1.

Legend: r rank, m [d_out], W as ``rows`` [d_out, n], A [r, n], B [d_out, r]; n is d_in, the
vocabulary of an embedding, or c_in/groups·k… of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.bases.stored import packed_weight
from lorakit.core.merging import stretch
from lorakit.errors import BaseError, TargetError, collected

#: numbers that are cast at a time, so that a half-precision weight is never copied whole
BLOCK_NUMBERS = 1 << 24


def check_dense(
    modules: Mapping[str, nn.Module], what: str = "DoRA needs the lengths of these weights"
) -> None:
    """Raise if the weight of any of these cannot be read.

    Args:
        what: needs them, for the message.

    Raises:
        TargetError: all are listed, each with the reason.
    """
    reasons = {path: _why_not_dense(module) for path, module in modules.items()}
    problems = [f"{path}: {reason}" for path, reason in reasons.items() if reason is not None]
    if problems:
        raise TargetError(collected(f"{what}; leave them out", problems, limit=8))


def _why_not_dense(module: Any) -> str | None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        return "its weight is offloaded and comes only for the forward; load the base whole"
    try:
        packed_weight(module)
    except BaseError:
        return f"its weight is stored as {type(weight).__name__}, which is not read here"
    return None


def dense_weight(module: Any) -> Tensor:
    """The stored weight, or the numbers that its packed ones mean, in float32."""
    packed = packed_weight(module)
    weight: Tensor = module.weight
    return weight.detach() if packed is None else packed.dense(torch.float32)


def weight_lengths(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """‖W‖ of each output, [d_out], on the weight's device: the magnitude of a new adapter."""
    with torch.no_grad():
        return _squares(output_rows(module, dense_weight(module)), dtype).sqrt()


class Magnitude:
    """The trained lengths of one site, and what of the factor need not be computed again.

    Args:
        value: m, [d_out].
    """

    __slots__ = ("_factor", "_squares", "value")

    def __init__(self, value: nn.Parameter) -> None:
        self.value = value
        self._squares: tuple[Any, Tensor] | None = None
        self._factor: tuple[Any, Tensor] | None = None

    def factor(
        self, module: nn.Module, A: Tensor, B: Tensor, scaling: float, own: Tensor | None = None
    ) -> Tensor:
        """g, [d_out], in float32 or float64; its gradient goes to m alone.

        It is kept while neither the weight nor a frozen adapter's values change. An output whose
        adapted weights are all zero has no direction; there g is 1.

        Args:
            own: the weight that this adapter puts in the module's place, if it does.
        """
        if torch.compiler.is_compiling():
            lengths = self._lengths(module, A, B, scaling, own)
            return stretch(self.value.to(lengths.dtype), lengths)
        frozen = not (A.requires_grad or B.requires_grad or self.value.requires_grad)
        stored = _stored(module) if own is None else [own]
        key = tuple(_state(t) for t in (*stored, A, B, self.value)) if frozen else None
        if key is not None and self._factor is not None and self._factor[0] == key:
            return self._factor[1]
        # outside of inference mode, so that what is kept may take part in a later backward
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(A.device.type, enabled=False),
        ):
            lengths = self._lengths(module, A, B, scaling, own)
            if key is not None:
                self._factor = (key, stretch(self.value.to(lengths.dtype), lengths))
                return self._factor[1]
        return stretch(self.value.to(lengths.dtype), lengths)

    @torch.no_grad()
    def _lengths(
        self, module: nn.Module, A: Tensor, B: Tensor, scaling: float, own: Tensor | None
    ) -> Tensor:
        """‖W + s·B A‖, [d_out]."""
        dtype = torch.promote_types(A.dtype, torch.float32)
        rows = output_rows(module, dense_weight(module) if own is None else own.detach())
        A, B = A.detach().to(dtype).flatten(1), B.detach().to(dtype).flatten(1)
        overlap, own_squares = _overlap_and_squares(module, rows, A, B)
        squares = self._base_squares(module, rows, dtype, own)
        squares = squares + 2 * scaling * overlap + scaling**2 * own_squares
        return squares.clamp(min=0).sqrt()

    def _base_squares(
        self, module: nn.Module, rows: Tensor, dtype: torch.dtype, own: Tensor | None
    ) -> Tensor:
        """‖W‖², kept: it is the largest sum of a step, and the base does not change."""
        if own is not None or torch.compiler.is_compiling():
            return _squares(rows, dtype)
        key = (tuple(_state(t) for t in _stored(module)), dtype)
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, _squares(rows, dtype))
        return self._squares[1]


def _stored(module: Any) -> list[Tensor]:
    """The tensors that hold the weight's numbers."""
    packed = packed_weight(module)
    return [module.weight] if packed is None else list(packed.tensors().values())


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs once a tensor's values, dtype or place have changed."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def output_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as [d_out, n]; embeddings and GPT-2's Conv1D store their outputs in columns."""
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)


def _squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ W² by output, [d_out]."""
    return torch.cat([block.to(dtype).square().sum(1) for block in _blocks(rows)])


def _overlap_and_squares(
    module: nn.Module, rows: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ W ⊙ (B A) and Σ (B A)² by output, both [d_out].

    A convolution with groups applies B by groups to what A made of *all* channels, so its change
    has entries where W, which sees its own group's channels alone, has none.
    """
    groups = A.shape[0] // B.shape[1]
    overlaps, squares = [], []
    pieces = zip(rows.chunk(groups), A.chunk(groups), B.chunk(groups), strict=True)
    for number, (W, a, b) in enumerate(pieces):
        seen = a.chunk(groups, dim=1)[number]  # channels come first in a flattened kernel
        products = torch.cat([block.to(a.dtype) @ seen.T for block in _blocks(W)])
        overlaps.append((products * b).sum(1))
        squares.append(((b @ (a @ a.T)) * b).sum(1))
    return torch.cat(overlaps), torch.cat(squares)


def _blocks(rows: Tensor) -> list[Tensor]:
    size = max(1, BLOCK_NUMBERS // rows.shape[1])
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]
