"""What the demo prints, and that it runs the commands to their end, or stops with their code."""

from __future__ import annotations

import json

import pytest

from tests.examples.test_orders import module
from tests.train.tiny import write_base

demo = module("demo")

RIGHT = '{"intent":"buy","order":null,"item":"hat","quantity":2,"by":null}'


def _asked(answers: list[str]) -> list[dict]:
    before = "I am\nsorry to hear that. " + "x" * 300
    return [
        {
            "row": {"prompt": f"hat {i}"},
            "references": [RIGHT],
            "models": [{"name": "base", "answer": before}, {"name": "orders", "answer": after}],
        }
        for i, after in enumerate(answers)
    ]


def test_answers_stand_beside_each_other_and_right_records_are_marked():
    spaced = json.dumps(json.loads(RIGHT), indent=1)
    lines = demo.beside_each_other(_asked([RIGHT, spaced, "Sure! " + RIGHT, "null"]), 9)
    shown = [line for line in lines if line.startswith("  adapter")]
    assert [line[-1] for line in shown] == ["✓", "✓", "✗", "✗"]
    assert all(len(line) <= 120 for line in lines)
    assert "  base      I am sorry to hear that. x" in "\n".join(lines)


def test_what_is_shown_is_spread_over_all_messages():
    lines = demo.beside_each_other(_asked([RIGHT] * 160), 5)
    messages = [line.split()[-1] for line in lines if line.startswith("  message")]
    assert messages == ["0", "32", "64", "96", "128"]


def test_the_table_names_all_metrics():
    models = [
        {"loss": 2.5, "metrics": dict.fromkeys(demo.METRICS, 0.0)},
        {"loss": 0.1, "metrics": dict.fromkeys(demo.METRICS, 97.5)},
    ]
    lines = demo.table({"models": models})
    assert lines[1].split() == ["valid", "JSON", "0%", "98%"]
    assert len(lines) == 2 + len(demo.METRICS)


def test_a_command_that_fails_ends_the_demo_with_its_code(capfd):
    with pytest.raises(SystemExit) as stopped:
        demo._lorakit("train", "--nonsense")
    assert stopped.value.code == 2
    assert "$ lorakit train --nonsense" in capfd.readouterr().out


def test_the_whole_demo_runs_and_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(demo.TRAINING, "--rank", "4")  # this base is 16 wide
    out = tmp_path / "run"
    arguments = ["--base", str(write_base(tmp_path / "base")), "--out", str(out)]
    assert demo.main([*arguments, "--steps", "2", "--limit", "3"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("$ lorakit ") == 2
    assert printed.count("\n  message ") == 3
    for phrase in ("valid JSON", "fields right", "whole records right", str(out / "report.html")):
        assert phrase in printed
    for name in ("report.html", "adapter/adapter_config.json", "test_answers.jsonl"):
        assert (out / name).is_file(), name

    demo._train(demo._parser().parse_args(arguments), out)
    assert "finished already (2 steps)" in capfd.readouterr().err
