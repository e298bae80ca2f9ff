"""The run folder read back: whole, half-written, resumed, broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.errors import InputError
from lorakit.train.folder import RunFolder
from lorakit.train.record import environment, flatten, is_finite, read_run


def step(number: int, loss: float | None = 2.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "tokens": 100, "seconds": 0.5}


def write(folder: Path, rows: list[dict[str, Any]], settings: Any = None, tail: str = "") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    if settings is not None:
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_settings_and_facts_are_told_apart(tmp_path: Path) -> None:
    facts = {"data_report": {"rows": 3}, "hardware": {"cores": 2}, "versions": {"torch": "2"}}
    record = read_run(write(tmp_path, [], {"train": {"lr": 1e-3}, "seed": 1, **facts}))
    assert record.settings == {"train": {"lr": 1e-3}, "seed": 1}
    assert record.facts == {**facts, "validation_report": {}}
    assert record.at("train", "lr") == 1e-3
    assert record.at("train", "none") is None
    assert record.at("seed", "deeper") is None


def test_a_step_written_twice_counts_once_and_the_last_one_wins(tmp_path: Path) -> None:
    rows = [step(1), step(2), step(3, 9.0), step(2, 1.5), step(3, 1.0)]
    record = read_run(write(tmp_path, rows))
    assert record.series("loss") == ([1, 2, 3], [2.0, 1.5, 1.0])
    assert record.total("tokens") == 300
    assert record.train_seconds == 1.5


def test_samples_hold_every_sign(tmp_path: Path) -> None:
    """Some of them part lines elsewhere, and are left as they are in JSON."""
    folder, samples = RunFolder(tmp_path), [{"prompt": "a\u2028b\u2029c\x85d\n\x0ce"}] * 2
    folder.write_samples(samples)
    assert folder.read_samples() == samples
    assert list(read_run(write(tmp_path, [])).samples) == samples


def test_numbers_that_are_not_finite_are_no_points(tmp_path: Path) -> None:
    rows = [step(1), step(2, None), step(3, float("nan")), step(4, float("inf")), step(5, 1.0)]
    record = read_run(write(tmp_path, rows))
    assert record.series("loss") == ([1, 5], [2.0, 1.0])
    assert len(record.steps) == 5
    assert not any(map(is_finite, (None, "1", True, float("nan"))))


def test_the_best_is_the_lowest_finite_and_the_first_of_equals(tmp_path: Path) -> None:
    losses = [2.5, None, 1.3, 1.2, 1.2, 1.4]
    evals = [
        {"kind": "eval", "step": 10 * i, "loss": loss, "seconds": 1.0}
        for i, loss in enumerate(losses)
    ]
    record = read_run(write(tmp_path, evals))
    assert record.best is not None
    assert record.best["step"] == 30
    assert record.start_eval is not None
    assert record.start_eval["loss"] == 2.5
    assert record.seconds == 6.0
    assert read_run(write(tmp_path, [step(1)])).best is None


def test_a_torn_last_row_is_said_and_left_out(tmp_path: Path) -> None:
    record = read_run(write(tmp_path, [step(1), step(2)], {}, tail='{"kind": "step", "st'))
    assert [row["step"] for row in record.steps] == [1, 2]
    assert any("1 unreadable row(s), the first in line 3" in text for text in record.missing)


def test_a_note_of_odd_signs_is_one_row(tmp_path: Path) -> None:
    row = {"kind": "note", "text": "a\u2028b\x85c"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", "utf-8")
    assert not any("unreadable" in text for text in read_run(tmp_path).missing)


def test_everything_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe[1]\n\n")
    record = read_run(tmp_path)
    assert record.steps == ()
    text = " ".join(record.missing)
    for part in ("run.yaml is not there", "metrics.jsonl has 1 unreadable", "adapter/ is not"):
        assert part in text


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "\x00"])
def test_settings_that_cannot_be_read_are_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    record = read_run(tmp_path)
    assert record.settings == {}
    assert any(text.startswith("run.yaml") for text in record.missing)


def test_a_broken_adapter_is_said(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    record = read_run(write(tmp_path, [step(1)]))
    assert record.adapter is None
    assert any(text.startswith("adapter/ cannot be read") for text in record.missing)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"neither run.yaml nor metrics.jsonl"):
        read_run(tmp_path)


def test_notes_are_kept_once_each(tmp_path: Path) -> None:
    notes = [{"kind": "note", "text": text} for text in ("a", "b", "a")]
    assert read_run(write(tmp_path, notes)).notes == ("a", "b")


def test_the_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["hardware"]["cores"] >= 1
    assert {"python", "torch", "numpy"} <= set(found["versions"])
    assert yaml.safe_load(yaml.safe_dump(found)) == found


def test_flatten_makes_dotted_names_of_plain_values() -> None:
    assert flatten({"a": {"b": {"c": 1}, "empty": {}}, "d": [1, 2], "e": None}) == {
        "a.b.c": 1,
        "a.empty": "{}",
        "d": "[1, 2]",
        "e": None,
    }
