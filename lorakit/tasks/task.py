"""What training and evaluation know of a model and its data: the protocol of a *task*.

The loop of ``train``, and the losses of ``evaluate``, know examples by their size and their weight
alone, and a model by the losses that a task gives them. What a row holds, how rows become the
inputs of a forward, and what is minimised is the task's.

============== ===================================================================================
`Example`      one row, ready for the model: its number, its size, its weight
`Examples`     the examples of a data set, checked and never changed again
`Stretch`      examples of one run in a forward, with the adapter that they use, and with what
               random numbers of theirs are a function of
`Task`         one model with what is trained on it: stretches → summed losses
`Kind`         the description of a family of tasks, which makes a `Task` of a model
============== ===================================================================================

The rule that a `Task` keeps, on which splitting a batch, sharing forwards, resuming, and comparing
runs stand: **an example's loss and gradient depend on the example, the adapter, and (seed, step,
id) alone.** Whichever examples are in the forward with it, and however a batch was cut, the sums
are the same up to rounding. What would couple examples (statistics of a batch) is left out, or
makes runs go apart with the reason said; a loss that contrasts the examples of a batch takes it
whole (:attr:`Task.whole`). Random numbers, be it dropout, noise or time steps, are drawn from
:meth:`Stretch.keys`, never from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.layers import Handle, token_keys
from lorakit.layers.routing import MixLike
from lorakit.tasks.names import Mode, Recompute


class Example(Protocol):
    """One row, ready for the model."""

    @property
    def id(self) -> int:
        """Its place in the data set, 0-based; the same in every batch, so it keys what is drawn."""

    @property
    def size(self) -> int:
        """What a forward's budget counts: about the tokens that the model makes of it."""

    @property
    def weight(self) -> int:
        """What the mean divides by: supervised tokens, labels, 1 for a picture."""


class Examples(Protocol):
    """The examples of a data set."""

    report: Any
    """What was read, as people are told; it has ``files``, ``kind`` and ``to_dict()``."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content: equal for equal training."""

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64: the size of each example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def where(self, index: int) -> str:
        """The row of an example, for messages: ``data.csv row 17 (line 18)``."""

    def prompt_key(self, index: int) -> bytes:
        """16 bytes; examples that share them are never on both sides of a split. Empty for one
        that is never held out."""


@dataclass(frozen=True)
class Stretch:
    """Examples of one run in a forward."""

    examples: Sequence[Any]
    """Each an :class:`Example` of the task."""
    adapter: MixLike
    """The adapter that they use; ``None`` is the bare model."""
    seed: int = 0
    """The run's."""
    step: int = 0
    """The optimizer step, the first being 0."""
    dropout: bool = False
    """Whether the adapter has dropout that acts in this forward."""

    @property
    def size(self) -> int:
        return sum(example.size for example in self.examples)

    def keys(self) -> Tensor:
        """int64 [E], one an example: what its random numbers are functions of."""
        ids = torch.tensor([example.id for example in self.examples])
        return token_keys(self.seed, self.step, ids, torch.zeros_like(ids))


class Measured(NamedTuple):
    """Examples, evaluated."""

    sums: Tensor
    """[E] float64: each example's summed loss."""
    weights: Tensor
    """[E] int64: what it is divided by."""
    outputs: Tensor | None = None
    """[E, …]: what a kind's metrics are computed from, if it has some."""


class Task(Protocol):
    """A model, with what is trained on it, that turns examples into losses."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def handle(self) -> Handle | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def notes(self) -> list[str]:
        """What was decided about the model, and why; one sentence each."""

    @property
    def mode(self) -> Mode:
        """How examples share a forward, and so what an evaluation fills one with. A task whose
        mode is single takes several all the same, and goes through them one by one."""

    @property
    def layers(self) -> str | None:
        """How its layers ran, to be said at the end; ``None``: nothing to say."""

    def losses(self, stretches: Sequence[Stretch]) -> Tensor:
        """Each stretch's summed loss, [G], float32 or wider, with a gradient.

        Nothing of one stretch reaches another's sum or gradient, NaN included. The losses are
        sums, not means: whoever calls divides by the weights of a whole batch.
        """

    def measured(self, examples: Sequence[Any], adapter: MixLike) -> Measured:
        """Losses of an evaluation, without a gradient; what is random is fixed by the example."""

    def smaller(self, examples: Sequence[Any], share: float) -> list[Any]:
        """Examples of about ``share`` of the size, at least one, that need about as much memory
        for each unit of it."""

    def why_apart(self, adapter: Adapter | None) -> str | None:
        """Why a run's rows may not share a forward with another's; ``None`` if they may.

        Args:
            adapter: what it trains; ``None`` is the model itself.
        """

    @property
    def whole(self) -> str | None:
        """Why a batch must be one forward of one run, as its examples are contrasted with each
        other; ``None``: it may be cut, and runs may share forwards."""

    def kin(self, adapter: Adapter | None) -> str:
        """Runs that share forwards do so with those of the same kin alone."""


@runtime_checkable
class Contrasting(Protocol):
    """A task whose losses of an evaluation are known once all of its examples are."""

    def contrasted(self, outputs: np.ndarray) -> np.ndarray:
        """Each example's summed loss, [E] float64, of what :meth:`Task.measured` gave, [E, …]."""

    def lonely(self, example: Any) -> bool:
        """Whether an example has nothing to be contrasted with where it is a batch of its own, so
        that its loss is 0 whatever the model does."""


class Kind(Protocol):
    """A family of tasks: how a model is made one, and what is said of its results."""

    @property
    def name(self) -> str:
        """As ``--task`` takes it."""

    @property
    def peft_type(self) -> str | None:
        """``task_type`` of the adapter's file; ``None`` where PEFT names none."""

    @property
    def command(self) -> str:
        """What trains in the shell, and goes on with a run with ``--resume``."""

    @property
    def memory_advice(self) -> str:
        """What helps an example that fits no memory, as a clause with its flags."""

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> Task:
        """The task on a model.

        Raises:
            BaseError: the model is of another kind.
        """

    def metrics(self, loss: float, examples: Any, indices: Sequence[int],
                outputs: np.ndarray | None) -> dict[str, float]:  # fmt: skip
        """What ``eval`` and the report show beside a loss, by name.

        Args:
            examples, indices: the data, and which of it was evaluated.
            outputs: what :meth:`Task.measured` gave, [len(indices), …].
        """

    def questions(self, base: Any, examples: Any, indices: Sequence[int], count: int
                  ) -> list[dict[str, Any]]:  # fmt: skip
        """The first ``count`` different items of a validation part for the report, each with
        ``prompt`` and ``reference`` (a list of texts); none where there is nothing to show."""

    def answers(self, base: Any, handle: Handle | None, adapter: str | None, examples: Any,
                indices: Sequence[int], count: int, max_new_tokens: int) -> list[str]:  # fmt: skip
        """What the model says to :meth:`questions`, in the same order."""

    def settings(self) -> Mapping[str, Any]:
        """Section ``task`` of run.yaml beside the name: what a resume makes the kind of again."""

    @property
    def load_base(self) -> Callable[..., Any]:
        """Gives the :class:`~lorakit.bases.Base` of section ``base`` of run.yaml, whose entries are
        its arguments; ``device`` and ``dtype``, which are added to it, among them."""

    def data_spec(self, section: Mapping[str, Any]) -> Any:
        """What section ``data`` (or ``validation``) of run.yaml was made of, by ``to_dict()``."""

    def load_data(self, spec: Any, base: Any) -> Any:
        """The :class:`Examples` of :meth:`data_spec`.

        Raises:
            DataError: the data cannot be read.
            BaseError: the base lacks what reads it, such as a tokenizer.
        """
