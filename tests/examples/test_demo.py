"""What the demo prints, and that it runs the commands to their end, or stops with their code."""

from __future__ import annotations

import json

import pytest

from tests.examples.test_orders import module

demo = module("demo")

RIGHT = '{"intent":"buy","order":null,"item":"hat","quantity":2,"by":null}'


def _report(answers: list[str]) -> dict:
    return {
        "models": [
            {
                "name": "base",
                "loss": 2.5,
                "metrics": dict.fromkeys(demo.METRICS, 0.0),
                "answers": ["I am\nsorry to hear that. " + "x" * 300] * len(answers),
            },
            {
                "name": "orders",
                "loss": 0.1,
                "metrics": dict.fromkeys(demo.METRICS, 97.5),
                "answers": answers,
            },
        ],
        "items": [{"prompt": f"hat {i}", "references": [RIGHT]} for i in range(len(answers))],
    }


def test_answers_stand_beside_each_other_and_right_records_are_marked():
    spaced = json.dumps(json.loads(RIGHT), indent=1)
    lines = demo.beside_each_other(_report([RIGHT, spaced, "Sure! " + RIGHT, "null"]), 4)
    shown = [line for line in lines if line.startswith("  adapter")]
    assert [line[-1] for line in shown] == ["✓", "✓", "✗", "✗"]
    assert all(len(line) <= 120 for line in lines)
    assert "  base      I am sorry to hear that. x" in "\n".join(lines)


def test_what_is_shown_is_spread_over_all_messages():
    lines = demo.beside_each_other(_report([RIGHT] * 160), 5)
    messages = [line.split()[-1] for line in lines if line.startswith("  message")]
    assert messages == ["0", "32", "64", "96", "128"]


def test_the_table_names_all_metrics():
    lines = demo.table(_report([RIGHT]))
    assert lines[1].split() == ["valid", "JSON", "0%", "98%"]
    assert len(lines) == 2 + len(demo.METRICS)


def test_a_command_that_fails_ends_the_demo_with_its_code(capfd):
    with pytest.raises(SystemExit) as stopped:
        demo._lorakit("train", "--nonsense")
    assert stopped.value.code == 2
    assert "$ lorakit train --nonsense" in capfd.readouterr().out
