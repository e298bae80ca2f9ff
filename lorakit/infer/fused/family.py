"""What a decoder layer is made of: which linears, which norms, which activation.

One description for all families of the Llama kind. It is read off the layer itself, and whoever
uses it compares a forward with the model's own before believing it.

=================== ====================================================================
part                where it is
=================== ====================================================================
q, k, v             ``self_attn.{q,k,v}_proj``, or ``self_attn.qkv_proj`` (Phi-3)
q and k norm        ``self_attn.{q,k}_norm`` by head (Qwen 3, Gemma 3), or absent
gate, up            ``mlp.{gate,up}_proj``, or ``mlp.gate_up_proj``
norms, two          ``input_layernorm``, ``post_attention_layernorm`` (before the MLP)
norms, four         also ``pre_feedforward_layernorm``, ``post_feedforward_layernorm``, where
                    ``post_attention_layernorm`` stands behind the attention (Gemma 2, 3)
=================== ====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases.half import HalfLinear
from lorakit.bases.stored import packed_weight
from lorakit.errors import BaseError
from lorakit.infer.fused.norm import Norm, norm_of


class DoesNotFit(Exception):
    """A layer is not of this kind; the message is the reason."""


@dataclass(frozen=True)
class Activation:
    """The gate's function, and how its gradient is computed."""

    name: str

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.name == "gelu_tanh" else "none")

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, from that of the output."""
        how = "tanh" if self.name == "gelu_tanh" else "none"
        dx: Tensor
        if self.name == "silu":
            dx = torch.ops.aten.silu_backward(dy, x)
        else:
            dx = torch.ops.aten.gelu_backward(dy, x, approximate=how)
        return dx


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one decoder layer."""

    attention: Any
    """The module; its config knows the numbers of heads."""
    qkv: tuple[Any, ...]
    """Three linears, or one whose output is cut in three."""
    o: Any
    gate_up: tuple[Any, ...]
    down: Any
    before_attention: Norm
    behind_attention: Norm | None
    before_mlp: Norm
    behind_mlp: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    activation: Activation
    head_dim: int
    scaling: float
    softcap: float | None

    @property
    def linears(self) -> tuple[Any, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of q, k and v."""
        config = self.attention.config
        kv = config.num_key_value_heads * self.head_dim
        return config.num_attention_heads * self.head_dim, kv, kv


def anatomy_of(layer: Any) -> Anatomy:
    """Take a decoder layer apart.

    Raises:
        DoesNotFit: it is made in another way.
    """
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise DoesNotFit(f"{type(layer).__name__} has no self_attn and mlp")
    qkv = _linears(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    gate_up = _linears(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    (o,), (down,) = _linears(attention, ("o_proj",)), _linears(mlp, ("down_proj",))
    norms = {name for name, _ in layer.named_children()} - {"self_attn", "mlp"}
    two = {"input_layernorm", "post_attention_layernorm"}
    four = two | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    dropouts = {name for name in norms if isinstance(getattr(layer, name), nn.Dropout)}
    if any(getattr(layer, name).p for name in dropouts):
        raise DoesNotFit("its layers have dropout of their own")
    norms -= dropouts
    if norms not in (two, four):
        raise DoesNotFit(f"its layers have the parts {', '.join(sorted(norms))}")
    if float(getattr(attention, "attention_dropout", 0.0) or 0.0):
        raise DoesNotFit("its attention has dropout")
    q_norm, k_norm = _head_norm(attention, "q_norm"), _head_norm(attention, "k_norm")
    head_dim = int(attention.head_dim)
    for norm in (q_norm, k_norm):
        if norm is not None and len(norm.weight) != head_dim:
            raise DoesNotFit("its queries are not normed by head")
    is_four = norms == four
    before_mlp = "pre_feedforward_layernorm" if is_four else "post_attention_layernorm"
    return Anatomy(
        attention=attention,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        before_attention=_norm(layer, "input_layernorm"),
        behind_attention=_norm(layer, "post_attention_layernorm") if is_four else None,
        before_mlp=_norm(layer, before_mlp),
        behind_mlp=_norm(layer, "post_feedforward_layernorm") if is_four else None,
        q_norm=q_norm,
        k_norm=k_norm,
        activation=_activation(mlp),
        head_dim=head_dim,
        scaling=float(attention.scaling),
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )


def dense_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a linear [d_out, d_in]: the stored one, or the values that it stands for.

    A quantised weight is unpacked, and one of another dtype cast, for the moment. Products with an
    unpacked weight are exact, and no row of the input influences another, as it may in
    LLM.int8's own kernel.
    """
    weight: Tensor = module.weight
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return weight.detach().to(dtype)
    packed = packed_weight(module)
    assert packed is not None
    return packed.dense(dtype)


def _linears(parent: Any, names: tuple[str, ...], fused: str = "") -> tuple[Any, ...]:
    found = tuple(getattr(parent, name, None) for name in names)
    if any(module is None for module in found) and fused:
        found = (getattr(parent, fused, None),)
    for module in found:
        if module is None:
            raise DoesNotFit(f"{type(parent).__name__} has no {' or '.join((*names, fused))}")
        if type(module) not in (nn.Linear, HalfLinear):
            try:
                quantised = isinstance(module, nn.Linear) and packed_weight(module) is not None
            except BaseError as error:
                raise DoesNotFit(str(error)) from error
            if not quantised:
                raise DoesNotFit(f"{type(parent).__name__} is made of {type(module).__name__}")
    return found


def _norm(layer: Any, name: str) -> Norm:
    norm = norm_of(getattr(layer, name))
    if norm is None:
        raise DoesNotFit(f"its {name} is no RMS norm")
    return norm


def _head_norm(attention: Any, name: str) -> Norm | None:
    module = getattr(attention, name, None)
    if module is None:
        return None
    norm = norm_of(module)
    if norm is None:
        raise DoesNotFit(f"its {name} is no RMS norm")
    return norm


def _activation(mlp: Any) -> Activation:
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if function is not None:
        x = torch.linspace(-4, 4, 65)
        for name in ("silu", "gelu_tanh", "gelu"):
            candidate = Activation(name)
            if torch.allclose(candidate.forward(x), function(x), rtol=1e-5, atol=1e-6):
                return candidate
    raise DoesNotFit(f"the activation of its MLP is {type(function).__name__}")
