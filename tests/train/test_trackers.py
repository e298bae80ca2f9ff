"""Trackers: the right calls to each service's package, one run across a resume, network failures.

The services' packages are replaced by small recording fakes; TensorBoard is also run for real
where it is installed.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import InputError, MissingDependencyError, TrainingError
from lorakit.train.callbacks import CallbackList, EvalMetrics, RunInfo, RunResult, StepMetrics
from lorakit.train.record import flatten
from lorakit.train.trackers import SINKS, MLflowSink, Tracker, make_trackers

SETTINGS = {"base": {"ref": "smollm2"}, "train": {"lr": 1e-3, "betas": [0.9, 0.99]}, "note": None}


def step(number: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(
        step=number,
        loss=loss,
        lr=1e-3,
        grad_norm=0.5,
        tokens=100,
        supervised=40,
        seconds=0.1,
        tokens_per_second=1000.0,
        rss_mb=900.0,
        vram_mb=12.0,
    )


def play(tracker: Tracker, out: Path, first: int = 0, *, ending: Any = "finished") -> None:
    """A run of two steps and an evaluation."""
    with CallbackList([tracker]) as events:
        events.on_start(RunInfo(out=out, total_steps=9, first_step=first, settings=SETTINGS))
        events.on_step(step(first + 1))
        events.on_step(step(first + 2))
        events.on_eval(EvalMetrics(step=first + 2, loss=1.0, perplexity=2.7, best=True))
        events.on_checkpoint(out / "checkpoints")
        events.on_note("told to nobody far away")
        events.on_end(
            RunResult(out=out, adapter=None, steps=first + 2, best_loss=1.0, ending=ending)
        )


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    """What the fakes were asked to do."""
    return []


@pytest.fixture
def fake_wandb(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> Any:
    class Run:
        id = "w1"
        summary = types.SimpleNamespace(update=lambda values: calls.append(("summary", values)))

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            calls.append(("define", args, kwargs))

        def log(self, numbers: dict[str, Any]) -> None:
            calls.append(("log", numbers))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    def init(**kwargs: Any) -> Run:
        print("wandb: a line that does not belong on stdout")
        calls.append(("init", kwargs))
        return Run()

    module: Any = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return module


@pytest.fixture
def fake_mlflow(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> Any:
    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("get_experiment", name))

        def create_experiment(self, name: str) -> str:
            return f"experiment {name}"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("create_run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))

        def update_run(self, run_id: str, status: str) -> None:
            calls.append(("update_run", run_id, status))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(metrics) <= 1000
            assert len(params) <= 100
            calls.append(("log_batch", run_id, list(metrics), list(params)))

        def set_tag(self, run_id: str, name: str, value: str) -> None:
            calls.append(("tag", name, value))

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.append(("terminated", run_id, status))

    module: Any = types.ModuleType("mlflow")
    module.MlflowClient = Client
    module.entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step),
        Param=lambda key, value: (key, value),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return module


@pytest.fixture
def fake_trackio(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> Any:
    class Run:
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, numbers: dict[str, Any], step: int | None = None) -> None:
            calls.append(("log", numbers, step))

    def init(**kwargs: Any) -> Run:
        print("* Trackio project initialized")
        calls.append(("init", kwargs))
        return Run(kwargs["name"])

    module: Any = types.ModuleType("trackio")
    module.init, module.finish = init, lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def of_kind(calls: list[tuple[Any, ...]], kind: str) -> list[tuple[Any, ...]]:
    return [call for call in calls if call[0] == kind]


# --- weights & biases --------------------------------------------------------------------------


def test_wandb_gets_settings_numbers_and_summary(
    fake_wandb: Any, calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(make_trackers(["wandb"])[0], tmp_path)
    started = of_kind(calls, "init")[0][1]
    assert started["project"] == "lorakit"
    assert started["name"] == tmp_path.name
    assert started["id"] is None
    assert started["config"] == flatten(SETTINGS)
    assert started["settings"] == {"console": "off"}
    rows = [row for _, row in of_kind(calls, "log")]
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[0]["train/loss"] == 1.5
    assert rows[0]["memory/vram_mb"] == 12.0
    assert rows[2]["validation/loss"] == 1.0
    assert of_kind(calls, "summary")[0][1]["summary/best_loss"] == 1.0
    assert of_kind(calls, "finish") == [("finish", 0)]
    captured = capsys.readouterr()
    assert captured.out == ""  # stdout belongs to the command's result
    assert "does not belong" in captured.err


def test_a_resumed_run_goes_on_in_the_same_place(
    fake_wandb: Any, fake_mlflow: Any, fake_trackio: Any, calls: list[Any], tmp_path: Path
) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        play(make_trackers([name])[0], tmp_path)
    known = json.loads((tmp_path / "trackers.json").read_text())
    assert known == {"wandb": "w1", "mlflow": "m1", "trackio": tmp_path.name}
    calls.clear()
    for name in ("wandb", "mlflow", "trackio"):
        play(make_trackers([name])[0], tmp_path, first=2)
    wandb, trackio = (call[1] for call in of_kind(calls, "init"))
    assert (wandb["id"], wandb["resume"]) == ("w1", "allow")
    assert (trackio["name"], trackio["resume"]) == (tmp_path.name, "allow")
    assert of_kind(calls, "update_run") == [("update_run", "m1", "RUNNING")]
    assert not of_kind(calls, "create_run")


def test_a_new_run_in_an_old_folder_does_not_go_on(
    fake_wandb: Any, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "trackers.json").write_text('{"wandb": "old"}')
    play(make_trackers(["wandb"])[0], tmp_path)
    assert of_kind(calls, "init")[0][1]["id"] is None
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "w1"}


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": '])
def test_a_broken_file_of_identities_is_a_new_start(
    fake_wandb: Any, calls: list[Any], tmp_path: Path, content: str
) -> None:
    (tmp_path / "trackers.json").write_text(content)
    play(make_trackers(["wandb"])[0], tmp_path, first=2)
    assert of_kind(calls, "init")[0][1]["id"] is None


def test_an_error_marks_the_run_as_failed(
    fake_wandb: Any, fake_mlflow: Any, calls: list[Any], tmp_path: Path
) -> None:
    events = CallbackList(make_trackers(["wandb", "mlflow"]))
    events.on_start(RunInfo(out=tmp_path, total_steps=9))
    with pytest.raises(ZeroDivisionError), events:
        raise ZeroDivisionError
    assert of_kind(calls, "finish") == [("finish", 1)]
    assert of_kind(calls, "terminated") == [("terminated", "m1", "FAILED")]


def test_projects_come_from_the_services_own_variables(
    fake_wandb: Any,
    fake_mlflow: Any,
    calls: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    for tracker in make_trackers(["wandb", "mlflow"]):
        play(tracker, tmp_path)
    assert of_kind(calls, "init")[0][1]["project"] == "ours"
    assert of_kind(calls, "get_experiment") == [("get_experiment", "theirs")]


# --- mlflow ------------------------------------------------------------------------------------


def test_mlflow_gets_numbers_in_few_requests(
    fake_mlflow: Any, calls: list[Any], tmp_path: Path
) -> None:
    now = 0.0
    tracker = Tracker("mlflow", MLflowSink(clock=lambda: now))
    tracker.on_start(RunInfo(out=tmp_path, total_steps=9, settings=SETTINGS))
    assert ("train.lr", "0.001") in of_kind(calls, "log_batch")[0][3]
    calls.clear()
    for number in range(1, 5):
        tracker.on_step(step(number, loss=float(number)))
    assert not calls  # they wait
    now = 6.0
    tracker.on_step(step(5, loss=5.0))
    assert len(calls) == 1
    losses = [(value, at) for name, value, at in calls[0][2] if name == "train/loss"]
    assert losses == [(float(n), n) for n in range(1, 6)]
    tracker.on_step(step(6))
    tracker.close(None)
    assert ("train/loss", 1.5, 6) in calls[1][2]  # what waited at the end is sent
    assert of_kind(calls, "terminated") == [("terminated", "m1", "FINISHED")]


def test_mlflow_keeps_to_the_limits_of_a_request(
    fake_mlflow: Any, calls: list[Any], tmp_path: Path
) -> None:
    tracker = Tracker("mlflow", MLflowSink(clock=lambda: 0.0))
    many = {f"setting {i}": "x" * 7000 for i in range(250)}
    tracker.on_start(RunInfo(out=tmp_path, total_steps=999, settings=many))
    for number in range(1, 400):
        tracker.on_step(step(number))
    tracker.close(None)
    params = [p for call in of_kind(calls, "log_batch") for p in call[3]]
    metrics = [m for call in of_kind(calls, "log_batch") for m in call[2]]
    assert len(params) == 250
    assert max(len(value) for _, value in params) == 6000
    assert len([m for m in metrics if m[0] == "train/loss"]) == 399


def test_an_interrupted_run_is_killed_in_mlflow(
    fake_mlflow: Any, calls: list[Any], tmp_path: Path
) -> None:
    play(make_trackers(["mlflow"])[0], tmp_path, ending="interrupted")
    assert of_kind(calls, "terminated") == [("terminated", "m1", "KILLED")]
    assert ("tag", "summary.ending", "interrupted") in calls


# --- trackio and tensorboard -------------------------------------------------------------------


def test_trackio_gets_numbers_and_prints_nothing_on_stdout(
    fake_trackio: Any, calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(make_trackers(["trackio"])[0], tmp_path)
    assert of_kind(calls, "init")[0][1]["resume"] == "never"
    assert [call[2] for call in of_kind(calls, "log")] == [1, 2, 2, None]
    assert calls[-1] == ("finish",)
    assert capsys.readouterr().out == ""


def test_tensorboard_writes_into_the_run_folder(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, at: int) -> None:
            calls.append(("scalar", name, value, at))

        def add_text(self, name: str, text: str, at: int) -> None:
            calls.append(("text", name, text))

        def close(self) -> None:
            calls.append(("close",))

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    play(make_trackers(["tensorboard"])[0], tmp_path)
    play(make_trackers(["tensorboard"])[0], tmp_path, first=2)
    opened = of_kind(calls, "open")
    assert opened == [("open", str(tmp_path / "tensorboard"), purge) for purge in (None, 3)]
    assert ("scalar", "train/loss", 1.5, 1) in calls
    assert [text for _, name, text in of_kind(calls, "text") if name == "settings"] == [
        "    base.ref: smollm2\n    train.lr: 0.001\n    train.betas: [0.9, 0.99]\n    note: None"
    ]
    assert calls[-1] == ("close",)


def test_tensorboard_for_real(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        play(make_trackers(["tensorboard"])[0], tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.5), (2, 1.5)]


# --- names and failures ------------------------------------------------------------------------


def test_every_name_has_a_sink_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(SINKS) == ["tensorboard", "wandb", "mlflow", "trackio"]
    for name in SINKS:
        monkeypatch.setitem(sys.modules, name, None)  # the import fails
        with pytest.raises(MissingDependencyError, match=f"--report-to {name}.*pip install {name}"):
            make_trackers([name])


def test_wrong_names_are_listed_together(fake_wandb: Any) -> None:
    with pytest.raises(InputError) as info:
        make_trackers(["wandb", "wandb", "comet"])
    assert "'comet' is unknown; the trackers are tensorboard, wandb" in str(info.value)
    assert "'wandb' is given twice" in str(info.value)


def _error(module: str, name: str, **attributes: Any) -> Exception:
    kind = type(name, (Exception,), {"__module__": module, **attributes})
    made: Exception = kind("down")
    return made


@pytest.mark.parametrize(
    ("error", "survives"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (_error("requests.exceptions", "RequestException"), True),
        (_error("httpx", "ConnectError"), True),
        (_error("wandb.errors.errors", "CommError"), True),
        (_error("wandb.errors.errors", "AuthenticationError"), False),
        (_error("wandb.errors.errors", "UsageError"), False),
        (_error("mlflow.exceptions", "RestException", error_code="TEMPORARILY_UNAVAILABLE"), True),
        (_error("mlflow.exceptions", "RestException", error_code="PERMISSION_DENIED"), False),
        (PermissionError(), False),
        (ValueError(), False),
    ],
)
def test_only_network_failures_are_survived(
    fake_wandb: Any, error: Exception, survives: bool
) -> None:
    tracker = make_trackers(["wandb"])[0]
    assert tracker.survives(error) is survives
    wrapped = RuntimeError("the service's own wrapper")
    wrapped.__cause__ = error
    assert tracker.survives(wrapped) is survives


def test_a_server_that_does_not_answer_is_said_and_left_out(
    fake_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise ConnectionRefusedError("port 443")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    with CallbackList(make_trackers(["wandb"])) as events:
        events.on_start(RunInfo(out=tmp_path, total_steps=9))
        assert len(events) == 0
        events.on_step(step(1))


def test_a_refused_login_stops_before_the_first_step(
    fake_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise _error("wandb.errors.errors", "AuthenticationError")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    with (
        pytest.raises(TrainingError, match="wandb failed in on_start: AuthenticationError"),
        CallbackList(make_trackers(["wandb"])) as events,
    ):
        events.on_start(RunInfo(out=tmp_path, total_steps=9))
