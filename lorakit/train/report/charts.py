"""Charts as inline SVG: numbers in, markup out; colours come from the page's style sheet.

All coordinates are in the units of a chart's own view box. Points are ``(x, y)`` with x rising
and both finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.train.report.markup import Html, fill, join

Points = Sequence[tuple[float, float]]

#: points kept of a long series: more than the pixels of a page show nothing more
MOST_POINTS = 1200


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    points: Points
    style: str
    """Class of the style sheet: train, raw, valid, other."""
    markers: bool = False
    """Whether each point gets a dot, with its value when pointed at."""


@dataclass(frozen=True)
class Frame:
    """A chart's size and its axes."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 52.0
    right: float = 16.0
    top: float = 14.0
    bottom: float = 30.0

    def x(self, value: float) -> float:
        """Position of a value from the left."""
        return self._place(value, self.x_range, self.left, self.width - self.right)

    def y(self, value: float) -> float:
        """Position of a value from the top."""
        return self._place(value, self.y_range, self.height - self.bottom, self.top)

    @staticmethod
    def _place(value: float, ends: tuple[float, float], start: float, stop: float) -> float:
        span = ends[1] - ends[0]
        share = (value - ends[0]) / span if span else 0.5
        return start + share * (stop - start)


# --- numbers -----------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between two ends, at most ``most``."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    while True:
        for factor in (1, 2, 5):
            pace = factor * power
            first, last = math.ceil(low / pace - 1e-9), math.floor(high / pace + 1e-9)
            if last - first + 1 <= most:
                return [round(i * pace, 12) for i in range(first, last + 1)] or [low]
        power *= 10


def label(value: float) -> str:
    """A number as an axis shows it."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-2:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """A range with some air around it, of some height even if all values are equal."""
    span = high - low or abs(high) * 0.1 or 1.0
    return low - share * span, high + share * span


def smooth(points: Points, share: float = 1 / 50) -> list[tuple[float, float]]:
    """The series without its noise: means weighed by a bell curve around each point.

    Args:
        share: standard deviation of the bell, as a share of the number of points; at least one
            point. A long series is first reduced to the means of ``MOST_POINTS`` stretches.
    """
    if not points:
        return []
    x, y = (np.asarray(v, dtype=np.float64) for v in zip(*points, strict=True))
    if len(x) > MOST_POINTS:
        parts = np.array_split(np.arange(len(x)), MOST_POINTS)
        x, y = (np.array([v[part].mean() for part in parts]) for v in (x, y))
    sigma = max(1.0, share * len(x))
    reach = math.ceil(3 * sigma)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    inside = slice(reach, reach + len(x))
    weights = np.convolve(np.ones(len(x)), bell)[inside]  # less at both ends
    return list(zip(x.tolist(), (np.convolve(y, bell)[inside] / weights).tolist(), strict=True))


def thinned(points: Points) -> Points:
    """A long series with only the lowest and highest point of each stretch, so that it looks the
    same."""
    if len(points) <= MOST_POINTS:
        return points
    kept = []
    for part in np.array_split(np.arange(len(points)), MOST_POINTS // 2):
        by_height = sorted(part.tolist(), key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({by_height[0], by_height[-1]})]
    return kept


# --- charts ------------------------------------------------------------------------------------


def line_chart(
    name: str,
    series: Sequence[Series],
    frame: Frame,
    *,
    levels: Sequence[tuple[float, str]] = (),
    best: tuple[float, float, str] | None = None,
    unit: str = "",
    y_ticks: int = 6,
) -> Html:
    """Lines over steps.

    Args:
        name: what it shows, for those who cannot see it; also makes its clip path's id.
        series: the lines, drawn in order.
        frame: size and ranges; what lies outside is cut at the frame.
        levels: horizontal lines with their text.
        best: a point to be ringed, with its text.
        unit: behind the values shown when a marker is pointed at.
        y_ticks: most numbers on the vertical axis.
    """
    clip = "clip-" + "".join(c if c.isalnum() else "-" for c in name.lower())
    parts: list[Html] = [*_axes(frame, y_ticks)]
    for value, text in levels:
        parts.append(
            fill(
                '<line class="level" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
                '<text class="leveltext" x="{b}" y="{ty}" text-anchor="end">{text}</text>',
                a=_n(frame.left),
                b=_n(frame.width - frame.right),
                y=_n(frame.y(value)),
                ty=_n(frame.y(value) - 6),
                text=text,
            )
        )
    lines = [_line(one, frame) for one in series]
    parts.append(fill('<g clip-path="url(#{clip})">{lines}</g>', clip=clip, lines=join(lines)))
    parts += [_markers(one, frame, unit) for one in series if one.markers]
    if best is not None:
        parts.append(_ring(best, frame))
    return fill(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{name}">'
        '<clipPath id="{clip}"><rect x="{left}" y="{top}" width="{iw}" height="{ih}"/></clipPath>'
        "{parts}</svg>",
        w=_n(frame.width),
        h=_n(frame.height),
        name=name,
        clip=clip,
        left=_n(frame.left),
        top=_n(frame.top - 4),
        iw=_n(frame.width - frame.left - frame.right + 1),
        ih=_n(frame.height - frame.top - frame.bottom + 8),
        parts=join(parts),
    )


def bar_chart(name: str, bars: Sequence[tuple[str, float, str]], frame: Frame) -> Html:
    """Upright bars side by side.

    Args:
        name: what it shows.
        bars: ``(text below, height, what is shown when pointed at)``.
        frame: size; ``y_range`` starts at 0.
    """
    inner = frame.width - frame.left - frame.right
    slot = inner / max(1, len(bars))
    parts: list[Html] = []
    for tick in ticks(*frame.y_range, most=4):
        parts.append(_y_tick(frame, tick))
    every = max(1, math.ceil(len(bars) * 44 / inner))
    for i, (text, height, title) in enumerate(bars):
        x, y = frame.left + i * slot, frame.y(height)
        parts.append(
            fill(
                '<rect class="bar" x="{x}" y="{y}" width="{w}" height="{h}" rx="2">'
                "<title>{title}</title></rect>",
                x=_n(x + 1),
                y=_n(y),
                w=_n(max(1.0, slot - 2)),
                h=_n(max(0.0, frame.y(0) - y)),
                title=title,
            )
        )
        if i % every == 0:
            parts.append(_x_text(frame, x + slot / 2, text))
    return _svg(name, frame.width, frame.height, parts)


@dataclass(frozen=True)
class Grid:
    """Numbers by row and column; a missing one stays empty."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], float]
    titles: Mapping[tuple[str, str], str]
    """What is shown when a cell is pointed at."""


def heat_map(name: str, grid: Grid, *, width: float = 960.0) -> Html:
    """A field of cells, darker for larger values, with each row's mean at its right."""
    left = min(260.0, 16 + 7.3 * max(len(row) for row in grid.rows))
    right, top, bottom, height = 64.0, 8.0, 26.0, 24.0
    cell = min(90.0, (width - left - right) / len(grid.columns))
    values = list(grid.values.values())
    low, high = min(values), max(values)
    parts: list[Html] = []
    for i, row in enumerate(grid.rows):
        y = top + i * height
        parts.append(
            fill(
                '<text class="tick" x="{x}" y="{y}" text-anchor="end">{text}<title>{row}</title>'
                "</text>",
                x=_n(left - 10),
                y=_n(y + height / 2 + 4),
                text=row if len(row) <= 34 else f"…{row[-33:]}",
                row=row,
            )
        )
        known = [grid.values[row, c] for c in grid.columns if (row, c) in grid.values]
        for j, column in enumerate(grid.columns):
            value = grid.values.get((row, column))
            if value is None:
                continue
            # never quite invisible: an empty place means that there is no adapter
            share = 0.08 + 0.92 * ((value - low) / (high - low) if high > low else 0.5)
            parts.append(
                fill(
                    '<rect class="heat" x="{x}" y="{y}" width="{w}" height="{h}" rx="3" '
                    'fill-opacity="{share}"><title>{title}</title></rect>',
                    x=_n(left + j * cell + 1),
                    y=_n(y + 1),
                    w=_n(max(1.0, cell - 2)),
                    h=_n(height - 2),
                    share=f"{share:.3f}",
                    title=grid.titles[row, column],
                )
            )
        parts.append(
            fill(
                '<text class="value" x="{x}" y="{y}">{text}</text>',
                x=_n(left + cell * len(grid.columns) + 10),
                y=_n(y + height / 2 + 4),
                text=label(sum(known) / len(known)),
            )
        )
    every = max(1, math.ceil(26 / cell))
    bottom_y = top + len(grid.rows) * height + 16
    for j, column in enumerate(grid.columns):
        if j % every == 0:
            x = left + j * cell + cell / 2
            parts.append(_text_at(x, bottom_y, column))
    return _svg(name, width, top + len(grid.rows) * height + bottom, parts)


# --- pieces ------------------------------------------------------------------------------------


def _svg(name: str, width: float, height: float, parts: Sequence[Html]) -> Html:
    return fill(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{name}">{parts}</svg>',
        w=_n(width),
        h=_n(height),
        name=name,
        parts=join(parts),
    )


def _axes(frame: Frame, y_ticks: int) -> list[Html]:
    parts = [_y_tick(frame, tick) for tick in ticks(*frame.y_range, most=y_ticks)]
    most = max(2, int((frame.width - frame.left - frame.right) / 80))
    whole = [tick for tick in ticks(*frame.x_range, most=most) if tick == round(tick)]
    return parts + [_x_text(frame, frame.x(tick), label(tick)) for tick in whole]


def _y_tick(frame: Frame, value: float) -> Html:
    return fill(
        '<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
        '<text class="tick" x="{tx}" y="{ty}" text-anchor="end">{text}</text>',
        a=_n(frame.left),
        b=_n(frame.width - frame.right),
        y=_n(frame.y(value)),
        tx=_n(frame.left - 8),
        ty=_n(frame.y(value) + 4),
        text=label(value),
    )


def _x_text(frame: Frame, x: float, text: str) -> Html:
    return _text_at(x, frame.height - frame.bottom + 20, text)


def _text_at(x: float, y: float, text: str) -> Html:
    return fill(
        '<text class="tick" x="{x}" y="{y}" text-anchor="middle">{text}</text>',
        x=_n(x),
        y=_n(y),
        text=text,
    )


def _line(series: Series, frame: Frame) -> Html:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thinned(series.points))
    return fill('<polyline class="{style}" points="{p}"/>', style=series.style, p=points)


def _markers(series: Series, frame: Frame, unit: str) -> Html:
    return join(
        fill(
            '<circle class="{style}" cx="{x}" cy="{y}" r="3.5"><title>step {step}: {value}{unit}'
            "</title></circle>",
            style=f"{series.style}dot",
            x=_n(frame.x(x)),
            y=_n(frame.y(y)),
            step=f"{x:,.0f}",
            value=f"{y:.4g}",
            unit=unit,
        )
        for x, y in series.points
    )


def _ring(best: tuple[float, float, str], frame: Frame) -> Html:
    x, y = frame.x(best[0]), frame.y(best[1])
    at_left = x > frame.width * 0.75
    return fill(
        '<circle class="ring" cx="{x}" cy="{y}" r="8"/>'
        '<text class="besttext" x="{tx}" y="{ty}" text-anchor="{anchor}">{text}</text>',
        x=_n(x),
        y=_n(y),
        tx=_n(x + (4 if at_left else 0)),
        ty=_n(y - 16),
        anchor="end" if at_left else "middle",
        text=best[2],
    )


def _n(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
