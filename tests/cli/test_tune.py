"""``lorakit tune``: flags, bad input, what goes where, going on."""

from __future__ import annotations

import argparse
import json

import pytest
import yaml

from lorakit.cli.main import main
from lorakit.cli.tune import duration
from lorakit.errors import Interrupted
from lorakit.formats import load_adapter
from lorakit.workflows.tuning.field import Field
from tests.train import tiny


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a tiny base and data, which is the working directory."""
    tiny.write_base(tmp_path / "base")
    tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(*flags: str) -> int:
    start = ["tune", "--base", "base", "--data", "data.jsonl", "--out", "out", "--device", "cpu"]
    return main([*start, "--steps", "4", "--batch-size", "2", *flags])


def test_a_quick_search_and_what_it_prints(files, capfd):
    assert tune("--quick", "--candidates", "3", "--rank", "2", "--lr", "0.02",
                "--search", "lr=1e-3..1e-1") == 0  # fmt: skip
    out, err = capfd.readouterr()
    assert "after 4" in out
    assert "Candidate" in out
    assert "is chosen: lr 0." in out
    assert "Adapter: " in out
    assert "3 candidates" in err
    adapter = load_adapter("out/adapter")
    assert adapter.spec.rank == 2
    table = json.loads((files / "out/tune.json").read_text())
    assert table["candidates"][0]["lr"] == 0.02  # the defaults are what the flags say

    # it has ended: the end is made again, elsewhere too, and --json is all of stdout
    before = load_adapter("out/adapter").sites
    (files / "elsewhere").mkdir()
    assert main(["tune", "--resume", "out", "--json"]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out)["chosen"] == table["chosen"]
    assert load_adapter("out/adapter").sites.keys() == before.keys()
    assert main(["tune", "--resume", "out", "--quick", "--steps", "9"]) == 2
    assert "--quick, --steps cannot be changed" in capfd.readouterr().err
    # the adapter is one that other commands take, by the search's folder
    assert main(["inspect", "out", "--json"]) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--search", "rank=2,4", "--rank", "8"), "--rank: --search has rank=2,4"),
        (("--search", "depth=3"), "'depth' cannot be searched"),
        (("--search", "lr=1e-2..1e-4"), "first end"),
        (("--candidates", "1"), "at least 2"),
        (("--max-time", "soon"), "expected such as 90s, 30m"),
        (("--search", "targets=nowhere,attention"), "nowhere"),
        (("--quick", "--lr", "0.1"), "nothing to choose from"),
        (("--valid", "data.jsonl", "--validation-fraction", "0.2"), "give one of them"),
        (("--validation-fraction", "0"), "none of them trains on"),
        (("--search", "rank=2,3", "--data", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(files, capfd, flags, says):
    assert tune(*flags, "--quiet") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err
    assert not (files / "out").exists()


def test_what_a_new_search_needs(files, capfd):
    assert main(["tune", "--quick"]) == 2
    err = capfd.readouterr().err
    assert all(f"--{name}: " in err for name in ("base", "data", "out"))
    assert main(["tune", "--resume", "nothing"]) == 2
    assert "does not exist" in capfd.readouterr().err
    (files / "out").mkdir()
    (files / "out/mine.txt").write_text("mine")
    assert tune("--quick") == 2
    assert "not empty" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800)],
)
def test_times(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "1h x", "-5m", "0s", "1h30"])
def test_times_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


def test_train_at_a_rate_that_is_found(files, capfd, monkeypatch):
    start = ["train", "--base", "base", "--data", "data.jsonl", "--device", "cpu", "--lr", "auto"]
    steps = ["--steps", "3", "--batch-size", "2", "--rank", "2"]

    def stopped(*_, **__):
        raise Interrupted("stopped by SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(Field, "advance", stopped)
        assert main([*start, *steps, "--out", "run"]) == 130
    assert "Go on with the same command" in capfd.readouterr().err
    assert main([*start, *steps, "--out", "run", "--steps", "4", "--dropout", "0.1"]) == 2
    err = capfd.readouterr().err
    assert "train.steps: 3 then, 4 now" in err
    assert "lora.dropout: 0.0 then, 0.1 now" in err
    assert not (files / "run").exists()
    assert main([*start, *steps, "--out", "run", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["steps"] == 3
    assert "is chosen: lr " in err
    found = json.loads((files / "run.search/tune.json").read_text())
    written = yaml.safe_load((files / "run/run.yaml").read_text())
    assert written["train"]["lr"] == found["values"]["lr"]
    assert list(found["values"]) == ["lr"]
    # it is a run like any other, and its place is taken
    assert main(["train", "--resume", "run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["best_loss"] == result["best_loss"]
    assert main([*start, *steps, "--out", "run"]) == 2
    capfd.readouterr()
    assert main([*start, "--from", "run", "--out", "more"]) == 2
    assert "--from: a search begins new adapters" in capfd.readouterr().err
    assert main([*start, "--out", "other", "--steps", "3", "--patience", "2"]) == 2
    assert "patience" in capfd.readouterr().err
