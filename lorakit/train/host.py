"""``Host``: the model that runs share, and what is trained on it at the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError
from lorakit.layers import Handle, attach
from lorakit.layers.initial import Initial
from lorakit.tasks.names import Recompute
from lorakit.tasks.task import Kind, Task
from lorakit.train.full import Full, TrainedBase
from lorakit.train.randomness import Generators, random_tensors, set_random_tensors
from lorakit.train.recompute import own_checkpointing_kept
from lorakit.train.trained import Trained, TrainedAdapter


class Host:
    """One model; made by :func:`hosting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generators = Generators()
        self._handle: Handle | None = None
        self._names: set[str] = set()
        self._task: Task | None = None
        self._kind: Kind | None = None
        self._notes: list[str] = []
        self._recompute: Recompute = "none"

    @property
    def handle(self) -> Handle | None:
        """Of the adapters that are on the model; ``None`` while there was none."""
        return self._handle

    @property
    def layers(self) -> str | None:
        """How the layers ran, if the task tells."""
        return None if self._task is None else self._task.layers

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

    def task(
        self, kind: Kind, recompute: Recompute, share: Callable[[], list[str]]
    ) -> tuple[Task, list[str]]:
        """The model as a task, and sentences on what was decided about it.

        Args:
            kind: of the task, the same for all who share the model.
            recompute: what its layers make again, the same for all who share it.
            share: spreads the base over several processes where that is wanted, before the model
                is looked at.

        Raises:
            BaseError: a model of another kind; it can make nothing again, or nothing can be
                offloaded here.
            SpecError: somebody else is on the model who lets it make again something else.
        """
        if self._task is None:
            shared = share()
            self._task = kind.on(self.model, self._handle, recompute)
            self._kind, self._notes = kind, [*shared, *self._task.notes]
            self._recompute = recompute
        elif kind != self._kind:
            assert self._kind is not None
            raise SpecError(
                f"the task is {kind.name!r}, and {self._kind.name!r} in the runs that this one "
                "shares its model with (or they differ in their settings). Train it alone"
            )
        elif recompute != self._recompute:
            raise SpecError(
                f"recompute is {recompute!r}, and {self._recompute!r} in the runs that this one "
                "shares its forwards with. Give all the same, or train it alone"
            )
        return self._task, self._notes

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
