"""What a run tells the world: events as values, and the callbacks that receive them.

The loop knows no terminal, no tracker and no file of metrics; it calls one :class:`CallbackList`::

    with CallbackList([Progress(), TensorBoard()]) as events:   # closes all, whatever happens
        events.on_start(RunInfo(...))
        for ...:
            events.on_step(StepMetrics(...))
            events.on_eval(EvalMetrics(...))
        events.on_end(RunResult(...))

A callback subclasses :class:`Callback` and overrides what it wants. An exception in one stops the
run and names it: a run whose numbers go nowhere is not the run that was asked for. The exception
to this is a failure that the callback itself declares survivable (a tracker whose server does not
answer): it is said once, in a note, and the callback is left out from then on.

Only the standard library is imported here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, runtime_checkable

from lorakit.errors import InputError, LorakitError, TrainingError, collected

logger = logging.getLogger(__name__)

Ending = Literal["finished", "early stop", "interrupted", "left"]


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    out: Path
    """The run folder."""
    total_steps: int
    """Optimizer steps the run will make at most, counted from the very first."""
    first_step: int = 0
    """Steps already made: 0, or where a resumed run goes on."""
    base: str = ""
    """How the user named the base."""
    device: str = "cpu"
    """Where it trains, such as ``"cpu"`` or ``"cuda:0"``."""
    num_trainable: int = 0
    """Trained parameters."""
    has_validation: bool = False
    """Whether ``on_eval`` will come."""
    adapter: str | None = None
    """How the model's handle calls what is trained; ``None`` where it is the base itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What ``run.yaml`` holds: nested plain data."""

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.out.resolve().name


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; a row of ``metrics.jsonl`` with ``kind: step``."""

    step: int
    """Number of this step; the first is 1."""
    loss: float
    """Mean over the step's supervised tokens, natural logarithm."""
    lr: float
    """Learning rate that this step used."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    tokens: int
    """Tokens that went through the model in this step."""
    supervised: int
    """Those among them with a loss."""
    seconds: float
    """Wall time of this step."""
    tokens_per_second: float
    """tokens / seconds."""
    rss_mb: float
    """Resident memory of the process, in units of 2^20 bytes."""
    vram_mb: float | None = None
    """Peak of the memory allocated on the GPU, same unit; ``None`` without one."""

    def to_row(self) -> dict[str, Any]:
        """Plain data, as ``metrics.jsonl`` holds it."""
        return _to_row("step", self)


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation on the validation part; a row with ``kind: eval``.

    The row of step 0 is what the run began with: the base, as a new adapter changes nothing, or
    the adapter that it goes on with.
    """

    step: int
    """Steps made before it."""
    loss: float
    """Mean over all supervised tokens of the validation part."""
    perplexity: float | None = None
    """exp(loss), where the loss is that of text."""
    best: bool = False
    """Whether it is the lowest so far, step 0 included; that adapter is kept."""
    seconds: float | None = None
    """Wall time of the evaluation."""
    examples: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)
    """Each example's summed loss (float64) and supervised tokens (int64), as arrays, in the order
    of the validation part; not part of the row."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else the kind of task tells, such as ``{"accuracy": 0.9}``."""

    def to_row(self) -> dict[str, Any]:
        """Plain data, as ``metrics.jsonl`` holds it."""
        return _to_row("eval", self)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    out: Path
    """The run folder."""
    adapter: Path | None
    """The folder of the kept adapter; ``None`` if the run ended before there was one, or trained
    all weights."""
    steps: int
    """Optimizer steps made, those before a resume included."""
    ending: Ending = "finished"
    """Why it ended; ``"left"`` where somebody took it out, and it can be resumed."""
    last_loss: float | None = None
    """Training loss of the last step."""
    base_loss: float | None = None
    """Validation loss before the first step (of the base, or of the adapter that the run went on
    with); ``None`` without validation."""
    best_loss: float | None = None
    """Lowest validation loss; ``None`` without validation."""
    best_step: int | None = None
    """The step after which it was measured."""
    seconds: float = 0.0
    """Wall time of the run, those before a resume included."""
    model: Path | None = None
    """The folder of the kept model, where all weights were trained."""


def _to_row(kind: str, event: StepMetrics | EvalMetrics) -> dict[str, Any]:
    values = {one.name: getattr(event, one.name) for one in dataclasses.fields(event)}
    values.pop("examples", None)
    if not values.get("metrics", True):
        del values["metrics"]
    return {"kind": kind, **{name: v for name, v in values.items() if v is not None}}


class Callback:
    """Receives the events of one run. Every method does nothing until a subclass overrides it.

    Methods are called from the training process's main thread, in the order of the list, and
    the loop waits for them.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step; on a resumed run before its first."""

    def on_step(self, metrics: StepMetrics) -> None:
        """After an optimizer step."""

    def on_eval(self, metrics: EvalMetrics) -> None:
        """After an evaluation."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    def on_note(self, text: str) -> None:
        """Something that the user should know: a choice with its reason, a skipped row."""

    def on_end(self, result: RunResult) -> None:
        """After the run ended well, early or by request; not after an exception."""

    def close(self, error: BaseException | None) -> None:
        """The last call, exactly once and in any case; ``error`` is what ended the run."""


@runtime_checkable
class Survivable(Protocol):
    """A callback whose failures need not stop a run."""

    def survives(self, error: Exception) -> bool:
        """Whether the run may go on without this callback after ``error``."""


_METHODS = tuple(name for name in vars(Callback) if name.startswith("on_") or name == "close")


class CallbackList(Callback):
    """Hands each event to every callback, in order.

    Used as a context manager it closes them all at the end.

    Raises:
        InputError: something in the list is not a callback, or has a misspelt ``on_…`` method
            that would never be called.
        TrainingError: a callback failed; names it, the event and the reason. Errors of lorakit
            (a missing package, say) pass as they are.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)
        self._closed = False
        problems = [problem for c in self._callbacks for problem in _problems(c)]
        if problems:
            raise InputError(collected("These callbacks cannot be used", problems))

    def __len__(self) -> int:
        return len(self._callbacks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def on_start(self, run: RunInfo) -> None:
        self._call("on_start", run)

    def on_step(self, metrics: StepMetrics) -> None:
        self._call("on_step", metrics)

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._call("on_eval", metrics)

    def on_checkpoint(self, path: Path) -> None:
        self._call("on_checkpoint", path)

    def on_note(self, text: str) -> None:
        self._call("on_note", text)

    def on_end(self, result: RunResult) -> None:
        self._call("on_end", result)

    def close(self, error: BaseException | None = None) -> None:
        """Close every callback, also when one of them fails to; a second call does nothing.

        While ``error`` is on its way up, failures here are only logged: they must not hide it.
        """
        if self._closed:
            return
        self._closed = True
        failures: list[LorakitError] = []
        for callback in self._callbacks:
            try:
                callback.close(error)
            except Exception as failure:
                stopped = _stopped(callback, "close", failure)
                if error is None and not _survives(callback, failure):
                    failures.append(stopped)
                else:
                    logger.warning("%s", stopped)
        if failures:
            raise failures[0]

    def _call(self, method: str, event: object) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(event)
            except Exception as error:
                if not _survives(callback, error):
                    stopped = _stopped(callback, method, error)
                    if stopped is error:
                        raise  # with the cause that it came with
                    raise stopped from error
                self._switch_off(callback, method, error)

    def _switch_off(self, callback: Callback, method: str, error: Exception) -> None:
        self._callbacks.remove(callback)
        text = (
            f"{_name(callback)} is switched off for the rest of this run: it failed in {method} "
            f"({_said(error)}). Training goes on; metrics.jsonl has every number."
        )
        logger.warning("%s", text)
        try:
            callback.close(error)
        except Exception as failure:
            logger.debug("closing %s failed too: %s", _name(callback), _said(failure))
        self.on_note(text)


def _name(callback: object) -> str:
    return str(getattr(callback, "name", type(callback).__name__))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _survives(callback: Callback, error: Exception) -> bool:
    return isinstance(callback, Survivable) and callback.survives(error)


def _stopped(callback: Callback, method: str, error: Exception) -> LorakitError:
    if isinstance(error, LorakitError):
        return error
    return TrainingError(
        f"the callback {_name(callback)} failed in {method}: {_said(error)}. Correct it or leave "
        "it out; the run can be resumed from its last checkpoint."
    )


def _problems(callback: object) -> list[str]:
    name = _name(callback)
    if isinstance(callback, type):
        return [f"{callback.__name__} is a class; give an instance, {callback.__name__}()"]
    missing = [m for m in _METHODS if not callable(getattr(callback, m, None))]
    if missing:
        return [f"{name} has no {', '.join(missing)}; subclass lorakit.train.callbacks.Callback"]
    unknown = [m for m in dir(callback) if m.startswith("on_") and m not in _METHODS]
    if unknown:
        return [
            f"{name}.{m} is never called; the events are {', '.join(_METHODS)}" for m in unknown
        ]
    return []
