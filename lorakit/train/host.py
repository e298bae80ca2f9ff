"""``Host``: the model that runs share, and the adapters that are on it at the moment."""

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
from lorakit.train.randomness import Generators, random_tensors, set_random_tensors
from lorakit.train.recompute import own_checkpointing_kept, recomputing
from lorakit.train.settings import Recompute


class Host:
    """One frozen model; made by :func:`hosting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generators = Generators()
        self._handle: Handle | None = None
        self._names: set[str] = set()
        self._packed: PackedModel | None = None
        self._notes: list[str] = []
        self._recompute: Recompute = "none"

    @property
    def handle(self) -> Handle:
        """Of the adapters that are on the model."""
        assert self._handle is not None, "nobody has attached anything yet"
        return self._handle

    @property
    def layers(self) -> str | None:
        """How the decoder layers ran, if any can run fused."""
        fused = None if self._packed is None else self._packed.fused
        return None if fused is None else fused.summary()

    def attach(self, what: LoRASpec | Adapter | Initial, name: str, seed: int) -> str:
        """Put an adapter on the model, trainable.

        Its base is not compared: that was done with the base as it was loaded.

        Returns:
            Its name on the handle: ``name``, or that with a number where it is taken.

        Raises:
            TargetError: targets that do not fit the model.
        """
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
        return name

    def remove(self, name: str) -> None:
        """Take an adapter off."""
        self.handle.remove(name)
        self._names.discard(name)

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
            packed, notes = recomputing(self.model, self.handle, recompute)
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
