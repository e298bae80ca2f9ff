"""Cross-entropy at chosen positions, a chunk at a time; the logits are never all there.

Legend: ``S`` supervised positions, ``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: hidden [n, d] → logits [n, V]
Head = Callable[[Tensor], Tensor]

#: bytes of float32 logits that exist together: few on a CPU, whose cores 128 rows of a common
#: vocabulary fill, so that more would only cost memory; more on an accelerator, which small
#: products leave idle
_BYTES_CPU, _BYTES_ACCELERATOR = 24 << 20, 256 << 20


def chunk_rows(vocabulary: int, device: str) -> int:
    """Positions whose logits exist together at most, on a type of device; at least 64."""
    size = _BYTES_CPU if device == "cpu" else _BYTES_ACCELERATOR
    return max(64, size // (4 * vocabulary))


def stretches(count: int, chunk: int) -> list[slice]:
    """At most ``chunk`` rows each, as even as they can be, the first the longest.

    The head's weights are read once a stretch: a short last one would cost what a long one does.
    """
    number = max(1, -(-count // chunk))
    edges = [-(-count * i // number) for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def summed_loss(hidden: Tensor, labels: Tensor, head: Head, *, chunk: int) -> Tensor:
    """Sum over positions of ``-log p(label)``, with a gradient; as :func:`group_losses`.

    Returns:
        A scalar, float32 or wider.
    """
    return group_losses(hidden, labels, head, (len(labels),), chunk=chunk)[0]


def group_losses(
    hidden: Tensor, labels: Tensor, head: Head, groups: Sequence[int], *, chunk: int
) -> Tensor:
    """Sums of ``-log p(label)`` over groups of positions, with a gradient.

    The gradients of a chunk are computed in the forward, where its logits are at hand, so that
    the head runs once and at most ``chunk`` rows of logits exist. They reach ``hidden`` and
    whatever trainable tensors the head uses: none if it is frozen, the factors of an adapted
    head, the weights of one that is trained whole. A position's gradient is multiplied by that of
    its own group's sum alone, so what is not finite in one group stays there.

    Args:
        hidden: [S, d].
        labels: [S], int64.
        head: maps rows of hidden states to rows of logits, each row on its own. With several
            groups it uses no trainable tensors.
        groups: positions of each group, one group behind the other; they sum to S.
        chunk: positions at a time.

    Returns:
        [G], float32 or wider.
    """
    leaves = _trainable_leaves(head, hidden) if torch.is_grad_enabled() else []
    if torch.is_grad_enabled() and (hidden.requires_grad or leaves):
        assert not leaves or len(groups) == 1
        losses: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            hidden, labels, head, chunk, tuple(groups), *leaves
        )
        return losses
    return _sums(position_losses(hidden, labels, head, chunk=chunk), groups)


def _sums(losses: Tensor, groups: Sequence[int]) -> Tensor:
    """Sums over stretches of ``losses [S]``, [G]."""
    return torch.stack([part.sum() for part in torch.split(losses, list(groups))])


@torch.no_grad()
def position_losses(hidden: Tensor, labels: Tensor, head: Head, *, chunk: int) -> Tensor:
    """``-log p(label)`` of each position, [S], float32 or wider, without a gradient."""
    losses = [
        _log_softmax(head(hidden[rows])).gather(1, labels[rows, None])[:, 0].neg()
        for rows in stretches(len(hidden), chunk)
    ]
    return torch.cat(losses)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(torch.float32, logits.dtype))


def _trainable_leaves(head: Head, hidden: Tensor) -> list[Tensor]:
    """The tensors that the head's result depends on and that want a gradient.

    They are read off the autograd graph of a call without rows: what is attached to a module
    need not be among its parameters.
    """
    pending = [head(hidden.detach()[:0]).grad_fn]
    seen: set[Any] = set()
    leaves: dict[int, Tensor] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node that accumulates into a leaf
            leaves[id(node.variable)] = node.variable
        pending += [following for following, _ in node.next_functions]
    return list(leaves.values())


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        chunk: int,
        groups: tuple[int, ...],
        *leaves: Tensor,
    ) -> Tensor:
        precision = torch.promote_types(torch.float32, hidden.dtype)
        losses = torch.empty(len(hidden), dtype=precision, device=hidden.device)
        for_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for_leaves: list[Tensor | None] = [None] * len(leaves)
        buffer: Tensor | None = None
        for rows in stretches(len(hidden), chunk):
            target = labels[rows, None]
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_(hidden.requires_grad)
                logits = head(h)
            if buffer is None or buffer.dtype != torch.promote_types(precision, logits.dtype):
                buffer = torch.empty(
                    logits.shape,
                    dtype=torch.promote_types(precision, logits.dtype),
                    device=logits.device,
                )
            p = buffer[: len(target)]
            torch.log_softmax(logits.detach().to(p.dtype), -1, out=p)
            losses[rows] = p.gather(1, target)[:, 0].neg_()
            p.exp_()  # d loss / d logits = softmax - one-hot
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
            wanted = [*([h] if hidden.requires_grad else []), *leaves]
            grads = list(torch.autograd.grad(logits, wanted, p.to(logits.dtype), allow_unused=True))
            if for_hidden is not None:
                for_hidden[rows] = grads.pop(0)
            for i, grad in enumerate(grads):
                so_far = for_leaves[i]
                if so_far is not None and grad is not None:
                    so_far.add_(grad)
                elif grad is not None:  # its own memory: two leaves may be given one tensor
                    for_leaves[i] = grad.clone()
            del logits  # before the next are made
        ctx.gradients, ctx.groups = (for_hidden, for_leaves), groups
        return _sums(losses, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        for_hidden, for_leaves = ctx.gradients
        if len(ctx.groups) == 1:
            each = outer
        else:
            counts = torch.tensor(ctx.groups, device=outer.device)
            each = outer.repeat_interleave(counts)[:, None]
        if for_hidden is not None:
            for_hidden = for_hidden * each.to(for_hidden.dtype)
        scaled = [None if g is None else g * outer.to(g.dtype) for g in for_leaves]
        return for_hidden, None, None, None, None, *scaled
