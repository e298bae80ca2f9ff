"""What an adapter holds at one place of a model.

Shapes: ``r`` rank, ``d_in``/``d_out`` features, ``V`` vocabulary, ``k…`` kernel size, ``E``
experts.

=========== ==================== ======================
kind        A                    B
=========== ==================== ======================
linear      [r, d_in]            [d_out, r]
embedding   [r, V]               [d, r]
conv        [r, c_in, k…]        [c_out, r/groups, 1…]
experts     [E, r, d_in]         [E, d_out, r]
router      [r, d_in]            [E, r]
=========== ==================== ======================

``experts`` is one parameter that holds a matrix for each expert, and the path is that parameter's:
``"model.layers.0.mlp.experts.down_proj"``. ``router`` is a module that turns its own linear's
output into a choice of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.frozen import FrozenDict

Kind = Literal["linear", "conv", "embedding", "experts", "router"]

#: parameters of fused experts, in the order in which a token meets them and a module holds them
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

#: dimensions of A and of B; a convolution's depend on its kernel
_DIMS = {"linear": 2, "embedding": 2, "router": 2, "experts": 3}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of one weight: ``W + scaling · B A`` (Hu et al., 2021)."""

    A: Tensor
    """Down-projection; see the table of the module."""
    B: Tensor
    """Up-projection."""
    scaling: float
    """Factor on B·A; alpha/r or alpha/√r, already computed."""
    kind: Kind = "linear"
    bias: Tensor | None = None
    """A bias of B, [d_out] (PEFT's ``lora_bias``); it is scaled like B·A."""
    magnitude: Tensor | None = None
    """DoRA's length of each output's weight vector, [d_out] (Liu et al., arXiv 2402.09353). The
    adapted weight is ``magnitude · (W + scaling·B A) / ‖W + scaling·B A‖``, by output."""

    @property
    def rank(self) -> int:
        return int(self.A.shape[0 if self.kind == "conv" else -2])

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors().values())

    def by_expert(self) -> list[LowRank]:
        """The experts as sites of linears; of another kind the site itself."""
        if self.kind != "experts":
            return [self]
        pairs = zip(self.A, self.B, strict=True)
        return [LowRank(A, B, self.scaling) for A, B in pairs]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their field name."""
        named = {"A": self.A, "B": self.B, "bias": self.bias, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def problems(self) -> list[str]:
        """What is wrong with it as a value; empty if nothing."""
        return list(self._problems)

    @cached_property  # a reader asks, to say all at once, and the adapter asks again
    def _problems(self) -> tuple[str, ...]:
        dims = _DIMS.get(self.kind)
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        found = []
        if dims is not None and (len(a), len(b)) != (dims, dims):
            what = "two matrices" + (" for each expert" if dims == 3 else "")
            found.append(f"A has shape {a} and B {b}; a {self.kind} site has {what}")
        elif self.kind == "conv" and (len(a) != len(b) or not 3 <= len(a) <= 5):
            found.append(f"A has shape {a} and B {b}; a conv site has kernels of equal dimension")
        elif 0 in a or 0 in b:
            found.append(f"A has shape {a} and B {b}; none may be empty")
        elif self.kind == "conv":
            if b[1] > a[0] or a[0] % b[1] or any(k != 1 for k in b[2:]):
                found.append(f"A has shape {a} and B {b}; B must be [c_out, {a[0]}/groups, 1…]")
        elif b[-1] != a[-2]:
            found.append(f"A has rank {a[-2]} (shape {a}), B has rank {b[-1]} (shape {b})")
        elif a[:-2] != b[:-2]:
            found.append(f"A holds {a[0]} experts (shape {a}), B {b[0]} (shape {b})")
        for name, vector in (("bias", self.bias), ("magnitude", self.magnitude)):
            if vector is not None and self.kind in ("experts", "router"):
                found.append(f"it has a {name}, which a site of {self.kind} cannot have")
            elif vector is not None and tuple(vector.shape) != b[:1]:
                found.append(f"its {name} has shape {tuple(vector.shape)}; expected {b[:1]}")
        if self.bias is not None and self.magnitude is not None:
            found.append(
                "it has a bias of B and a magnitude; DoRA rescales weights and has no such bias"
            )
        if not math.isfinite(self.scaling):
            found.append(f"its scaling is {self.scaling}; expected a finite number")
        found += _not_finite(self.tensors())
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Replace:
    """A module, or a single parameter, that was trained whole.

    Under the path of a module, ``tensors`` maps its parameters' names (``"weight"``,
    ``"dense.bias"``) to values. Under the path of a parameter (``"fc1.bias"``) it holds one
    tensor named ``""``.
    """

    tensors_by_name: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors_by_name", FrozenDict(dict(self.tensors_by_name)))

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors_by_name.values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by parameter name."""
        return dict(self.tensors_by_name)

    def problems(self) -> list[str]:
        """What is wrong with it as a value; empty if nothing."""
        if not self.tensors_by_name:
            return ["it holds no tensor"]
        return _not_finite(self.tensors())


@dataclass(frozen=True, eq=False)
class Prefix:
    """Trained keys and values in front of the text, for one attention layer.

    The past of prefix tuning (Li & Liang, 2021, arXiv 2101.00190), and the prefix-layer tuning that
    section 7 of the LoRA paper puts beside LoRA. It stands under the path of the attention module.
    Every token of a row sees all of it, and the row's own tokens begin at position ``n``, as if
    these keys had been read first; they are stored as a cache holds them, already rotated.
    """

    key: Tensor
    """[n, H_kv, d]: ``n`` virtual tokens, ``H_kv`` key heads, ``d`` their size."""
    value: Tensor
    """[n, H_kv, d_v]"""

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return int(self.key.shape[0])

    @property
    def num_parameters(self) -> int:
        return self.key.numel() + self.value.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their field name."""
        return {"key": self.key, "value": self.value}

    def problems(self) -> list[str]:
        """What is wrong with it as a value; empty if nothing."""
        k, v = tuple(self.key.shape), tuple(self.value.shape)
        if len(k) != 3 or len(v) != 3 or k[:2] != v[:2] or 0 in k + v:
            return [
                f"its key has shape {k} and its value {v}; expected [tokens, heads, size] with "
                "equal tokens and heads"
            ]
        return _not_finite(self.tensors())


#: why a prefix is not merged, and the way out
NOT_MERGED = (
    "it is a prefix, keys and values in front of the text, which no weight can hold. Keep the "
    "adapter attached (--adapter in generate and eval); or, if what it does without its prefix is "
    "enough, merge the rest: adapter.with_(sites={**adapter.low_rank, **adapter.replaced})"
)

Site = LowRank | Replace | Prefix


def module_of(path: str, site: Site) -> str:
    """The path of the module that runs a site: of experts the one that holds the parameter."""
    is_parameter = isinstance(site, LowRank) and site.kind == "experts"
    return path.rpartition(".")[0] if is_parameter else path


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            found.append(f"{name or 'the tensor'} has dtype {tensor.dtype}; expected a float")
        elif not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            # the sum is faster and catches both, but may overflow by itself
            bad = int((~torch.isfinite(tensor)).sum())
            found.append(
                f"{name or 'the tensor'} has {bad} of {tensor.numel()} values that are NaN or Inf"
            )
    return found
