"""``lorakit train``: flags to settings, resume, what goes where, exit codes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from lorakit.cli.main import main
from lorakit.formats import load_adapter
from lorakit.train import Callback
from lorakit.train.checkpoint import list_checkpoints
from tests.train import tiny


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a tiny base and data, which is the working directory."""
    tiny.write_base(tmp_path / "base")
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(60))
    tiny.write_rows(tmp_path / "valid.jsonl", tiny.rows(10, seed=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*flags: str, out: str = "run") -> int:
    start = ["train", "--base", "base", "--data", "data.jsonl", "--out", out, "--device", "cpu"]
    rank = () if {"--rank", "--from"} & set(flags) else ("--rank", "3")
    return main([*start, "--steps", "6", "--samples", "0", *rank, *flags])


def settings(out: str = "run") -> dict:
    return yaml.safe_load(Path(out, "run.yaml").read_text())


def test_every_flag_arrives(files, capfd):
    flags = {
        "lora": {
            "rank": 2, "alpha": 5.0, "targets": ["q_proj", "v_proj", "o_proj"],
            "exclude": ["v_proj"], "layers": "0", "dropout": 0.1,
            "scaling": "alpha/sqrt(r)", "init": "gaussian", "variant": "dora",
        },
        "train": {
            "batch_size": 4, "micro_batch": 2, "micro_batch_tokens": 99, "lr": 0.002,
            "schedule": "cosine", "warmup": 2, "weight_decay": 0.1, "clip": 0.5, "seed": 3,
            "eval_every": 3, "eval_rows": 7, "patience": 4, "checkpoint_every": 2,
            "keep_checkpoints": 1, "validation_fraction": 0.25,
        },
    }  # fmt: skip
    given = []
    for section in flags.values():
        for name, value in section.items():
            given.append("--" + name.replace("_", "-"))
            given += value if isinstance(value, list) else [str(value)]
    assert train(*given) == 0
    written = settings()
    for section, values in flags.items():
        for name, value in values.items():
            assert written[section][name] == value, name
    adapter = load_adapter("run/adapter")
    assert set(adapter.sites) == {
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")
    }
    assert len(list_checkpoints(Path("run/checkpoints"))) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "6 steps" in err


def test_json_is_all_of_stdout(files, capfd):
    assert train("--json", "--valid", "valid.jsonl") == 0
    out, _ = capfd.readouterr()
    result = json.loads(out)
    assert result["ending"] == "finished"
    assert result["steps"] == 6
    assert result["best_loss"] <= result["base_loss"]
    assert load_adapter(result["adapter"])


def test_quiet_says_nothing(files, capfd):
    assert train("--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_interrupted_and_resumed_from_elsewhere(files, capfd, monkeypatch):
    class Stop(Callback):
        def on_step(self, metrics):
            if metrics.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    from lorakit.cli import train as command

    monkeypatch.setattr(command, "_callbacks", lambda *_: [Stop()])
    assert train("--optimizer", "sgd") == 130
    monkeypatch.undo()
    assert f"Go on with: lorakit train --resume {files / 'run'}" in capfd.readouterr().err
    # paths in run.yaml are absolute, so the working directory does not matter
    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")
    assert main(["train", "--resume", "../run", "--json"]) == 0
    resumed = json.loads(capfd.readouterr().out)
    assert resumed["steps"] == 6
    # a finished run says so, and is left as it is
    before = {path: path.stat().st_mtime_ns for path in (files / "run").rglob("*")}
    assert main(["train", "--resume", "../run", "--json"]) == 0
    out, err = capfd.readouterr()
    assert "is finished already (6 steps)" in err
    assert json.loads(out) == resumed
    assert {path: path.stat().st_mtime_ns for path in (files / "run").rglob("*")} == before


@pytest.mark.parametrize("flag", [("--steps", "9"), ("--rank", "2"), ("--base", "base")])
def test_a_resumed_run_takes_no_settings(files, capfd, flag):
    assert train("--quiet") == 0
    assert main(["train", "--resume", "run", *flag]) == 2
    err = capfd.readouterr().err
    assert f"{flag[0]} cannot be changed" in err
    assert "--from run/adapter" in err


def test_going_on_with_an_adapter(files, capfd):
    assert train("--rank", "2", "--alpha", "4", "--quiet", out="first") == 0
    again = ["--from", "first/adapter", "--quiet"]
    assert train(*again, "--rank", "2", "--dropout", "0.25", out="second") == 0
    spec = load_adapter("second/adapter").spec
    assert (spec.rank, spec.alpha, spec.dropout) == (2, 4.0, 0.25)
    capfd.readouterr()
    assert train(*again, "--rank", "3", "--alpha", "9", out="third") == 2
    err = capfd.readouterr().err
    assert "--rank 3: the adapter has 2" in err
    assert "--alpha 9.0: the adapter has 4.0" in err
    assert not os.path.exists("third")


def test_what_is_missing_comes_at_once(capfd):
    assert main(["train", "--steps", "3"]) == 2
    err = capfd.readouterr().err
    assert all(flag in err for flag in ("--base", "--data", "--out", "--resume RUN"))


def test_choices_are_said_with_their_reason(files, capfd):
    assert train("--eval-rows", "4") == 0
    err = capfd.readouterr().err
    assert "lr is" in err
    assert "held out" in err


def test_help_teaches(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    for flag in ("--resume", "--from", "--valid", "--rank", "--lr", "--report-to", "--json"):
        assert flag in out


# --- all weights ----------------------------------------------------------------------------------


def test_all_weights(files, capfd):
    """Trained, gone on with, judged beside the base, and made into an adapter."""
    start = ["train", "--base", "base", "--data", "data.jsonl", "--device", "cpu", "--full"]
    assert main([*start, "--out", "full", "--steps", "6", "--lr", "1e-2", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["adapter"], Path(result["model"]).name) == (None, "model")
    assert result["best_loss"] < result["base_loss"]
    assert "all 6,416 weights are trained" in err
    assert settings("full")["lora"] is None
    assert main(["train", "--resume", "full", "--json"]) == 0
    assert json.loads(capfd.readouterr()[0])["model"] == result["model"]
    judge = ["eval", "--base", "base", "--full", "full", "--data", "valid.jsonl", "--forgetting"]
    assert main([*judge, "--device", "cpu", "--json"]) == 0
    base, tuned = json.loads(capfd.readouterr()[0])["models"]
    assert tuned["loss"] < base["loss"]
    assert tuned["forgetting"]["difference"] != 0
    extract = ["extract", "--base", "base", "--tuned", "full/model", "--rank", "full"]
    assert main([*extract, "--out", "extracted"]) == 0
    assert load_adapter("extracted").sites


def test_all_weights_take_no_flags_of_an_adapter(files, capfd):
    flags = ["--rank", "4", "--targets", "mlp", "--init", "pissa"]
    flags += ["--from", "x", "--quantize", "nf4"]
    start = ["train", "--base", "base", "--data", "data.jsonl", "--out", "full", "--full"]
    assert main([*start, *flags, "--lr", "auto"]) == 2
    err = capfd.readouterr()[1]
    assert all(flag in err for flag in ("--rank", "--targets", "--init", "--from", "--quantize"))
    assert "--lr auto" in err
    assert not Path("full").exists()
    Path("jobs.yaml").write_text("{base: base, out: o, jobs: [{data: data.jsonl, full: true}]}")
    assert main(["train", "jobs.yaml"]) == 2
    assert "it trains the base, which the others need" in capfd.readouterr()[1]
