"""``Trained``: what a job trains, be it an adapter or all weights of the base.

To a job it is one flat buffer and the gradient beside it; everything that decides what becomes of
them (order of the data, clipping, optimizer, best) is the job's. Legend: ``P`` trained parameters.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.core.sites import module_of
from lorakit.layers import Handle
from lorakit.layers.gradients import FlatGradient
from lorakit.train.rates import rate_factors
from lorakit.train.settings import TrainSettings


class Trained(Protocol):
    """What a job trains."""

    @property
    def name(self) -> str | None:
        """How a routing calls it; ``None`` is the bare model."""

    @property
    def dropout(self) -> float:
        """Above zero, its forwards need keys."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """Paths of the modules that it puts into training mode."""

    @property
    def is_small(self) -> bool:
        """Whether it is small beside the model, so that a copy may be made of it."""

    @property
    def flat(self) -> nn.Parameter:
        """The weights, [P]; what an optimizer moves."""

    def arrange(self, settings: TrainSettings) -> dict[float, tuple[int, int]]:
        """Order :attr:`flat` by the factor on the learning rate: factor → its stretch.

        Raises:
            SpecError: settings of rates that cannot act.
        """

    def gradient(self) -> Tensor:
        """What backwards have added up since :meth:`clear`, laid out as :attr:`flat`."""

    def clear(self) -> None:
        """Forget the gradient."""

    def moved(self) -> None:
        """Called when :attr:`flat` has been written to."""

    def release(self) -> None:
        """Let go of what only a further step would need."""

    def remove(self) -> None:
        """The run ends; undo what was done to the model, but for the weights."""

    def snapshot(self) -> Adapter | None:
        """A copy of the present values; ``None`` if it is no adapter."""


class TrainedAdapter:
    """A trainable adapter on a handle.

    Args:
        name: its name there.
    """

    is_small = True

    def __init__(self, name: str, handle: Handle) -> None:
        self.name = name
        self._handle = handle
        adapter = handle.snapshot(name)
        self.spec = adapter.spec
        self.dropout = adapter.spec.dropout
        low_rank = adapter.low_rank.items()
        self.adapted = tuple(dict.fromkeys(module_of(path, site) for path, site in low_rank))

    @property
    def flat(self) -> nn.Parameter:
        return self._flat

    def arrange(self, settings: TrainSettings) -> dict[float, tuple[int, int]]:
        factors = rate_factors(self._handle.snapshot(self.name), settings)
        stretches = self._handle.arrange(self.name, factors)
        self._flat = self._handle.flat(self.name)
        self._flat.grad = None
        # here, so that whoever measures a forward does not count it
        self._gradient = FlatGradient(self._handle.parameters(self.name))
        return stretches  # type: ignore[return-value]

    def gradient(self) -> Tensor:
        return self._gradient.collect()

    def clear(self) -> None:
        self._gradient.clear()

    def moved(self) -> None:
        pass  # the model uses the buffer itself

    def release(self) -> None:
        self._gradient.release()

    def remove(self) -> None:
        self.release()  # the host takes it off

    def snapshot(self) -> Adapter:
        return self._handle.snapshot(self.name)
