"""Trackers: a run's numbers in TensorBoard, Weights & Biases, MLflow or Trackio.

Each goes through the service's own package, which reads its own settings (``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID``, …). A :class:`Tracker` turns events into named
numbers; a :class:`Sink` is the little that differs between the services.

=========================== ======================================================
``train/…``                 loss, lr, grad_norm, tokens, tokens_per_second
``memory/…``                rss_mb, vram_mb
``validation/…``            loss, perplexity
``summary/…``               what :class:`RunResult` says, once, at the end
=========================== ======================================================

A resumed run goes on in the same place: the service's id of the run is kept in ``trackers.json``
in the run folder. A service that cannot be reached is said once and left out; everything else
that fails (no login, no such project) stops the run before its first step.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lorakit.core.files import write_atomic
from lorakit.errors import InputError, collected
from lorakit.optional import require
from lorakit.train.callbacks import Callback, EvalMetrics, RunInfo, RunResult, StepMetrics
from lorakit.train.record import flatten

#: where MLflow's numbers wait at most before they are sent: a request per step would slow training
_MLFLOW_SECONDS = 5.0
#: MLflow's own limits per request
_MLFLOW_METRICS, _MLFLOW_PARAMS, _MLFLOW_VALUE = 1000, 100, 6000

#: packages whose exceptions mean that a server was not reached
_NETWORK_PACKAGES = {"requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2", "aiohttp"}
_MLFLOW_NETWORK_CODES = {
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
}


class Sink(Protocol):
    """One service, as far as a tracker needs it."""

    def open(self, run: RunInfo, identity: str | None) -> str | None:
        """Begin a run, or go on with the one of that identity; returns the identity."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send named numbers of one step."""

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Send what is left and end the run."""


class Tracker(Callback):
    """Sends a run's numbers to one :class:`Sink`."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self._sink = sink
        self._open = False
        self._summary: dict[str, Any] = {}

    def on_start(self, run: RunInfo) -> None:
        with _stdout_kept_free():
            known = _identities(run.out)
            identity = known.get(self.name) if run.first_step else None
            opened = self._sink.open(run, identity)
        self._open = True
        if opened is not None and opened != known.get(self.name):
            content = json.dumps({**known, self.name: opened}, sort_keys=True, indent=1) + "\n"
            write_atomic(run.out / "trackers.json", content.encode())

    def on_step(self, metrics: StepMetrics) -> None:
        numbers: dict[str, float] = {
            "train/loss": metrics.loss,
            "train/lr": metrics.lr,
            "train/grad_norm": metrics.grad_norm,
            "train/tokens": metrics.tokens,
            "train/tokens_per_second": metrics.tokens_per_second,
            "memory/rss_mb": metrics.rss_mb,
        }
        if metrics.vram_mb is not None:
            numbers["memory/vram_mb"] = metrics.vram_mb
        self._log(numbers, metrics.step)

    def on_eval(self, metrics: EvalMetrics) -> None:
        numbers = {"validation/loss": metrics.loss}
        if metrics.perplexity is not None:
            numbers["validation/perplexity"] = metrics.perplexity
        numbers |= {f"validation/{name}": value for name, value in metrics.metrics.items()}
        self._log(numbers, metrics.step)

    def on_end(self, result: RunResult) -> None:
        values = {
            "steps": result.steps,
            "ending": result.ending,
            "last_loss": result.last_loss,
            "base_loss": result.base_loss,
            "best_loss": result.best_loss,
            "best_step": result.best_step,
            "seconds": result.seconds,
        }
        self._summary = {f"summary/{k}": v for k, v in values.items() if v is not None}

    def close(self, error: BaseException | None) -> None:
        if self._open:
            self._open = False
            with _stdout_kept_free():
                self._sink.finish(self._summary, failed=error is not None)

    def survives(self, error: Exception) -> bool:
        """Whether ``error`` means that the service could not be reached."""
        return any(_is_network_failure(link) for link in _chain(error))

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        with _stdout_kept_free():
            self._sink.log(numbers, step)


class TensorBoardSink:
    """Event files in ``<run folder>/tensorboard``; see ``tensorboard --logdir``."""

    def __init__(self) -> None:
        require("tensorboard", purpose="--report-to tensorboard")
        self._writer: Any = None

    def open(self, run: RunInfo, identity: str | None) -> str | None:
        writer = require("torch.utils.tensorboard").SummaryWriter
        # rows behind the checkpoint, which the resumed run will write again, are hidden
        purge = run.first_step + 1 if run.first_step else None
        self._writer = writer(str(run.out / "tensorboard"), purge_step=purge)
        if not run.first_step:
            lines = [f"    {k}: {v}" for k, v in flatten(run.settings).items()]
            self._writer.add_text("settings", "\n".join(lines), 0)
        return None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        if summary:
            lines = [f"    {k}: {v}" for k, v in summary.items()]
            self._writer.add_text("summary", "\n".join(lines), 0)
        self._writer.close()


class WandbSink:
    """A run in Weights & Biases; project ``WANDB_PROJECT``, or lorakit."""

    def __init__(self) -> None:
        self._wandb = require("wandb", purpose="--report-to wandb")
        self._run: Any = None

    def open(self, run: RunInfo, identity: str | None) -> str | None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lorakit"),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=str(run.out),
            config=flatten(run.settings),
            id=identity,
            resume="allow" if identity else None,
            # without this it replaces sys.stdout and sys.stderr by its own
            settings=self._wandb.Settings(console="off"),
        )
        # W&B drops rows whose own step goes back, as it does after a resume: ours is an axis
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=1 if failed else 0)


class MLflowSink:
    """A run in MLflow; experiment ``MLFLOW_EXPERIMENT_NAME``, or lorakit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._mlflow = require("mlflow", purpose="--report-to mlflow")
        self._clock = clock
        self._client: Any = None
        self._run_id = ""
        self._waiting: list[Any] = []
        self._sent_at = 0.0

    def open(self, run: RunInfo, identity: str | None) -> str | None:
        self._client = self._mlflow.MlflowClient()
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self._run_id = identity
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lorakit")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
            self._send_settings(run.settings)
        self._sent_at = self._clock()
        return self._run_id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        metric = self._mlflow.entities.Metric
        now = int(time.time() * 1000)
        self._waiting += [metric(name, float(v), now, step) for name, v in numbers.items()]
        full = len(self._waiting) > _MLFLOW_METRICS - 20
        if full or self._clock() - self._sent_at >= _MLFLOW_SECONDS:
            self._send()

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        try:
            self._send()
            for name, value in summary.items():
                self._client.set_tag(self._run_id, name.replace("/", "."), str(value))
        finally:
            status = "FAILED" if failed else "FINISHED"
            if summary.get("summary/ending") == "interrupted":
                status = "KILLED"
            self._client.set_terminated(self._run_id, status=status)

    def _send(self) -> None:
        self._sent_at = self._clock()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._client.log_batch(self._run_id, metrics=waiting)

    def _send_settings(self, settings: Mapping[str, Any]) -> None:
        param = self._mlflow.entities.Param
        params = [param(k, str(v)[:_MLFLOW_VALUE]) for k, v in flatten(settings).items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MLFLOW_PARAMS])


class TrackioSink:
    """A run in Trackio, local unless ``TRACKIO_SPACE_ID`` is set; project lorakit."""

    def __init__(self) -> None:
        self._trackio = require("trackio", purpose="--report-to trackio")
        self._run: Any = None

    def open(self, run: RunInfo, identity: str | None) -> str | None:
        self._run = self._trackio.init(
            project="lorakit",
            name=identity or run.name,
            config=flatten(run.settings),
            resume="allow" if identity else "never",
            embed=False,
        )
        return str(self._run.name)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        if numbers:
            self._run.log(numbers)
        self._trackio.finish()


#: name for ``--report-to`` → its sink
SINKS: dict[str, Callable[[], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MLflowSink,
    "trackio": TrackioSink,
}


def make_trackers(names: Iterable[str]) -> list[Tracker]:
    """The trackers of these names, in order; their packages are imported now.

    Raises:
        InputError: a name is unknown or given twice.
        MissingDependencyError: a package is missing; the message is its install command.
    """
    wanted = list(names)
    problems = [
        f"{name!r} is unknown; the trackers are {', '.join(SINKS)}"
        for name in wanted
        if name not in SINKS
    ]
    problems += [f"{n!r} is given twice" for n in dict.fromkeys(wanted) if wanted.count(n) > 1]
    if problems:
        raise InputError(collected("These trackers cannot be used", problems))
    return [Tracker(name, SINKS[name]()) for name in wanted]


def _identities(out: Path) -> dict[str, str]:
    try:
        known = json.loads((out / "trackers.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


@contextlib.contextmanager
def _stdout_kept_free() -> Iterator[None]:
    """Send what a service prints to stderr: stdout belongs to the command's result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_network_failure(error: BaseException) -> bool:
    kind = type(error)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if kind.__module__.partition(".")[0] in _NETWORK_PACKAGES:
        return True
    if kind.__module__.startswith("wandb."):
        return kind.__name__ == "CommError"  # and not AuthenticationError, which inherits from it
    if kind.__module__.startswith("mlflow."):
        return getattr(error, "error_code", None) in _MLFLOW_NETWORK_CODES
    return False
