"""The live view of a training run, on stderr: what somebody looks at while waiting.

On a terminal it is a bar, a curve that grows along it, and the numbers that matter, redrawn in
place with rich; notes are printed above it. Anywhere else (a log file, a pipe, a dumb terminal,
or without rich) it is a plain line about every ten seconds. Nothing here touches stdout, which
belongs to the command's result.

``View`` holds what is known and knows no terminal; ``drawing`` turns it into a picture for a
width and an instant; ``LiveProgress`` and ``PlainProgress`` are the two ways to show it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from lorakit.cli.output import plural
from lorakit.train.callbacks import Callback, EvalMetrics, RunInfo, RunResult, StepMetrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

#: lines of the curve, and the smallest terminal that gets one
CURVE_HEIGHT = 6
_LEAST_LINES_FOR_CURVE = 16
_LEAST_WIDTH_FOR_CURVE = 40
#: seconds between two lines where there is no terminal
PLAIN_SECONDS = 10.0
#: columns of the numbers left of the curve
_MARGIN = 7


# --- what is known -----------------------------------------------------------------------------


@dataclass
class View:
    """A run so far."""

    run: RunInfo
    step: int = 0
    steps: list[int] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    """Per entry of ``steps``: mean of the losses so far, older ones weighing less and less."""
    evals: list[EvalMetrics] = field(default_factory=list)
    last: StepMetrics | None = None
    tokens_per_second: float | None = None
    """Smoothed like the loss."""
    ending: str | None = None
    _instants: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=512))
    _loss_sum: float = 0.0
    _rate_sum: float = 0.0
    _weight: float = 0.0

    def __post_init__(self) -> None:
        self.step = self.run.first_step

    def begin(self, now: float) -> None:
        """The clock starts: ``now`` in seconds, of any origin."""
        self._instants.clear()
        self._instants.append((self.step, now))

    def add_step(self, metrics: StepMetrics, now: float) -> None:
        """Take in a step that ended at ``now``."""
        self.step, self.last = metrics.step, metrics
        self._instants.append((metrics.step, now))
        if not math.isfinite(metrics.loss):
            return  # the loop stops on these; the mean of the others stays readable
        # the newest 5 % of the run weigh most, but never under 4 steps nor over 50
        keep = 1 - 1 / min(50.0, max(4.0, self.run.total_steps / 20))
        self._weight = keep * self._weight + 1 - keep
        self._loss_sum = keep * self._loss_sum + (1 - keep) * metrics.loss
        self._rate_sum = keep * self._rate_sum + (1 - keep) * metrics.tokens_per_second
        self.tokens_per_second = self._rate_sum / self._weight
        # the list that a drawing thread zips against must never be the longer one
        self.smoothed.append(self._loss_sum / self._weight)
        self.steps.append(metrics.step)

    def add_eval(self, metrics: EvalMetrics) -> None:
        """Take in an evaluation."""
        self.evals.append(metrics)

    @property
    def best(self) -> EvalMetrics | None:
        """The evaluation with the lowest loss."""
        finite = [e for e in list(self.evals) if math.isfinite(e.loss)]
        return min(finite, key=lambda e: e.loss, default=None)

    @property
    def before(self) -> EvalMetrics | None:
        """The evaluation before the first step."""
        return next((e for e in list(self.evals) if e.step == 0), None)

    def seconds_left(self, now: float) -> float | None:
        """By the pace of the last half of the steps, evaluations included; ``None`` at first."""
        instants = list(self._instants)
        if len(instants) < 2 or self.step >= self.run.total_steps:
            return None
        # the very first step pays for warming up; leave it out as soon as there are others
        start = instants[max(len(instants) // 2, 1 if len(instants) > 2 else 0)]
        if start == instants[-1]:
            start = instants[-2]
        (step_0, time_0), (step_1, time_1) = start, instants[-1]
        per_step = (time_1 - time_0) / max(1, step_1 - step_0)
        return max(0.0, per_step * (self.run.total_steps - self.step) - (now - time_1))


def view_of_rows(run: RunInfo, rows: Iterable[dict[str, Any]]) -> tuple[View, float]:
    """The view after these rows of ``metrics.jsonl``, and the seconds that they took."""
    view, now = View(run), 0.0
    view.begin(0.0)
    for row in rows:
        now += float(row.get("seconds") or 0.0)
        values = {name: value for name, value in row.items() if name != "kind"}
        for name in ("loss", "perplexity", "grad_norm"):  # null stands for a number not finite
            if name in values and values[name] is None:
                values[name] = math.nan
        with contextlib.suppress(TypeError):  # a row of another version, with other fields
            if row.get("kind") == "step":
                view.add_step(StepMetrics(**values), now)
            elif row.get("kind") == "eval":
                view.add_eval(EvalMetrics(**values))
    return view, now


# --- pictures ----------------------------------------------------------------------------------


def braille(
    points: Sequence[tuple[float, float]],
    *,
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[str]:
    """A line through points as ``height`` texts of ``width`` braille signs, 2 × 4 dots each.

    Points must be sorted by x and lie within the ranges; a space stands where no dot is set.
    """
    columns, rows = 2 * width, 4 * height

    def place(value: float, ends: tuple[float, float], size: int) -> float:
        span = ends[1] - ends[0]
        return 0.5 * (size - 1) if span <= 0 else (value - ends[0]) / span * (size - 1)

    placed = [
        (place(x, x_range, columns), place(-y, (-y_range[1], -y_range[0]), rows)) for x, y in points
    ]
    bits = [[0] * width for _ in range(height)]
    for (x_0, y_0), (x_1, y_1) in zip(placed, placed[1:] or placed, strict=False):
        dots = max(1, math.ceil(max(abs(x_1 - x_0), abs(y_1 - y_0))))
        for i in range(dots + 1):
            x = round(x_0 + (x_1 - x_0) * i / dots)
            y = round(y_0 + (y_1 - y_0) * i / dots)
            bits[y // 4][x // 2] |= _BRAILLE[y % 4][x % 2]
    return ["".join(chr(0x2800 + b) if b else " " for b in row) for row in bits]


_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def curve(view: View, *, width: int, height: int = CURVE_HEIGHT) -> list[Text]:
    """The smoothed loss over the whole run, evaluations marked; empty until there are two points.

    Args:
        view: the run.
        width: columns, the numbers on the left included.
        height: lines.
    """
    from rich.text import Text

    points = list(zip(view.steps, view.smoothed, strict=False))
    marks = [(e.step, e.loss) for e in list(view.evals) if math.isfinite(e.loss)]
    if len(points) < 2:
        return []
    losses = [y for _, y in points + marks]
    low, high = min(losses), max(losses)
    plot = width - _MARGIN
    x_range = (0.0, float(max(view.run.total_steps, view.step)))
    lines = braille(points, width=plot, height=height, x_range=x_range, y_range=(low, high))
    cells = [[(sign, "cyan") for sign in line] for line in lines]
    best = view.best
    for step, loss in marks:
        column = round((step / x_range[1]) * (plot - 1)) if x_range[1] else 0
        row = round((high - loss) / (high - low) * (height - 1)) if high > low else height // 2
        is_best = best is not None and step == best.step
        cells[row][column] = ("◆", "bold green") if is_best else ("◆", "yellow")
    numbers = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    drawn = []
    for row in range(height):
        text = Text(no_wrap=True)
        axis = "┤" if row in numbers else "│"
        text.append(f"{numbers.get(row, ''):>{_MARGIN - 2}} {axis}", style="dim")
        for style, group in itertools.groupby(cells[row], key=lambda cell: cell[1]):
            text.append("".join(sign for sign, _ in group), style=style)
        drawn.append(text)
    return drawn


def drawing(view: View, now: float, *, width: int, with_curve: bool = True) -> RenderableType:
    """The whole picture of a run at an instant, for a terminal of ``width`` columns."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    total = max(1, view.run.total_steps)
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    counter = Text()
    counter.append(f"{view.step}/{view.run.total_steps}", style="bold")
    counter.append(f" · {_state(view, now)}")
    done = min(view.step, total)
    line = ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")
    bar.add_row(line, counter)
    lines: list[RenderableType] = [bar]
    if with_curve:
        lines += curve(view, width=width)
    lines += [_joined(part, width) for part in (_quality(view), _machine(view)) if part]
    return Group(*lines)


def _state(view: View, now: float) -> str:
    if view.ending is not None:
        return view.ending
    left = view.seconds_left(now)
    if left is not None:
        return f"{duration(left)} left"
    return "starting" if view.last is None else "finishing"


def _quality(view: View) -> list[tuple[str, str, str]]:
    """``(label, value, style)`` of how good it is."""
    parts = []
    if view.smoothed:
        parts.append(("loss", f"{view.smoothed[-1]:.3f}", "bold cyan"))
    best, before = view.best, view.before
    if view.evals and view.evals[-1].step:
        parts.append(("◆ validation", f"{view.evals[-1].loss:.3f}", "bold yellow"))
    if best is not None and best.step:
        parts.append(("best", f"{best.loss:.3f} at {best.step}", "bold green"))
    if before is not None:
        parts.append(("before training", f"{before.loss:.3f}", "bold"))
    return parts


def _machine(view: View) -> list[tuple[str, str, str]]:
    """``(label, value, style)`` of how fast and how large it is."""
    if view.last is None:
        return []
    parts = []
    if view.tokens_per_second is not None:
        parts.append(("", f"{count(view.tokens_per_second)} tokens/s", ""))
    parts.append(("lr", f"{view.last.lr:.2e}", ""))
    parts.append(("memory", memory(view.last.rss_mb), ""))
    if view.last.vram_mb is not None:
        parts.append(("GPU", memory(view.last.vram_mb), ""))
    return parts


def _joined(parts: Sequence[tuple[str, str, str]], width: int) -> Text:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    for label, value, style in parts:
        piece = Text()
        piece.append(" · " if text else "", style="dim")
        piece.append(f"{label} " if label else "", style="dim")
        piece.append(value, style=style)
        if len(text) + len(piece) > width:
            break  # a number cut in half would be another number
        text.append_text(piece)
    return text


# --- numbers as people read them ---------------------------------------------------------------


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3:07"`` (minutes) or ``"2:03:07"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(mb: float) -> str:
    """``"850 MB"`` or ``"1.2 GB"``, from units of 2^20 bytes."""
    return f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1024:.1f} GB"


def count(number: float) -> str:
    """``"1,234"``; below ten with one decimal."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def summary(view: View, result: RunResult) -> str:
    """One sentence on how the run ended."""
    ending = {
        "finished": "Finished",
        "early stop": "Stopped early, validation no longer improved,",
        "interrupted": "Interrupted",
        "left": "Left",
    }[result.ending]
    text = f"{ending} after {plural(result.steps, 'step')} in {duration(result.seconds)}"
    if result.best_loss is not None and result.base_loss is not None:
        text += f": validation loss {result.base_loss:.3f} → {result.best_loss:.3f}"
        text += f", best at step {result.best_step}." if result.best_step is not None else "."
    elif result.last_loss is not None:
        text += f"; training loss {view.smoothed[-1] if view.smoothed else result.last_loss:.3f}."
    else:
        text += "."
    return text


# --- showing -----------------------------------------------------------------------------------


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
            parts += [" ".join(filter(None, (label, value))) for label, value, _ in _machine(view)]
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
