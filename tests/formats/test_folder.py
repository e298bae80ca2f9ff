"""The folder on the disk: whole at every moment, and other people's files stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, InputError
from lorakit.formats import folder as folder_module
from lorakit.formats import load_adapter, save_adapter

from .adapters import assert_equal
from .small import contents, small_adapter


def version(number: int):
    """An adapter that says its number in every place, and has it as its rank."""
    rank = number % 5 + 1
    site = LowRank(torch.full((rank, 3), float(number)), torch.ones(2, rank), float(number))
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


def test_the_config_is_never_beside_other_weights(tmp_path, monkeypatch):
    """A folder with foreign files is written piece by piece; in between it is no adapter."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    folder = save_adapter(version(1), tmp_path / "a")
    written = []
    write = folder_module._write

    def watched(path, content):
        if path.name != "adapter_config.json":
            with pytest.raises(FormatError):
                load_adapter(folder)
        write(path, content)
        written.append(path.name)

    monkeypatch.setattr(folder_module, "_write", watched)
    save_adapter(version(2), folder)
    assert written[-1] == "adapter_config.json"
    assert check_whole(load_adapter(folder)) == 2


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
    for number in range(1, 40):
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
