"""Mean loss of a base and its adapters over examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lorakit.data import TokenData, pack
from lorakit.errors import DataError
from lorakit.infer import PackedModel
from lorakit.infer.packed import evaluating
from lorakit.layers import Handle, Routing
from lorakit.layers.routing import MixLike

#: tokens of one forward where the caller does not say. More would not be faster on a CPU, where
#: the products fill the cores from a few hundred tokens on
_TOKENS = {"cpu": 2048}
_TOKENS_ACCELERATOR = 16384


@dataclass(frozen=True)
class LossResult:
    """A loss over some examples."""

    loss: float
    """Mean negative log-likelihood of the supervised tokens, in nats."""
    perplexity: float
    """exp(loss); infinite where that is too large for a float."""
    tokens: int
    """Supervised tokens."""
    sums: np.ndarray = field(repr=False)
    """float64, one an example in the given order: its summed negative log-likelihood."""
    counts: np.ndarray = field(repr=False)
    """int64, one an example: its supervised tokens."""

    @property
    def not_finite(self) -> np.ndarray:
        """Places, in the given order, of the examples whose loss is NaN or infinite."""
        return np.flatnonzero(~np.isfinite(self.sums))


def loss(
    model: nn.Module,
    handle: Handle | None,
    adapter: MixLike,
    data: TokenData,
    indices: Sequence[int] | None = None,
    *,
    token_budget: int | None = None,
    packed: PackedModel | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Mean loss of ``model`` with ``adapter`` over examples.

    Every supervised token counts alike, whatever example it is in, so the result does not
    depend on how the examples are put into batches.

    Args:
        handle: the adapters on the model; ``None`` if there are none.
        adapter: a name, ``None`` for the bare base, or weights.
        indices: which examples of ``data``; ``None`` means all.
        token_budget: most tokens of one forward; a longer example runs alone.
        packed: the model, studied already; made here otherwise.
        on_batch: called with the examples done and those to do.

    Raises:
        DataError: no token of these examples is supervised.
        RoutingError: an adapter that is not attached.
    """
    return mean_loss(
        *example_losses(
            model,
            handle,
            adapter,
            data,
            indices,
            token_budget=token_budget,
            packed=packed,
            on_batch=on_batch,
        )
    )


def mean_loss(sums: np.ndarray, counts: np.ndarray) -> LossResult:
    """The mean over all supervised tokens, of what :func:`example_losses` gives.

    Raises:
        DataError: no token of these examples is supervised.
    """
    total = int(counts.sum())
    if not total:
        raise DataError(
            f"none of these {len(counts)} examples has a supervised token, so there is no loss. "
            "lorakit preview shows what is supervised; --loss-on chooses it."
        )
    mean = float(sums.sum() / total)
    return LossResult(mean, perplexity(mean), total, sums, counts)


def example_losses(
    model: nn.Module,
    handle: Handle | None,
    adapter: MixLike,
    data: TokenData,
    indices: Sequence[int] | None = None,
    *,
    token_budget: int | None = None,
    packed: PackedModel | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each example's summed negative log-likelihood (float64) and supervised tokens (int64), [E].

    Arguments as those of :func:`loss`.
    """
    packed = packed or PackedModel(model, handle)
    chosen = list(range(len(data))) if indices is None else [int(i) for i in indices]
    routing = Routing.uniform(adapter) if handle is not None else None
    budget = token_budget or _TOKENS.get(packed.device.type, _TOKENS_ACCELERATOR)
    sums, counts = np.zeros(len(chosen)), np.zeros(len(chosen), np.int64)
    done = 0
    with evaluating(model):
        for places in _batches([int(data.lengths[i]) for i in chosen], budget, packed.mode):
            batch = pack([data[chosen[place]] for place in places])
            each, tokens = packed.per_example_loss(batch, routing)
            sums[places], counts[places] = each.cpu().numpy(), tokens.cpu().numpy()
            done += len(places)
            if on_batch is not None:
                on_batch(done, len(chosen))
    return sums, counts


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else (math.inf if loss >= 700 else math.nan)


def _batches(lengths: Sequence[int], budget: int, mode: str) -> Iterator[list[int]]:
    """Places, the longest examples first, in groups that fit the budget.

    Padded rows cost as much as the longest of them.
    """
    batch: list[int] = []
    tokens = 0
    for place in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        cost = lengths[batch[0]] if batch and mode == "padded" else lengths[place]
        if batch and tokens + cost > budget:
            yield batch
            batch, tokens, cost = [], 0, lengths[place]
        batch.append(place)
        tokens += cost
    if batch:
        yield batch
