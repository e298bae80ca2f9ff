"""A view as a picture for a width and an instant: a bar, a curve, the numbers that matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.cli.progress.view import View
from lorakit.cli.progress.wording import count, duration, memory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

#: lines of the curve
CURVE_HEIGHT = 6
#: columns of the numbers left of it
_MARGIN = 7


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
    lines += [_joined(part, width) for part in (_quality(view), machine(view)) if part]
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


def machine(view: View) -> list[tuple[str, str, str]]:
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
