"""The loop: forwards and backwards of one job, its evaluations and its checkpoints.

One step of it::

    window  = job.window()                      # the examples, one's share cut into forwards
    forward and backward of each part           # losses divided by the window's tokens
    sum over all processes                      # of the gradient, where there are several
    loss and gradient finite?                   # before anything moves
    job.take_step(…)                            # clip, optimizer, weights finite?, count
    row, evaluation, checkpoint                 # as due

Between two forwards it looks whether somebody asked to stop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.core.sites import LowRank
from lorakit.data import Example, TokenData, pack
from lorakit.errors import TrainingError, collected
from lorakit.evaluate import LossResult, example_losses, mean_loss
from lorakit.infer import PackedModel
from lorakit.layers import Routing
from lorakit.train.callbacks import Callback, EvalMetrics, StepMetrics
from lorakit.train.checkpoint import Checkpoint, write_checkpoint
from lorakit.train.distributed import PeerLost, World
from lorakit.train.folder import MetricsFile, RunFolder
from lorakit.train.interrupt import StopRequest
from lorakit.train.job import Job, Window
from lorakit.train.memory import peak_vram_mb, resident_mb
from lorakit.train.origin import check_settings
from lorakit.train.randomness import random_tensors, seeded, set_random_tensors
from lorakit.train.room import (
    MARGIN,
    PeakMemory,
    available_bytes,
    give_back_memory,
    is_memory_error,
    num_tokens,
    shortened,
)

#: seconds between two checkpoints where the steps between them are not given …
CHECKPOINT_SECONDS = 60.0
#: … and the share of the time that writing them may take
CHECKPOINT_SHARE = 0.01

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Somebody asked to stop; the job stands between two steps."""


class Loop:
    """Runs one job on one model.

    Args:
        packed: the model with the job's adapter attached.
        continued: whether the adapter was there before the run, and so is not the base.
        validation: data to evaluate on, and which of it; ``None`` for none.
        events: who is told.
        folder, metrics: where rows and checkpoints go; no metrics in a process that writes none.
        stop: asked between two forwards.
        keep: saves the job's adapter; called at each new best.
        decided: the settings that a checkpoint belongs to.
        world: the processes that train together.
    """

    def __init__(
        self,
        packed: PackedModel,
        job: Job,
        *,
        world: World,
        continued: bool,
        validation: tuple[TokenData, Sequence[int]] | None,
        events: Callback,
        folder: RunFolder,
        metrics: MetricsFile | None,
        stop: StopRequest,
        keep: Callable[[Job], None],
        decided: Mapping[str, Any],
    ) -> None:
        self._packed = packed
        self._model = packed.model
        self._job = job
        self._world = world
        self._continued = continued
        self._validation = validation
        self._events = events
        self._folder = folder
        self._metrics = metrics
        self._stop = stop
        self._keep = keep
        self._decided = decided
        self._adapted = [p for p, s in job.snapshot().sites.items() if isinstance(s, LowRank)]
        self._seconds_before = 0.0
        self._began = time.perf_counter()
        self._saved_step: int | None = None
        self._saved_at = self._began
        self._writing_seconds = 0.0

    # --- state -----------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, that before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it was made with other settings.
        """
        check_settings(checkpoint.state["settings"], self._decided)
        job = {
            name.removeprefix("job."): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith("job.")
        }
        self._job.load(job, checkpoint.state["job"])
        set_random_tensors(checkpoint.tensors)
        self._seconds_before = float(checkpoint.state["seconds"])
        self._saved_step = checkpoint.step

    def save(self) -> Path | None:
        """Write a checkpoint of this moment; ``None`` if the last one is of this step, or if it
        is another process that writes."""
        if self._metrics is None or self._saved_step == self._job.step:
            return None
        started = time.perf_counter()
        self._metrics.sync()
        checkpoint = Checkpoint(
            step=self._job.step,
            tensors={
                **{f"job.{name}": tensor for name, tensor in self._job.tensors().items()},
                **random_tensors(),
            },
            state={
                "job": self._job.state(),
                "metrics_length": self._metrics.length,
                "seconds": self.seconds,
                "settings": self._decided,
            },
        )
        keep = self._job.settings.keep_checkpoints
        path = write_checkpoint(self._folder.checkpoints, checkpoint, keep=keep)
        self._saved_step = self._job.step
        self._saved_at = time.perf_counter()
        self._writing_seconds = self._saved_at - started
        self._events.on_checkpoint(path)
        return path

    @property
    def layers(self) -> str | None:
        """How the decoder layers ran, if any can run fused."""
        fused = self._packed.fused
        return None if fused is None else fused.summary()

    def note(self, text: str, **facts: Any) -> None:
        """Tell, and keep a row."""
        self._row({"kind": "note", "text": text, **facts})
        self._events.on_note(text)

    def _row(self, row: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.append(row)

    # --- running ---------------------------------------------------------------------------

    def run(self) -> None:
        """Step until the job is done.

        Raises:
            Stopped: somebody asked; a checkpoint of the last whole step is on disk.
            PeerLost: another process has ended; so it is then.
            TrainingError: a loss or a gradient is not finite, the disk or the memory is full.
        """
        job = self._job
        try:
            if not job.done and not self._world.sharded:
                self._try_largest()
            self._evaluate_if_due()  # before the first step, or where a stop cut it off
            while not job.done:
                self._step()
                self._evaluate_if_due()
                if self._checkpoint_due():
                    self.save()
        except (Stopped, PeerLost):
            job.clear_gradient()
            self.save()
            raise
        self.save()

    def _evaluate_if_due(self) -> None:
        if self._validation is not None and self._job.evaluation_due():
            self.evaluate()

    def _look_for_stop(self) -> None:
        # with a sharded base the others could not go on without this process
        if self._stop.received is not None and not self._world.sharded:
            raise Stopped

    def _together(self, work: Callable[[], T]) -> T:
        """What this process makes of its share; if one was asked to stop, all do.

        Raises:
            Stopped: somebody asked one of the processes.
            PeerLost: another process has ended.
        """
        made: list[T] = []
        with self._world.guarded(), contextlib.suppress(Stopped):
            made.append(work())
        wish = self._world.sharded and self._stop.received is not None
        if self._world.any(wish or not made):
            raise Stopped
        return made[0]

    def _step(self) -> None:
        job = self._job
        started = time.perf_counter()
        with training_mode(self._model, self._adapted):
            window, share = self._together(lambda: self._accumulate(job.window()))
            loss = float(self._world.sum_(torch.tensor(share, dtype=torch.float64)))
            self._world.sum_(job.gradient)
            norm = job.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(window, loss, norm)
        try:
            rate = job.take_step(loss, norm)
        except FloatingPointError as error:
            job.clear_gradient()
            self.save()
            raise TrainingError(
                f"Stopped in step {window.step + 1}: {error}, so it was not made. The state after "
                f"step {job.step} is saved in {self._folder.checkpoints}. Start a new run with a "
                "lower --lr."
            ) from error
        seconds = time.perf_counter() - started
        metrics = StepMetrics(
            step=job.step,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens=window.num_tokens,
            supervised=window.num_supervised,
            seconds=seconds,
            tokens_per_second=window.num_tokens / seconds,
            rss_mb=resident_mb(),
            vram_mb=peak_vram_mb(),
        )
        self._row(metrics.to_row())
        self._events.on_step(metrics)

    def _accumulate(self, window: Window) -> tuple[Window, float]:
        """Gradient of the window's mean loss, as far as this process's share adds to it: the
        window as it was cut in the end, and that part of the loss.

        Where the memory has no room for a part, the window is cut smaller and begun again.

        Raises:
            TrainingError: there is no room for one of its examples alone.
        """
        while True:
            self._job.clear_gradient()
            total = torch.zeros((), dtype=torch.float64)
            for part in window.parts:
                self._look_for_stop()
                summed = self._with_room(part, window.num_supervised)
                if summed is None:
                    break
                total += summed.cpu()
            else:
                for _ in range(window.idle):  # with a weight of zero
                    self._backward([min(window.examples, key=lambda e: len(e.ids))], math.inf)
                return window, float(total) / window.num_supervised
            window = self._job.window()

    def _with_room(
        self, part: Sequence[Example], num_supervised: int, *, cut: bool = True
    ) -> Tensor | None:
        """:meth:`_backward`; ``None`` if it does not fit and parts are to be smaller from now on.

        Args:
            cut: make parts smaller then.

        Raises:
            TrainingError: the part is one example.
        """
        try:
            return self._backward(part, num_supervised)
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise  # sharded, the others are in the middle of this forward
            message = str(error).strip().split("\n")[0]
        # out here nothing refers any more to what the forward had made
        self._job.clear_gradient()
        give_back_memory()
        if cut:
            self._cut_smaller(part, num_tokens(part) // 2, f"the memory was too small ({message})")
        return None

    def _cut_smaller(self, part: Sequence[Example], tokens: int, why: str) -> None:
        """Let no forward have more tokens than these, or tell that one example is too long.

        Raises:
            TrainingError: the part is one example; the state before this step is saved.
        """
        job = self._job
        if len(part) == 1:
            self.save()
            raise TrainingError(f"Stopped in step {job.step + 1}: {_no_room(job, part[0], why)}")
        before, job.most_tokens = job.most_tokens, max(1, tokens)
        text = (
            f"{why}, for a forward of {num_tokens(part)} tokens; from step {job.step + 1} on it "
            f"has at most {job.most_tokens} (before: {before}), so that a batch goes through in "
            "more parts, with the same result"
        )
        self.note(text, step=job.step + 1, micro_batch_tokens=job.most_tokens)
        if not self._world.first:
            logger.warning("process %d: %s", self._world.rank, text)

    def _try_largest(self) -> None:
        """Find out now whether the largest forward of the run fits; nothing is changed by it."""
        job = self._job
        with training_mode(self._model, self._adapted), seeded(job.settings.seed):
            try:
                if self._packed.device.type == "cpu":
                    self._compare_with_free()
                else:
                    while self._with_room(job.largest_part(), 1) is None:
                        pass
            finally:
                job.clear_gradient()
                give_back_memory(collect=False)

    def _compare_with_free(self) -> None:
        """On a CPU the kernel ends a process that takes too much, so the need is told beforehand.

        It is measured on a shortened copy of the largest forward; if that leaves a doubt, on one
        twice as long too, whose difference tells what each token needs.
        """
        free = available_bytes()
        if free is not None and self._world.size > 1:  # those of this machine share it
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", self._world.size))
        part = self._job.largest_part()
        tokens = num_tokens(part)
        small = shortened(part, 1 / 8)
        needed = self._measured(small)
        if free is None or needed is None or needed * tokens <= MARGIN * free * num_tokens(small):
            return
        larger, constant = shortened(part, 1 / 4), 0.0
        each = needed / num_tokens(small)
        if num_tokens(larger) > num_tokens(small) and 2 * needed < MARGIN * free:
            more = (self._measured(larger) or 0) - needed
            each = max(more, 0) / (num_tokens(larger) - num_tokens(small))
            constant = max(0.0, needed - each * num_tokens(small))
        fit = int((MARGIN * free - constant) / each) if each else tokens
        if fit >= tokens:
            return
        fit = max(fit, 0)
        why = f"the memory that is free ({free / 2**20:,.0f} MB) has room for about {fit} tokens"
        longest = max(part, key=lambda example: len(example.ids))
        self._cut_smaller([longest] if len(longest.ids) > fit else part, fit, why)

    def _measured(self, part: Sequence[Example]) -> int | None:
        """Bytes that a forward and its backward need at their peak; ``None``: not known."""
        with PeakMemory() as memory:
            if self._with_room(part, 1, cut=False) is None:
                return None  # an allocator refuses, which the first step meets and handles
        return memory.grown

    def _backward(self, part: Sequence[Example], num_supervised: float) -> Tensor:
        """Add the gradient of a part's losses / ``num_supervised``; gives their sum, float64."""
        batch = pack(part)
        with torch.enable_grad():
            summed, _ = self._packed.supervised_loss(batch, self._job.routing(batch))
            (summed / num_supervised).backward()  # type: ignore[no-untyped-call]
        return summed.detach().double()

    def evaluate(self) -> None:
        """Evaluate on the validation part, tell, and keep the adapter if it is the best."""
        assert self._validation is not None
        job = self._job
        started = time.perf_counter()
        result = self._loss_of(job.name)
        if job.step == 0:
            base = self._loss_of(None) if self._continued else result
            job.base_loss = base.loss
        metrics = EvalMetrics(
            step=job.step,
            loss=result.loss,
            perplexity=result.perplexity,
            best=job.observe(result.loss),
            seconds=time.perf_counter() - started,
            examples=(result.sums, result.counts),
        )
        self._row(metrics.to_row())
        if not math.isfinite(result.loss):
            self._say_not_finite(result)
        if metrics.best and job.step:  # the first one changes nothing yet
            self._keep(job)
        self._events.on_eval(metrics)

    def _say_not_finite(self, result: LossResult) -> None:
        assert self._validation is not None
        data, indices = self._validation
        rows = [data.where(indices[place]) for place in result.not_finite]
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        self.note(
            f"the validation loss after step {self._job.step} is {result.loss}, so it cannot be "
            f"the best; the rows behind it: {', '.join(rows[:3])}{more}"
        )

    def _loss_of(self, adapter: str | None) -> LossResult:
        """The validation loss. Each process takes a share of the examples, unless all are
        needed for every forward."""
        assert self._validation is not None
        data, indices = self._validation
        world = self._world
        mine = slice(None) if world.sharded else slice(world.rank, None, world.size)

        def losses() -> tuple[np.ndarray, np.ndarray]:
            while True:
                found = self._losses_with_room(adapter, data, indices[mine])
                if found is not None:
                    return found

        both = np.zeros((2, len(indices)))
        both[:, mine] = self._together(losses)
        if not world.sharded:
            world.sum_(torch.from_numpy(both))
        return mean_loss(both[0], both[1].astype(np.int64))

    def _losses_with_room(
        self, adapter: str | None, data: TokenData, indices: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Each example's loss; ``None`` if it does not fit and forwards are smaller from now on.

        Raises:
            TrainingError: the longest example alone does not fit.
        """
        job = self._job
        try:
            return example_losses(
                self._model,
                self._packed.handle,
                adapter,
                data,
                indices,
                token_budget=job.most_tokens,
                packed=self._packed,
                on_batch=lambda *_: self._look_for_stop(),
            )
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise
            message = str(error).strip().split("\n")[0]
        give_back_memory()
        examples = sorted((data[i] for i in indices), key=lambda e: len(e.ids), reverse=True)
        alone = len(examples[0].ids) >= (job.most_tokens or math.inf)
        part = examples[:1] if alone else examples
        tokens = min(num_tokens(part), job.most_tokens or num_tokens(part)) // 2
        self._cut_smaller(part, tokens, f"the memory was too small in an evaluation ({message})")
        return None

    def _checkpoint_due(self) -> bool:
        every = self._job.settings.checkpoint_every
        if every is not None:
            return self._job.step % every == 0
        pause = max(CHECKPOINT_SECONDS, self._writing_seconds / CHECKPOINT_SHARE)
        return time.perf_counter() - self._saved_at >= pause

    # --- when a number is not finite -------------------------------------------------------

    def _not_finite(self, window: Window, loss: float, norm: float) -> NoReturn:
        """Save the state before this step, find the examples, and stop.

        Raises:
            TrainingError: always.
        """
        job = self._job
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what = f"the gradient's norm is {norm}"
        job.clear_gradient()
        self.save()
        rows = [
            f"{job.where(example)}: its {problem}"
            for example in window.examples
            if (problem := self._problem_of(example)) is not None
        ]
        job.clear_gradient()
        stopped = f"Stopped in step {window.step + 1}, before the weights moved: {what}"
        found = f"{stopped}, though that of each of its rows alone is finite."
        if rows:
            found = collected(f"{stopped}. The rows behind it", rows)
        raise TrainingError(
            f"{found}\nThe state after step {job.step} is saved in {self._folder.checkpoints}. "
            "Look at these rows, lower --lr, or use --dtype float32; then start a new run."
        )

    def _problem_of(self, example: Example) -> str | None:
        with training_mode(self._model, self._adapted):
            self._job.clear_gradient()
            loss = float(self._backward([example], 1))
        norm = self._job.gradient_norm()
        if not math.isfinite(loss):
            return f"loss is {loss}"
        return None if math.isfinite(norm) else f"gradient's norm is {norm}"


@contextlib.contextmanager
def training_mode(model: nn.Module, adapted: Sequence[str]) -> Iterator[None]:
    """Training mode for the adapted modules alone, evaluation mode for all others.

    The base is frozen, so its own dropout and batch statistics would be noise that depends on
    how a batch is cut; the adapters' dropout is keyed and is not. Layers whose gradient
    checkpointing is on count as training, without which it would not act, except while they run.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        for path in adapted:
            model.get_submodule(path).training = True
        with contextlib.ExitStack() as stack:
            for module in _checkpointing(model):
                stack.enter_context(_recomputed(module))
            yield
    finally:
        for module, mode in before:
            module.training = mode


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    """The innermost modules whose gradient checkpointing is on; those around them only say so."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    return [m for m in on if sum(inner in on for inner in m.modules()) == 1]


@contextlib.contextmanager
def _recomputed(module: Any) -> Iterator[None]:
    """Let a module's gradient checkpointing act, while its own dropout stays off."""
    module.training = True
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None:  # it has a way of its own
        yield
        return

    def quiet(run: Callable[..., Any], *inputs: Any) -> Any:
        mode, module.training = module.training, False
        try:
            return run(*inputs)
        finally:
            module.training = mode

    def quietly(run: Callable[..., Any], *inputs: Any) -> Any:
        inputs = tuple(map(_with_gradient, inputs))
        return checkpoint(partial(quiet, run), *inputs)

    module._gradient_checkpointing_func = quietly
    try:
        yield
    finally:
        module._gradient_checkpointing_func = checkpoint


def _with_gradient(value: Any) -> Any:
    """An input of a reentrant checkpoint, which gives no gradient at all where none needs one."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


def check_first_forward(packed: PackedModel, job: Job) -> None:
    """Run one example, so that what cannot work is known before anything is written.

    Raises:
        TargetError: adapted modules that are never called.
        BaseError: a model that computes no loss over tokens.
        TrainingError: the memory has no room for it.
    """
    example = job.window().examples[0]
    try:
        with training_mode(packed.model, []), torch.no_grad():
            packed.supervised_loss(pack([example]), Routing.uniform(job.name))
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        told = _no_room(job, example, f"the memory was too small ({error})")
        raise TrainingError(f"Not begun: {told}") from error


def _no_room(job: Job, example: Example, why: str) -> str:
    return (
        f"{why}, and this example does not fit even alone: {job.where(example)}, "
        f"{len(example.ids)} tokens. What would help: leave it out or cut it with --max-length; "
        "--recompute layers; --quantize nf4."
    )
