"""``lorakit train`` for many adapters: files of jobs, folders of data, and their resuming."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from lorakit.cli import jobs, many_progress, train_many
from lorakit.cli.main import main
from lorakit.formats import load_adapter
from lorakit.train.callbacks import Callback, RunInfo, RunResult, StepMetrics
from lorakit.train.trackers import SINKS
from tests.train import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("many"))


@pytest.fixture
def files(base, tmp_path, monkeypatch):
    """The working directory, with a base and small data files in ``data``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "data").mkdir()
    for number in range(4):
        tiny.write_rows(tmp_path / "data" / f"c{number}.jsonl", tiny.rows(6 + number, seed=number))
    return tmp_path


def write(content, name="jobs.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(content, sort_keys=False))
    return name


JOBS = {
    "base": "base",
    "device": "cpu",
    "out": "runs",
    "defaults": {"rank": 3, "steps": 4, "samples": 0},
    "jobs": [
        {"data": "data/c0.jsonl", "lr": "1e-2"},
        {"name": "b", "data": "data/c1.jsonl", "rank": 2, "targets": ["q_proj", "v_proj"]},
        {"name": "c", "data": ["data/c2.jsonl"], "out": "elsewhere/c", "dropout": 0.1, "steps": 6},
    ],
}


def test_a_file_of_jobs(files, capfd):
    Path("runs").mkdir()
    assert main(["train", write(JOBS, "runs/jobs.yaml"), "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    rows = json.loads(out)["runs"]
    assert [row["name"] for row in rows] == ["c0", "b", "c"]
    assert [row["steps"] for row in rows] == [4, 4, 6]
    assert [row["rows"] for row in rows] == [6, 7, 8]
    assert all(row["loss_on"] == "training" and row["loss_before"] for row in rows)
    assert rows[2]["adapter"].endswith("elsewhere/c/adapter")
    assert load_adapter("runs/b").spec.rank == 2
    assert load_adapter("runs/c0").spec.rank == 3
    settings = yaml.safe_load(Path("runs/c0/run.yaml").read_text())
    assert settings["train"]["lr"] == 0.01
    assert json.loads(Path("runs/summary.json").read_text())["runs"] == rows
    # again it is refused, and nothing is touched
    assert main(["train", "runs/jobs.yaml"]) == 2
    assert "lorakit train --resume runs" in capfd.readouterr().err
    kept = yaml.safe_load(Path("runs/runs.yaml").read_text())
    assert [job["rank"] for job in kept["jobs"]] == [3, 2, 3]
    # runs go on where their folder is now
    Path("runs").rename("moved")
    assert main(["train", "--resume", "moved", "--json", "--quiet"]) == 0
    now = json.loads(capfd.readouterr().out)["runs"]
    assert [Path(row["adapter"]).parent for row in now] == [
        Path("moved/c0").absolute(),
        Path("moved/b").absolute(),
        Path("elsewhere/c").absolute(),
    ]
    assert not Path("runs").exists()


def test_a_file_of_jobs_is_not_taken_for_what_a_folder_of_runs_keeps(files, capfd):
    Path("runs").mkdir()
    for content in (JOBS, {"base": "base"}, {"base": "base", "jobs": [{"data": "d"}]}):
        write(content, "runs/runs.yaml")
        assert main(["train", "--resume", "runs"]) == 2
        assert "runs/runs.yaml is not the list of runs" in capfd.readouterr().err
    write(JOBS, "runs/runs.yaml")
    assert main(["train", "runs/runs.yaml"]) == 2
    err = capfd.readouterr().err
    assert "Give it another name" in err
    assert "--resume" not in err
    assert yaml.safe_load(Path("runs/runs.yaml").read_text()) == JOBS


def test_what_is_wrong_is_said_of_all_jobs_at_once(files, capfd):
    jobs = [
        {"data": "data/c0.jsonl", "lr": -1},
        {"data": "data/c1.jsonl", "rang": 3},
        {"name": "x", "data": "data/c2.jsonl", "base": "other"},
        {"name": "y", "data": "data/c3.jsonl", "optimizer": "sgd", "weight_decay": 0.1},
        {"name": "y", "data": "data/c3.jsonl"},
        {"name": "z"},
        {"name": "../evil", "data": "data/c3.jsonl"},
        {"name": "", "data": "data/c3.jsonl"},
        {"name": "p", "data": "data/c3.jsonl", "out": "r/a"},
        {"name": "q", "data": "data/c3.jsonl", "out": "r/b/../a"},
        {"data": "data/c3.jsonl", "out": "other/p"},
        {"name": "w", "data": "data/c3.jsonl", "report_to": "wandb"},
    ]
    assert main(["train", write({**JOBS, "jobs": jobs, "colour": "red"})]) == 2
    err = capfd.readouterr().err
    for text in (
        "jobs.yaml",
        "colour: unknown",
        "job c0: argument --lr",
        "job c1: rang: there is no such setting",
        "job x: base: the jobs share it",
        "job y: ",
        "sgd has no decoupled decay",
        "job z: data: missing",
        "job ../evil: such a folder is not inside of runs",
        "job : such a folder",
        "job q: another job has the run folder",
        "job p: another job is called so too",
        "job w: report_to: wandb",
    ):
        assert text in err, text
    assert not Path("runs").exists()
    assert main(["train", write({"jobs": 3})]) == 2
    err = capfd.readouterr().err
    assert all(word in err for word in ("base: missing", "out: missing", "jobs: must be a list"))


def each(*more: str) -> int:
    flags = ["--device", "cpu", "--steps", "3", "--rank", "2"]
    return main(["train", "--each", "data", "--base", "base", "--out", "runs", *flags, *more])


def test_a_folder_of_files_with_broken_ones(files, capfd):
    Path("data/broken.jsonl").write_text('{"prompt": "a", "comple')
    Path("data/empty.csv").write_text("")
    Path("data/notes.md").write_text("no data")
    Path("data/c2.jsonl").rename("data/c2.NDJSON")
    Path("data/c3.jsonl.gz").write_bytes(gzip.compress(Path("data/c3.jsonl").read_bytes()))
    Path("data/c3.jsonl").unlink()
    assert each("--max-concurrent", "3") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "left out: notes.md\n" in err
    assert "2 jobs of 6 failed" in err
    assert "  - broken: " in err
    assert "  - empty: " in err
    for number in range(4):
        assert load_adapter(f"runs/c{number}").spec.rank == 2
    rows = {row["name"]: row for row in json.loads(Path("runs/summary.json").read_text())["runs"]}
    assert len(rows) == 6
    assert "broken.jsonl" in rows["broken"]["error"]
    # healed, only they are made
    times = {p: p.stat().st_mtime_ns for p in Path("runs").glob("c*/adapter/*")}
    tiny.write_rows(Path("data/broken.jsonl"), tiny.rows(5, seed=7))
    tiny.write_rows(Path("data/empty.csv"), tiny.rows(5, seed=8))
    Path("data/empty.csv").write_text("prompt,completion\nw1 w2,w2 w1\n")
    assert main(["train", "--resume", "runs", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["runs"]
    assert [row["ending"] for row in rows] == ["finished"] * 6
    assert {p: p.stat().st_mtime_ns for p in Path("runs").glob("c*/adapter/*")} == times


def test_whatever_is_wrong_with_a_job_ends_no_other():
    view = many_progress.ManyProgress(1, quiet=True)
    job = jobs.Job("a", {}, argparse.Namespace(), Path("a"))
    with train_many._told(job, view):
        raise KeyError("nobody foresaw it")
    assert train_many.summary_row(job)["error"] == "KeyError: 'nobody foresaw it'"


def test_interrupted_all_are_saved_and_go_on(files, capfd, monkeypatch):
    class Stop(many_progress._OfOne):
        def on_step(self, metrics):
            super().on_step(metrics)
            if metrics.step == 2 and self._job.name == "c1":
                os.kill(os.getpid(), signal.SIGINT)

    sent = []

    class Sink:
        def open(self, run, identity):
            self._name = identity or run.out.name
            return self._name

        def log(self, numbers, step):
            sent.append((self._name, step))

        def finish(self, summary, *, failed):
            pass

    monkeypatch.setitem(SINKS, "mlflow", Sink)
    with monkeypatch.context() as patched:
        patched.setattr(many_progress, "_OfOne", Stop)
        assert each("--max-concurrent", "2", "--report-to", "mlflow") == 130
    err = capfd.readouterr().err
    assert "stopping after this forward; again to stop now" in err
    assert "lorakit train --resume runs" in err
    rows = json.loads((files / "runs" / "summary.json").read_text())["runs"]
    assert [row["ending"] for row in rows] == ["interrupted"] * 2 + ["not begun"] * 2
    assert main(["train", "--resume", "runs", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["runs"]
    assert [row["steps"] for row in rows] == [3] * 4
    assert [row["rows"] for row in rows] == [6, 7, 8, 9]
    # nothing is left to do, and all is told again
    assert main(["train", "--resume", "runs", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["runs"] == rows
    assert sorted(sent) == [(f"c{run}", step) for run in range(4) for step in (1, 2, 3)]
    assert main(["train", "--resume", "runs", "--lr", "1"]) == 2
    assert "--lr cannot be changed" in capfd.readouterr().err


def test_what_does_not_go_together(files, capfd):
    write(JOBS)
    assert main(["train", "jobs.yaml", "--each", "data"]) == 2
    assert "a file of jobs and --each are given" in capfd.readouterr().err
    assert (
        main(["train", "--base", "base", "--data", "d", "--out", "r", "--token-budget", "9"]) == 2
    )
    assert "--token-budget: there is one adapter" in capfd.readouterr().err
    assert main(["train", "--each", "nowhere", "--base", "base", "--out", "r"]) == 2
    assert "is no folder" in capfd.readouterr().err


def test_the_view_of_many():
    now = [0.0]
    view = many_progress.ManyProgress(20, quiet=True, clock=lambda: now[0])

    class One:
        first_loss = None

        def __init__(self, name):
            self.name = name

    values = {"lr": 1.0, "grad_norm": 1.0, "supervised": 1, "seconds": 1.0}
    jobs = [One(f"j{i}") for i in range(12)]
    callbacks: list[Callback] = [view.of(job) for job in jobs]
    for callback in callbacks:
        callback.on_start(RunInfo(out=Path("r"), total_steps=10))
    for step in (1, 2, 3, 4, 5):
        now[0] += 2.0
        for callback in callbacks:
            callback.on_step(
                StepMetrics(
                    step=step, loss=3.0 / step, tokens=50, tokens_per_second=1, rss_mb=512, **values
                )
            )
    assert jobs[0].first_loss == 3.0
    view.done("j0", RunResult(out=Path("r"), adapter=None, steps=10))
    view.failed("j1", ValueError("no"))
    lines = view.lines()
    assert lines[0].startswith("1/20 done · 10 running · 1 failed · 375 tokens/s · 512 MB · 10 s")
    assert lines[0].endswith("about 19 s left")
    assert len(lines) == 1 + 8 + 1
    assert lines[1] == "  j4  5/10  loss 0.600"
    assert lines[-1] == "  … and 2 more"
