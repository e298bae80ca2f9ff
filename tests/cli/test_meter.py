"""How far something is, where there is no terminal."""

from __future__ import annotations

from lorakit.cli import meter


def test_no_line_is_said_twice(monkeypatch, capsys):
    monkeypatch.setattr(meter, "_SECONDS", 0.0)
    tell = meter._lines()
    for done in (113, 538, 538, 538):
        tell("MB read and written", done, 538)
    said = capsys.readouterr().err.splitlines()
    assert said == ["MB read and written: 113 of 538", "MB read and written: 538 of 538"]


def test_nothing_is_said_of_what_is_done_at_once(capsys):
    tell = meter._lines()
    tell("answers", 1, 2)
    tell("answers", 2, 2)
    assert capsys.readouterr().err == ""
