"""The progress view: right numbers, nothing on stdout, readable at any width and without rich."""

from __future__ import annotations

import builtins
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lorakit.cli.progress import LiveProgress, PlainProgress, Progress
from lorakit.cli.progress.drawing import braille, curve, drawing
from lorakit.cli.progress.view import View, view_of_rows
from lorakit.cli.progress.wording import duration, memory
from lorakit.train.callbacks import (
    Callback,
    CallbackList,
    EvalMetrics,
    RunInfo,
    RunResult,
    StepMetrics,
)

RUN = RunInfo(
    out=Path("runs/x"), total_steps=80, base="smollm2", num_trainable=4884480, has_validation=True
)


def step(number: int, loss: float = 2.0, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": number,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "supervised": 40,
        "seconds": 2.0,
        "tokens_per_second": 1234.0,
        "rss_mb": 1228.8,
    }
    return StepMetrics(**values | changes)


def evaluation(number: int, loss: float, *, best: bool = True) -> EvalMetrics:
    return EvalMetrics(step=number, loss=loss, perplexity=math.exp(loss), best=best)


def shown(view: View, now: float = 0.0, *, width: int = 80, with_curve: bool = True) -> str:
    """The picture as plain text."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(drawing(view, now, width=width, with_curve=with_curve))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def play(callback: Callback, clock: Clock, *, steps: int = 80, every: float = 2.0) -> None:
    """A run with an evaluation before it and one every 20 steps."""
    with CallbackList([callback]) as events:
        events.on_start(RUN)
        events.on_note("lr is 0.0013: what LoRA likes at width [576]")
        events.on_eval(evaluation(0, 2.5))
        for number in range(1, steps + 1):
            clock.now += every
            events.on_step(step(number, 2.5 - number / 100))
            if number % 20 == 0:
                events.on_eval(evaluation(number, 2.0 - number / 100))
        events.on_end(
            RunResult(
                out=RUN.out,
                adapter=RUN.out / "adapter",
                steps=steps,
                base_loss=2.5,
                best_loss=1.2,
                best_step=80,
                seconds=steps * every,
            )
        )


# --- the view ----------------------------------------------------------------------------------


def test_the_smoothed_loss_is_the_weighted_mean_of_all_losses() -> None:
    view = View(RUN)  # 80 steps: the newest weighs 1/4
    losses = [2.5, 1.0, 3.0, 2.0, 0.5]
    view.begin(0.0)
    for number, loss in enumerate(losses, start=1):
        view.add_step(step(number, loss), float(number))
    weights = [0.25 * 0.75 ** (len(losses) - 1 - i) for i in range(len(losses))]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert view.smoothed[-1] == pytest.approx(expected, rel=1e-12)  # float64 sums of five
    assert view.smoothed[0] == pytest.approx(2.5, rel=1e-12)


def test_a_loss_that_is_not_finite_leaves_the_curve_readable() -> None:
    view = View(RUN)
    for number, loss in enumerate([2.0, math.nan, math.inf, 2.0], start=1):
        view.add_step(step(number, loss), float(number))
    assert view.steps == [1, 4]
    assert view.smoothed == pytest.approx([2.0, 2.0])
    view.add_eval(evaluation(4, math.nan))
    assert view.best is None
    assert "loss 2.000" in shown(view)


def test_time_left_follows_the_pace_without_the_slow_first_step() -> None:
    view = View(RUN)
    view.begin(0.0)
    assert view.seconds_left(0.0) is None
    view.add_step(step(1), 30.0)  # compiling
    assert view.seconds_left(30.0) == pytest.approx(79 * 30)
    view.add_step(step(2), 32.0)
    assert view.seconds_left(32.0) == pytest.approx(78 * 2)
    for number in range(3, 11):
        view.add_step(step(number), 28.0 + 2.0 * number)
    assert view.seconds_left(48.0) == pytest.approx(70 * 2)
    assert view.seconds_left(49.5) == pytest.approx(70 * 2 - 1.5)  # it ticks between steps
    view.add_step(step(80), 200.0)
    assert view.seconds_left(200.0) is None


def test_a_resumed_run_counts_its_own_pace() -> None:
    view = View(RunInfo(out=RUN.out, total_steps=80, first_step=40))
    view.begin(1000.0)
    view.add_step(step(41), 1002.0)
    view.add_step(step(42), 1004.0)
    assert view.seconds_left(1004.0) == pytest.approx(38 * 2)


# --- the picture -------------------------------------------------------------------------------


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """The set dots as (column, row), from the Unicode standard's numbering of braille dots."""
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return {
        (2 * column + dx, 4 * row + dy)
        for row, line in enumerate(lines)
        for column, sign in enumerate(line)
        for bit, (dx, dy) in enumerate(places)
        if sign != " " and (ord(sign) - 0x2800) >> bit & 1
    }


def test_braille_draws_corners_and_a_diagonal() -> None:
    size: dict[str, Any] = {"width": 4, "height": 2, "x_range": (0, 7), "y_range": (0, 7)}
    assert dots(braille([(0, 7)], **size)) == {(0, 0)}
    assert dots(braille([(7, 0)], **size)) == {(7, 7)}
    assert dots(braille([(0, 0), (7, 7)], **size)) == {(i, 7 - i) for i in range(8)}


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50),
    st.integers(1, 60),
    st.integers(1, 8),
)
def test_braille_always_fits_and_is_one_line_without_gaps(
    values: list[float], width: int, height: int
) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    lines = braille(
        points,
        width=width,
        height=height,
        x_range=(0.0, float(max(1, len(values) - 1))),
        y_range=(min(values), max(values)),
    )
    assert [len(line) for line in lines] == [width] * height
    found = dots(lines)
    start = min(found)
    reached, todo = {start}, [start]
    while todo:
        x, y = todo.pop()
        near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & found - reached
        reached |= near
        todo += near
    assert reached == found


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("steps", [0, 1, 2, 40, 80])
def test_no_line_is_wider_than_the_terminal(width: int, steps: int) -> None:
    view = View(RUN)
    view.begin(0.0)
    view.add_eval(evaluation(0, 2.5))
    for number in range(1, steps + 1):
        view.add_step(step(number, 3.0 / number, vram_mb=81234.0), 1000.0 * number)
        view.add_eval(evaluation(number, 2.5 / number))
    lines = shown(view, width=width).splitlines()
    assert max(map(len, lines)) <= width


def test_the_picture_says_what_matters_at_width_80() -> None:
    view = View(RUN)
    view.begin(0.0)
    view.add_eval(evaluation(0, 2.512))
    for number in range(1, 41):
        view.add_step(step(number, 1.4, vram_mb=5120.0), 2.0 * number)
    view.add_eval(evaluation(20, 1.371))
    view.add_eval(evaluation(40, 1.402, best=False))
    text = shown(view, 80.0)
    for part in (
        "40/80 · 1:20 left",
        "loss 1.400",
        "validation 1.402",
        "best 1.371 at 20",
        "before training 2.512",
        "1,234 tokens/s",
        "lr 1.00e-03",
        "memory 1.2 GB",
        "GPU 5.0 GB",
    ):
        assert part in text
    assert text.count("◆") == 3 + 1  # evaluations on the curve, and in the line of numbers
    assert "│" not in shown(view, with_curve=False)


def test_the_curve_spans_the_whole_run_and_marks_evaluations_where_they_were() -> None:
    view = View(RUN)
    for number in range(1, 41):
        view.add_step(step(number, 2.0 - number / 80), float(number))
    view.add_eval(evaluation(40, 1.5))
    lines = [text.plain for text in curve(view, width=87, height=6)]
    assert all(len(line) == 87 for line in lines)
    column = next(line.index("◆") for line in lines if "◆" in line)
    assert column - 7 == round(40 / 80 * 79)
    assert not any(line[column + 1 :].strip() for line in lines)  # the future is empty
    assert lines[0].startswith(" 1.99 ┤")


def test_rows_of_the_metrics_file_give_the_same_view() -> None:
    rows = [
        evaluation(0, 2.5).to_row(),
        *(step(n, 2.0).to_row() for n in range(1, 5)),
        {"kind": "note", "text": "x"},
        {"kind": "step", "step": 5, "new field": 1},
        {**step(6).to_row(), "loss": None},
    ]
    view, now = view_of_rows(RUN, json.loads(json.dumps(rows)))
    assert view.steps == [1, 2, 3, 4]
    assert view.step == 6
    assert [e.loss for e in view.evals] == [2.5]
    assert now == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory() -> None:
    assert (memory(850.2), memory(1228.8), memory(1024 * 80)) == ("850 MB", "1.2 GB", "80.0 GB")


# --- live --------------------------------------------------------------------------------------


def live_console(width: int = 80, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("refresh", [0.0, 4.0])
def test_the_live_view_ends_with_the_whole_run_on_the_screen(
    refresh: float, capsys: pytest.CaptureFixture[str]
) -> None:
    console, clock = live_console(), Clock()
    play(LiveProgress(console, clock=clock, refresh_per_second=refresh), clock)
    text = written(console)
    assert "80/80" in text
    assert "• lr is 0.0013: what LoRA likes at width [576]" in text  # brackets are no markup
    assert "finished, 2:40" in text
    assert (
        "Finished after 80 steps in 2:40: validation loss 2.500 → 1.200, best at step 80." in text
    )
    assert text.endswith("\n")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back
    captured = capsys.readouterr()
    assert captured.out == ""


def test_stdout_stays_the_command_s_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    console, clock = live_console(), Clock()
    progress = LiveProgress(console, clock=clock, refresh_per_second=0)
    progress.on_start(RUN)
    stdout = sys.stdout
    print('{"the": "result"}')
    progress.close(None)
    assert sys.stdout is stdout
    assert capsys.readouterr().out == '{"the": "result"}\n'


def test_an_error_leaves_the_terminal_usable() -> None:
    console, clock = live_console(), Clock()
    stderr = sys.stderr
    events = CallbackList([LiveProgress(console, clock=clock, refresh_per_second=0)])
    events.on_start(RUN)
    with pytest.raises(ZeroDivisionError), events:
        raise ZeroDivisionError
    assert sys.stderr is stderr
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == 1
    assert "stopped" in written(console)


def test_a_low_terminal_gets_no_curve() -> None:
    for height, has_curve in ((10, False), (40, True)):
        console, clock = live_console(height=height), Clock()
        play(LiveProgress(console, clock=clock, refresh_per_second=0), clock, steps=20)
        assert ("┤" in written(console)) is has_curve


def test_a_resumed_run_shows_the_curve_from_the_beginning(tmp_path: Path) -> None:
    rows = [evaluation(0, 2.5).to_row(), *(step(n).to_row() for n in range(1, 41))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console, clock = live_console(), Clock()
    progress = LiveProgress(console, clock=clock, refresh_per_second=0)
    progress.on_start(RunInfo(out=tmp_path, total_steps=80, first_step=30))
    progress.close(None)
    assert "30/80" in written(console)
    assert "┤" in written(console)
    assert "from step 30" in written(console)


# --- plain -------------------------------------------------------------------------------------


def test_plain_lines_come_every_ten_seconds_and_at_evaluations() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainProgress(stream, clock=clock), clock)
    lines = stream.getvalue().splitlines()
    assert lines[0] == ("Training runs/x on smollm2: 80 steps on cpu, 4,884,480 trained parameters")
    assert lines[1].startswith("note: lr is 0.0013")
    assert lines[2].startswith("step 0/80  validation loss 2.500  perplexity 12.2  (before")
    steps = [int(line.split()[1].split("/")[0]) for line in lines if "tokens/s" in line]
    assert steps == [1, *range(6, 80, 5), 80]
    assert "loss 2.490  1,234 tokens/s  lr 1.00e-03  memory 1.2 GB  2:38 left" in lines[3]
    assert sum("(best so far)" in line for line in lines) == 4
    assert lines[-1].startswith("Finished after 80 steps")


def test_plain_lines_by_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainProgress(stream, every_steps=32, clock=clock), clock)
    lines = [line for line in stream.getvalue().splitlines() if "tokens/s" in line]
    assert [line.split()[1] for line in lines] == ["32/80", "64/80", "80/80"]


def test_a_log_in_an_old_encoding_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    stream, clock = io.TextIOWrapper(raw, encoding="ascii"), Clock()
    play(PlainProgress(stream, clock=clock), clock)
    assert b"2.500 ? 1.200" in raw.getvalue()


def test_it_follows_where_stderr_goes(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    play(Progress(), clock, steps=3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Training runs/x" in captured.err
    assert "\x1b" not in captured.err  # no terminal, no control codes


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(quiet=True), Clock(), steps=3)
    assert capsys.readouterr() == ("", "")


def test_the_kind_of_progress_fits_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"  # type: ignore[assignment]

        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(Progress(Terminal()), LiveProgress)
    assert isinstance(Progress(io.StringIO()), PlainProgress)
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    assert isinstance(Progress(Terminal()), PlainProgress)  # it has no braille
    monkeypatch.setattr(Terminal, "encoding", "utf-8")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(Progress(Terminal()), PlainProgress)
    monkeypatch.setenv("TERM", "xterm-256color")

    original = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ModuleNotFoundError(name="rich")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    plain = Progress(Terminal())
    assert isinstance(plain, PlainProgress)
    play(plain, Clock(), steps=3)
