"""The live view of many runs at once, on stderr: one line of all, one for each of the last few.

On a terminal it is redrawn in place; elsewhere it is a line about every ten seconds and one for
each run that ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from lorakit.cli.progress.showing import PLAIN_SECONDS
from lorakit.cli.progress.wording import count, duration, memory
from lorakit.train.callbacks import Callback, EvalMetrics, RunInfo, RunResult, StepMetrics

#: runs under way that have a line
_SHOWN = 8


@dataclass
class _Row:
    """One run under way."""

    name: str
    total: int
    step: int = 0
    loss: float | None = None
    valid: float | None = None
    before: float | None = None


class ManyProgress:
    """Knows all runs; :meth:`of` makes the callback of each.

    Args:
        total: runs that there will be.
        quiet: show nothing; the jobs' first losses are still noted.
        stream: where to; stderr by default.
    """

    def __init__(
        self,
        total: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._quiet = quiet
        self._stream = stream
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._ended = self._failed = self._before = 0
        self._began = clock()
        self._said_at = self._began
        self._tokens: list[tuple[float, int]] = []
        self._rss = 0.0
        self._live: Any = None
        self._noted: set[str] = set()

    def __enter__(self) -> Self:
        self._began = self._said_at = self._clock()
        if not self._quiet:
            self._live = _live(self._stream, self.lines)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def of(self, job: Any) -> Callback:
        """The callback of a job's run; notes the first training loss in ``job.first_loss``."""
        return _OfOne(self, job)

    # --- what happens ----------------------------------------------------------------------

    def started(self, name: str, run: RunInfo) -> None:
        self._rows[name] = _Row(name, run.total_steps, run.first_step)

    def stepped(self, name: str, metrics: StepMetrics) -> None:
        row, now = self._rows[name], self._clock()
        row.step, row.loss, self._rss = metrics.step, metrics.loss, metrics.rss_mb
        self._tokens = [one for one in self._tokens if now - one[0] < 30]
        self._tokens.append((now, metrics.tokens))
        if self._live is None and now - self._said_at >= PLAIN_SECONDS:
            self._said_at = now
            self._say(self.overall())

    def evaluated(self, name: str, metrics: EvalMetrics) -> None:
        row = self._rows[name]
        row.valid = metrics.loss
        if metrics.step == 0:
            row.before = metrics.loss

    def done(self, name: str, result: RunResult, *, quietly: bool = False) -> None:
        """A run has ended well."""
        self._rows.pop(name, None)
        self._ended += 1
        self._before += quietly
        if quietly:
            return
        text = f"{name}: {result.ending} after {result.steps} steps, {duration(result.seconds)}"
        if result.best_loss is not None and result.base_loss is not None:
            text += f", validation loss {result.base_loss:.3f} → {result.best_loss:.3f}"
        elif result.last_loss is not None:
            text += f", training loss {result.last_loss:.3f}"
        self._say(text)

    def failed(self, name: str, error: Exception) -> None:
        """A run has ended with an error, or could not begin."""
        self._rows.pop(name, None)
        self._failed += 1
        self._say(f"{name}: failed: {str(error).partition(chr(10))[0]}")

    def note(self, name: str, text: str) -> None:
        """A run says something while it is under way; what another has said is not repeated."""
        if text not in self._noted:
            self._noted.add(text)
            self._say(f"{name}: {text}")

    # --- how it looks ----------------------------------------------------------------------

    def overall(self) -> str:
        """The line on all of them."""
        now = self._clock()
        parts = [f"{self._ended}/{self.total} done", f"{len(self._rows)} running"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._tokens and now > self._tokens[0][0]:
            rate = sum(n for _, n in self._tokens) / (now - self._tokens[0][0])
            parts.append(f"{count(rate)} tokens/s")
        if self._rss:
            parts.append(memory(self._rss))
        parts.append(duration(now - self._began))
        left = self._seconds_left(now)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return " · ".join(parts)

    def _seconds_left(self, now: float) -> float | None:
        """By the share of the runs that is done, those under way by their steps."""
        parts = sum(row.step / max(1, row.total) for row in list(self._rows.values()))
        done = self._ended + self._failed - self._before + parts
        every = self.total - self._before
        if done < 0.05 * every and done < 1:
            return None
        return max(0.0, (now - self._began) / done * (every - done))

    def lines(self) -> list[str]:
        """All of the picture."""
        rows = list(self._rows.values())
        lines = [self.overall()]
        for row in rows[-_SHOWN:]:
            parts = [f"  {row.name}  {row.step}/{row.total}"]
            if row.loss is not None:
                parts.append(f"loss {row.loss:.3f}")
            if row.valid is not None:
                start = "" if row.before is None else f"{row.before:.3f} → "
                parts.append(f"validation {start}{row.valid:.3f}")
            lines.append("  ".join(parts))
        if len(rows) > _SHOWN:
            lines.append(f"  … and {len(rows) - _SHOWN} more")
        return lines

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
            return
        stream = self._stream or sys.stderr
        encoding = getattr(stream, "encoding", None) or "ascii"
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


class _OfOne(Callback):
    """The events of one run."""

    def __init__(self, progress: ManyProgress, job: Any) -> None:
        self._progress, self._job = progress, job
        self._begun = False

    def on_start(self, run: RunInfo) -> None:
        self._progress.started(self._job.name, run)

    def on_step(self, metrics: StepMetrics) -> None:
        self._begun = True
        if self._job.first_loss is None and metrics.step == 1:
            self._job.first_loss = metrics.loss
        self._progress.stepped(self._job.name, metrics)

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._progress.evaluated(self._job.name, metrics)

    def on_note(self, text: str) -> None:
        # what was chosen before the first step is in the run's folder; of many it would be noise
        if self._begun:
            self._progress.note(self._job.name, text)


def _live(stream: TextIO | None, lines: Callable[[], list[str]]) -> Any:
    """A picture that is redrawn, where there is a terminal for it."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ModuleNotFoundError:
        return None
    console = Console(file=stream, stderr=stream is None)
    utf8 = console.encoding.lower().replace("-", "").startswith("utf")
    if not console.is_terminal or console.is_dumb_terminal or not utf8:
        return None

    def draw() -> Text:
        width = max(10, console.size.width)
        return Text("\n".join(line[:width] for line in lines()), no_wrap=True)

    live = Live(get_renderable=draw, console=console, refresh_per_second=4, redirect_stdout=False)
    live.start()
    return live
