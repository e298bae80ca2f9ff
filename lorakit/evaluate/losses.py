"""Mean loss of a base and its adapters over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import nn

from lorakit.errors import DataError
from lorakit.infer.mode import evaluating
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.causal import perplexity as perplexity
from lorakit.tasks.task import Contrasting, Examples, Task

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
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the kind of task tells beside the loss, by name."""

    @property
    def not_finite(self) -> np.ndarray:
        """Places, in the given order, of the examples whose loss is NaN or infinite."""
        return np.flatnonzero(~np.isfinite(self.sums))


class Losses(NamedTuple):
    """Of each example, in the given order."""

    sums: np.ndarray
    """[E] float64: its summed loss."""
    counts: np.ndarray
    """[E] int64: what the mean divides by, such as its supervised tokens."""
    outputs: np.ndarray | None = None
    """[E, …]: what metrics are computed from, where the task gives any."""


def loss(
    model: nn.Module,
    handle: Handle | None,
    adapter: MixLike,
    data: Examples,
    indices: Sequence[int] | None = None,
    *,
    token_budget: int | None = None,
    task: Task | None = None,
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
        task: the model as a task; that of a causal language model is made here otherwise.
        on_batch: called with the examples done and those to do.

    Raises:
        DataError: no token of these examples is supervised.
        RoutingError: an adapter that is not attached.
    """
    return mean_loss(
        example_losses(
            model,
            handle,
            adapter,
            data,
            indices,
            token_budget=token_budget,
            task=task,
            on_batch=on_batch,
        )
    )


def mean_loss(losses: Losses) -> LossResult:
    """The mean over all supervised tokens, of what :func:`example_losses` gives.

    Raises:
        DataError: no token of these examples is supervised.
    """
    sums, counts, _ = losses
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
    data: Examples,
    indices: Sequence[int] | None = None,
    *,
    token_budget: int | None = None,
    task: Task | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Losses:
    """Each example's summed loss, its weight, and what it gives for metrics.

    Arguments as those of :func:`loss`.
    """
    task = task or CAUSAL.on(model, handle)
    chosen = list(range(len(data))) if indices is None else [int(i) for i in indices]
    budget = token_budget or _TOKENS.get(task.device.type, _TOKENS_ACCELERATOR)
    sums, counts = np.zeros(len(chosen)), np.zeros(len(chosen), np.int64)
    outputs: np.ndarray | None = None
    done = 0
    with evaluating(model):
        for places in _batches([int(data.lengths[i]) for i in chosen], budget, task.mode):
            found = task.measured([data[chosen[place]] for place in places], adapter)
            sums[places], counts[places] = found.sums.cpu().numpy(), found.weights.cpu().numpy()
            if found.outputs is not None:
                each = found.outputs.double().cpu().numpy()
                outputs = np.zeros((len(chosen), *each.shape[1:])) if outputs is None else outputs
                outputs[places] = each
            done += len(places)
            if on_batch is not None:
                on_batch(done, len(chosen))
    if isinstance(task, Contrasting) and outputs is not None:
        sums = task.contrasted(outputs)
    return Losses(sums, counts, outputs)


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
