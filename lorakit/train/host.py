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
from lorakit.train.mode import own_checkpointing_kept
from lorakit.train.randomness import Generators, random_tensors, set_random_tensors
from lorakit.train.trained import Trained, TrainedAdapter


class Host:
    """One model; made by :func:`hosting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generators = Generators()
        self._handle: Handle | None = None
        self._names: set[str] = set()
        self._shared: list[str] | None = None
        self._task: Task | None = None
        self._kind: Kind | None = None
        self._recompute: Recompute = "none"
        self._checkpointing = contextlib.ExitStack()
        """Puts the model's own gradient checkpointing back to what it was before the task."""

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

        It is the same one until nobody else is on the model and another is wanted.

        Args:
            kind: of the task, the same for all who share the model.
            recompute: what its layers make again, the same for all who share it.
            share: spreads the base over several processes where that is wanted, before the model
                is looked at; called once.

        Raises:
            BaseError: a model of another kind; it can make nothing again, or nothing can be
                offloaded here.
            SpecError: somebody else is on the model who lets it make again something else.
        """
        if self._task is not None and len(self._names) > 1:  # itself, and somebody else
            self._check_same(kind, recompute)
        if self._shared is None:
            self._shared = share()
        if self._task is None or (kind, recompute) != (self._kind, self._recompute):
            self._let_go()
            with contextlib.ExitStack() as undo:
                undo.enter_context(own_checkpointing_kept(self.model))
                self._task = kind.on(self.model, self._handle, recompute)
                self._checkpointing = undo.pop_all()
            self._kind, self._recompute = kind, recompute
        return self._task, [*self._shared, *self._task.notes]

    def _check_same(self, kind: Kind, recompute: Recompute) -> None:
        """Refuse what those who are on the model already do otherwise."""
        if kind != self._kind:
            assert self._kind is not None
            raise SpecError(
                f"the task is {kind.name!r}, and {self._kind.name!r} in the runs that this one "
                "shares its model with (or they differ in their settings). Train it alone"
            )
        if recompute != self._recompute:
            raise SpecError(
                f"recompute is {recompute!r}, and {self._recompute!r} in the runs that this one "
                "shares its forwards with. Give all the same, or train it alone"
            )

    def _let_go(self) -> None:
        """Nobody is on the model any more to whom the task belongs."""
        self._task = None
        self._checkpointing.close()

    def close(self) -> None:
        """Leave the model as it was."""
        self._let_go()
        if self._handle is not None:
            self._handle.detach()


@contextlib.contextmanager
def hosting(model: nn.Module) -> Iterator[Host]:
    """A host, after which the model and the generators of random numbers are as before."""
    before = random_tensors()
    host = Host(model)
    try:
        try:
            yield host
        finally:
            host.close()
    finally:
        set_random_tensors(before)
