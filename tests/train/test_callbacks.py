"""Callbacks: every event reaches everyone in order, and no failure stays unsaid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import InputError, MissingDependencyError, TrainingError
from lorakit.train.callbacks import (
    Callback,
    CallbackList,
    EvalMetrics,
    RunInfo,
    RunResult,
    StepMetrics,
)

OUT = Path("runs/x")
STEP = StepMetrics(
    step=3,
    loss=1.5,
    lr=1e-3,
    grad_norm=0.5,
    tokens=100,
    supervised=40,
    seconds=0.1,
    tokens_per_second=1000.0,
    rss_mb=900.0,
)
EVENTS: list[tuple[str, Any]] = [
    ("on_start", RunInfo(out=OUT, total_steps=10)),
    ("on_step", STEP),
    ("on_eval", EvalMetrics(step=3, loss=1.0, perplexity=2.7)),
    ("on_checkpoint", OUT / "checkpoints" / "3"),
    ("on_note", "a choice, with its reason"),
    ("on_end", RunResult(out=OUT, adapter=None, steps=10)),
]


class Recorder(Callback):
    """Writes down what it receives, into a list that several may share."""

    def __init__(self, log: list[Any], label: str = "") -> None:
        self.log, self.label = log, label

    def on_start(self, run: RunInfo) -> None:
        self.log.append((self.label, "on_start", run))

    def on_step(self, metrics: StepMetrics) -> None:
        self.log.append((self.label, "on_step", metrics))

    def on_eval(self, metrics: EvalMetrics) -> None:
        self.log.append((self.label, "on_eval", metrics))

    def on_checkpoint(self, path: Path) -> None:
        self.log.append((self.label, "on_checkpoint", path))

    def on_note(self, text: str) -> None:
        self.log.append((self.label, "on_note", text))

    def on_end(self, result: RunResult) -> None:
        self.log.append((self.label, "on_end", result))

    def close(self, error: BaseException | None) -> None:
        self.log.append((self.label, "close", error))


class Unreachable(Callback):
    """Fails like a tracker whose server does not answer."""

    name = "far"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.calls.append("on_step")
        raise ConnectionError("no route to host")

    def on_eval(self, metrics: EvalMetrics) -> None:
        self.calls.append("on_eval")

    def close(self, error: BaseException | None) -> None:
        self.calls.append("close")
        raise ConnectionError("still no route")

    def survives(self, error: Exception) -> bool:
        return isinstance(error, ConnectionError)


def test_every_event_reaches_every_callback_in_order() -> None:
    log: list[Any] = []
    with CallbackList([Recorder(log, "a"), Recorder(log, "b")]) as events:
        for method, event in EVENTS:
            getattr(events, method)(event)
    expected = [(who, method, event) for method, event in EVENTS for who in "ab"]
    assert log == [*expected, ("a", "close", None), ("b", "close", None)]


def test_the_base_class_does_nothing_and_an_empty_list_is_fine() -> None:
    for callbacks in ([], [Callback()]):
        with CallbackList(callbacks) as events:
            for method, event in EVENTS:
                getattr(events, method)(event)


def test_rows_hold_the_names_of_the_metrics_file() -> None:
    row = STEP.to_row()
    assert set(row) == {
        "kind", "step", "loss", "lr", "grad_norm", "tokens", "supervised", "seconds",
        "tokens_per_second", "rss_mb",
    }  # fmt: skip
    assert row["kind"] == "step"
    evaluation = EvalMetrics(step=3, loss=1.0, perplexity=2.7, best=True).to_row()
    assert evaluation == {"kind": "eval", "step": 3, "loss": 1.0, "perplexity": 2.7, "best": True}
    assert StepMetrics(**{k: v for k, v in json.loads(json.dumps(row)).items() if k != "kind"})


@pytest.mark.parametrize("method", [method for method, _ in EVENTS])
def test_a_failing_callback_stops_the_run_and_is_named(method: str) -> None:
    class Broken(Callback):
        pass

    def fail(self: Any, event: Any) -> None:
        raise ValueError("the wrong shape")

    setattr(Broken, method, fail)
    events = CallbackList([Broken()])
    with pytest.raises(TrainingError, match=f"Broken failed in {method}.*the wrong shape") as info:
        getattr(events, method)(dict(EVENTS)[method])
    assert isinstance(info.value.__cause__, ValueError)


def test_our_own_errors_and_ctrl_c_pass_as_they_are() -> None:
    for error in (MissingDependencyError("pip install x"), KeyboardInterrupt()):

        class Raising(Callback):
            def on_step(self, metrics: StepMetrics, error: BaseException = error) -> None:
                raise error

        with pytest.raises(type(error)) as info:
            CallbackList([Raising()]).on_step(STEP)
        assert info.value is error


def test_a_survivable_failure_is_said_once_and_switches_the_callback_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: list[Any] = []
    far = Unreachable()
    with caplog.at_level(logging.WARNING), CallbackList([far, Recorder(log)]) as events:
        events.on_step(STEP)
        events.on_step(STEP)
        events.on_eval(EvalMetrics(step=3, loss=1.0, perplexity=2.7))
        assert len(events) == 1
    assert far.calls == ["on_step", "close"]  # and never again
    notes = [event for _, method, event in log if method == "on_note"]
    assert len(notes) == 1
    assert "far is switched off" in notes[0]
    assert "no route to host" in notes[0]
    assert [r.getMessage() for r in caplog.records] == notes
    assert [m for _, m, _ in log] == ["on_note", "on_step", "on_step", "on_eval", "close"]


def test_what_it_does_not_survive_stops_the_run() -> None:
    class Wrong(Unreachable):
        def on_step(self, metrics: StepMetrics) -> None:
            raise KeyError("project")

    with pytest.raises(TrainingError, match=r"far failed in on_step: KeyError: 'project'"):
        CallbackList([Wrong()]).on_step(STEP)


def test_all_are_closed_once_with_the_error_that_ended_the_run() -> None:
    log: list[Any] = []
    error = RuntimeError("the run's own")
    with (
        pytest.raises(RuntimeError, match="the run's own"),
        CallbackList([Recorder(log, "a"), Recorder(log, "b")]) as events,
    ):
        raise error
    events.close()
    assert log == [("a", "close", error), ("b", "close", error)]


class FailsToClose(Callback):
    def close(self, error: BaseException | None) -> None:
        raise OSError("cannot flush")


def test_a_failure_to_close_is_raised_after_all_are_closed() -> None:
    log: list[Any] = []
    with (
        pytest.raises(TrainingError, match=r"FailsToClose failed in close.*cannot flush"),
        CallbackList([FailsToClose(), Recorder(log)]),
    ):
        pass
    assert log == [("", "close", None)]


def test_a_failure_to_close_never_hides_the_run_s_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), CallbackList([FailsToClose()]):
        raise ZeroDivisionError
    assert "cannot flush" in caplog.text


def test_an_error_of_lorakit_s_own_keeps_its_cause() -> None:
    class Fails(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            raise TrainingError("the disk is full") from OSError(28, "no space")

    with pytest.raises(TrainingError) as info, CallbackList([Fails()]) as events:
        events.on_step(STEP)
    assert isinstance(info.value.__cause__, OSError)


def test_what_is_no_callback_is_refused_with_all_problems_at_once() -> None:
    class Misspelt(Callback):
        def on_steps(self, metrics: StepMetrics) -> None: ...

    with pytest.raises(InputError) as info:
        CallbackList([Misspelt(), Recorder, 3])  # type: ignore[list-item]
    message = str(info.value)
    assert "Misspelt.on_steps is never called" in message
    assert "Recorder is a class; give an instance" in message
    assert "int has no on_start" in message


def test_a_callback_needs_no_base_class() -> None:
    class Duck:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("on_") or name == "close":
                return lambda event: None
            raise AttributeError(name)

    with CallbackList([Duck()]) as events:  # type: ignore[list-item]
        events.on_step(STEP)


def test_the_name_of_a_run_is_its_folder_s(tmp_path: Path) -> None:
    assert RunInfo(out=tmp_path / "a" / ".." / "mine", total_steps=1).name == "mine"
