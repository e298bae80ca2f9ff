"""One adapter being trained: everything that belongs to it and to nothing else.

A job knows which examples come next, how its gradient becomes a step, and what it has reached. It
does not know the model: whoever runs it does the forward and the backward, perhaps for several
jobs at once, and hands over the sum of the losses. Nothing here depends on who else is trained
(solo equivalence, principle 6 of the design): the order of the data is a pure function of the
seed and the count, the loss is divided by the job's own supervised tokens, and the norm that is
clipped is that of its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.data import Batch, Example, TokenData, indices_at
from lorakit.errors import InputError
from lorakit.layers import Handle, Routing, token_keys
from lorakit.train.settings import TrainSettings, rate_at


@dataclass(frozen=True)
class Window:
    """The examples of one optimizer step, cut into forwards."""

    step: int
    """Number of the step, the first being 0."""
    parts: tuple[tuple[Example, ...], ...]
    """The examples of each forward, in the order of the stream."""
    num_tokens: int
    num_supervised: int
    """Supervised tokens of all parts; every part's loss is divided by it."""

    @property
    def examples(self) -> Iterator[Example]:
        return (example for part in self.parts for example in part)


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far, and the weights that reached it."""

    step: int
    loss: float
    flat: Tensor
    """[P], on the CPU."""


class Job:
    """One adapter's training, from step to step.

    Args:
        name: the adapter's name on the handle.
        handle: of the model; the adapter is trainable.
        data: where the examples are.
        indices: which of them are trained on.
        settings: resolved.
        dropout: of the adapter; above zero, its forwards need keys.
    """

    def __init__(
        self,
        name: str,
        handle: Handle,
        data: TokenData,
        indices: Sequence[int] | np.ndarray,
        settings: TrainSettings,
        *,
        dropout: float = 0.0,
    ) -> None:
        self.name = name
        self.settings = settings
        self.step = 0
        """Optimizer steps made."""
        self.weights_step = 0
        """The step whose weights the adapter has: the last, or the best's once restored."""
        self.best: Best | None = None
        self.start_loss: float | None = None
        """Validation loss before the first step."""
        self.base_loss: float | None = None
        """That of the base; the same, unless the run goes on with an adapter."""
        self.last_loss: float | None = None
        """Training loss of the last step."""
        self.stale = 0
        """Evaluations in a row that were no new best."""
        self.evaluated: int | None = None
        """The step after which the last evaluation was."""
        self._handle = handle
        self._dropout = dropout
        self._data = data
        self._indices = np.asarray(indices, dtype=np.int64)
        self._flat = handle.flat(name)
        self._optimizer = _make_optimizer(self._flat, settings)

    # --- what comes next -------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        assert self.settings.steps is not None
        return self.settings.steps

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return self._flat.numel()

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out."""
        return bool(self.settings.patience) and self.stale >= self.settings.patience

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps or self.stopped_early

    def window(self) -> Window:
        """The next step's examples; asking twice gives the same."""
        size = self.settings.batch_size
        places = indices_at(len(self._indices), self.settings.seed, self.step * size, size)
        examples = [self._data[int(index)] for index in self._indices[places]]
        return Window(
            step=self.step,
            parts=tuple(self._cut(examples)),
            num_tokens=sum(len(example.ids) for example in examples),
            num_supervised=sum(num_supervised(example) for example in examples),
        )

    def where(self, example: Example) -> str:
        """The row of an example, for messages."""
        return self._data.where(example.id)

    def _cut(self, examples: Sequence[Example]) -> Iterator[tuple[Example, ...]]:
        """Parts of at most ``micro_batch`` examples and ``micro_batch_tokens`` tokens."""
        most_tokens = self.settings.micro_batch_tokens or math.inf
        most = self.settings.micro_batch or math.inf
        part: list[Example] = []
        tokens = 0
        for example in examples:
            if part and (len(part) + 1 > most or tokens + len(example.ids) > most_tokens):
                yield tuple(part)
                part, tokens = [], 0
            part.append(example)
            tokens += len(example.ids)
        yield tuple(part)

    def routing(self, batch: Batch) -> Routing:
        """This adapter for the whole batch, with keys for its dropout."""
        routing = Routing.uniform(self.name)
        if not self._dropout:
            return routing
        lengths = torch.tensor(batch.lengths)
        example = torch.repeat_interleave(batch.example_ids.cpu(), lengths)
        position = batch.position_ids.cpu().reshape(-1)
        keys = token_keys(self.settings.seed, self.step, example, position)
        return routing.with_dropout_keys(keys.reshape(batch.input_ids.shape))

    # --- a step ----------------------------------------------------------------------------

    def clear_gradient(self) -> None:
        """Forget what was accumulated."""
        assert self._flat.grad is not None
        self._flat.grad.zero_()

    def gradient_norm(self) -> float:
        """L2 norm of the accumulated gradient; not finite if any of its values is."""
        assert self._flat.grad is not None
        return float(torch.linalg.vector_norm(self._flat.grad))

    @torch.no_grad()
    def take_step(self, loss: float, norm: float) -> float:
        """Clip, move the weights, count the step.

        Args:
            loss: mean over the window's supervised tokens.
            norm: from :meth:`gradient_norm`; finite.

        Returns:
            The learning rate that was used.

        Raises:
            FloatingPointError: a weight would not be finite; all is as it was before the step.
        """
        assert math.isfinite(loss)
        assert math.isfinite(norm)
        before = {name: tensor.clone() for name, tensor in self._moving().items()}
        clip = self.settings.clip
        if clip:
            total = torch.tensor(norm, dtype=self._flat.dtype)
            torch.nn.utils.clip_grads_with_norm_([self._flat], clip, total)
        rate = rate_at(self.step, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        possible = rate <= torch.finfo(self._flat.dtype).max  # sgd could not even convert it
        if possible:
            self._optimizer.step()
        if not possible or not self._flat.isfinite().all():
            self._go_back(before)
            raise FloatingPointError(f"a step of learning rate {rate:g} makes weights not finite")
        self.step += 1
        self.weights_step = self.step
        self.last_loss = loss
        return rate

    # --- evaluations -----------------------------------------------------------------------

    def evaluation_due(self) -> bool:
        """Whether to evaluate now, after the last step, and it was not done yet."""
        if self.evaluated == self.step:
            return False
        if self.step == 0:
            return True
        every = self.settings.eval_every
        return self.step == self.total_steps or bool(every and self.step % every == 0)

    def observe(self, loss: float) -> bool:
        """Take note of a validation loss at this step; keeps the weights if it is the lowest.

        Returns:
            Whether it is. A loss that is not finite never is.
        """
        self.evaluated = self.step
        if self.step == 0:
            self.start_loss = loss
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best = Best(self.step, loss, self._flat.detach().to("cpu", copy=True))
            self.stale = 0
            return True
        self.stale += 1
        return False

    # --- values ----------------------------------------------------------------------------

    def snapshot(self) -> Adapter:
        """The adapter as it is now."""
        return self._handle.snapshot(self.name)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the best evaluation; without one the present ones stay."""
        if self.best is not None:
            self._flat.copy_(self.best.flat)
            self.weights_step = self.best.step

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the job's state."""
        tensors = self._moving()
        if self.best is not None:
            tensors["best"] = self.best.flat
        return tensors

    def _moving(self) -> dict[str, Tensor]:
        """What an optimizer step changes: the weights, and the optimizer's own tensors."""
        inner = self._optimizer.state.get(self._flat, {})
        own = {f"optimizer.{name}": tensor for name, tensor in inner.items()}
        return {"flat": self._flat.detach(), **own}

    def state(self) -> dict[str, Any]:
        """All else of the job's state, as JSON data."""
        best = None if self.best is None else {"step": self.best.step, "loss": self.best.loss}
        return {
            "step": self.step,
            "stale": self.stale,
            "evaluated": self.evaluated,
            "start_loss": self.start_loss,
            "base_loss": self.base_loss,
            "last_loss": self.last_loss,
            "best": best,
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`tensors` and :meth:`state` gave.

        Raises:
            InputError: they are of an adapter of another size.
        """
        if tensors["flat"].shape != self._flat.shape:
            raise InputError(
                f"the checkpoint's adapter has {tensors['flat'].numel()} parameters and this one "
                f"{self._flat.numel()}, so the run cannot go on. Put its run.yaml and start/ back "
                "as they were; or start a new run."
            )
        self._go_back(tensors)
        self.step = self.weights_step = int(state["step"])
        self.stale = int(state["stale"])
        self.evaluated = state["evaluated"]
        self.start_loss = state["start_loss"]
        self.base_loss = state["base_loss"]
        self.last_loss = state["last_loss"]
        best = state["best"]
        self.best = None if best is None else Best(int(best["step"]), best["loss"], tensors["best"])

    def _go_back(self, tensors: Mapping[str, Tensor]) -> None:
        """To what :meth:`_moving` gave."""
        self._flat.copy_(tensors["flat"])
        inner = {
            name.removeprefix("optimizer."): tensor
            for name, tensor in tensors.items()
            if name.startswith("optimizer.")
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(
            {"state": {0: inner} if inner else {}, "param_groups": groups}
        )


def num_supervised(example: Example) -> int:
    """Tokens of an example that are predicted with a loss; nothing predicts the first."""
    return int(np.count_nonzero(example.supervised[1:]))


def _make_optimizer(flat: torch.nn.Parameter, settings: TrainSettings) -> torch.optim.Optimizer:
    assert settings.lr is not None
    if settings.optimizer == "sgd":
        return torch.optim.SGD([flat], lr=settings.lr)
    return torch.optim.AdamW(
        [flat],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=flat.device.type in ("cpu", "cuda"),
    )
