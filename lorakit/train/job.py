"""One adapter being trained, or a whole base: all that belongs to it and to nothing else.

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

from lorakit.bases.quiet import quiet_transformers
from lorakit.core.adapter import Adapter
from lorakit.data import indices_at
from lorakit.errors import InputError
from lorakit.optional import require
from lorakit.tasks.task import Example, Examples, Stretch
from lorakit.train.distributed import World
from lorakit.train.settings import EIGHT_BIT, TrainSettings, rate_at
from lorakit.train.trained import Trained

#: numbers of four bytes that an optimizer keeps of each parameter
_KEPT = {"adamw": 2.0, "adamw8bit": 0.51, "paged-adamw8bit": 0.51, "sgd": 0.0}

#: of the coming steps, how many are searched for the largest forward
_STEPS_LOOKED_AT = 5000

#: numbers of a gradient whose length is computed in one piece
_PIECE = 4096


@dataclass(frozen=True)
class Window:
    """The examples of one optimizer step, and this process's share of them cut into forwards."""

    step: int
    """Number of the step, the first being 0."""
    examples: tuple[Example, ...]
    """Those of all processes, in the order of the stream."""
    parts: tuple[tuple[Example, ...], ...]
    """The examples of each forward of this process, in the order of the stream."""
    num_tokens: int
    num_supervised: int
    """The weight of all examples, such as their supervised tokens; every part's loss is divided
    by it."""
    idle: int = 0
    """Forwards to make without a use of one's own, where the others need one's part of the base."""


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far."""

    step: int
    loss: float


class Job:
    """One training, from step to step.

    Args:
        trained: the weights that move, with their gradient.
        data: where the examples are.
        indices: which of them are trained on.
        settings: resolved.
        world: the processes that share each batch.
    """

    def __init__(
        self,
        trained: Trained,
        data: Examples,
        indices: Sequence[int] | np.ndarray,
        settings: TrainSettings,
        *,
        world: World | None = None,
    ) -> None:
        self.trained = trained
        self.settings = settings
        self.step = 0
        """Optimizer steps made."""
        self.weights_step = 0
        """The step whose weights these are: the last, or the best's once restored."""
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
        self.most_tokens = settings.micro_batch_tokens
        """Tokens of one forward at most; lowered where the memory has no room for more."""
        self._world = world or World()
        self._data = data
        self._indices = np.asarray(indices, dtype=np.int64)
        stretches = trained.arrange(settings)
        self._flat = trained.flat
        self._gradient: Tensor | None = None
        self._largest = math.inf
        """Bound on the size of the weights; infinite: not known."""
        self._optimizer = _make_optimizer(self._flat, settings, stretches)
        self._stretches = list(stretches.values())
        self.clear_gradient()

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
    def bytes_to_come(self) -> int:
        """What the optimizer will keep from its first step on, and does not yet."""
        if self._optimizer.state:
            return 0
        each = _KEPT[self.settings.optimizer] * self._flat.element_size()
        return int(self.num_parameters * each)

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out."""
        return bool(self.settings.patience) and self.stale >= self.settings.patience

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps or self.stopped_early

    @property
    def usual_tokens(self) -> float:
        """Tokens of a batch, on the average."""
        return float(self._data.lengths[self._indices].mean()) * self.settings.batch_size

    def window(self) -> Window:
        """The next step's examples; asking twice gives the same."""
        return self._window(self.step)

    def _window(self, step: int) -> Window:
        size = self.settings.batch_size
        places = indices_at(len(self._indices), self.settings.seed, step * size, size)
        examples = [self._data[int(index)] for index in self._indices[places]]
        lengths = [example.size for example in examples]
        shares = shared(lengths, self._world.size)
        parts = tuple(self._cut([examples[i] for i in shares[self._world.rank]]))
        return Window(
            step=step,
            examples=tuple(examples),
            parts=parts,
            idle=self._most_parts(lengths, shares) - len(parts) if self._world.sharded else 0,
            num_tokens=sum(lengths),
            num_supervised=sum(example.weight for example in examples),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self._data.lengths[self._indices].max())

    def largest_part(self) -> tuple[Example, ...]:
        """The forward with the most tokens among those of the next thousands of steps."""
        size = self.settings.batch_size
        steps = min(self.total_steps, self.step + _STEPS_LOOKED_AT)
        lengths = self._data.lengths[self._indices]
        largest, found = 0, (self.step, 0)
        for step in range(self.step, steps):
            places = indices_at(len(self._indices), self.settings.seed, step * size, size)
            mine = shared(lengths[places].tolist(), self._world.size)[self._world.rank]
            for number, cut in enumerate(self._cut_lengths(lengths[places[mine]].tolist())):
                if sum(cut) > largest:
                    largest, found = sum(cut), (step, number)
        step, number = found
        return self._window(step).parts[number]

    def _most_parts(self, lengths: Sequence[int], shares: Sequence[Sequence[int]]) -> int:
        """Forwards of the process that makes most of them."""
        return max(len(list(self._cut_lengths([lengths[i] for i in s]))) for s in shares)

    def where(self, example: Example) -> str:
        """The row of an example, for messages."""
        return self._data.where(example.id)

    def _cut(self, examples: Sequence[Example]) -> Iterator[tuple[Example, ...]]:
        start = 0
        for part in self._cut_lengths([example.size for example in examples]):
            yield tuple(examples[start : start + len(part)])
            start += len(part)

    def _cut_lengths(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Parts of at most ``micro_batch`` examples and ``most_tokens`` tokens."""
        most_tokens = self.most_tokens or math.inf
        most = self.settings.micro_batch or math.inf
        part: list[int] = []
        tokens = 0
        for length in lengths:
            if part and (len(part) + 1 > most or tokens + length > most_tokens):
                yield part
                part, tokens = [], 0
            part.append(length)
            tokens += length
        if part:
            yield part

    def stretch(self, examples: Sequence[Example]) -> Stretch:
        """Examples of this run, as a forward of this step takes them."""
        return Stretch(
            examples,
            self.trained.name,
            seed=self.settings.seed,
            step=self.step,
            dropout=bool(self.trained.dropout),
        )

    # --- the gradient ----------------------------------------------------------------------

    def clear_gradient(self) -> None:
        """Forget what was accumulated."""
        self._gradient = None
        self.trained.clear()
        for group in self._optimizer.param_groups:
            group["params"][0].grad = None

    def collect_gradient(self) -> Tensor:
        """What was accumulated, [P], laid out as the weights."""
        if self._gradient is not None:
            return self._gradient
        gradient = self.trained.gradient()
        for group, (begin, end) in zip(self._optimizer.param_groups, self._stretches, strict=True):
            group["params"][0].grad = gradient[begin:end]
        self._gradient = gradient
        return gradient

    def gradient_norm(self) -> float:
        """L2 norm of the accumulated gradient; not finite if any of its values is."""
        return _length(self.collect_gradient())

    # --- a step ----------------------------------------------------------------------------

    @torch.no_grad()
    def take_step(self, loss: float, norm: float) -> float:
        """Clip, move the weights, count the step; the gradient is used up.

        Args:
            loss: mean over the window's supervised tokens.
            norm: from :meth:`gradient_norm`; finite.

        Returns:
            The learning rate that was used.

        Raises:
            FloatingPointError: a number would not be finite; all is as it was before the step.
        """
        assert math.isfinite(loss)
        assert math.isfinite(norm)
        gradient = self.collect_gradient()
        rate = rate_at(self.step, self.settings)
        scale = self._clipped(norm)
        if scale is not None:
            gradient.mul_(scale)
            norm = min(norm, self.settings.clip)
        before: dict[str, Tensor] | None = None
        if not self._stays_finite(rate, norm):
            if not self.trained.is_small:  # no second copy, even to go back to
                raise FloatingPointError(
                    f"after a step of learning rate {rate:g} weights might not be finite"
                )
            before = {name: tensor.clone() for name, tensor in self._moving().items()}
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        possible = rate <= torch.finfo(self._flat.dtype).max  # sgd could not even convert it
        if possible:
            self._optimizer.step()
        if before is not None and not (possible and self._is_finite()):
            self._go_back(before)
            raise FloatingPointError(f"a step of learning rate {rate:g} makes weights not finite")
        self.trained.moved()
        self.clear_gradient()
        self.step += 1
        self.weights_step = self.step
        self.last_loss = loss
        return rate

    def _clipped(self, norm: float) -> Tensor | None:
        """What the gradient is multiplied by; ``None`` where it is not too long."""
        if not self.settings.clip:
            return None
        scale = self.settings.clip / (torch.tensor(norm, dtype=self._flat.dtype) + 1e-6)
        return scale.to(self._flat.device) if scale < 1 else None

    def _stays_finite(self, rate: float, norm: float) -> bool:
        """Whether a step can be told beforehand to leave every number finite, so that nothing
        need be copied to go back to.

        sgd moves a weight by at most rate · norm. AdamW's ratio of averages is at most
        1 / √((1 − β₂)(1 − β₁²/β₂)), by Cauchy-Schwarz over the gradients that both are made of.
        Of averages of 8 bits less is known: the first is at most the longest clipped gradient, as
        rounding stays below the largest of its block, and the denominator at least ε.
        """
        rate = rate * max(group["factor"] for group in self._optimizer.param_groups)
        limit = torch.finfo(self._flat.dtype).max / 16
        farthest = self._farthest(norm)
        if not (farthest < math.inf and rate < limit):
            return False
        if self.settings.optimizer != "sgd" and not norm < math.sqrt(limit):
            return False

        def moved(largest: float) -> float:
            return largest * (1 + rate * self.settings.weight_decay) + rate * farthest

        # the weights are looked at only where what is known of them from the steps before is not
        # enough: of many adapters that is a pass over much memory
        largest = moved(self._largest)
        if not largest < limit:
            largest = moved(_largest(self._flat))
        self._largest = largest if largest < limit else math.inf
        return largest < limit

    def _farthest(self, norm: float) -> float:
        """Bound on what one step of rate 1 adds to a weight, its decay apart; infinite: not
        known."""
        settings = self.settings
        beta1, beta2 = settings.betas
        if settings.optimizer == "sgd":
            return norm
        if settings.optimizer in EIGHT_BIT:
            return settings.clip / (settings.eps * (1 - beta1)) if settings.clip else math.inf
        if beta1**2 < beta2:
            return 1 / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        return math.inf

    def _is_finite(self) -> bool:
        """Whether everything is that a step moves."""
        tensors = [tensor for tensor in self._moving().values() if tensor.is_floating_point()]
        return all(math.isfinite(_largest(tensor)) for tensor in tensors)

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
        """Take note of a validation loss at this step.

        Returns:
            Whether it is the lowest, so that the weights are to be kept. A loss that is not finite
            never is.
        """
        self.evaluated = self.step
        if self.step == 0:
            self.start_loss = loss
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best = Best(self.step, loss)
            self.stale = 0
            return True
        self.stale += 1
        return False

    # --- values ----------------------------------------------------------------------------

    def snapshot(self) -> Adapter | None:
        """The adapter as it is now; ``None`` if it is no adapter that is trained."""
        return self.trained.snapshot()

    @property
    def flat(self) -> Tensor:
        """The weights, [P]; the buffer itself."""
        return self._flat.detach()

    def share(self) -> None:
        """Let every process have the first one's weights."""
        self._largest = math.inf
        self._world.copy_(self.flat)
        self.trained.moved()

    @torch.no_grad()
    def restore(self, flat: Tensor | None, step: int) -> None:
        """Go back to the weights of an earlier step, and make no further one.

        Args:
            flat: [P]; ``None``: another process has them, and shares them.
        """
        self._gradient = None
        self._optimizer.state.clear()  # for there is more memory without the averages
        self.clear_gradient()
        self.trained.release()
        if flat is not None:
            self._flat.copy_(flat)
        self.share()
        self.weights_step = step

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the job's state."""
        return self._moving()

    def _moving(self) -> dict[str, Tensor]:
        """What an optimizer step changes: the weights, and the optimizer's own tensors."""
        own = {
            f"optimizer.{number}.{name}" if number else f"optimizer.{name}": tensor
            for number, group in enumerate(self._optimizer.param_groups)
            for name, value in self._optimizer.state.get(group["params"][0], {}).items()
            for tensor in [value if isinstance(value, Tensor) else torch.tensor(value)]
        }
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
            "most_tokens": self.most_tokens,
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`tensors` and :meth:`state` gave.

        Raises:
            InputError: they are of an adapter of another size.
        """
        if tensors["flat"].shape != self._flat.shape:
            raise InputError(
                f"the checkpoint has {tensors['flat'].numel()} trained parameters and this run "
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
        self.most_tokens = state.get("most_tokens", self.most_tokens)
        best = state["best"]
        self.best = None if best is None else Best(int(best["step"]), best["loss"])

    def _go_back(self, tensors: Mapping[str, Tensor]) -> None:
        """To what :meth:`_moving` gave."""
        self.clear_gradient()
        self._largest = math.inf
        self._flat.copy_(tensors["flat"])
        self.trained.moved()
        inner: dict[int, dict[str, Any]] = {}
        for full, tensor in tensors.items():
            if full.startswith("optimizer."):
                number, _, name = full.removeprefix("optimizer.").rpartition(".")
                counts = name == "step" and self.settings.optimizer in EIGHT_BIT
                inner.setdefault(int(number or 0), {})[name] = int(tensor) if counts else tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": inner, "param_groups": groups})


def shared(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of ``lengths`` in ``size`` shares of about as many tokens, each in its old order.

    The longest are dealt first, each to whoever has least so far (Graham, 1969).
    """
    if size == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        who = tokens.index(min(tokens))
        shares[who].append(place)
        tokens[who] += lengths[place]
    return [sorted(share) for share in shares]


def _parameter_groups(
    flat: torch.nn.Parameter, stretches: Mapping[Any, tuple[int, int]]
) -> list[dict[str, Any]]:
    """The optimizer's groups: stretches of ``flat`` by the factor on the learning rate."""
    if len(stretches) == 1:
        return [{"params": [flat], "factor": next(iter(stretches))}]
    return [
        {"params": [torch.nn.Parameter(flat.detach()[begin:end])], "factor": factor}
        for factor, (begin, end) in stretches.items()
    ]


def _length(flat: Tensor) -> float:
    """L2 norm of [P]. By pieces: PyTorch gives a vector to one thread, and its float32 sum of
    millions of squares is less exact."""
    whole = len(flat) // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(flat[:whole].view(-1, _PIECE), dim=1)
    return float(torch.linalg.vector_norm(torch.cat([pieces, flat[whole:]])))


def _largest(tensor: Tensor) -> float:
    """The largest size of its numbers, NaN where one is; makes no other tensor of its size."""
    return float(torch.linalg.vector_norm(tensor.detach().reshape(-1), math.inf))


def _make_optimizer(
    flat: torch.nn.Parameter, settings: TrainSettings, stretches: Mapping[Any, tuple[int, int]]
) -> torch.optim.Optimizer:
    assert settings.lr is not None
    groups = _parameter_groups(flat, stretches)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    if settings.optimizer in EIGHT_BIT:
        return _eight_bit(groups, flat.dtype, settings)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=flat.device.type in ("cpu", "cuda"),
    )


def _eight_bit(
    groups: list[dict[str, Any]], dtype: torch.dtype, settings: TrainSettings
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; fewer than 4096 parameters keep averages of 32 bits there.

    Raises:
        InputError: the adapter is float64.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if dtype == torch.float64:
        raise InputError(
            f"the adapter is float64, for which {settings.optimizer} does not exist. Use "
            "--optimizer adamw, or --dtype float32"
        )
    with quiet_transformers():  # it warns of kernels that it looks for and can do without
        optim = require("bitsandbytes", extra="quant", purpose=settings.optimizer).optim
    kind = optim.AdamW8bit if settings.optimizer == "adamw8bit" else optim.PagedAdamW8bit
    made: torch.optim.Optimizer = kind(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return made
