"""The smallest adapter whose measured loss stays within an allowance.

Candidates are compressions to a number of parameters, which go where they keep the most of the
change (``algebra.compress``). Their sizes are those that the adapter would have at rank 1, 2, … at
every site, and a half, a quarter and an eighth of the first. All of them are attached beside the
whole adapter and the bare base, and one forward measures each on the same examples: the routing
sends every copy of an example to another candidate. Where there are too many for that, some are
tried first, then those between the largest that fails and the smallest that passes.

The loss need not fall with every parameter, and a size may pass by chance. So half of the prompts
choose, and the other half confirm: the smallest size that passes on both is taken, and the next
smaller one fails on at least one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lorakit.algebra.compress import compress_to_each, size_at_rank, smallest_size
from lorakit.core.adapter import Adapter
from lorakit.data import TokenData, pack, split
from lorakit.errors import DataError, InputError
from lorakit.infer import PackedModel
from lorakit.infer.mode import evaluating
from lorakit.layers import Routing, attach

logger = logging.getLogger(__name__)

#: candidates of one forward
AT_ONCE = 15
#: tokens of one forward, all candidates together
_TOKENS = {"cpu": 4096}
_TOKENS_ACCELERATOR = 32768

#: (what, done, total)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """One size."""

    parameters: int
    """Of the whole adapter; 0 is the bare base."""
    relative_error: float
    """‖ΔW − ΔW'‖/‖ΔW‖ over all sites."""
    loss: float
    """On the half that chooses, in nats a token."""
    confirming: float | None = None
    """On the other half; ``None`` where it was not needed."""


@dataclass(frozen=True)
class Search:
    """What was found, and how."""

    adapter: Adapter
    trials: tuple[Trial, ...]
    """Every size that was tried, the smallest first; the last is the whole adapter."""
    limit: float
    """The highest loss that passes on the half that chooses."""
    limit_confirming: float
    rows: int
    """Examples of the half that chooses."""
    rows_confirming: int

    @property
    def chosen(self) -> int:
        """Parameters of the adapter."""
        return self.adapter.num_parameters


def compress_until_loss(
    model: nn.Module,
    adapter: Adapter,
    data: TokenData,
    increase: float,
    *,
    relative: bool = True,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Tell | None = None,
) -> Search:
    """Find the smallest compression whose loss is at most so much above the whole adapter's.

    Args:
        model: the adapter's base, with no adapters attached; it is left as it was.
        increase: 0.01 lets the loss rise by 1 %, or, not ``relative``, by 0.01 nats a token.
        limit: how many examples to use, from the first on; ``None`` is all.
        seed: of the division of the prompts.
        on_progress: called with a word, the examples done and those to do.

    Raises:
        DataError: fewer than two prompts.
        InputError: no smaller size passes, or the adapter cannot be compressed.
    """
    rows = np.arange(len(data))[:limit]
    confirming, choosing = (np.intersect1d(part, rows) for part in split(data, 0.5, seed))
    if not len(confirming) or not len(choosing):
        raise DataError(
            f"{len(rows)} rows are too few: both halves need a prompt of their own. Give more"
        )
    lab = _Lab(model, adapter, data, on_progress or (lambda what, done, total: None))
    try:
        return _search(lab, increase, relative, choosing, confirming)
    finally:
        lab.close()


def sizes(adapter: Adapter) -> list[int]:
    """Parameters of the candidates, ascending; all are fewer than the adapter has."""
    ranks = max((site.rank for site in adapter.low_rank.values()), default=0)
    found = {size_at_rank(adapter, rank) for rank in range(1, ranks)}
    low_rank = sum(site.A.numel() + site.B.numel() for site in adapter.low_rank.values())
    fixed = adapter.num_parameters - low_rank
    found |= {fixed + (size_at_rank(adapter, 1) - fixed) // part for part in (2, 4, 8)}
    least = smallest_size(adapter)
    return sorted(size for size in found if least <= size < adapter.num_parameters)


def _search(
    lab: _Lab, increase: float, relative: bool, choosing: np.ndarray, confirming: np.ndarray
) -> Search:
    def highest(loss: float) -> float:
        return loss * (1 + increase) if relative else loss + increase

    whole = lab.adapter.num_parameters
    possible = sizes(lab.adapter)
    losses: dict[int, float] = {}
    open_sizes = possible
    while open_sizes:
        losses |= lab.losses([0, *_some(open_sizes), whole], choosing, "choosing")
        limit = highest(losses[whole])
        passing = min((s for s in losses if losses[s] <= limit), default=whole)
        failing = max((size for size in losses if size < passing), default=0)
        open_sizes = [size for size in possible if failing < size < passing]
    if not losses:
        raise InputError("it has no smaller size: nothing of it has a rank that could be cut")
    limit = highest(losses[whole])
    if losses[0] <= limit:
        logger.warning("the bare base is within the allowance too: no adapter is needed for it")
    passing_sizes = sorted(s for s in losses if 0 < s < whole and losses[s] <= limit)
    confirmed: dict[int, float] = {}
    for chosen in passing_sizes:
        if chosen not in confirmed:
            smaller = max(size for size in losses if size < chosen)
            following = [s for s in passing_sizes if s >= chosen][:3]
            confirmed |= lab.losses(sorted({smaller, *following, whole}), confirming, "confirming")
        if confirmed[chosen] <= highest(confirmed[whole]):
            break
    else:
        raise InputError(
            f"no smaller size keeps the loss within {limit:.4f} on {len(choosing)} rows and within "
            f"the same allowance on the other {len(confirming)}; allow more"
        )
    trials = tuple(
        Trial(lab.parameters(size), lab.error(size), losses[size], confirmed.get(size))
        for size in sorted(losses)
    )
    found = _told(lab.made[chosen], trials, limit, increase, relative)
    return Search(found, trials, limit, highest(confirmed[whole]), len(choosing), len(confirming))


def _some(open_sizes: Sequence[int]) -> list[int]:
    """At most :data:`AT_ONCE` of them, spread by ratio as they are."""
    if len(open_sizes) <= AT_ONCE:
        return list(open_sizes)
    wanted = np.geomspace(open_sizes[0], open_sizes[-1], AT_ONCE)
    nearest = np.abs(np.asarray(open_sizes)[:, None] - wanted).argmin(0)
    return [open_sizes[i] for i in sorted(set(nearest.tolist()))]


def _told(
    adapter: Adapter, trials: Sequence[Trial], limit: float, increase: float, relative: bool
) -> Adapter:
    """The adapter with the search in its history."""
    facts = dict(adapter.provenance["compressed"])
    facts["until_loss"] = {
        "increase": increase,
        "relative": relative,
        "limit": limit,
        "trials": [
            {
                "parameters": one.parameters,
                "loss": one.loss,
                "loss_confirming": one.confirming,
            }
            for one in trials
        ],
    }
    return adapter.with_(provenance={**adapter.provenance, "compressed": facts})


class _Lab:
    """The candidates on the model, made and attached when they are first measured."""

    def __init__(self, model: nn.Module, adapter: Adapter, data: TokenData, tell: Tell) -> None:
        self.adapter = adapter
        self.made: dict[int, Adapter] = {}
        """Parameters asked for → the compression."""
        self._data, self._tell = data, tell
        # the caller has compared the bases
        self._handle = attach(model, adapter, _name(adapter.num_parameters), allow_other_base=True)
        self._packed = PackedModel(model, self._handle)

    def close(self) -> None:
        """Leave the model as it was."""
        self._handle.detach()

    def parameters(self, size: int) -> int:
        """What a candidate has: at most what it was given."""
        if size in self.made:
            return self.made[size].num_parameters
        return size

    def error(self, size: int) -> float:
        """How far a candidate is from the whole adapter."""
        if size == self.adapter.num_parameters:
            return 0.0
        return float(self.made[size].provenance["compressed"]["relative_error"]) if size else 1.0

    def losses(self, sizes: Sequence[int], rows: np.ndarray, what: str) -> Mapping[int, float]:
        """Mean loss of each size over the rows; every forward holds all of them."""
        self._attach([s for s in sizes if 0 < s < self.adapter.num_parameters])
        mixes = [_name(size) if size else None for size in sizes]
        sums, counts = np.zeros(len(sizes)), np.zeros(len(sizes))
        done = 0
        with evaluating(self._packed.model):
            for part in self._batches(rows, len(sizes)):
                examples = [self._data[int(i)] for i in part]
                tokens = sum(len(one.ids) for one in examples)
                routing = Routing.tokens([(mix, tokens) for mix in mixes])
                each, number = self._packed.per_example_loss(pack(examples * len(sizes)), routing)
                sums += each.view(len(sizes), -1).sum(1).cpu().numpy()
                counts += number.view(len(sizes), -1).sum(1).cpu().numpy()
                done += len(part)
                self._tell(f"{what} among {len(sizes)} sizes", done, len(rows))
        if not counts.all():
            raise DataError(f"none of {len(rows)} rows has a supervised token, so there is no loss")
        return dict(zip(sizes, (sums / counts).tolist(), strict=True))

    def _attach(self, sizes: Sequence[int]) -> None:
        new = [size for size in sizes if size not in self.made]
        for size, candidate in zip(new, compress_to_each(self.adapter, new), strict=True):
            self.made[size] = candidate
            self._handle.add(candidate, _name(size), allow_other_base=True)

    def _batches(self, rows: np.ndarray, copies: int) -> list[list[int]]:
        """Rows of similar length whose tokens, times the copies, fit one forward."""
        budget = _TOKENS.get(self._packed.device.type, _TOKENS_ACCELERATOR) // copies
        found: list[list[int]] = []
        room = 0
        for row in sorted(rows.tolist(), key=lambda i: -int(self._data.lengths[i])):
            length = int(self._data.lengths[row])
            if not found or length > room:
                found.append([])
                room = budget
            found[-1].append(row)
            room -= length
        return found


def _name(size: int) -> str:
    return f"{size} parameters"
