"""What can be adapted: the kinds of modules, their factors' shapes, and their deltas.

Legend: r rank, ``A``/``B`` as in ``core.sites``. A module is known by its features alone
(``in_features``, ``out_features``), so a layer quantised by any library is a black box that works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.sites import Kind

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Shape:
    """What a site's factors must look like."""

    kind: Kind
    d_in: int
    """Input features, channels, or vocabulary."""
    d_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    def a(self, rank: int) -> tuple[int, ...]:
        """Shape of A."""
        return (rank, self.d_in, *self.kernel)

    def b(self, rank: int) -> tuple[int, ...]:
        """Shape of B."""
        return (self.d_out, rank // self.groups, *(1 for _ in self.kernel))

    @property
    def max_rank(self) -> int:
        """The rank above which more rank changes nothing."""
        width = self.d_in
        for k in self.kernel:
            width *= k
        return min(width, self.d_out)


def shape_of(module: Any) -> Shape | None:
    """How ``module`` can be adapted; ``None`` if it cannot."""
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
