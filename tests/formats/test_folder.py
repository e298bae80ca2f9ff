"""The folder on the disk: whole at every moment, and other people's files stay."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, InputError, TrainingError
from lorakit.formats import folder as folder_module
from lorakit.formats import load_adapter, registry, save_adapter

from .adapters import assert_equal
from .small import contents, small_adapter


def version(number: int):
    """An adapter that says its number in every place, and has it as its rank."""
    rank = number % 5 + 1
    site = LowRank(torch.full((rank, 3), float(number)), torch.ones(2, rank), float(number + 1))
    return small_adapter(
        sites={"a.q": site},
        provenance={"number": number},
        tokenizer_files={"vocab.txt": str(number).encode()},
    )


def check_whole(adapter) -> int:
    """All places say the same number."""
    number = adapter.provenance["number"]
    assert_equal(adapter, version(number))
    return number


def test_saving_again_replaces(tmp_path):
    for number in (1, 2, 7):
        folder = save_adapter(version(number), tmp_path / "a")
        assert check_whole(load_adapter(folder)) == number
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_run_folder_is_read_as_its_adapter(tmp_path, caplog):
    folder = save_adapter(version(1), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "settings.json").write_text("{}")
    with caplog.at_level("INFO", "lorakit"):
        assert check_whole(load_adapter(tmp_path / "run")) == 1
    assert f"its adapter is {folder}" in caplog.text
    assert registry.read(str(tmp_path / "run")).adapter.provenance["number"] == 1
    # what is an adapter itself is not looked into
    save_adapter(version(2), tmp_path / "run")
    assert check_whole(load_adapter(tmp_path / "run")) == 2


def test_only_the_changed_file_is_written(tmp_path):
    folder = save_adapter(version(1), tmp_path / "a")
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    save_adapter(version(1), folder)
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"adapter_model.safetensors"}


def test_a_tokenizer_that_is_gone_is_gone(tmp_path):
    folder = save_adapter(version(1), tmp_path / "a")
    save_adapter(version(1).with_(tokenizer_files={}), folder)
    assert not (folder / "vocab.txt").exists()
    assert load_adapter(folder).tokenizer_files == {}


def test_other_files_stay(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "mine.txt").write_text("mine")
    (tmp_path / "a" / "sub" / "x").write_text("x")
    for number in (1, 2):
        folder = save_adapter(version(number), tmp_path / "a")
        assert check_whole(load_adapter(folder)) == number
    (folder / "adapter_model.bin").write_bytes(b"older weights")
    save_adapter(version(3).with_(tokenizer_files={}), folder)
    assert sorted(contents(folder)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mine.txt", "sub/x",
    ]  # fmt: skip


def test_a_card_written_by_hand_stays(tmp_path):
    folder = save_adapter(version(1), tmp_path / "a")
    assert folder_module.CARD_MARK in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# My adapter\n")
    for _ in range(2):
        save_adapter(version(2), folder)
        assert (folder / "README.md").read_text() == "# My adapter\n"
    assert check_whole(load_adapter(folder)) == 2


@pytest.fixture
def shared(tmp_path) -> Path:
    """A folder with an adapter, the first version, and a file of somebody else."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    return save_adapter(version(1), tmp_path / "a")


def test_the_config_is_never_beside_other_weights(shared, monkeypatch):
    """A folder with foreign files is renamed piece by piece; in between it is no adapter."""
    renamed = []
    replace = os.replace

    def watched(source, target):
        replace(source, target)
        renamed.append(Path(target).name)
        if renamed[-1] != "adapter_config.json":
            with pytest.raises(FormatError):
                load_adapter(shared)

    monkeypatch.setattr(os, "replace", watched)
    save_adapter(version(2), shared)
    assert renamed[-1] == "adapter_config.json"
    assert check_whole(load_adapter(shared)) == 2


def test_new_weights_alone_are_one_rename(shared, monkeypatch):
    """As a run saves them: the config stays, and the adapter is whole at every moment."""
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append(load_adapter(shared).provenance["number"])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save_adapter(version(1).with_(provenance={"number": 2}), shared)
    assert seen == [1]
    assert load_adapter(shared).provenance["number"] == 2


@pytest.mark.parametrize("name", ["adapter_config.json", "vocab.txt", "adapter_model.safetensors"])
def test_a_disk_that_fills_leaves_the_old_adapter(shared, name, monkeypatch):
    before = contents(shared)
    write = folder_module._write

    def full(path, content):
        if name in path.name:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(folder_module, "_write", full)
    with pytest.raises(TrainingError, match="is full"):
        save_adapter(version(2), shared)
    assert contents(shared) == before
    assert check_whole(load_adapter(shared)) == 1


def test_readers_always_see_a_whole_adapter(tmp_path):
    folder = save_adapter(version(0), tmp_path / "a")
    stop, seen, failures = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(check_whole(load_adapter(folder)))
            except BaseException as error:
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    number = 0
    while number < 40 or (len(seen) < 2 and not failures and number < 4000):
        number += 1
        save_adapter(version(number), folder)
    stop.set()
    reader.join()
    assert failures == []
    assert len(seen) > 1


WRITE = """
import sys
from pathlib import Path
from tests.formats.test_folder import version
from lorakit.formats import save_adapter
print("ready", flush=True)
number = 0
while True:
    number += 1
    save_adapter(version(number), Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_adapter(tmp_path):
    for attempt in range(8):
        path = tmp_path / "a"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        threading.Event().wait(0.05 + 0.037 * attempt)
        writer.kill()
        writer.wait()
        writer.stdout.close()
        if path.exists():
            check_whole(load_adapter(path))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(version(1), tmp_path / "a")


def test_a_file_as_parent(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(version(1), tmp_path / "file" / "a")
