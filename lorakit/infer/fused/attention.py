"""The attention of a fused layer, forward and backward, over the segments of a packed row.

In general PyTorch's kernel runs once for each segment, and its gradient is the one that autograd
knows for it. Short examples, of which a row holds many, leave such a kernel little to do between
its starts. On a CPU they go together instead: padded to the longest, in one batched product of
dense scores, whose gradient is written out here.

    P = softmax(s · q kᵀ + causal),   o = P v
    dv = Pᵀ do,   dS = P ∘ (do vᵀ − rowsum(P ∘ do vᵀ)),   dq = s · dS k,   dk = s · dSᵀ q

Legend: ``N`` tokens, ``S`` segments, ``L`` the longest, ``H`` query heads, ``H_kv`` key heads,
``G = H / H_kv``, ``d`` head size, ``s`` the scaling.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.infer.segments import Segments, fronts_of, segment_attention
from lorakit.layers.attention import computed_in
from lorakit.layers.prefix import Stretches

#: tokens with padding, of those without, up to which padding costs less than it saves
_PADDING = 1.5


class Attended(Protocol):
    """One attention that was computed."""

    output: Tensor
    """[N, H, d], in the dtype in which it was computed."""

    def backward(self, d_output: Tensor) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        """The gradients of q, k and v [N, …, d], dense in memory, and of each tensor in front.

        It is called once, and only if the attention was kept.
        """


def attend(
    module: Any,
    heads: Sequence[Tensor],
    segments: Segments,
    *,
    scaling: float,
    softcap: float | None,
    prefixes: Stretches | None,
    fronts: Sequence[Tensor],
    keep: bool,
) -> Attended:
    """The attention of each segment.

    Args:
        module: the model's attention module.
        heads: q [N, H, d]; k and v [N, H_kv, d].
        softcap: bound of the scores (Gemma 2).
        prefixes: keys and values in front of the segments; ``fronts`` are their tensors.
        keep: whether a backward will follow.
    """
    # the dtype of the computation from here on, so that there is one copy of them
    computed = computed_in(heads[0], softcap)
    q, k, v = (t.detach().to(computed) for t in heads)
    lengths, masks = segments.lengths, segments.masks
    causal = softcap is None and prefixes is None and all(mask is None for mask in masks)
    if (
        q.is_cpu
        and causal
        and go_together(len(q), len(lengths), max(lengths, default=0), q.shape[-1])
    ):
        return _Together(q, k, v, lengths, scaling)
    return _OneByOne(module, (q, k, v), segments, scaling, softcap, prefixes, fronts, keep)


def go_together(tokens: int, segments: int, longest: int, head_dim: int) -> bool:
    """Whether segments that are plainly causal are many, short and alike.

    P is then at most twice as large as q, but for the padding.
    """
    alike = segments * longest <= _PADDING * tokens
    return segments > 1 and 0 < longest <= 2 * head_dim and alike


class _OneByOne:
    """Each segment by PyTorch's kernel."""

    def __init__(
        self,
        module: Any,
        heads: Sequence[Tensor],
        segments: Segments,
        scaling: float,
        softcap: float | None,
        prefixes: Stretches | None,
        fronts: Sequence[Tensor],
        keep: bool,
    ) -> None:
        # leaves of a small graph, if it is to be kept
        self._heads = [t.transpose(0, 1)[None].requires_grad_(keep) for t in heads]
        self._fronts = [t.detach().requires_grad_(keep and t.requires_grad) for t in fronts]
        with torch.set_grad_enabled(keep):
            q, k, v = self._heads
            self._end, _ = segment_attention(
                module,
                q,
                k,
                v,
                segments,
                scaling=scaling,
                softcap=softcap,
                fronts=fronts_of(prefixes, len(segments.lengths), self._fronts),
            )
        self.output = self._end.detach()[0]

    def backward(self, d_output: Tensor) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        trained = [tensor for tensor in self._fronts if tensor.requires_grad]
        d_all = torch.autograd.grad(
            self._end, (*self._heads, *trained), d_output[None], retain_graph=False
        )
        d_heads = [d[0].transpose(0, 1).contiguous() for d in d_all[:3]]
        d_fronts = iter(d_all[3:])
        return d_heads, [next(d_fronts) if t.requires_grad else None for t in self._fronts]


class _Together:
    """Plainly causal segments in one product."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float
    ) -> None:
        self._layout = layout = _layout(lengths, q.shape[1], k.shape[1], q.dtype)
        self._scaling = scaling
        self._q = layout.padded(q)
        self._k, self._v = layout.padded(k), layout.padded(v)
        scores = torch.baddbmm(layout.causal, self._q, self._k.transpose(1, 2), alpha=scaling)
        self._p = torch.softmax(scores, dim=-1)
        self.output = layout.back(torch.bmm(self._p, self._v), q.shape[1])

    def backward(self, d_output: Tensor) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        layout, p, scaling = self._layout, self._p, self._scaling
        d_o = layout.padded(d_output)
        # the pads are a segment's last token once more: no gradient comes from them
        d_o.view(-1, d_o.shape[-1]).index_fill_(0, layout.pads, 0.0)
        dv = torch.bmm(p.transpose(1, 2), d_o)
        dp = torch.bmm(d_o, self._v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.baddbmm(self._q, ds, self._k, beta=0, alpha=scaling)
        dk = torch.baddbmm(self._k, ds.transpose(1, 2), self._q, beta=0, alpha=scaling)
        heads, kv_heads = d_output.shape[1], layout.kv_heads
        return [layout.back(dq, heads), layout.back(dk, kv_heads), layout.back(dv, kv_heads)], []


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where heads of tokens [N, h, d] stand in padded ones [S · H_kv, h / H_kv · L, d]."""

    kv_heads: int
    longest: int
    into: dict[int, Tensor]
    """By h: int64 [S · h · L], the row of [N · h, d] that is to stand there."""
    out_of: dict[int, Tensor]
    """By h: int64 [N · h], the row of the padded ones."""
    pads: Tensor
    """int64, the rows of padded queries that are none."""
    causal: Tensor
    """[G · L, L], 0 or −∞."""

    def padded(self, heads: Tensor) -> Tensor:
        count, width = heads.shape[1:]
        rows = heads.reshape(-1, width).index_select(0, self.into[count])
        return rows.view(-1, count // self.kv_heads * self.longest, width)

    def back(self, padded: Tensor, count: int) -> Tensor:
        width = padded.shape[-1]
        return padded.view(-1, width).index_select(0, self.out_of[count]).view(-1, count, width)


@functools.lru_cache(maxsize=4)  # of one forward, every layer asks for the same
@torch.inference_mode(False)  # another forward, which may want gradients, gets it too
def _layout(lengths: tuple[int, ...], heads: int, kv_heads: int, dtype: torch.dtype) -> _Layout:
    each, longest = torch.tensor(lengths, device="cpu"), max(lengths)
    position = torch.arange(longest, device="cpu")
    begin = each.cumsum(0) - each
    token = begin[:, None] + torch.minimum(position, each[:, None] - 1)  # [S, L]
    real = position < each[:, None]
    into, out_of = {}, {}
    for count in {heads, kv_heads}:
        head = torch.arange(count, device="cpu")[:, None]
        into[count] = (token[:, None] * count + head).flatten()  # [S, h, L]
        place = torch.arange(len(lengths) * count * longest, device="cpu")
        place = place.view(-1, count, longest)
        out_of[count] = place.transpose(1, 2)[real].flatten()  # [N, h]
    pads = (~real)[:, None].expand(-1, heads, -1).flatten().nonzero().flatten()
    causal = torch.full((longest, longest), float("-inf"), dtype=dtype, device="cpu").triu(1)
    return _Layout(kv_heads, longest, into, out_of, pads, causal.repeat(heads // kv_heads, 1))
