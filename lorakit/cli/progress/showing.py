"""The two ways to show a view: redrawn in place on a terminal, or as lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from lorakit.cli.output import plural
from lorakit.cli.progress.drawing import drawing, machine
from lorakit.cli.progress.view import View, view_of_rows
from lorakit.cli.progress.wording import duration, summary
from lorakit.train.callbacks import Callback, EvalMetrics, RunInfo, RunResult, StepMetrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: the smallest terminal that gets a curve
_LEAST_LINES_FOR_CURVE = 16
_LEAST_WIDTH_FOR_CURVE = 40
#: seconds between two lines where there is no terminal
PLAIN_SECONDS = 10.0


class PlainProgress(Callback):
    """A line at the start, about every ten seconds, at each evaluation and at the end.

    Args:
        stream: where to; stderr by default.
        seconds: least time between two lines of steps.
        every_steps: a line at each multiple of so many steps instead.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        seconds: float = PLAIN_SECONDS,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._seconds = seconds
        self._every_steps = every_steps
        self._clock = clock
        self._view: View | None = None
        self._said_at = -math.inf

    def on_start(self, run: RunInfo) -> None:
        self._view = View(run)
        self._view.begin(self._clock())
        self._say(_opening(run))

    def on_step(self, metrics: StepMetrics) -> None:
        view, now = self._known, self._clock()
        view.add_step(metrics, now)
        if self._every_steps is not None:
            due = metrics.step % self._every_steps == 0
        else:
            due = now - self._said_at >= self._seconds
        if due or metrics.step == view.run.total_steps:
            self._said_at = now
            left = view.seconds_left(now)
            parts = [f"loss {view.smoothed[-1]:.3f}" if view.smoothed else "loss not finite"]
            parts += [" ".join(filter(None, (label, value))) for label, value, _ in machine(view)]
            parts += [] if left is None else [f"{duration(left)} left"]
            self._say(f"step {metrics.step}/{view.run.total_steps}  {'  '.join(parts)}")

    def on_eval(self, metrics: EvalMetrics) -> None:
        view = self._known
        view.add_eval(metrics)
        what = "  (best so far)" if metrics.best and metrics.step else ""
        what = "  (before training)" if metrics.step == 0 else what
        known = {"perplexity": metrics.perplexity, **metrics.metrics}
        parts = [f"  {name} {value:.3g}" for name, value in known.items() if value is not None]
        self._say(
            f"step {metrics.step}/{view.run.total_steps}  validation loss {metrics.loss:.3f}"
            f"{''.join(parts)}{what}"
        )

    def on_note(self, text: str) -> None:
        self._say(f"note: {text}")

    def on_end(self, result: RunResult) -> None:
        self._say(summary(self._known, result))

    @property
    def _known(self) -> View:
        assert self._view is not None, "on_start comes first"
        return self._view

    def _say(self, text: str) -> None:
        stream = self._stream or sys.stderr
        encoding = getattr(stream, "encoding", None) or "ascii"
        # a log in an old encoding is no reason to stop a run
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


class LiveProgress(Callback):
    """The picture, redrawn in place; it stays on the screen when the run ends.

    Args:
        console: a rich console on a terminal.
        clock: seconds, monotonic.
        refresh_per_second: how often it is redrawn; 0 only when something happens.
    """

    def __init__(
        self,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
        refresh_per_second: float = 4.0,
    ) -> None:
        self._console = console
        self._clock = clock
        self._refresh_per_second = refresh_per_second
        self._view: View | None = None
        self._live: Any = None

    def on_start(self, run: RunInfo) -> None:
        from rich.live import Live

        self._view = _with_past(run)
        self._view.begin(self._clock())
        self._console.print(_opening(run), highlight=False, markup=False)
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            auto_refresh=self._refresh_per_second > 0,
            refresh_per_second=self._refresh_per_second or 1.0,
            # stdout is the result's: it must not be led through a console on stderr
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._live.start()

    def on_step(self, metrics: StepMetrics) -> None:
        self._known.add_step(metrics, self._clock())

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._known.add_eval(metrics)

    def on_note(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"• {text}", style="dim"), highlight=False)

    def on_end(self, result: RunResult) -> None:
        from rich.text import Text

        self._known.ending = f"{result.ending}, {duration(result.seconds)}"
        self._stop()
        self._console.print(Text(summary(self._known, result), style="bold"), highlight=False)

    def close(self, error: BaseException | None) -> None:
        if self._view is not None and self._view.ending is None:
            self._view.ending = "stopped"
        self._stop()

    @property
    def _known(self) -> View:
        assert self._view is not None, "on_start comes first"
        return self._view

    def _draw(self) -> RenderableType:
        size = self._console.size
        roomy = size.height >= _LEAST_LINES_FOR_CURVE and size.width >= _LEAST_WIDTH_FOR_CURVE
        return drawing(self._known, self._clock(), width=size.width, with_curve=roomy)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def Progress(stream: TextIO | None = None, *, quiet: bool = False) -> Callback:
    """The progress that fits where it is shown.

    Args:
        stream: where to; stderr by default.
        quiet: show nothing at all.
    """
    if quiet:
        return Callback()
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return PlainProgress(stream)
    console = Console(file=stream, stderr=stream is None)
    utf8 = console.encoding.lower().replace("-", "").startswith("utf")
    if console.is_terminal and not console.is_dumb_terminal and utf8:
        return LiveProgress(console)
    return PlainProgress(stream)


def _opening(run: RunInfo) -> str:
    base = f" on {run.base}" if run.base else ""
    size = f", {run.num_trainable:,} trained parameters" if run.num_trainable else ""
    start = f", from step {run.first_step}" if run.first_step else ""
    return (
        f"Training {run.out}{base}: {plural(run.total_steps, 'step')} on {run.device}{size}{start}"
    )


def _with_past(run: RunInfo) -> View:
    """A view that begins with what a resumed run did before."""
    if not run.first_step:
        return View(run)
    from lorakit.errors import InputError
    from lorakit.train.record import read_run

    try:
        record = read_run(run.out, with_adapter=False)
    except InputError:  # the curve begins here, then
        return View(run)
    past = [dict(row) for row in record.steps if row["step"] <= run.first_step]
    view, _ = view_of_rows(run, [*past, *map(dict, record.evals)])
    view.step = run.first_step
    return view
