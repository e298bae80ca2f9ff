"""A whole decoder layer as one node of the graph, with its backward written by hand.

    x  → norm → q, k, v → positions → attention → o → + x  = x₂
    x₂ → norm → gate, up → act(gate) · up       → down → + x₂ = y

What is kept from the forward: x, x₂, the attention's inputs and output, gate and up, and the
adapters' hidden values. The norms and ``act(gate)·up`` are made again, which costs less than
fetching them.

More can be made again, for less memory and more time (:data:`Recompute`): gate and up, which are
more than half of what is kept, for two of the layer's seven products; or all but x.

Legend: ``N`` tokens, ``M`` tokens that are left (N, or the supervised ones in the last layer),
``d`` hidden size, ``H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.infer.fused.attention import Attended, attend
from lorakit.infer.fused.family import Anatomy
from lorakit.infer.fused.linear import Group
from lorakit.infer.fused.rope import rotate_, rotate_back_
from lorakit.infer.segments import Segments
from lorakit.layers.prefix import Stretches

#: what of a layer is not kept for its backward but made again: nothing, gate and up, or all
Recompute = Literal["none", "mlp", "layers"]

#: an input that makes autograd call a backward for gradients of which it does not know
_WANTED = torch.zeros(0, requires_grad=True)


@dataclass(frozen=True, eq=False)
class Call:
    """One layer in one forward."""

    anatomy: Anatomy
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    cos: Tensor
    """[N, R]"""
    sin: Tensor
    segments: Segments
    rows: Tensor | None
    """int64 [M], the tokens that go on behind the attention; ``None``: all."""
    recompute: Recompute
    prefixes: Stretches | None = None
    """Keys and values in front of the segments, if any has some."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def fronts(self) -> list[Tensor]:
        """The prefixes' tensors."""
        return [] if self.prefixes is None else list(self.prefixes.parameters())

    def parameters(self) -> list[Tensor]:
        """What the backward gives gradients for, in this order."""
        found = [p for group in self.groups for p in group.parameters()] + self.fronts
        return [*found, _WANTED] if any(group.adds_gradients for group in self.groups) else found


@dataclass(eq=False)
class _Kept:
    """What the backward needs."""

    attended: Attended
    unnormed: tuple[Tensor, Tensor] | None
    """q and k before their norms, [N, H, d_h]."""
    o_input: Tensor
    o_output: Tensor | None
    """[M, d], before the norm behind the attention."""
    x2: Tensor
    gate_up: list[Tensor] | None
    """``None`` where they are made again."""
    down_output: Tensor | None
    hidden: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class FusedLayer(torch.autograd.Function):
    """``FusedLayer.apply(x [N, d], call, *parameters)`` → y [M, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *parameters: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        y, kept = _forward(x, call, keep=wanted and call.recompute != "layers")
        if wanted:
            ctx.call, ctx.kept = call, kept
            ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        call: Call = ctx.call
        if call.recompute == "layers":
            _, kept = _forward(x, call, keep=True)
        else:
            kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise LorakitError(
                "the backward of a fused layer ran twice; its memory is used up by the first. "
                "Run the forward again, or build PackedModel(…, fused=False)"
            )
        dx, gradients = _backward(dy, x, call, kept, need_input=ctx.needs_input_grad[0])
        return dx, None, *gradients, None  # of the input that only says that it is wanted


def _forward(x: Tensor, call: Call, *, keep: bool) -> tuple[Tensor, _Kept | None]:
    parts = call.anatomy
    qkv, hidden_qkv = call.qkv.forward(parts.before_attention.forward(x))
    q, k, v = _split(qkv, parts.widths)
    q, k, v = (t.view(len(x), -1, parts.head_dim) for t in (q, k, v))
    unnormed = None
    if parts.q_norm is not None and parts.k_norm is not None:
        unnormed = (q, k)
        q, k = parts.q_norm.forward(q), parts.k_norm.forward(k)
    rotate_(q, call.cos, call.sin)
    rotate_(k, call.cos, call.sin)
    attended = _attend((q, k, v), call, keep=keep)
    o_input = attended.output.reshape(len(x), -1).to(x.dtype)
    residual = x
    if call.rows is not None:
        o_input, residual = o_input.index_select(0, call.rows), x.index_select(0, call.rows)
    x2, o_output, hidden_o = _onto(call.o, parts.behind_attention, o_input, residual)
    gate_up, hidden_gate_up = call.gate_up.forward(parts.before_mlp.forward(x2))
    gate, up = _halves(gate_up)
    product = parts.activation.forward(gate).mul_(up)
    y, down_output, hidden_down = _onto(call.down, parts.behind_mlp, product, x2)
    if not keep:
        return y, None
    hidden = (hidden_qkv, hidden_o, hidden_gate_up, hidden_down)
    keeps = None if call.recompute == "mlp" else gate_up
    kept = _Kept(attended, unnormed, o_input, o_output, x2, keeps, down_output, hidden)
    return y, kept


def _backward(
    dy: Tensor, x: Tensor, call: Call, kept: _Kept, *, need_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    parts = call.anatomy
    hidden_qkv, hidden_o, hidden_gate_up, hidden_down = kept.hidden
    none_for_fronts: list[Tensor | None] = [None] * len(call.fronts)
    below_o = need_input or call.qkv.trained or any(t.requires_grad for t in call.fronts)
    below_mlp = below_o or call.o.trained
    # the MLP
    normed = None
    gate_up = kept.gate_up
    if gate_up is None:
        normed = parts.before_mlp.forward(kept.x2)
        gate_up, _ = call.gate_up.forward(normed)
    gate, up = _halves(gate_up)
    activated = parts.activation.forward(gate)
    d_out = dy
    if parts.behind_mlp is not None:
        assert kept.down_output is not None
        d_out = parts.behind_mlp.backward(dy, kept.down_output)
    d_product, for_down = call.down.backward(
        [d_out], activated * up, hidden_down, need_input=below_mlp or call.gate_up.trained
    )
    for_gate_up: list[Tensor | None] = [None] * len(call.gate_up.parameters())
    dx2 = dy
    if d_product is not None:
        d_up = activated.mul_(d_product)
        d_gate = parts.activation.backward(d_product.mul_(up), gate)
        joined = len(gate_up) == 1
        d_halves = [torch.cat([d_gate, d_up], dim=-1)] if joined else [d_gate, d_up]
        normed = parts.before_mlp.forward(kept.x2) if normed is None else normed
        d_normed, for_gate_up = call.gate_up.backward(
            d_halves, normed, hidden_gate_up, need_input=below_mlp
        )
        if d_normed is not None:
            dx2 = parts.before_mlp.backward(d_normed, kept.x2).add_(dy)
    if not below_mlp:
        missing: list[Tensor | None] = [None] * (
            len(call.qkv.parameters()) + len(call.o.parameters())
        )
        return None, [*missing, *for_gate_up, *for_down, *none_for_fronts]
    # behind the attention
    d_o = dx2
    if parts.behind_attention is not None:
        assert kept.o_output is not None
        d_o = parts.behind_attention.backward(dx2, kept.o_output)
    d_attended, for_o = call.o.backward([d_o], kept.o_input, hidden_o, need_input=below_o)
    for_qkv: list[Tensor | None] = [None] * len(call.qkv.parameters())
    if d_attended is None:
        return None, [*for_qkv, *for_o, *for_gate_up, *for_down, *none_for_fronts]
    if call.rows is not None:
        d_attended = _spread(d_attended, call.rows, len(x))
        dx2 = _spread(dx2, call.rows, len(x)) if need_input else dx2
    # the attention and what it reads
    d_heads, for_fronts = _attention_backward(d_attended, call, kept)
    normed = parts.before_attention.forward(x)
    d_normed, for_qkv = call.qkv.backward(d_heads, normed, hidden_qkv, need_input=need_input)
    dx = None
    if d_normed is not None:
        dx = parts.before_attention.backward(d_normed, x).add_(dx2)
    return dx, [*for_qkv, *for_o, *for_gate_up, *for_down, *for_fronts]


def _attend(heads: tuple[Tensor, ...], call: Call, *, keep: bool) -> Attended:
    return attend(
        call.anatomy.attention,
        heads,
        call.segments,
        scaling=call.anatomy.scaling,
        softcap=call.anatomy.softcap,
        prefixes=call.prefixes,
        fronts=call.fronts,
        keep=keep,
    )


def _attention_backward(
    d_attended: Tensor, call: Call, kept: _Kept
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients of what the linears of q, k and v gave, and of the prefixes' tensors."""
    parts, output = call.anatomy, kept.attended.output
    d_heads, for_fronts = kept.attended.backward(d_attended.view(output.shape).to(output.dtype))
    dq, dk, dv = (d.to(d_attended.dtype) for d in d_heads)
    rotate_back_(dq, call.cos, call.sin)
    rotate_back_(dk, call.cos, call.sin)
    if kept.unnormed is not None and parts.q_norm is not None and parts.k_norm is not None:
        dq = parts.q_norm.backward(dq, kept.unnormed[0])
        dk = parts.k_norm.backward(dk, kept.unnormed[1])
    flat = [d.reshape(len(d), -1) for d in (dq, dk, dv)]
    return (flat if len(parts.qkv) == 3 else [torch.cat(flat, dim=-1)]), for_fronts


def _onto(
    group: Group, norm: Any, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """``residual + norm(linear(x))``, and the linear's output if a norm stands behind it."""
    if norm is None:
        (y,), hidden = group.forward(x, onto=residual)
        return y, None, hidden
    (y,), hidden = group.forward(x)
    return norm.forward(y) + residual, y, hidden


def _split(outputs: list[Tensor], widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    if len(outputs) == len(widths):
        return tuple(outputs)
    return tuple(part.contiguous() for part in torch.split(outputs[0], list(widths), dim=-1))


def _halves(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(outputs) == 2:
        return outputs[0], outputs[1]
    gate, up = outputs[0].chunk(2, dim=-1)
    return gate, up


def _spread(rows: Tensor, where: Tensor, count: int) -> Tensor:
    """Rows [M, …] at their places among ``count``, zeros elsewhere."""
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, where, rows)
