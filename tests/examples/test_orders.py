"""The demo's data: reproducible, unambiguous, and a test that training cannot have seen."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "examples" / "orders"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"orders_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


make_data = module("make_data")


def _committed(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9{} ]", "", text.lower()).split()


def test_the_committed_files_are_what_the_generator_writes(tmp_path, monkeypatch, capsys):
    for name in ("phrasings_train.txt", "phrasings_test.txt"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert "160 rows" in capsys.readouterr().out


def test_there_are_as_many_rows_and_phrasings_as_promised():
    train = make_data.read_phrasings(FOLDER / "phrasings_train.txt")
    test = make_data.read_phrasings(FOLDER / "phrasings_test.txt")
    assert len(_committed("train")) >= 600
    assert len(_committed("test")) >= 150
    assert len(train) + len(test) >= 300
    per_intent = [sum(p.intent == intent for p in train) for intent in {p.intent for p in test}]
    assert per_intent == [per_intent[0]] * 8


@pytest.mark.parametrize("name", ["train", "test"])
def test_each_phrasing_can_be_filled_in_many_ways_and_names_one_deadline_at_most(name):
    named = {"n", "a", "the", "my", "item", "order"}
    for phrasing in make_data.read_phrasings(FOLDER / f"phrasings_{name}.txt"):
        assert named & set(phrasing.gaps), phrasing
        assert sum(gap in ("by", "day") for gap in phrasing.gaps) <= 1, phrasing
        assert not re.search(r"on \{by\}", phrasing.text), f"{phrasing}: 'on tomorrow'"


def test_no_phrasing_of_the_test_is_one_of_training_or_nearly():
    train = make_data.read_phrasings(FOLDER / "phrasings_train.txt")
    for unseen in make_data.read_phrasings(FOLDER / "phrasings_test.txt"):
        for seen in train:
            alike = difflib.SequenceMatcher(None, _words(unseen.text), _words(seen.text)).ratio()
            assert alike < 0.75, f"{unseen.text!r} is too close to {seen.text!r}"


def test_no_message_occurs_twice_and_no_order_number_on_both_sides():
    train, test = _committed("train"), _committed("test")
    prompts = [row["prompt"] for row in train + test]
    assert len(set(prompts)) == len(prompts)
    numbers = [
        {json.loads(row["completion"])["order"] for row in rows} - {None} for rows in (train, test)
    ]
    assert not numbers[0] & numbers[1]


def test_half_of_the_test_is_about_things_that_training_never_names():
    trained = {json.loads(row["completion"])["item"] for row in _committed("train")}
    fresh = [
        item
        for row in _committed("test")
        if (item := json.loads(row["completion"])["item"])
        and not any(item.endswith(str(known)) for known in trained)
    ]
    assert len(fresh) >= 40


@pytest.mark.parametrize("name", ["train", "test"])
def test_each_record_can_be_read_from_its_message(name):
    """Checked with other means than the generator's: by looking for the values in the text."""
    numbers = dict(zip(make_data.NUMBERS, range(13), strict=True))
    for row in _committed(name):
        message, record = row["prompt"], json.loads(row["completion"])
        assert tuple(record) == make_data.FIELDS
        assert row["completion"] == json.dumps(record, separators=(",", ":"))
        assert (re.findall(r"\b[A-Z]\d{4}\b", message) or [None]) == [record["order"]], message
        assert record["by"] is None or record["by"] in message
        if record["item"] is None:
            assert record["quantity"] is None
            continue
        found = re.search(rf"(\S*)\s+{record['item']}(s|es)?\b", f" {message}", re.IGNORECASE)
        assert found, message
        before = found[1].lower()
        stated = numbers.get(before, int(before) if before.isdigit() else 1)
        assert stated == record["quantity"], message
        assert bool(found[2]) == (record["quantity"] > 1), message


def test_no_gap_is_left_and_sentences_that_begin_with_one_have_a_capital():
    for row in _committed("train") + _committed("test"):
        assert not re.search(r"[{}]|  ", row["prompt"])
        assert not re.search(r"[.!?] (the|my|a) ", row["prompt"]), row["prompt"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 100))
def test_any_seed_and_size_gives_distinct_messages(seed, num_train, num_test):
    made = make_data.make(num_train, num_test, seed)
    assert [len(made["train"]), len(made["test"])] == [num_train, num_test]
    messages = [row["prompt"] for rows in made.values() for row in rows]
    assert len(set(messages)) == len(messages)
    assert made == make_data.make(num_train, num_test, seed)
