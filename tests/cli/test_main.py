"""The entry point itself: what it keeps from being lost."""

import signal
import sys
import time

import pytest

from lorakit.cli import inspect_
from lorakit.cli.main import main


@pytest.fixture(autouse=True)
def _interruptible():
    """Also where the tests run behind ``&``, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Interrupting:
    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_in_a_finaliser_still_ends_the_command(monkeypatch, capsys):
    """Python would only print it, and the command would run on."""

    def run(_):
        _Interrupting()
        _Interrupting()
        time.sleep(20)  # waiting is interrupted, too
        return 0

    monkeypatch.setattr(inspect_, "run", run)
    before = sys.unraisablehook
    begun = time.monotonic()
    assert main(["inspect", "anything"]) == 130
    assert time.monotonic() - begun < 10
    assert capsys.readouterr().err == "\nInterrupted.\n"
    assert sys.unraisablehook is before


def test_ctrl_c_in_the_last_finaliser_ends_the_command_and_not_its_caller(monkeypatch):
    monkeypatch.setattr(inspect_, "run", lambda _: _Interrupting() and 0)
    assert main(["inspect", "anything"]) == 130
    time.sleep(0.2)  # nothing comes later


def test_other_errors_of_finalisers_are_told_as_before(monkeypatch):
    class Failing:
        def __del__(self) -> None:
            raise ValueError("of a finaliser")

    told = []

    def run(_):
        Failing()
        return 0

    monkeypatch.setattr(inspect_, "run", run)
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    assert main(["inspect", "anything"]) == 0
    assert told == ["of a finaliser"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--step", "4"], "lorakit train: unknown: --step (close: --steps)"),
        (
            ["images", "sample", "--base", "b", "--out", "o", "--sede=1"],
            "lorakit images sample: unknown: --sede (close: --seed)",
        ),
        (["inspect", "a", "--quux"], "lorakit inspect: unknown: --quux\n"),
        (
            ["merge", "--base", "b", "--out", "o", "--overwrite"],
            "lorakit merge: unknown: --overwrite\n",
        ),
        (["train", "--rank", "0"], "lorakit train: argument --rank: '0' given; expected"),
    ],
)
def test_a_flag_that_is_wrong(arguments, told, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(told)
    assert len(err.splitlines()) == 2  # and not all flags before it


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], []])
def test_help_is_a_success(arguments, capsys):
    assert main(arguments) == 0
    assert "usage: lorakit" in capsys.readouterr().out
