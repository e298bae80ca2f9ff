"""Checkpoints and the run folder: whole or absent, the last two, damage and a full disk."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakit.core import files
from lorakit.errors import InputError, TrainingError
from lorakit.train import checkpoint as checkpoints
from lorakit.train import folder as folders
from lorakit.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from lorakit.train.folder import RunFolder
from lorakit.train.randomness import random_tensors, seeded, set_random_tensors
from tests.train import child

SECTIONS = {name: {} for name in ("base", "data", "validation", "lora", "train", "content")}


def make(step: int) -> Checkpoint:
    return Checkpoint(
        step,
        {"flat": torch.randn(5), "step": torch.tensor(3.0), "bytes": torch.arange(4).byte()},
        {"loss": 0.1 + 0.2, "nothing": None, "nested": {"a": [1, 2]}},
    )


def test_what_is_written_is_read(tmp_path):
    written = make(12)
    path = write_checkpoint(tmp_path, written, keep=2)
    read = read_checkpoint(path)
    assert read.step == 12
    assert read.state == written.state
    for name, tensor in load_file(path).items():  # the library's own reader
        assert torch.equal(tensor, written.tensors[name])
        assert torch.equal(read.tensors[name], tensor)


def test_the_last_ones_are_kept(tmp_path):
    for step in (5, 10, 100, 99):
        write_checkpoint(tmp_path, make(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000099.safetensors",
        "step-00000100.safetensors",
    ]
    assert latest_checkpoint(tmp_path)[0].step == 100


def test_none_yet(tmp_path):
    assert latest_checkpoint(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "flipped", "header"])
def test_a_damaged_one_is_said_and_the_one_before_is_used(tmp_path, damage):
    write_checkpoint(tmp_path, make(1), keep=2)
    path = write_checkpoint(tmp_path, make(2), keep=2)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-7],
            "empty": b"",
            "other": b"not a checkpoint at all",
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "header": content.replace(b"nested", b"rested"),
        }[damage]
    )
    found, notes = latest_checkpoint(tmp_path)
    assert found.step == 1
    assert len(notes) == 1
    assert f"{path} is damaged" in notes[0]
    list_checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.raises(TrainingError, match=r"No checkpoint in .* can be read"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", [1, 99])
def test_another_layout_is_refused(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LAYOUT", layout)
    path = write_checkpoint(tmp_path, make(1), keep=2)
    monkeypatch.undo()
    with pytest.raises(TrainingError, match=f"has layout {layout}; this version reads 2"):
        read_checkpoint(path)


def test_a_write_that_the_system_cuts_short_leaves_what_was_there(tmp_path):
    """A limit on the size of files, in a process of its own, for it cannot be lifted again."""
    process = child.context().Process(target=child.write_too_much, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert latest_checkpoint(tmp_path)[0].step == 1


@pytest.mark.parametrize("where", ["save", "flush", "rename"])
def test_enospc_is_a_clear_error(tmp_path, monkeypatch, where):
    write_checkpoint(tmp_path, make(1), keep=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "save":
        from safetensors import SafetensorError

        def refuse(*_):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

        monkeypatch.setattr(checkpoints, "save_file", refuse)
    elif where == "flush":
        monkeypatch.setattr(files, "flush", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrainingError, match="is full; nothing that was complete is lost"):
        write_checkpoint(tmp_path, make(2), keep=2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


# --- random states -------------------------------------------------------------------------------


def draw():
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
    )


def test_random_states_go_through_a_checkpoint(tmp_path):
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    np.random.standard_normal()
    path = write_checkpoint(tmp_path, Checkpoint(1, random_tensors()), keep=2)
    expected = draw()
    draw()
    set_random_tensors(read_checkpoint(path).tensors)
    assert draw() == expected


def test_seeded_leaves_no_trace():
    before = random_tensors()
    with seeded(3):
        first = draw()
    with seeded(3):
        assert draw() == first
    with seeded(4):
        assert draw() != first
    after = random_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- the run folder ------------------------------------------------------------------------------


def test_a_folder_is_made_in_one_stroke(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "runs" / "a")
    train = {"lr": 1e-3, "betas": [0.9, 0.99]}
    folder.create({**SECTIONS, "train": train, "text": "größer"}, None, ["why"])
    assert folder.read_settings() == {**SECTIONS, "train": train, "text": "größer"}
    assert folder.metrics.read_text() == '{"kind": "note", "text": "why"}\n'
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "run.yaml"]
    assert sorted(path.name for path in folder.path.parent.iterdir()) == ["a"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(TrainingError, match="is full"):
        RunFolder(tmp_path / "b").create({}, None, [])
    assert not (tmp_path / "b").exists()


def test_a_place_that_is_taken_is_refused_untouched(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create(SECTIONS, None, [])
    with pytest.raises(InputError, match=r"holds a run already.*--resume"):
        folder.create({"y": {}}, None, [])
    assert folder.read_settings() == SECTIONS
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        RunFolder(tmp_path / "other").check_new()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "other" / "thesis.txt").check_new()
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").create({"z": {}}, None, [])


@pytest.mark.parametrize("there", [False, True])
def test_of_two_runs_at_once_one_gets_the_place(tmp_path, monkeypatch, there):
    """The second one comes between the first one's look and its rename."""
    first, second = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "a")
    if there:
        first.path.mkdir()
    original = folders._as_yaml

    def race(settings):
        if settings == {"x": "first"}:
            second.create({"x": "second"}, None, [])
        return original(settings)

    monkeypatch.setattr(folders, "_as_yaml", race)
    if there:  # the first one has claimed it
        with pytest.raises(InputError, match="is not empty"):
            first.create({"x": "first"}, None, [])
        assert not any(first.path.iterdir())
    else:
        with pytest.raises(InputError, match="holds a run already"):
            first.create({"x": "first"}, None, [])
        assert b"second" in second.settings.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_empty_folder_stays_the_one_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    number = tmp_path.stat().st_ino
    run = RunFolder(Path("."))
    run.create(SECTIONS, None, ["why"])
    assert tmp_path.stat().st_ino == number
    assert sorted(os.listdir(".")) == ["metrics.jsonl", "run.yaml"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder(Path("~/b")).path == tmp_path.resolve() / "b"


@pytest.mark.parametrize("place", ["/proc/lorakit", "x" * 300, f"a/{'x' * 300}/b"])
def test_impossible_places_are_said(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot be (written|made)"):
        RunFolder(Path(place)).create(SECTIONS, None, [])


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG])
def test_a_place_at_fault_is_the_input(number):
    with pytest.raises(InputError, match="x cannot be written"), files.clear_disk_errors(Path("x")):
        raise OSError(number, os.strerror(number))


def test_a_limit_on_the_size_of_files_is_said():
    with pytest.raises(TrainingError, match="ulimit -f"), files.clear_disk_errors(Path("x")):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "has no run.yaml"),
        (lambda path: (path.mkdir(), (path / "run.yaml").write_text("a: [")), "cannot be read"),
        (lambda path: (path.mkdir(), (path / "run.yaml").write_text("text")), "no mapping"),
        (lambda path: (path.mkdir(), (path / "run.yaml").write_text("{}")), "train is missing"),
        (lambda path: (path.mkdir(), (path / "run.yaml").write_text("lora: 3")), "lora is 3; it"),
        (lambda path: (path.mkdir(), (path / "run.yaml").write_bytes(b"\xff")), "cannot be read"),
    ],
)
def test_no_run_to_resume(tmp_path, prepare, message):
    prepare(tmp_path / "a")
    with pytest.raises(InputError, match=message):
        RunFolder(tmp_path / "a").read_settings()


def test_metrics_are_cut_where_the_checkpoint_was(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create(SECTIONS, None, ["one", "two"])
    metrics = folder.open_metrics(None)
    metrics.append({"kind": "step", "loss": 1.5})
    length = metrics.length
    metrics.append({"kind": "eval", "loss": float("nan")})
    metrics.close()
    lines = folder.metrics.read_text().splitlines()
    assert lines[2:] == ['{"kind": "step", "loss": 1.5}', '{"kind": "eval", "loss": null}']
    with open(folder.metrics, "ab") as file:
        file.write(b'{"kind": "st')  # killed in the middle of a row
    folder.open_metrics(length).close()
    assert folder.metrics.read_text().splitlines() == lines[:3]
    folder.open_metrics(10**6).close()  # never longer than it is
    assert folder.metrics.read_text().splitlines() == lines[:3]
    folder.open_metrics(None).close()
    assert folder.metrics.read_text().splitlines() == lines[:2]


def test_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create(SECTIONS, None, [])
    with (
        folder.locked(),
        pytest.raises(InputError, match="another process is running"),
        RunFolder(folder.path).locked(),
    ):
        raise AssertionError
    with folder.locked():
        pass


def test_what_a_kill_left_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.create(SECTIONS, None, [])
    folder.checkpoints.mkdir()
    (folder.checkpoints / ".step-00000001.safetensors.abc.tmp").write_bytes(b"half")
    (folder.path / ".adapter.abc.tmp").mkdir()
    (folder.path / ".adapter.abc.tmp" / "x").write_bytes(b"half")
    folder.clean()
    assert not list(folder.checkpoints.iterdir())
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "run.yaml",
    ]
