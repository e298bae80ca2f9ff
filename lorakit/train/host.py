"""``Host``: the model that runs share, and what is trained on it at the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError
from lorakit.infer import PackedModel
from lorakit.layers import Handle, attach
from lorakit.layers.initial import Initial
from lorakit.train.full import Full, TrainedBase
from lorakit.train.randomness import Generators, random_tensors, set_random_tensors
from lorakit.train.recompute import own_checkpointing_kept, recomputing
from lorakit.train.settings import Recompute
from lorakit.train.trained import Trained, TrainedAdapter


class Host:
    """One model; made by :func:`hosting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generators = Generators()
        self._handle: Handle | None = None
        self._names: set[str] = set()
        self._packed: PackedModel | None = None
        self._notes: list[str] = []
        self._recompute: Recompute = "none"

    @property
    def handle(self) -> Handle | None:
        """Of the adapters that are on the model; ``None`` while there was none."""
        return self._handle

    @property
    def layers(self) -> str | None:
        """How the decoder layers ran, if any can run fused."""
        fused = None if self._packed is None else self._packed.fused
        return None if fused is None else fused.summary()

    def put(self, what: LoRASpec | Adapter | Initial | Full, name: str, seed: int) -> Trained:
        """Put an adapter on the model, trainable; or make the model's own weights so.

        An adapter's base is not compared: that was done with the base as it was loaded.

        Args:
            name: of an adapter on the handle; it gets a number where it is taken.

        Raises:
            TargetError: targets that do not fit the model.
        """
        if isinstance(what, Full):
            return TrainedBase(self.model)
        number, wanted = 1, name
        while name in self._names:
            number += 1
            name = f"{wanted} {number}"
        if self._handle is None:
            self._handle = attach(
                self.model, what, name, trainable=True, seed=seed, allow_other_base=True
            )
            self._handle.activate(None)
        else:
            self._handle.add(what, name, trainable=True, seed=seed, allow_other_base=True)
        self._names.add(name)
        return TrainedAdapter(name, self._handle)

    def remove(self, trained: Trained) -> None:
        """Take an adapter off; the model's own weights stay as they are."""
        trained.remove()
        if trained.name is not None and self._handle is not None:
            self._handle.remove(trained.name)
            self._names.discard(trained.name)

    def packed(
        self, recompute: Recompute, share: Callable[[], list[str]]
    ) -> tuple[PackedModel, list[str]]:
        """The model for training, and sentences on what was decided about it.

        Args:
            recompute: what its layers make again, the same for all who share it.
            share: spreads the base over several processes where that is wanted, before the model
                is looked at.

        Raises:
            BaseError: this model can make nothing again, or nothing can be offloaded here.
            SpecError: somebody else is on the model who lets it make again something else.
        """
        if self._packed is None:
            shared = share()
            packed, notes = recomputing(self.model, self._handle, recompute)
            self._packed, self._notes = packed, [*shared, *notes]
            self._recompute = recompute
        elif recompute != self._recompute:
            raise SpecError(
                f"recompute is {recompute!r}, and {self._recompute!r} in the runs that this one "
                "shares its forwards with. Give all the same, or train it alone"
            )
        return self._packed, self._notes

    def close(self) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.detach()


@contextlib.contextmanager
def hosting(model: nn.Module) -> Iterator[Host]:
    """A host, after which the model and the generators of random numbers are as before."""
    before = random_tensors()
    host = Host(model)
    try:
        with own_checkpointing_kept(model):
            try:
                yield host
            finally:
                host.close()
    finally:
        set_random_tensors(before)
