"""How it went: the losses, and what else was measured at each step."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.train.record import Record, is_finite
from lorakit.train.report.blocks import section, wide
from lorakit.train.report.charts import Frame, Points, Series, line_chart, padded, smooth
from lorakit.train.report.markup import Html, fill, join
from lorakit.train.report.words import count_text, loss_text, starting_point


def losses(record: Record) -> Html:
    raw = list(zip(*record.series("loss"), strict=True))
    valid = [(float(r["step"]), float(r["loss"])) for r in record.evals if is_finite(r.get("loss"))]
    if not raw and not valid:
        return Html("")
    smoothed = smooth(raw)
    heights = sorted(y for _, y in raw)
    # one wild step must not flatten everything else
    inner = heights[len(heights) // 50 : len(heights) - len(heights) // 50]
    shown = [*inner, *(y for _, y in smoothed), *(y for _, y in valid)]
    frame = Frame(
        960, 380, (0.0, max(x for x, _ in (*raw, *valid)) or 1.0), padded(min(shown), max(shown))
    )
    start, best = record.start_eval, record.best
    levels = []
    if start is not None and is_finite(start.get("loss")):
        levels.append(
            (float(start["loss"]), f"{starting_point(record)} {loss_text(start['loss'])}")
        )
    ring = None
    if best is not None and best["step"] != 0:
        loss = float(best["loss"])
        ring = (float(best["step"]), loss, f"best {loss_text(loss)}")
    chart = line_chart(
        "Loss over steps",
        [Series(raw, "raw"), Series(smoothed, "train"), Series(valid, "valid", markers=True)],
        frame,
        levels=levels,
        best=ring,
    )
    cut = sum(not frame.y_range[0] <= y <= frame.y_range[1] for y in heights)
    hint = "Mean negative log-likelihood per supervised token; lower is better. Across: steps."
    if cut:
        one = "1 step lies" if cut == 1 else f"{count_text(cut)} steps lie"
        hint += f" {one} outside the frame."
    lost = len(record.steps) - len(raw)
    if lost:
        hint += f" {count_text(lost)} step(s) had no finite loss."
    if not valid:
        hint += " There was no validation."
    legend = [("--raw", "training, each step"), ("--train", "training, smoothed")] if raw else []
    legend += [("--valid", "validation")] if valid else []
    return section("Loss", hint, _legend(legend), wide(chart))


def course(record: Record) -> Html:
    charts = []
    for name, title, unit, smoothed in (
        ("lr", "Learning rate", "", False),
        ("tokens_per_second", "Tokens per second", "", True),
        ("grad_norm", "Norm of the gradient, before clipping", "", True),
        ("vram_mb", "GPU memory, GB", "gb", False),
        ("rss_mb", "Memory of the process, GB", "gb", False),
    ):
        points: Points = list(zip(*record.series(name), strict=True))
        if len(points) < 2:
            continue
        if unit == "gb":
            points = [(x, y / 1024) for x, y in points]
        low, high = min(y for _, y in points), max(y for _, y in points)
        # memory and rates mean something against zero; a norm needs its own range
        y_range = padded(0.0 if name != "grad_norm" else low, high)
        frame = Frame(470, 190, (0.0, points[-1][0]), (max(0.0, y_range[0]), y_range[1]))
        lines = [Series(points, "raw"), Series(smooth(points), "other")] if smoothed else []
        chart = line_chart(title, lines or [Series(points, "other")], frame, y_ticks=4)
        charts.append(fill("<div><h3>{title}</h3>{chart}</div>", title=title, chart=chart))
    if not charts:
        return Html("")
    pair = fill('<div class="pair">{charts}</div>', charts=join(charts))
    return section("Course of the run", "Thin: each step; thick: smoothed.", pair)


def _legend(entries: Sequence[tuple[str, str]]) -> Html:
    return fill(
        '<div class="legend">{entries}</div>',
        entries=join(
            fill('<span><i style="--c:var({color})"></i>{text}</span>', color=color, text=text)
            for color, text in entries
        ),
    )
