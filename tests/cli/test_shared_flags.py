"""The flags that commands share, and what becomes of them."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.cli import adapters, bases, flags, output, rows
from lorakit.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_everything_that_json_can_hold_is_printed_as_valid_json(value):
    text = json.dumps(output.plain(value), allow_nan=False)

    def without_infinite(x):
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        if isinstance(x, list):
            return [without_infinite(y) for y in x]
        if isinstance(x, dict):
            return {k: without_infinite(y) for k, y in x.items()}
        return x

    assert json.loads(text) == without_infinite(value)


def test_foreign_values_become_plain_data():
    value = {
        "dtype": torch.float32,
        "path": Path("a/b"),
        "array": np.array([1.0, np.nan]),
        "scalar": np.float32(0.5),
        "tensor": torch.tensor(3),
        "set": {"b", "a"},
        "argument": adapters.AdapterArgument("runs/x", "x"),
    }
    assert output.plain(value) == {
        "dtype": "torch.float32",
        "path": "a/b",
        "array": [1.0, None],
        "scalar": 0.5,
        "tensor": 3,
        "set": ["a", "b"],
        "argument": {"ref": "runs/x", "name": "x", "weight": None, "flag": "--adapter"},
    }


@given(st.floats(-1e6, 1e6))
def test_weight_of_an_adapter(weight):
    assert adapters.parse_adapter(f"some/where={weight!r}") == ("some/where", weight)
    assert adapters.parse_adapter("some/where") == ("some/where", None)


@pytest.mark.parametrize("text", ["a=", "a=b", "a=nan", "a=inf", "=0.5"])
def test_bad_weight_is_refused(text):
    with pytest.raises(InputError, match="finite number"):
        adapters.parse_adapter(text)


@pytest.mark.parametrize(
    ("text", "ref", "name", "weight"),
    [
        ("runs/mine/adapter", "runs/mine/adapter", "mine", None),
        ("runs/mine/checkpoints/step-40", "runs/mine/checkpoints/step-40", "checkpoints", None),
        ("runs/mine/adapter=0.5", "runs/mine/adapter", "mine", 0.5),
        ("someone/sql-lora@v2", "someone/sql-lora@v2", "sql-lora", None),
        ("x/adapter_model.safetensors", "x/adapter_model.safetensors", "x", None),
        ("x/sql.safetensors=-1", "x/sql.safetensors", "sql", -1.0),
        ("sql:runs/mine/adapter=2", "runs/mine/adapter", "sql", 2.0),
        ("C:\\adapters", "C:\\adapters", "C:\\adapters", None),
        ("adapter", "adapter", "adapter", None),
    ],
)
def test_adapter_argument(text, ref, name, weight):
    assert adapters.adapter_argument(text) == adapters.AdapterArgument(ref, name, weight)


def test_an_existing_path_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=0.5", "two:words", "lr=1"):
        Path(folder).mkdir()
    assert adapters.adapter_argument("lr=0.5") == adapters.AdapterArgument("lr=0.5", "lr=0.5")
    assert adapters.adapter_argument("two:words=2").ref == "two:words"
    assert adapters.adapter_argument("it:lr=1") == adapters.AdapterArgument("lr=1", "it")


def test_names_that_clash_are_refused_and_the_way_out_is_named():
    two = [adapters.adapter_argument(t) for t in ("a/sql", "b/sql", "c/base")]
    with pytest.raises(InputError) as caught:
        adapters.check_names(two)
    assert "--adapter other:b/sql" in str(caught.value)
    assert "--adapter mine:c/base" in str(caught.value)
    adapters.check_names([adapters.adapter_argument(t) for t in ("a/sql", "other:b/sql")])


def parser():
    made = argparse.ArgumentParser(prog="lorakit eval")
    bases.add_base_arguments(made)
    adapters.add_adapter_arguments(made)
    rows.add_data_arguments(made)
    output.add_json_argument(made)
    made.add_argument("--limit", type=flags.positive_int)
    made.add_argument("--metrics", type=flags.comma_list("bleu", "chrf"))
    return made


NEEDED = ["--base", "b", "--data", "d.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "'0' given; expected a whole number of at least 1"),
        (["--limit", "two"], "'two' given; expected a whole number of at least 1"),
        (["--metrics", "bleu,blue"], "blue given; expected one or several of bleu,chrf"),
        (["--metrics", ","], "expected one or several of bleu,chrf"),
        (["--map", "prompt"], "expected FIELD=COLUMN"),
        (["--map", "a=b,a=c"], "the field 'a' is mapped twice"),
        (["--adapter", "a=b"], "expected a finite number"),
        (["--adapter", ""], "expected a folder, a file or a hub id"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--max-length", "-5"], "'-5' given"),
    ],
)
def test_wrong_flags_exit_2_and_say_what_was_expected(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([*NEEDED, *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@given(st.integers(-(2**63) + 1, 2**63 - 1), st.floats())
def test_number_types(whole, real):
    def accepted(kind, value):
        try:
            kind(repr(value))
        except argparse.ArgumentTypeError:
            return False
        return True

    finite = math.isfinite(real)
    assert accepted(flags.positive_int, whole) == (whole >= 1)
    assert accepted(flags.count, whole) == (whole >= 0)
    assert accepted(flags.seed, whole) == (0 <= whole < 2**63)
    assert accepted(flags.positive_float, real) == (finite and real > 0)
    assert accepted(flags.non_negative_float, real) == (finite and real >= 0)
    assert accepted(flags.probability, real) == (finite and 0 < real <= 1)
    assert accepted(flags.fraction, real) == (finite and 0 <= real < 1)


def test_a_run_folder_stands_for_its_adapter(tmp_path):
    inner = tmp_path / "adapter"
    inner.mkdir()
    (inner / "adapter_config.json").write_text("{}")
    assert adapters.adapter_path(str(tmp_path)) == str(inner)
    assert adapters.adapter_path(str(inner)) == str(inner)


def test_json_is_printed_alone_on_stdout(capsys):
    output.say("progress")
    output.emit_json({"a": math.nan})
    out = capsys.readouterr()
    assert json.loads(out.out) == {"a": None}
    assert out.err == "progress\n"
