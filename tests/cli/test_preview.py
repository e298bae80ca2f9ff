"""``lorakit preview``: what is shown, with nothing but a tokenizer and a config."""

from __future__ import annotations

import json

import pytest

from lorakit.cli.main import main
from tests.data.toys import make_tokenizer, write_jsonl

ROWS = [{"prompt": f"what is {n}", "completion": f"the cat {n}"} for n in range(6)]


@pytest.fixture
def base(tmp_path):
    """A base's folder without any weights."""
    from transformers import LlamaConfig

    folder = tmp_path / "base"
    make_tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=300, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [*ROWS, {"prompt": "x", "completion": ""}, {"prompt": "é " * 90, "completion": "y"}]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_examples_are_shown_with_marks_where_there_is_no_colour(base, data, capsys):
    assert main(["preview", "--base", str(base), "--data", str(data), "--rows", "2"]) == 0
    out, err = capsys.readouterr()
    assert "<|im_start|>user\nwhat is 0<|im_end|>\n<|im_start|>assistant\n" in out
    assert "⟦the cat 0<|im_end|>⟧" in out
    assert "⟦the cat 1<|im_end|>⟧" in out
    assert "⟦the cat 2" not in out
    assert f"{data} line 1: " in out
    assert "prompt/completion" in out
    assert "has a chat template" in out
    assert "Left out: 2 of 8 rows" in out
    assert f"{data} line 7: column 'completion' is empty" in out
    assert "at most 64 fit" in out
    assert "Training would stop at these 2 rows; with --bad-rows skip it leaves them out." in out
    assert "One epoch: " in out
    assert "Tokens per example" in out
    assert err == ""


def test_what_training_would_skip_does_not_stop_it(base, data, capsys):
    arguments = ["preview", "--base", str(base), "--data", str(data), "--bad-rows", "skip"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Left out: 2 of 8 rows" in out
    assert "would stop" not in out


def test_json_is_one_object(base, data, capsys):
    arguments = ["preview", "--base", str(base), "--data", str(data), "--rows", "1", "--json"]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert found["report"]["used"] == 6
    assert found["report"]["dropped"] == {"empty completion": 1, "longer than 64 tokens": 1}
    assert found["training_would_stop"] is True
    assert "im_start" in found["chat_template"]
    (example,) = found["examples"]
    assert example["where"] == f"{data} line 1"
    assert [span["supervised"] for span in example["spans"]] == [False, True]
    assert example["spans"][1]["text"] == "the cat 0<|im_end|>"
    assert example["prompt"] == example["spans"][0]["text"]


def test_colour_replaces_the_marks_on_a_terminal(base, data, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["preview", "--base", str(base), "--data", str(data), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "⟦" not in out
    assert "\x1b[1;32mthe cat 0<|im_end|>" in out


def test_a_terminal_without_unicode_still_gets_everything(base, data, capfd, monkeypatch):
    import io
    import sys

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["preview", "--base", str(base), "--data", str(data), "--rows", "1"]) == 0
    sys.stdout.flush()
    assert b"[[the cat 0<|im_end|>]]" in raw.getvalue()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--map", "prompt=q,completion=a"], "no column 'q'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--max-length", "4096"], "the base's context holds 64 tokens"),
        (["--template", "{prompt} {completion}"], "hold its own answer"),
        (["--max-length", "6"], "8 of 8 rows cannot be used"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(base, data, capsys, arguments, expected):
    given = ["preview", "--base", str(base), "--data", str(data), *arguments]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert "Traceback" not in err
